"""The learning rate of every step."""

from __future__ import annotations

import math

from fastrepa.config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of update number `step`, 0-based: linear warm-up, then constant or half a cosine."""
    lr, s = training.optimizer.lr, training.schedule
    if step < s.warmup:
        return lr * (step + 1) / s.warmup
    if s.name == "constant":
        return lr
    done = min(1.0, (step - s.warmup) / max(1, training.steps - s.warmup))
    return lr * (s.final + (1 - s.final) * 0.5 * (1 + math.cos(math.pi * done)))
