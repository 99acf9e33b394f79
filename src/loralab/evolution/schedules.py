"""Multipliers that change over a run."""

from __future__ import annotations

from math import cos, pi

from loralab.config import ScaleConfig, ScheduleConfig


def multiplier(schedule: ScheduleConfig, generation: int, generations: int) -> float:
    """1 at generation 0, `schedule.final` at the last one, and between them by name.

    constant stays at 1; linear is a straight line; cosine is half a period of one.
    """
    if schedule.name == "constant" or generations <= 1:
        return 1.0
    done = min(max(generation, 0) / (generations - 1), 1.0)
    share = 1.0 - done if schedule.name == "linear" else (1.0 + cos(pi * done)) / 2
    return schedule.final + (1.0 - schedule.final) * share


def start_factor(scale: ScaleConfig, generation: int) -> float:
    """`init_scale` for generation 0, `perturb_scale` for every later one."""
    return scale.init_scale if generation == 0 else scale.perturb_scale
