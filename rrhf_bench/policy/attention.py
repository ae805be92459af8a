"""Attention over packs: a response sees its prompt, which is in memory once for all responses, and itself.

On a CPU the processor's fused kernel computes causal pieces and full pieces, which are merged by their log-sum-exps.
On a GPU FlexAttention computes a pack with a block mask. A pack reaches the layers as an argument of the model's
forward, not through a global. A checkpointed layer that is computed again, or a second forward before the backward of
the first, therefore sees its own pack.

Letters: L tokens of a pack, H heads, D size of a head, S segments in one call, T tokens of the longest of them,
N blocks of FlexAttention's mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy.batching import Prefixes, Span

FLEX_BLOCK = 128  # tokens of a block of FlexAttention's mask
# torch compiles for 1 block apart. If the number of blocks equals a number of heads when it compiles, it takes the two
# for one number, and compiles again for other lengths; 2 key heads are common, 3 are not.
MIN_BLOCKS = 3
MAX_COMPILATIONS = 64  # of FlexAttention in a process: two to four a model, so room for all that one run loads

NAME = "rrhf_shared_prefix"  # of the attention, in transformers' registry

# Private operators of the pinned torch: the CPU's fused attention that also returns the log-sum-exp, and its backward.
_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SharedPrefixAttention(torch.autograd.Function):
    """Return the (1, H, L, D) attention of a pack on a CPU; its keys and values are (1, H_kv, L, D).

    The output of a token merges two pieces: its own segment and the prompt. Both are weighted by one log-sum-exp over
    all keys. The backward pass of each piece is then that of the whole, restricted to the keys of the piece, and the
    gradients add up exactly.
    """

    @staticmethod
    def forward(ctx: Any, q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float) -> Tensor:
        qkv = q_HLD, _per_query_head(q_HLD, k_HLD), _per_query_head(q_HLD, v_HLD)
        out_HLD = _empty(q_HLD, q_HLD.dtype)
        lse_HL = torch.empty(q_HLD.shape[:3], dtype=torch.promote_types(q_HLD.dtype, torch.float32))
        for index_ST, real_ST in prefixes.batches:
            part, lse = _forward(*(_take(x, index_ST) for x in qkv), 0.0, True, scale=scale)
            _put(out_HLD, index_ST, part, real_ST)
            _put(lse_HL, index_ST, lse, real_ST)
        for queries, keys in _slices(prefixes.shared):
            part, lse = _forward(*(x[:, :, at] for x, at in zip(qkv, (queries, keys, keys), strict=True)), scale=scale)
            own_HLD, own_HL = out_HLD[:, :, queries], lse_HL[:, :, queries]
            share = (lse - own_HL).sigmoid_()[..., None]
            own_HLD.copy_(own_HLD.to(share.dtype).lerp(part.to(share.dtype), share))
            torch.logaddexp(own_HL, lse, out=own_HL)
        ctx.save_for_backward(q_HLD, k_HLD, v_HLD, out_HLD, lse_HL)
        ctx.prefixes, ctx.scale = prefixes, scale
        return out_HLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_HLD, k_HLD, v_HLD, out_HLD, lse_HL = ctx.saved_tensors
        # In float32 or better: in half precision the kernel's backward takes twice as long.
        inputs = (grads[0], q_HLD, _per_query_head(q_HLD, k_HLD), _per_query_head(q_HLD, v_HLD), out_HLD)
        inputs = (*(x.to(lse_HL.dtype) for x in inputs), lse_HL)
        totals = [_empty(q_HLD, lse_HL.dtype) for _ in range(3)]
        for index_ST, real_ST in ctx.prefixes.batches:
            grad, *taken = (_take(x, index_ST) for x in inputs)
            grad = grad.masked_fill(~real_ST[:, None, :, None], 0.0)  # padded queries add nothing to real keys
            for total, part in zip(totals, _backward(grad, *taken, 0.0, True, scale=ctx.scale), strict=True):
                _put(total, index_ST, part, real_ST)
        for queries, keys in _slices(ctx.prefixes.shared):
            places = queries, queries, keys, keys, queries, queries
            taken = [x[:, :, at] for x, at in zip(inputs, places, strict=True)]
            parts = _backward(*taken, 0.0, False, scale=ctx.scale)
            for total, part, at in zip(totals, parts, (queries, keys, keys), strict=True):
                total[:, :, at] += part
        groups = q_HLD.shape[1] // k_HLD.shape[1]
        d_q, *d_kv = (total.to(q_HLD.dtype) for total in totals)
        return d_q, *(d.unflatten(1, (-1, groups)).sum(2) if groups > 1 else d for d in d_kv), None, None


def _empty(like_HLD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty (1, H, L, D) in which the heads of a token follow one another in memory."""
    _, heads, length, size = like_HLD.shape
    return torch.empty(1, length, heads, size, dtype=dtype).transpose(1, 2)


def _slices(spans: Iterable[tuple[Span, Span]]) -> Iterator[tuple[slice, slice]]:
    return ((slice(*queries), slice(*keys)) for queries, keys in spans)


def _take(x_HL: Tensor, index_ST: Tensor) -> Tensor:
    """Return (S, H, T, ...), some positions of (1, H, L, ...)."""
    return x_HL[0].transpose(0, 1)[index_ST].transpose(1, 2)


def _put(x_HL: Tensor, index_ST: Tensor, part: Tensor, real_ST: Tensor) -> None:
    """Write (S, H, T, ...) to the positions of (1, H, L, ...) that are not padding."""
    x_HL[0].transpose(0, 1)[index_ST[real_ST]] = part.transpose(1, 2)[real_ST]


