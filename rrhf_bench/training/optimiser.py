"""AdamW and its learning-rate schedule, as every method that changes weights uses them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from rrhf_bench.settings import OptimiserSettings


def adamw(parameters: Iterable[torch.nn.Parameter], settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that train."""
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def lr_factor(step: int, total: int, settings: OptimiserSettings) -> float:
    """What the learning rate is multiplied by at a step (0-based) of ``total``: linear warm-up, then the schedule.

    The first step of a warm-up of w steps has 1/w of the rate, not 0: a step at rate 0 would be thrown away.
    """
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    left = (total - step) / (total - warmup)  # 1 at the first step after the warm-up, 1/(total - warmup) at the last
    return left if settings.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr
