"""The learning-rate schedule of every training loop: policies, reward models, and models trained from scratch."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def lr_factor(step: int, total: int, *, warmup: int, schedule: Schedule) -> float:
    """Return what the learning rate is multiplied by at a step (0-based) of ``total``.

    The factor rises linearly over ``warmup`` steps and then falls to 0 as the schedule says. The first step of the
    warm-up has 1 / warmup of the rate and not 0, because a step at rate 0 would be thrown away.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "linear":  # 1 at the first step after the warm-up, 1 / (total - warmup) at the last
        return (total - step) / (total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
