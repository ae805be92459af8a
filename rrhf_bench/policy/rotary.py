"""The attention layer of Llama, Mistral, Qwen 2 and Gemma over a pack on a CPU, as one function: projections, rotation
(2104.09864), attention, projection. What has no gradient is looked for once, and what the projections' input gets from
three of them is added up in place.

Letters: L tokens of a pack, D hidden size, H heads, E size of a head, N outputs of a projection.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy.activations import ROUNDING, before
from rrhf_bench.policy.attention import attend, attend_backward, by_head
from rrhf_bench.policy.batching import Prefixes
from rrhf_bench.policy.linear import Linear, Product, add_product_, among_zeros, weight_gradient, with_gradient

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RotaryAttention(torch.nn.Module):
    """Put before a model's own class of attention, which does what is not a pass over a pack, what has adapters, and
    heads that turn in part."""

    head_dim: int
    scaling: float

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, *others: Any, **named: Any) -> Any:
        layers = [getattr(self, name) for name in PROJECTIONS]
        prefixes, x_1LD = named.get("prefixes"), hidden_states
        plain = all(type(layer) is Linear for layer in layers)
        # Heads that turn in part only have narrower angles.
        if prefixes is None or not plain or position_embeddings[0].shape[-1] != self.head_dim:
            return super().forward(x_1LD, position_embeddings, *others, **named)
        if "layers_seen" in named:
            named["layers_seen"].append(self)
        product = layers[0].product if x_1LD.dtype == torch.float32 else torch.mm
        # Weights before biases: autograd leaves out what is None where it says which node is behind which input.
        weights, biases = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
        how = prefixes, self.head_dim, self.scaling, product
        y_LD = cast(Tensor, _RotaryAttention.apply(x_1LD[0], *weights, *biases, *position_embeddings, *how))
        return y_LD[None], None


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LD: Tensor, *inputs: Any) -> Tensor:
        *parameters, cos_1LE, sin_1LE, prefixes, size, scale, product = inputs
        weights, biases = parameters[:4], parameters[4:]
        heads = [weight.shape[0] // size for weight in weights[:2]]
        qk_LHE = x_LD.new_empty(len(x_LD), sum(heads), size)
        places = qk_LHE.flatten(1).split([weight.shape[0] for weight in weights[:2]], 1)
        for place_LN, weight, bias in zip(places, weights, biases, strict=False):
            _affine(x_LD, weight, bias, product, place_LN)
        v_LHE = _affine(x_LD, weights[2], biases[2], product).unflatten(1, (-1, size))
        q, k, v = (by_head(part) for part in (*_rotated(qk_LHE, cos_1LE, sin_1LE).split(heads, 1), v_LHE))
        out_HLE, lse_HL = attend(q, k, v, prefixes, scale)
        ctx.save_for_backward(x_LD, *weights, cos_1LE, sin_1LE, q, k, v, out_HLE, lse_HL)
        ctx.prefixes, ctx.scale, ctx.product = prefixes, scale, product
        return _affine(_by_row(out_HLE), weights[3], biases[3], product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_LD, *weights, cos_1LE, sin_1LE, q, k, v, out_HLE, lse_HL = ctx.saved_tensors
        product, wanted = ctx.product, ctx.needs_input_grad
        nodes = [node for node, _ in ctx.next_functions[1:5]]
        d_weights: list[Tensor | None] = [None] * 4
        d_biases: list[Tensor | None] = [None] * 4

        grad_LD, out_LN = grads[0].contiguous(), _by_row(out_HLE)
        live = with_gradient(grad_LD)
        if live is not None:
            grad_LD, out_LN = grad_LD.index_select(0, live), out_LN.index_select(0, live)
        if wanted[4]:
            d_weights[3] = weight_gradient(weights[3], nodes[3], grad_LD, out_LN, product)
        if wanted[8]:
            d_biases[3] = grad_LD.sum(0)
        d_out_LN = among_zeros(product(grad_LD, weights[3]), live, len(x_LD))
        d_out_HLE = by_head(d_out_LN.unflatten(1, (-1, q.shape[-1])))
        of_pack = {"prefixes": ctx.prefixes, "scale": ctx.scale, "live": live}
        d_qkv_LHE = attend_backward(d_out_HLE, q, k, v, out_HLE, lse_HL, **of_pack)
        d_qk_LHE = d_qkv_LHE[:, : -v.shape[1]]
        d_qk_LHE.copy_(_rotated(d_qk_LHE, cos_1LE, sin_1LE, back=True))
        grad_LN = d_qkv_LHE.flatten(1)
        live = with_gradient(grad_LN)
        if live is not None:
            grad_LN, x_LD = grad_LN.index_select(0, live), x_LD.index_select(0, live)
        d_x: Tensor | None = None
        for i, grad in enumerate(grad_LN.split([weight.shape[0] for weight in weights[:3]], 1)):
            if wanted[1 + i]:
                d_weights[i] = weight_gradient(weights[i], nodes[i], grad, x_LD, product)
            if wanted[5 + i]:
                d_biases[i] = grad.sum(0)
            if wanted[0] and d_x is None:
                d_x = product(grad, weights[i])
            elif d_x is not None:
                add_product_(d_x, grad, weights[i], product)
        if d_x is not None:
            d_x = among_zeros(d_x, live, len(grads[0]))
        return d_x, *d_weights, *d_biases, *(None,) * 6


def _affine(
    x_LD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, product: Product, place_LN: Tensor | None = None
) -> Tensor:
    """x @ weight.t() + bias, in ``place_LN`` if there is one."""
    if product is not torch.mm:
        y_LN = product(x_LD, weight_ND.t())
        y_LN = y_LN if place_LN is None else place_LN.copy_(y_LN)
    else:
        y_LN = torch.mm(x_LD, weight_ND.t(), out=place_LN)
    return y_LN if bias_N is None else y_LN.add_(bias_N)


def _by_row(x_HLE: Tensor) -> Tensor:
    """(1, H, L, E) as (L, H E)."""
    return x_HLE[0].transpose(0, 1).flatten(1)


def _rotated(x_LHE: Tensor, cos_1LE: Tensor, sin_1LE: Tensor, *, back: bool = False) -> Tensor:
    """x cos + (-second half of x, first half of x) sin, with the roundings that this has in transformers; ``back``: its
    transpose."""
    half = x_LHE.shape[-1] // 2
    sign = 1 if back else -1
    beside_LHE = x_LHE * (sin_1LE if back else sin_1LE.roll(half, -1))[0, :, None]
    turned_LHE = x_LHE * cos_1LE[0, :, None]
    turned_LHE[..., :half].add_(beside_LHE[..., half:], alpha=sign)
    turned_LHE[..., half:].add_(beside_LHE[..., :half], alpha=-sign)
    return turned_LHE


def take_over(model: torch.nn.Module) -> int:
    """Put this before the attention of a model whose attention over packs is ``attention.attention``, in place, where
    it computes the same; how many there are."""
    taken = 0
    for module in model.modules():
        kind = type(module)
        if issubclass(kind, RotaryAttention) or not _looks_like_it(module):
            continue
        query: Any = module.q_proj
        x_1LD = torch.linspace(-2.0, 2.0, 5 * query.in_features, dtype=query.weight.dtype).view(1, 5, -1)
        angle_1LE = torch.linspace(-1.0, 3.0, 5 * cast(int, module.head_dim)).view(1, 5, -1)
        turn = angle_1LE.cos().to(x_1LD.dtype), angle_1LE.sin().to(x_1LD.dtype)
        prefixes = Prefixes(((0, 2), (2, 4), (4, 5)), (((2, 5), (0, 2)),))
        try:
            with torch.no_grad():
                expected, _ = module(x_1LD, turn, None, prefixes=prefixes)
                module.__class__ = before(RotaryAttention, cast(Any, kind))
                found, _ = module(x_1LD, turn, None, prefixes=prefixes)
            same = bool((found - expected).abs().max() <= ROUNDING[x_1LD.dtype] * expected.abs().max())
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):  # it is called otherwise
            same = False
        if same:
            taken += 1
        else:
            module.__class__ = kind
    return taken


def _looks_like_it(module: torch.nn.Module) -> bool:
    own = {name for name, _ in module.named_children()} == set(PROJECTIONS)
    named = {"position_embeddings", "past_key_values"} <= set(signature(type(module).forward).parameters)
    return own and named and hasattr(module, "head_dim") and hasattr(module, "scaling")
