"""Log-probs of given tokens from hidden states, without the logits of a whole batch ever being in memory.

Letters: N predicted tokens, C of them in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rrhf_bench.policy.gradients import gradient_to_add_to
from rrhf_bench.policy.linear import WORTH, Linear, Product, add_product_
from rrhf_bench.policy.logprobs import gather_logprobs

Way = Literal["cpu", "cuda"]

# Bytes of softmax that may be kept for the backward pass, a token fed; what is beyond them is computed again. A row of
# a vocabulary of 32,000 is 125 KiB in float32; the layers of a Llama of 60M keep 250 KiB a token.
KEPT = 128 << 10
BLOCK = 1 << 19  # logits that go through the softmax at once on a CPU: they stay in its cache from one step to the next
CHUNK = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits of a chunk that nobody keeps: 32 MB in float32, 0.5 GB
LEAST = 1e-30  # probability that float32 holds to the last digit: the log of a smaller one is computed from the logits
LONGEST_CHUNK = {"cpu": 512, "cuda": 4096}  # rows of one product with the head: more gain nothing


def token_logprobs(
    head: Any, hidden_ND: Tensor, token_N: Tensor, temperature: float, keep: int, way: Way | None = None
) -> Tensor:
    """log softmax(head(hidden) / temperature) at the given tokens: (N,) float32 (float64 of a float64 model).

    The head is a linear layer whose output is the logits. It runs on chunks of rows; ``keep`` bytes of softmax at most
    are kept for the backward pass, where rows without gradient are left out. Equal to ``gather_logprobs(head(hidden),
    ...)``, the definition, which an unknown kind of head is computed with. ``way`` names the
    device whose sizes and kernels it is computed with: by default the one that it is on. A CPU can do both.
    """
    if not isinstance(head, torch.nn.Linear):
        return gather_logprobs(head(hidden_ND), token_N, temperature)
    product = head.product if isinstance(head, Linear) and hidden_ND.dtype == torch.float32 else torch.mm
    way = way or ("cuda" if hidden_ND.is_cuda else "cpu")
    parts = (hidden_ND, head.weight, head.bias, token_N, temperature, keep, product, way)
    return cast(Tensor, _ChunkedLogprobs.apply(*parts))


def chunk_rows(vocabulary: int, way: Way = "cpu") -> int:
    """Return the rows of a chunk whose logits nobody keeps: CHUNK logits, but 64 to LONGEST_CHUNK rows."""
    return max(64, min(LONGEST_CHUNK[way], CHUNK[way] // vocabulary))


class Rooms:
    """Memory for the logits of a pass on a CPU, used again by the next: filling memory that is fresh from the system
    takes several times as long as filling it again. The largest one that is given back waits for the next call."""

    def __init__(self) -> None:
        self._spare: list[Tensor] = []

    def take(self, size: int, like: Tensor) -> Tensor:
        """(size or more,) of anything, in the dtype and on the device of ``like``; nobody else's until given back."""
        found = self._spare.pop() if self._spare else None
        fits = found is not None and found.dtype == like.dtype and found.device == like.device and len(found) >= size
        return cast(Tensor, found) if fits else like.new_empty(size)

    def give_back(self, room: Tensor) -> None:
        if not room.is_cuda and (not self._spare or self._spare[0].nbytes < room.nbytes):
            self._spare[:] = [room]

    def clear(self) -> None:
        self._spare.clear()


