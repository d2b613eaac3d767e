"""The parts of scripts/finetune.py."""
