"""Norms and gated layers of a model on a CPU that keep less for the backward pass.

PyTorch keeps what every single operation needs. Of an RMS norm, its input and a factor a row are enough; of a gated
layer, its input and what its two first products gave. The rest is computed again from them, which costs less on a CPU
than the memory it would lie in.

Letters: M rows (positions), D hidden size, F inner size of a gated layer.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from rrhf_bench.policy.linear import Linear, Product, add_product_, among_zeros, weight_gradient, with_gradient

# How far outputs of one kind may be apart, of the largest: some units in the last place.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


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
            along_M1 = (work_MD @ weight_D)[..., None]
            d_x = torch.mul(grads[0], weight_D, out=work_MD)
            d_x = d_x.addcmul_(quotient_MD, along_M1, value=-1 / x_MD.shape[-1]).mul_(factor_M1).to(x_MD.dtype)
        return d_x, d_weight, None


class GatedMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x)) (2002.05202), the feed-forward layer of Llama, Mistral and Qwen."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if not torch.is_grad_enabled() or not all(type(layer) is Linear and layer.bias is None for layer in layers):
            return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
        product = self.gate_proj.product if x.dtype == torch.float32 else torch.mm
        out_MD = _GatedMLP.apply(x.reshape(-1, x.shape[-1]), *(layer.weight for layer in layers), product)
        return cast(Tensor, out_MD).view(x.shape)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, product: Product) -> Tensor:
        gate_MF, up_MF = product(x_MD, gate_FD.t()), product(x_MD, up_FD.t())
        ctx.save_for_backward(x_MD, gate_FD, up_FD, down_DF, gate_MF, up_MF)
        ctx.product = product
        return product(silu(gate_MF).mul_(up_MF), down_DF.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_FD, up_FD, down_DF, gate_MF, up_MF = ctx.saved_tensors
        want_x, *want = ctx.needs_input_grad[:4]
        product, grad_MD = ctx.product, grads[0].contiguous()
        live = with_gradient(grad_MD)
        if live is not None:
            grad_MD, x_MD, gate_MF, up_MF = (x.index_select(0, live) for x in (grad_MD, x_MD, gate_MF, up_MF))
        d_inner_MF, inner_MF = product(grad_MD, down_DF), silu(gate_MF)
        d_gate_MF = d_inner_MF * up_MF
        d_gate_MF = torch.ops.aten.silu_backward.grad_input(d_gate_MF, gate_MF, grad_input=d_gate_MF)
        d_up_MF = d_inner_MF.mul_(inner_MF)
        inner_MF = inner_MF.mul_(up_MF)
        products = (gate_FD, d_gate_MF, x_MD), (up_FD, d_up_MF, x_MD), (down_DF, grad_MD, inner_MF)
        d_weights = (
            weight_gradient(weight, node, grad, x, product) if wanted else None
            for wanted, (weight, grad, x), (node, _) in zip(want, products, ctx.next_functions[1:4], strict=True)
        )
        d_x: Tensor | None = None
        if want_x:
            d_x = product(d_gate_MF, gate_FD)
            add_product_(d_x, d_up_MF, up_FD, product)
            d_x = among_zeros(d_x, live, len(grads[0]))
        return d_x, *d_weights, None


@cache
def before(first: Any, kind: Any) -> Any:
    """A class named like ``kind``, a model's own, with ``first`` before it."""
    return type(kind.__name__, (first, kind), {})


def take_over(model: torch.nn.Module) -> int:
    """Make the norms and gated layers of a model these, in place, where they compute the same; how many there are."""
    taken = 0
    for module in model.modules():
        was, own = type(module), _own_kind(module)
        if own is None:
            continue
        weight = next(module.parameters())
        x_MD = torch.linspace(-2.0, 2.0, 3 * weight.shape[-1], dtype=weight.dtype).view(3, -1)
        with torch.enable_grad():  # as in training, which is what these are for
            expected = module(x_MD).detach()
            module.__class__ = own
            if (module(x_MD).detach() - expected).abs().max() <= ROUNDING[weight.dtype] * expected.abs().max():
                taken += 1
            else:
                module.__class__ = was
    return taken


def _own_kind(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class here that a module looks like, by its parts."""
    if type(module) in (RMSNorm, GatedMLP) or len(signature(type(module).forward).parameters) != 2:
        return None
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return RMSNorm
    gated = {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return GatedMLP if gated and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation") else None
