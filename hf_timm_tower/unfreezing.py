"""The documented place of `UnfreezeSchedule`; it is written in `training/unfreeze_schedule.py`."""

from .training.unfreeze_schedule import Stage, UnfreezeSchedule, parse_schedule

__all__ = ["Stage", "UnfreezeSchedule", "parse_schedule"]
