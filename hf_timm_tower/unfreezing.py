"""The documented place of `UnfreezeSchedule`; it is written in `training/unfreeze_schedule.py`."""

from .training.unfreeze_schedule import UnfreezeSchedule, parse_schedule

__all__ = ["UnfreezeSchedule", "parse_schedule"]
