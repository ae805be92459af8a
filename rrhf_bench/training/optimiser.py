"""AdamW and its learning-rate schedule, as every method that changes weights uses them.

Weights of half precision are trained through float32 copies: a step of 1e-5 of a weight is less than bfloat16 resolves,
and would be rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rrhf_bench.schedule import lr_factor
from rrhf_bench.settings.methods import OptimiserSettings


class AdamW:
    """AdamW over the parameters that train, in float32 or better whatever precision they are in.

    Gradients are added up in float32 too. ``step`` divides by ``weight`` what has been accumulated, clips its global
    norm, and leaves no gradients behind.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: OptimiserSettings) -> None:
        self.settings = settings
        self._trained = [p for p in parameters if p.requires_grad]
        self._master = [_master(p) for p in self._trained]
        self._hooks = [
            p.register_post_accumulate_grad_hook(_adds_to(master))
            for p, master in zip(self._trained, self._master, strict=True)
            if master is not p
        ]
        on_gpu = all(p.is_cuda for p in self._master)
        self._adamw = torch.optim.AdamW(
            self._master,
            # One kernel without temporaries. CUDA's default holds square roots as large as all weights beside them.
            fused=True if on_gpu else None,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that train, in their own precision."""
        return list(self._trained)

    @torch.no_grad()
    def clip(self, weight: float = 1.0) -> float:
        """Divide the gradients by ``weight`` and bring their norm down to grad_clip; the norm before that, which is not
        finite where a gradient is not."""
        if weight != 1.0:
            torch._foreach_div_([p.grad for p in self._master if p.grad is not None], weight)
        return torch.nn.utils.clip_grad_norm_(self._master, self.settings.grad_clip).item()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.forget_gradients()
        for p, master in zip(self._trained, self._master, strict=True):
            if master is not p:
                p.copy_(master)

    @torch.no_grad()
    def has_finite_weights(self) -> bool:
        """Return True if every trained weight is finite in the model's own precision, in which float16 may overflow."""
        # The largest absolute value of each tensor: unlike a sum or a 2-norm, it cannot overflow by itself.
        largest = torch._foreach_norm([p for p in self._trained if p.numel()], math.inf)
        return bool(torch.stack([value.float() for value in largest]).isfinite().all())

    def forget_gradients(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """All that a later step depends on: the weights, in full precision, and the moments of their gradients."""
        return {"weights": [master.detach() for master in self._master], "adamw": self._adamw.state_dict()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Put them back, into the parameters too."""
        self._adamw.load_state_dict(state["adamw"])
        for p, master, kept in zip(self._trained, self._master, state["weights"], strict=True):
            master.copy_(kept)
            if master is not p:
                p.copy_(master)

    def close(self) -> None:
        """Take the hooks off the parameters, which may live on."""
        for hook in self._hooks:
            hook.remove()
        self.forget_gradients()


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return torch.nn.Parameter(parameter.detach().float())


def _adds_to(master: torch.nn.Parameter) -> Any:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        grad, parameter.grad = parameter.grad, None
        if master.grad is None:
            master.grad = grad.float()
        else:
            master.grad += grad

    return hook


def learning_rate(step: int, total: int, settings: OptimiserSettings) -> float:
    """Return the learning rate at a step (0-based) of ``total``."""
    warmup = math.ceil(settings.warmup * total)
    return settings.lr * lr_factor(step, total, warmup=warmup, schedule=settings.schedule)