ROOMS = Rooms()


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        temperature: float,
        keep: int,
        product: Product,
        way: Way,
    ) -> Tensor:
        rows, vocabulary = len(hidden_ND), len(weight_VD)
        kept = min(rows, keep // (vocabulary * weight_VD.element_size())) if any(ctx.needs_input_grad) else 0
        longest = LONGEST_CHUNK[way]
        chunk = max(chunk_rows(vocabulary, way), min(kept, longest))
        room = ROOMS.take(max(kept, min(chunk, rows)) * vocabulary, weight_VD)
        room_RV = room[: len(room) // vocabulary * vocabulary].view(-1, vocabulary)
        logp, ctx.spans, ctx.kept = [], [], []
        # The rows that are kept come last: until then the logits of the others are where theirs will be.
        first_kept = rows - kept
        for start, end in (*_spans(0, first_kept, chunk), *_spans(first_kept, rows, longest)):
            keeps = start >= first_kept
            place_CV = room_RV[start - first_kept : end - first_kept] if keeps else room_RV[: end - start]
            logits_CV = _logits(hidden_ND[start:end], weight_VD, bias_V, product, place_CV)
            p_C = _softmax_(logits_CV, token_N[start:end], temperature, way, wanted=keeps)
            ctx.kept.append((logits_CV, p_C.clone()) if keeps else None)
            lost_R = (p_C < LEAST).nonzero().squeeze(-1)
            p_C.log_()
            if len(lost_R):
                at = start + lost_R
                again_RV = torch.nn.functional.linear(hidden_ND[at], weight_VD, bias_V)
                p_C[lost_R] = gather_logprobs(again_RV, token_N[at], temperature)
            logp.append(p_C)
            ctx.spans.append((start, end))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N)
        ctx.temperature, ctx.product, ctx.way, ctx.room = temperature, product, way, room if kept else None
        if not kept:
            ROOMS.give_back(room)
        return torch.cat(logp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, token_N = ctx.saved_tensors
        # Of the logits: grad x (1 at the token - p). The factor goes to the small side of each product.
        factor_N = (-grads[0] / ctx.temperature).to(hidden_ND.dtype)  # two precisions in one product are far slower
        vocabulary = len(weight_VD)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        d_hidden_ND = torch.zeros_like(hidden_ND) if want_hidden else None
        d_weight_VD: Tensor | None = None
        total_VD = gradient_to_add_to(weight_VD, ctx.next_functions[1][0]) if want_weight else None
        d_bias_V = torch.zeros_like(bias_V) if want_bias else None
        # What was kept is written over: a second backward computes it again.
        kept, ctx.kept, room, ctx.room = ctx.kept, [None] * len(ctx.kept), ctx.room, None
        if room is None:
            room = ROOMS.take(max(end - start for start, end in ctx.spans) * vocabulary, weight_VD)
        room_RV = room[: len(room) // vocabulary * vocabulary].view(-1, vocabulary)
        for start, end in reversed(ctx.spans):  # what is kept goes before anything is computed again
            chunk = kept.pop()
            live_C = factor_N[start:end].nonzero().squeeze(-1)  # RRHF's loss, for one, leaves many responses alone
            if not len(live_C):
                continue
            some = len(live_C) <= WORTH * (end - start)
            at = start + live_C if some else slice(start, end)
            hidden_CD, token_C, factor_C1 = hidden_ND[at], token_N[at], factor_N[at, None]
            if chunk is None:
                p_CV = _logits(hidden_CD, weight_VD, bias_V, ctx.product, room_RV[: len(hidden_CD)])
                p_C = _softmax_(p_CV, token_C, ctx.temperature, ctx.way)
            else:
                p_CV, p_C = (_first_(chunk[0], live_C, ctx.way), chunk[1][live_C]) if some else chunk
            # In float32: half precision has no number between 0.996 and 1 to take 1 off.
            p_CV[torch.arange(len(p_CV), device=p_CV.device), token_C] = (p_C - 1.0).to(p_CV.dtype)
            if d_hidden_ND is not None:
                d_hidden_ND[at] = ctx.product(p_CV, weight_VD).mul_(factor_C1)
            scaled_CD = hidden_CD * factor_C1
            if total_VD is None and want_weight:
                total_VD = d_weight_VD = ctx.product(p_CV.t(), scaled_CD)
            elif total_VD is not None:
                add_product_(total_VD, p_CV.t(), scaled_CD, ctx.product)
            if d_bias_V is not None:
                d_bias_V += torch.mv(p_CV.t(), factor_C1.squeeze(-1))
        ROOMS.give_back(room)
        if want_weight and total_VD is None:
            d_weight_VD = torch.zeros_like(weight_VD)
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None, None, None, None


def _spans(start: int, end: int, longest: int) -> list[tuple[int, int]]:
    """start to end in as few parts of at most that many as will do, of like size."""
    parts = -(-(end - start) // longest)
    return list(pairwise(start + (end - start) * i // parts for i in range(parts + 1))) if parts else []


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, product: Product, place_CV: Tensor) -> Tensor:
    """(C, V), in ``place_CV`` where the product can write there."""
    if product is torch.mm:
        logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=place_CV)
    else:
        logits_CV = product(hidden_CD, weight_VD.t())
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


def _softmax_(logits_CV: Tensor, token_C: Tensor, temperature: float, way: Way, *, wanted: bool = True) -> Tensor:
    """(C,) probabilities of the tokens, in float32 or better; the softmax, in place of the logits if it is wanted.
    Computed in float32 at least: a block of rows goes through all steps while the processor's cache has it."""
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    work_RV: Tensor | None = None
    taken = []
    for at in _blocks(logits_CV, way):
        x_RV = logits_CV[at]
        if x_RV.dtype != wide:
            work_RV = torch.empty_like(x_RV, dtype=wide) if work_RV is None else work_RV[: len(x_RV)]
            x_RV = work_RV.copy_(x_RV)
        if temperature != 1.0:
            x_RV.div_(temperature)
        in_place = way == "cpu"
        p_RV = torch.ops.aten._softmax.out(x_RV, -1, False, out=x_RV) if in_place else x_RV.softmax(-1)
        taken.append(p_RV.gather(-1, token_C[at, None]))
        if wanted and not (in_place and work_RV is None):
            logits_CV[at] = p_RV
    return torch.cat(taken).squeeze(-1)


def _first_(p_CV: Tensor, live_C: Tensor, way: Way) -> Tensor:
    """Some rows, by ascending index, moved before the others."""
    work_RV: Tensor | None = None
    found_CV = p_CV[: len(live_C)]
    for at in _blocks(found_CV, way):
        # A row moves only to a place before its own, and what is in a block was read before the block is written.
        place_RV = found_CV[at]
        work_RV = torch.empty_like(place_RV) if work_RV is None else work_RV[: len(place_RV)]
        place_RV.copy_(torch.index_select(p_CV, 0, live_C[at], out=work_RV))
    return found_CV


def _blocks(x_CV: Tensor, way: Way) -> Iterator[slice]:
    rows = max(1, BLOCK // x_CV.shape[1] if way == "cpu" else len(x_CV))
    return (slice(start, start + rows) for start in range(0, len(x_CV), rows))
