"""Attention over packs: a response sees its prompt, once in memory for all of them, and itself.

On a CPU a pack is cut into causal and full pieces, each computed with the processor's fused kernel, merged by their
log-sum-exps; on a GPU FlexAttention with a block mask; elsewhere one dense mask. Packs reach the layers as an argument
of the model's forward, not through a global: so a checkpointed layer that is computed again, or a second forward
before the first one's backward, sees its own.

Letters: L tokens of a pack, H heads, D size of a head, S segments in one rectangle, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy.batching import Prefixes
from rrhf_bench.policy.linear import with_gradient

NAME = "rrhf_shared_prefix"  # of the attention, in transformers' registry

# Private operators of the pinned torch: the CPU's fused attention that also returns the log-sum-exp, and its backward.
_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

LONG = 256  # tokens of a segment that is worth taking in halves

Piece = tuple[Any, Any, Tensor | None, bool]  # queries at, keys at (slices or (S, T) indices), real_ST, causal


class SharedPrefixAttention(torch.autograd.Function):
    """(1, H, L, D) attention of a pack on a CPU from (1, H, L, D) queries and (1, H_kv, L, D) keys and values.

    A token's output is the merge of a few pieces: its own segment, whole or in parts, and the prompt. With one
    log-sum-exp over all, each piece's backward is that of the whole restricted to its keys: gradients add up exactly.
    """

    @staticmethod
    def forward(ctx: Any, q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float) -> Tensor:
        k_full, v_full = _per_query_head(q_HLD, k_HLD), _per_query_head(q_HLD, v_HLD)
        out_HLD = _empty(q_HLD)
        lse_HL = torch.empty(q_HLD.shape[:3], dtype=torch.promote_types(q_HLD.dtype, torch.float32))
        for at, keys, real_ST, causal in _pieces(prefixes):
            taken = _take(q_HLD, at), _take(k_full, keys), _take(v_full, keys)
            part, lse = _forward(*taken, 0.0, causal, attn_mask=None, scale=scale)  # (S, H, T, D), (S, H, T)
            if real_ST is not None:
                _put(out_HLD, at, part, real_ST)
                _put(lse_HL, at, lse, real_ST)
            elif causal:
                out_HLD[:, :, at], lse_HL[:, :, at] = part, lse
            else:
                own_HLD, own_HL = out_HLD[:, :, at], lse_HL[:, :, at]
                both = torch.logaddexp(own_HL, lse)
                own_share, share = (own_HL - both).exp_()[..., None], (lse - both).exp_()[..., None]
                own_HLD.copy_((own_HLD * own_share).addcmul_(part.to(own_share.dtype), share))
                own_HL.copy_(both)
        ctx.save_for_backward(q_HLD, k_HLD, v_HLD, out_HLD, lse_HL)
        ctx.prefixes, ctx.scale = prefixes, scale
        return out_HLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In float32 or better: of half precision the kernel's backward takes twice as long.
        saved = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (*ctx.saved_tensors, grads[0]))
        q_HLD, k_HLD, v_HLD, out_HLD, lse_HL, grad_HLD = saved
        k_full, v_full = _per_query_head(q_HLD, k_HLD), _per_query_head(q_HLD, v_HLD)
        dq_HLD, dk_HLD, dv_HLD = _empty(q_HLD), _empty(q_HLD), _empty(q_HLD)
        live = with_gradient(grad_HLD[0].transpose(0, 1).flatten(1))
        for at, keys, real_ST, causal in _pieces(ctx.prefixes):
            if live is not None and real_ST is None:
                # Queries without a gradient give none; where a segment has no other, its own keys get none.
                asked = live[(live >= at.start) & (live < at.stop)]
                if not len(asked):
                    if causal:
                        dq_HLD[:, :, at], dk_HLD[:, :, at], dv_HLD[:, :, at] = 0.0, 0.0, 0.0
                    continue
                at = at if causal else asked
            grad, lse = _take(grad_HLD, at), _take(lse_HL, at)
            if real_ST is not None:
                # A padded query would pull at real keys: no gradient comes in from it, and its weights are exp(-inf).
                grad = grad.masked_fill(~real_ST[:, None, :, None], 0.0)
                lse = lse.masked_fill(~real_ST[:, None], 1e30)
            taken = _take(q_HLD, at), _take(k_full, keys), _take(v_full, keys), _take(out_HLD, at)
            dq, dk, dv = _backward(grad, *taken, lse, 0.0, causal, attn_mask=None, scale=ctx.scale)
            if real_ST is not None:
                _put(dq_HLD, at, dq, real_ST)
                _put(dk_HLD, at, dk, real_ST)
                _put(dv_HLD, at, dv, real_ST)
            elif causal:
                dq_HLD[:, :, at], dk_HLD[:, :, at], dv_HLD[:, :, at] = dq, dk, dv
            else:
                dq_HLD[:, :, at] += dq
                dk_HLD[:, :, keys] += dk
                dv_HLD[:, :, keys] += dv
        found = dq_HLD, _per_key_head(k_HLD, dk_HLD), _per_key_head(v_HLD, dv_HLD)
        return *(x.to(grads[0].dtype) for x in found), None, None


def _pieces(prefixes: Prefixes) -> Iterator[Piece]:
    """Every segment on itself first, so that each token has an output; then the responses on their prompts. What is not
    causal comes after what is for the same queries."""
    for index_ST, real_ST in prefixes.rectangles:
        if len(index_ST) == 1:
            yield from _halves(int(index_ST[0, 0]), int(index_ST[0, -1]) + 1)
        else:
            yield index_ST, index_ST, real_ST, True
    for prompt_start, prompt_end, start, end in prefixes.shared:
        yield slice(start, end), slice(prompt_start, prompt_end), None, False


def _halves(start: int, end: int) -> Iterator[Piece]:
    """A segment on itself: if it is long, its halves on themselves and the second on the first. Of up to 512 keys the
    kernel computes all, also those that causal attention does not see."""
    if end - start < LONG:
        yield slice(start, end), slice(start, end), None, True
        return
    middle = (start + end) // 2
    yield from _halves(start, middle)
    yield from _halves(middle, end)
    yield slice(middle, end), slice(start, middle), None, False


def _empty(like_HLD: Tensor) -> Tensor:
    """(1, H, L, D), a token's heads one behind the other in memory, as the linear layers around want them."""
    return like_HLD.new_empty(*(like_HLD.shape[i] for i in (0, 2, 1, 3))).transpose(1, 2)


