"""Attention over packs: a response sees its prompt, once in memory for all of them, and itself.

On a CPU a pack is cut into causal and full pieces, each computed with the processor's fused kernel, merged by their
log-sum-exps; on a GPU FlexAttention with a block mask; elsewhere one dense mask. Packs reach the layers as an argument
of the model's forward, not through a global: so a checkpointed layer that is computed again, or a second forward
before the first one's backward, sees its own.

Letters: L tokens of a pack, H heads, D size of a head, S segments in one call, T tokens of the longest of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy.batching import Prefixes, Span
from rrhf_bench.policy.linear import with_gradient

FLEX_BLOCK = 128  # tokens of a block of FlexAttention's mask
# torch compiles for 1 block apart. If the number of blocks equals a number of heads when it compiles, it takes the two
# for one number, and compiles again for other lengths; 2 key heads are common, 3 are not.
LEAST_BLOCKS = 3
COMPILATIONS = 64  # of FlexAttention in a process: two to four a model, so room for all that one run loads

NAME = "rrhf_shared_prefix"  # of the attention, in transformers' registry

# Private operators of the pinned torch: the CPU's fused attention that also returns the log-sum-exp, and its backward.
_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SharedPrefixAttention(torch.autograd.Function):
    """``attend`` where the layers around it are the model's own."""

    @staticmethod
    def forward(ctx: Any, q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float) -> Tensor:
        out_HLD, lse_HL = attend(q_HLD, k_HLD, v_HLD, prefixes, scale)
        ctx.save_for_backward(q_HLD, k_HLD, v_HLD, out_HLD, lse_HL)
        ctx.prefixes, ctx.scale = prefixes, scale
        return out_HLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_HLD, k_HLD, v_HLD, out_HLD, lse_HL = ctx.saved_tensors
        live = with_gradient(grads[0][0].transpose(0, 1).flatten(1))
        d_qkv = attend_backward(
            grads[0], q_HLD, k_HLD, v_HLD, out_HLD, lse_HL, prefixes=ctx.prefixes, scale=ctx.scale, live=live
        )
        sizes = q_HLD.shape[1], k_HLD.shape[1], k_HLD.shape[1]
        return *(by_head(part) for part in d_qkv.split(sizes, 1)), None, None


def attend(q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float) -> tuple[Tensor, Tensor]:
    """(1, H, L, D) attention of a pack on a CPU, and its (1, H, L) log-sum-exps, from (1, H, L, D) queries and
    (1, H_kv, L, D) keys and values.

    A token's output is the merge of a few pieces: its own segment, whole or in parts, and the prompt. With one
    log-sum-exp over all, each piece's backward is that of the whole restricted to its keys: gradients add up exactly.
    What attends to nothing has zeros and the log-sum-exp of nothing.
    """
    qkv = q_HLD, _per_query_head(q_HLD, k_HLD), _per_query_head(q_HLD, v_HLD)
    out_HLD = by_head(q_HLD.new_empty(*(q_HLD.shape[i] for i in (2, 1, 3))))
    lse_HL = torch.empty(q_HLD.shape[:3], dtype=torch.promote_types(q_HLD.dtype, torch.float32))
    if not prefixes.whole:
        out_HLD.zero_()
        lse_HL.fill_(-torch.inf)
    if prefixes.rectangle is not None:
        index_ST, real_ST = prefixes.rectangle
        part, lse = _forward(*(_take(x, index_ST) for x in qkv), 0.0, True, scale=scale)
        _put(out_HLD, index_ST, part, real_ST)
        _put(lse_HL, index_ST, lse, real_ST)
    for run in _runs(prefixes.causal):
        part, lse = _forward(*(_view(x, *run) for x in qkv), 0.0, True, scale=scale)  # (S, H, T, D), (S, H, T)
        _view(out_HLD, *run).copy_(part)
        _view(lse_HL, *run).copy_(lse)
    for queries, keys in prefixes.full:
        part, lse = _forward(*map(_view, qkv, (queries, keys, keys)), 0.0, False, scale=scale)
        own_HLD, own_HL = _view(out_HLD, queries), _view(lse_HL, queries)
        share = (lse - own_HL).sigmoid_()[..., None]
        own_HLD.copy_(own_HLD.to(share.dtype).lerp(part.to(share.dtype), share))
        torch.logaddexp(own_HL, lse, out=own_HL)
    return out_HLD, lse_HL


