"""Learning rate as a function of the step."""

import math
from typing import Literal

from optimizer.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, max_iters: int) -> float:
    """Learning rate of the step that follows `step` completed ones."""
    return learning_rate_at(
        step, max_iters, config.learning_rate, config.lr_schedule if config.decay_lr else "constant",
        config.warmup_ratio, config.min_lr_ratio, config.wsd_decay_ratio,
    )  # fmt: skip


def learning_rate_at(
    step: int,
    max_iters: int,
    peak: float,
    schedule: Literal["cosine", "wsd", "constant"] = "cosine",
    warmup_ratio: float = 0.01,
    min_ratio: float = 0.1,
    decay_ratio: float = 0.2,
) -> float:
    """Learning rate of step `step` (the first is 0) of `max_iters`.

    All schedules rise linearly to `peak` over the first warmup_ratio of the steps. After that,
    cosine    falls along half a cosine to min_ratio * peak at 0.9 * max_iters and stays there (llm-zero2all)
    wsd       stays at peak, and falls linearly to min_ratio * peak over the last decay_ratio of the steps
              (warmup-stable-decay, Hu et al., MiniCPM, 2024)
    constant  stays at peak
    """
    warmup = int(warmup_ratio * max_iters)
    if step < warmup:
        return peak * (step + 1) / warmup
    lowest = min_ratio * peak
    if schedule == "cosine":
        end = max(int(0.9 * max_iters), warmup + 1)
        progress = min(1.0, (step - warmup) / (end - warmup))
        return lowest + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - lowest)
    if schedule == "wsd":
        start = max(int((1.0 - decay_ratio) * max_iters), warmup)
        progress = max(0.0, (step - start) / max(1, max_iters - start))
        return peak - min(1.0, progress) * (peak - lowest)
    return peak
