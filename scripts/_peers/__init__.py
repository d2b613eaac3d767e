"""The calls of `scripts/peers.py`, and how they are run and told."""