def attend_backward(
    grad_HLD: Tensor,
    q_HLD: Tensor,
    k_HLD: Tensor,
    v_HLD: Tensor,
    out_HLD: Tensor,
    lse_HL: Tensor,
    *,
    prefixes: Prefixes,
    scale: float,
    live: Tensor | None,
) -> Tensor:
    """(L, H + 2 H_kv, D), the gradients of queries, keys and values, from that of the output; ``live``, if it is given,
    are the positions where that is not zero."""
    # In float32 or better: of half precision the kernel's backward takes twice as long.
    dtype, wide = grad_HLD.dtype, torch.promote_types(grad_HLD.dtype, torch.float32)
    q_HLD, k_HLD, v_HLD, out_HLD, grad_HLD = (x.to(wide) for x in (q_HLD, k_HLD, v_HLD, out_HLD, grad_HLD))
    qkv = q_HLD, _per_query_head(q_HLD, k_HLD), _per_query_head(q_HLD, v_HLD)
    causal: Iterable[Span] = prefixes.causal
    full: Iterable[tuple[Span | Tensor, Span]] = prefixes.full
    # Queries without a gradient give none; where a part has no other, its own keys get none from it.
    if live is not None:
        positions = live.tolist()

        def asked(span: Span) -> slice:
            return slice(bisect_left(positions, span[0]), bisect_left(positions, span[1]))

        causal = [span for span in causal if positions[asked(span)]]
        full = [(live[asked(queries)], keys) for queries, keys in prefixes.full if positions[asked(queries)]]
    heads, groups = q_HLD.shape[1], q_HLD.shape[1] // k_HLD.shape[1]
    written = live is None and prefixes.whole  # before anything is added
    total_LHD = (q_HLD.new_empty if written else q_HLD.new_zeros)(q_HLD.shape[2], 3 * heads, q_HLD.shape[3])
    found = [by_head(part) for part in total_LHD.split(heads, 1)]
    if prefixes.rectangle is not None:
        index_ST, real_ST = prefixes.rectangle
        # A padded query would pull at real keys: no gradient comes in from it, and its weights are exp(-inf).
        grad = _take(grad_HLD, index_ST).masked_fill(~real_ST[:, None, :, None], 0.0)
        lse = _take(lse_HL, index_ST).masked_fill(~real_ST[:, None], 1e30)
        taken = [_take(x, index_ST) for x in (*qkv, out_HLD)]
        for total, part in zip(found, _backward(grad, *taken, lse, 0.0, True, scale=scale), strict=True):
            _put(total, index_ST, part, real_ST)
    for run in _runs(causal):
        taken = [_view(x, *run) for x in (grad_HLD, *qkv, out_HLD, lse_HL)]
        for total, part in zip(found, _backward(*taken, 0.0, True, scale=scale), strict=True):
            _view(total, *run).copy_(part)
    for queries, keys in full:
        at = queries, queries, keys, keys, queries, queries
        taken = list(map(_view, (grad_HLD, *qkv, out_HLD, lse_HL), at))
        parts = _backward(*taken, 0.0, False, scale=scale)
        for total, part, place in zip(found, parts, (queries, keys, keys), strict=True):
            if isinstance(place, Tensor):
                total.index_add_(2, place, part)
            else:
                _view(total, place).add_(part)
    if groups > 1:
        shared = total_LHD[:, heads:].unflatten(1, (-1, groups)).sum(2)
        total_LHD = torch.cat([total_LHD[:, :heads], shared], 1)
    return total_LHD.to(dtype)


def _runs(spans: Iterable[Span]) -> Iterator[tuple[Span, int]]:
    """Spans of one length, one behind the other, as one; how many these are. A kernel takes them as a batch."""
    start = end = count = 0
    for span in spans:
        if count and span[0] == end and span[1] - end == (end - start) // count:
            end, count = span[1], count + 1
            continue
        if count:
            yield (start, end), count
        (start, end), count = span, 1
    if count:
        yield (start, end), count


