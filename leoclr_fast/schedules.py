"""Schedules: step -> value."""

from __future__ import annotations

import math

from leoclr_fast.config import LearningRateSchedule


def learning_rate(schedule: LearningRateSchedule, lr: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate at `step` (counted from 0 over the whole run).

    `cosine_per_epoch` is MoCo-v2's: 0.5 * lr * (1 + cos(pi * epoch / epochs)), constant within an epoch.
    """
    if schedule == "constant":
        return lr
    total = epochs * steps_per_epoch
    done = step // steps_per_epoch / epochs if schedule == "cosine_per_epoch" else step / total
    return 0.5 * lr * (1 + math.cos(math.pi * done))
