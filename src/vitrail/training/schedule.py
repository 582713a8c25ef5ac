"""The learning rate as a pure function of the step, and a run's length in steps."""

from __future__ import annotations

import math

from vitrail.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, total: int, warmup: int) -> float:
    """The learning rate of optimiser step `step` (from 0) as a fraction of its peak, in a run of `total` steps.

    Linear warm-up reaches 1 at step `warmup`; then cosine or linear decay towards `min_lr` (reached after the last step), or
    multiplication by `step_factor` at each milestone (fractions of the whole run), or nothing.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        passed = sum(step >= milestone * total for milestone in config.milestones)
        return max(config.step_factor**passed, config.min_lr)
    done = (step - warmup) / max(total - warmup, 1)
    falling = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (1 - config.min_lr) * falling


def total_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the run before any time budget: `steps`, or `epochs` of the data."""
    return config.steps or max(round(config.epochs * steps_per_epoch), 1)


def warmup_steps(config: ScheduleConfig, steps_per_epoch: int, total: int) -> int:
    """Optimiser steps of linear warm-up: `warmup_steps`, or `warmup_epochs`, and never more than a third of the run."""
    return min(config.warmup_steps or round(config.warmup_epochs * steps_per_epoch), total // 3)