def _take(x_HL: Tensor, at: Any) -> Tensor:
    """(S, H, T, ...) of some tokens of (1, H, L, ...)."""
    if isinstance(at, slice) or at.dim() == 1:
        return x_HL[:, :, at]
    return x_HL[0].transpose(0, 1)[at].transpose(1, 2)


def _put(x_HL: Tensor, index_ST: Tensor, part: Tensor, real_ST: Tensor) -> None:
    """The reverse, for those that are no padding."""
    x_HL[0].transpose(0, 1)[index_ST[real_ST]] = part.transpose(1, 2)[real_ST]


def _per_query_head(q_HLD: Tensor, x_HLD: Tensor) -> Tensor:
    return x_HLD if x_HLD.shape[1] == q_HLD.shape[1] else x_HLD.repeat_interleave(q_HLD.shape[1] // x_HLD.shape[1], 1)


def _per_key_head(x_HLD: Tensor, grad_HLD: Tensor) -> Tensor:
    """The gradient of ``_per_query_head``."""
    if x_HLD.shape[1] == grad_HLD.shape[1]:
        return grad_HLD
    return grad_HLD.unflatten(1, (x_HLD.shape[1], -1)).sum(2)


def flex_attention(q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float) -> Tensor:
    """The same with FlexAttention, (1, H, L, D) each: compiled on a GPU; eager elsewhere, where it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention as attend

    attend = cast(Any, _compiled(attend) if q_HLD.is_cuda else attend)
    mask = _block_mask(prefixes, q_HLD.shape[2], q_HLD.device)
    return attend(q_HLD, k_HLD, v_HLD, block_mask=mask, scale=scale, enable_gqa=k_HLD.shape[1] != q_HLD.shape[1])


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


def _block_mask(prefixes: Prefixes, length: int, device: torch.device) -> Any:
    """Made once a pack, for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    kept = prefixes.__dict__.setdefault("_block_masks", {})
    if device not in kept:
        segment_L = torch.zeros(length, dtype=torch.int32)
        prompt_L = torch.full((length,), -1, dtype=torch.int32)  # the segment that a token sees beside its own
        for number, (start, end) in enumerate(prefixes.segments):
            segment_L[start:end] = number
        for prompt_start, _, start, end in prefixes.shared:
            prompt_L[start:end] = segment_L[prompt_start].item()
        segment_L, prompt_L = segment_L.to(device), prompt_L.to(device)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (segment_L[query] == segment_L[key]) & (query >= key)
            return own | (prompt_L[query] == segment_L[key])

        kept[device] = create_block_mask(visible, None, None, length, length, device=str(device))
    return kept[device]


def dense_attention(q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float) -> Tensor:
    """The same with one dense mask, (1, H, L, D) each: the definition, on any device."""
    mask_LL = prefixes.mask_LL.to(q_HLD.device)
    gqa = k_HLD.shape[1] != q_HLD.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        q_HLD, k_HLD, v_HLD, attn_mask=mask_LL, scale=scale, enable_gqa=gqa
    )


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefixes: Prefixes | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: of packs where the model's forward was given ``prefixes``, else sdpa."""
    if prefixes is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    seen = others.get("layers_seen")
    if seen is not None:
        seen.append(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        out_HLD = cast(Tensor, SharedPrefixAttention.apply(query, key, value, prefixes, scale))
        return out_HLD.transpose(1, 2), None
    attend = flex_attention if query.is_cuda else dense_attention
    return attend(query, key, value, prefixes, scale).transpose(1, 2), None


@cache
def register() -> str:
    """Make the attention known to transformers; its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # of padded rows and of sampling; packs bring their own
    return NAME
