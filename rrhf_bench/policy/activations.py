"""Norms and gates of a model on a CPU that keep less for the backward pass.

PyTorch keeps what every single operation needs. Of an RMS norm, input and one factor a row are enough; of a gated layer
its two inputs: the rest is computed again from them, which costs less here than the memory it would lie in.

Letters: M rows (positions), D hidden size, F inner size of a gated layer.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

SLACK = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # norms are in float32


class RMSNorm(torch.nn.Module):
    """weight x / sqrt(mean(x^2) + eps), the quotient in float32 (1910.07467); the norm of Llama, Mistral and Qwen."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_MD = x_MD.float()
        work_MD = wide_MD * wide_MD
        factor_M1 = work_MD.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_MD, weight_D, factor_M1)
        quotient_MD = torch.mul(wide_MD, factor_M1, out=work_MD).to(x_MD.dtype)
        return quotient_MD.mul_(weight_D) if quotient_MD.dtype == weight_D.dtype else weight_D * quotient_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weight_D, factor_M1 = ctx.saved_tensors
        quotient_MD = x_MD.float() * factor_M1
        d_x = d_weight = None
        work_MD = grads[0].float() * quotient_MD
        if ctx.needs_input_grad[1]:
            d_weight = work_MD.flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            weight_D = weight_D.float()
            along_M1 = (work_MD @ weight_D).div_(x_MD.shape[-1]).neg_()[..., None]
            d_x = torch.mul(grads[0], weight_D, out=work_MD).addcmul_(quotient_MD, along_M1).mul_(factor_M1)
            d_x = d_x.to(x_MD.dtype)
        return d_x, d_weight, None


class GatedMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x)) (2002.05202), the feed-forward layer of Llama, Mistral and Qwen."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x))))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_MF, up_MF)
        return torch.nn.functional.silu(gate_MF).mul_(up_MF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_MF, up_MF = ctx.saved_tensors
        d_up = torch.nn.functional.silu(gate_MF).mul_(grads[0])
        d_gate = grads[0] * up_MF
        return torch.ops.aten.silu_backward.grad_input(d_gate, gate_MF, grad_input=d_gate), d_up


@torch.no_grad()
def take_over(model: torch.nn.Module) -> int:
    """Make the norms and gated layers of a model these, in place, where they compute the same; how many there are."""
    taken = 0
    for module in list(model.modules()):
        own = _own_kind(module)
        if own is None:
            continue
        weight = next(module.parameters())
        x_MD = torch.linspace(-2.0, 2.0, 3 * weight.shape[-1], dtype=weight.dtype).view(3, -1)
        was, expected = module.__class__, module(x_MD)
        module.__class__ = own
        if (module(x_MD) - expected).abs().max() <= SLACK[weight.dtype] * expected.abs().max():
            taken += 1
        else:
            module.__class__ = was
    return taken


def _own_kind(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class here that a module looks like, by its parts."""
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return RMSNorm
    parts = {name for name, _ in module.named_children()}
    gated = parts == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return GatedMLP if gated and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation") else None
