"""Schedules: step -> value."""

from __future__ import annotations

import math

from leoclr_fast.config import LearningRateSchedule


def learning_rate(schedule: LearningRateSchedule, lr: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate at `step` (counted from 0 over the whole run).

    `cosine_per_epoch` is MoCo-v2's: 0.5 * lr * (1 + cos(pi * epoch / epochs)), constant within an epoch, which is
    counted from 0, and by `cosine_per_epoch_from_1` from 1.
    """
    if schedule == "constant":
        return lr
    total = epochs * steps_per_epoch
    epoch = step // steps_per_epoch + (schedule == "cosine_per_epoch_from_1")
    done = step / total if schedule == "cosine_per_step" else epoch / epochs
    return 0.5 * lr * (1 + math.cos(math.pi * done))
