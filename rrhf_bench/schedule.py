"""The learning-rate schedule of every training loop, and batches of like length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

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


def batch_order(lengths: Sequence[int], batch_size: int, rng: np.random.Generator, bucket: int = 16) -> list[list[int]]:
    """Return every index once, in batches of like length and in random order; the last one may be smaller.

    Rows are sorted by length within ``bucket`` batches: padding shrinks, and the order stays random at large.
    """
    order = rng.permutation(len(lengths)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * bucket):
        near = sorted(order[start : start + batch_size * bucket], key=lambda i: lengths[i])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
