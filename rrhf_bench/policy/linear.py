"""Linear layers on a CPU whose backward pass costs what the loss asks for.

A loss over candidates leaves many of them alone: RRHF's, for one, has no gradient for a response that is in as many
violated pairs above as below and is not the best. All of that response's positions then have none, in every layer, and
are left out of the products. What is added up over passes is added in place.

Letters: M rows (positions), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy.gradients import gradient_to_add_to

Product = Callable[[Tensor, Tensor], Tensor]  # (M, K) @ (K, N)
ENOUGH = 64  # rows for which it pays to look
WORTH = 0.8  # share of the rows: to leave out fewer costs more in copies than it saves


class Linear(torch.nn.Linear):
    """A linear layer of a model that ``take_over`` was called with. ``product`` multiplies in float32; half precision
    goes to PyTorch's own product in any case."""

    product: Product

    def forward(self, input: Tensor) -> Tensor:
        product = self.product if input.dtype == torch.float32 else torch.mm
        if input.is_cuda or not input.numel() or (product is torch.mm and not torch.is_grad_enabled()):
            return super().forward(input)
        out_MN = _Linear.apply(input.reshape(-1, input.shape[-1]), self.weight, self.bias, product)
        return cast(Tensor, out_MN).view(*input.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        ctx.product = product
        if product is torch.mm:
            return torch.nn.functional.linear(x_MK, weight_NK, bias_N)
        out_MN = product(x_MK, weight_NK.t())
        return out_MN if bias_N is None else out_MN.add_(bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_MN, product = grads[0].contiguous(), ctx.product
        live = with_gradient(grad_MN)
        if live is not None:
            grad_MN, x_MK = grad_MN.index_select(0, live), x_MK.index_select(0, live) if want_weight else x_MK
        d_x = among_zeros(product(grad_MN, weight_NK), live, len(grads[0])) if want_x else None
        node = ctx.next_functions[1][0]
        d_weight = weight_gradient(weight_NK, node, grad_MN, x_MK, product) if want_weight else None
        return d_x, d_weight, grad_MN.sum(0) if want_bias else None, None


def weight_gradient(weight_NK: Any, node: Any, grad_MN: Tensor, x_MK: Tensor, product: Product) -> Tensor | None:
    """grad.t() @ x; None if it has been added to the gradient that the weight has. ``node`` is the one behind it."""
    total_NK = gradient_to_add_to(weight_NK, node)
    if total_NK is None:
        return product(grad_MN.t(), x_MK)
    add_product_(total_NK, grad_MN.t(), x_MK, product)
    return None


def add_product_(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor, product: Product) -> None:
    """total += a @ b."""
    if product is torch.mm:
        total_MN.addmm_(a_MK, b_KN)
    else:
        total_MN += product(a_MK, b_KN)


def with_gradient(grad_MN: Tensor) -> Tensor | None:
    """Indices of the rows that are not zero throughout; None where these are most, or nobody looked."""
    if len(grad_MN) < ENOUGH:
        return None
    if grad_MN[:, 0].count_nonzero() > WORTH * len(grad_MN):  # not all of a row, but nearly always enough to know
        return None
    live = torch.logical_or(grad_MN.amax(-1), grad_MN.amin(-1)).nonzero().squeeze(-1)
    return live if len(live) <= WORTH * len(grad_MN) else None


def among_zeros(part_MN: Tensor, live: Tensor | None, rows: int) -> Tensor:
    """The rows that ``with_gradient`` named, among as many of zeros as there were."""
    return part_MN if live is None else part_MN.new_zeros(rows, part_MN.shape[1]).index_copy_(0, live, part_MN)


def take_over(model: torch.nn.Module, product: Product = torch.mm) -> int:
    """Make every linear layer of a model one of these, in place; how many there are."""
    layers = [module for module in model.modules() if type(module) in (torch.nn.Linear, Linear)]
    for layer in layers:
        layer.__class__ = Linear
        cast(Linear, layer).product = product
    return len(layers)