def _per_query_head(q_HLD: Tensor, x_HLD: Tensor) -> Tensor:
    return x_HLD if x_HLD.shape[1] == q_HLD.shape[1] else x_HLD.repeat_interleave(q_HLD.shape[1] // x_HLD.shape[1], 1)


def flex_attention(
    q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float, backend: Any = None
) -> Tensor:
    """Return the same attention by FlexAttention, compiled by ``backend``.

    By default the backend is inductor's on a GPU. Elsewhere FlexAttention is eager and has no backward pass.

    A pack is filled up to whole blocks, at least MIN_BLOCKS, with tokens that see each other only. FlexAttention has
    other kernels for less than a block and for a last block that is not full, so the trial of a few tokens, when a
    policy is loaded, would compile what training never uses.
    """
    from torch.nn.attention.flex_attention import flex_attention as attend

    backend = backend or ("inductor" if q_HLD.is_cuda else None)
    # torch compiles a function 8 times at most, which four models exhaust, and raises beyond that, since the function
    # must be one graph. The eager form holds all scores and is many times slower.
    if torch._dynamo.config.recompile_limit < MAX_COMPILATIONS:  # at each call, since vLLM's import sets it, to 16
        torch._dynamo.config.recompile_limit = MAX_COMPILATIONS
    attend = cast(Any, _compile(attend, backend) if backend else attend)
    length = q_HLD.shape[2]
    filled = max(MIN_BLOCKS, -(-length // FLEX_BLOCK)) * FLEX_BLOCK
    mask = block_mask(prefixes, filled, q_HLD.device)
    # As (1, L, H, D), so that all of them lie in memory alike: it would be compiled for other strides as well.
    qkv = (torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, filled - length)) for x in (q_HLD, k_HLD, v_HLD))
    q_HLD, k_HLD, v_HLD = (x.transpose(1, 2) for x in qkv)
    gqa = k_HLD.shape[1] != q_HLD.shape[1]
    return attend(q_HLD, k_HLD, v_HLD, block_mask=mask, scale=scale, enable_gqa=gqa)[:, :, :length]


@cache
def _compile(function: Any, backend: Any) -> Any:
    """Return FlexAttention as one graph for any length. It is compiled once for each size and number of heads, dtype,
    and with or without gradients."""
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)


def block_mask(prefixes: Prefixes, length: int, device: torch.device) -> Any:
    """Return FlexAttention's mask of a pack, made once for all layers; no (L, L) mask is ever in memory.

    Tokens behind the last segment are a segment of their own. A block of which every query sees every key is computed
    without looking at single tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    kept = prefixes.__dict__.setdefault("_block_masks", {})
    if device in kept:
        return kept[device]
    segments = [*prefixes.segments, *([(prefixes.length, length)] if length > prefixes.length else [])]
    segment_L = torch.empty(length, dtype=torch.int32)
    prompt_L = torch.full((length,), -1, dtype=torch.int32)  # the segment that a token sees beside its own
    for number, (start, end) in enumerate(segments):
        segment_L[start:end] = number
    for (start, end), (prompt_start, _) in prefixes.shared:
        prompt_L[start:end] = segment_L[prompt_start].item()
    segment_L, prompt_L = segment_L.to(device), prompt_L.to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (segment_L[query] == segment_L[key]) & (query >= key)
        return own | (prompt_L[query] == segment_L[key])

    blocks = length // FLEX_BLOCK
    some_NN, all_NN = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(2))
    for span in segments:
        some, full = _touched(span), _filled(span)
        some_NN[some, some] |= torch.ones_like(some_NN[some, some]).tril()
        all_NN[full, full] |= torch.ones_like(all_NN[full, full]).tril(-1)
    for queries, keys in prefixes.shared:
        some_NN[_touched(queries), _touched(keys)] = True
        all_NN[_filled(queries), _filled(keys)] = True
    (count, order), (full_count, full_order) = (_ordered(x_NN, device) for x_NN in (some_NN & ~all_NN, all_NN))
    kept[device] = BlockMask.from_kv_blocks(
        count, order, full_count, full_order, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )
    return kept[device]


def _touched(span: Span) -> slice:
    """Return the blocks that hold a position of a span."""
    return slice(span[0] // FLEX_BLOCK, -(-span[1] // FLEX_BLOCK))


def _filled(span: Span) -> slice:
    """Return the blocks whose positions are all in a span."""
    return slice(-(-span[0] // FLEX_BLOCK), max(-(-span[0] // FLEX_BLOCK), span[1] // FLEX_BLOCK))


def _ordered(block_NN: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (1, 1, N) how many key blocks each query block has, and (1, 1, N, N) their numbers before all others."""
    order_NN = block_NN.int().argsort(dim=-1, descending=True, stable=True)
    return tuple(x.to(device, torch.int32)[None, None] for x in (block_NN.sum(-1), order_NN))  # type: ignore[return-value]


def dense_attention(q_HLD: Tensor, k_HLD: Tensor, v_HLD: Tensor, prefixes: Prefixes, scale: float) -> Tensor:
    """Return the same attention by one dense mask: the definition that tests hold the others to."""
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
    """Return a layer's attention for transformers: over a pack if the model's forward got ``prefixes``, else sdpa's."""
    if prefixes is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if "layers_seen" in others:
        others["layers_seen"].append(module)
    device, scale = query.device.type, query.shape[-1] ** -0.5 if scaling is None else scaling
    attend: Any = SharedPrefixAttention.apply if device == "cpu" else flex_attention
    if torch.is_autocast_enabled(device):  # as it is for sdpa; rotated queries and keys are float32 here
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    return attend(query, key, value, prefixes, scale).transpose(1, 2), None


@cache
def register() -> str:
    """Register the attention in transformers and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # of padded rows and of sampling; packs bring their own
    return NAME
