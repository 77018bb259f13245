"""The learning rate of every step."""

from __future__ import annotations

import math

from fastrepa.config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of update number `step`, 0-based: linear warm-up, then constant or half a cosine,
    counted from `schedule.start`.
    """
    lr, s = training.optimizer.lr, training.schedule
    # A run whose checkpoint is older than the start waits for it at the first rate.
    step, steps = max(0, step - s.start), training.steps - s.start
    if step < s.warmup:
        return lr * (step + 1) / s.warmup
    if s.name == "constant":
        return lr
    done = min(1.0, (step - s.warmup) / max(1, steps - s.warmup))
    return lr * (s.final + (1 - s.final) * 0.5 * (1 + math.cos(math.pi * done)))