def by_head(x_LHD: Tensor) -> Tensor:
    """(L, H, D), a token's heads one behind the other in memory as the linear layers around want them, seen as
    (1, H, L, D)."""
    return x_LHD.transpose(0, 1)[None]


def _view(x_HL: Tensor, at: Span | Tensor, count: int = 1) -> Tensor:
    """(S, H, T, ...) of (1, H, L, ...): a span, as that many segments of one length; or the positions named, copied."""
    if isinstance(at, Tensor):
        return x_HL.index_select(2, at)
    part = x_HL.narrow(2, at[0], at[1] - at[0])
    return part if count == 1 else part[0].unflatten(1, (count, -1)).transpose(0, 1)


def _take(x_HL: Tensor, index_ST: Tensor) -> Tensor:
    """(S, H, T, ...) of some tokens of (1, H, L, ...)."""
    return x_HL[0].transpose(0, 1)[index_ST].transpose(1, 2)


def _put(x_HL: Tensor, index_ST: Tensor, part: Tensor, real_ST: Tensor) -> None:
    """The reverse, for those that are no padding."""
    x_HL[0].transpose(0, 1)[index_ST[real_ST]] = part.transpose(1, 2)[real_ST]


def _per_query_head(q_HLD: Tensor, x_HLD: Tensor) -> Tensor:
    return x_HLD if x_HLD.shape[1] == q_HLD.shape[1] else x_HLD.repeat_interleave(q_HLD.shape[1] // x_HLD.shape[1], 1)


def flex_attention(
    q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float, backend: Any = None
) -> Tensor:
    """The same with FlexAttention, (1, H, L, D) each, compiled by ``backend``: by default inductor's on a GPU and none
    elsewhere, where FlexAttention is eager and has no backward.

    A pack is filled up to whole blocks, at least LEAST_BLOCKS, with tokens that see each other only. FlexAttention has
    other kernels for less than a block and for a last block that is not full, so the trial of a few tokens, when a
    policy is loaded, would compile what training never uses.
    """
    from torch.nn.attention.flex_attention import flex_attention as attend

    backend = backend or ("inductor" if q_HLD.is_cuda else None)
    attend = cast(Any, _compiled(attend, backend) if backend else attend)
    length = q_HLD.shape[2]
    filled = max(LEAST_BLOCKS, -(-length // FLEX_BLOCK)) * FLEX_BLOCK
    mask = _block_mask(prefixes, filled, q_HLD.device)
    # As (1, L, H, D), so that all of them lie in memory alike: it would be compiled for other strides as well.
    qkv = (torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, filled - length)) for x in (q_HLD, k_HLD, v_HLD))
    q_HLD, k_HLD, v_HLD = (x.transpose(1, 2) for x in qkv)
    gqa = k_HLD.shape[1] != q_HLD.shape[1]
    return attend(q_HLD, k_HLD, v_HLD, block_mask=mask, scale=scale, enable_gqa=gqa)[:, :, :length]


def _compiled(function: Any, backend: Any) -> Any:
    """Return FlexAttention as one graph for any length. It is compiled once for each size and number of heads, dtype,
    and with or without gradients.

    torch compiles a function 8 times at most, which four models exhaust. Then it would go on with the eager form, which
    holds all scores and is many times slower; of a function that must be one graph it raises instead.
    """
    if torch._dynamo.config.recompile_limit < COMPILATIONS:  # at each call, since vLLM's import sets it, to 16
        torch._dynamo.config.recompile_limit = COMPILATIONS
    return _compile(function, backend)


@cache
def _compile(function: Any, backend: Any) -> Any:
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)


def _block_mask(prefixes: Prefixes, length: int, device: torch.device) -> Any:
    """Made once a pack, for all layers; tokens behind the last segment are a segment of their own."""
    from torch.nn.attention.flex_attention import create_block_mask

    kept = prefixes.__dict__.setdefault("_block_masks", {})
    if device not in kept:
        segment_L = torch.full((length,), -2, dtype=torch.int32)
        prompt_L = torch.full((length,), -1, dtype=torch.int32)  # the segment that a token sees beside its own
        for number, (start, end) in enumerate(prefixes.segments):
            segment_L[start:end] = number
        for (start, end), (prompt_start, _) in prefixes.shared:
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
    if "layers_seen" in others:
        others["layers_seen"].append(module)
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
