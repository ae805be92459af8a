"""Batches of responses to prompts as token ids, and the two layouts in which a model is fed with them.

A ``ResponseBatch`` holds every prompt once, and every response with the index of its prompt. ``pack`` lays out every
prompt once, followed by its responses, each at the positions that follow the prompt. ``padded`` is the plain layout:
prompt + response in a row, padding on the right. Neither layout has the last token of a response, because nothing is
predicted from it.

Letters: B responses, T tokens of the longest, L tokens of a pack (or of a padded row), N response tokens in all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResponseBatch:
    """B responses to P prompts. ``prompt_of[b]`` is the index of the prompt that response b answers.

    Raises ValueError for an empty prompt or response: neither has a position that predicts its first token.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    response_ids: tuple[tuple[int, ...], ...]
    prompt_of: tuple[int, ...]
    temperature: float = 1.0  # the log-probs are those of softmax(logits / temperature)

    def __post_init__(self) -> None:
        if not self.response_ids or not all(self.response_ids) or not all(self.prompt_ids):
            raise ValueError("a batch needs at least one response, and no prompt or response in it may be empty")
        assert len(self.prompt_of) == len(self.response_ids)

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0) -> ResponseBatch:
        """Return a batch of (prompt ids, response ids) pairs; equal prompts are held once."""
        index: dict[tuple[int, ...], int] = {}
        prompt_of = tuple(index.setdefault(tuple(prompt), len(index)) for prompt, _ in pairs)
        return cls(tuple(index), tuple(tuple(response) for _, response in pairs), prompt_of, temperature)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of response tokens of each row."""
        return tuple(map(len, self.response_ids))

    @cached_property
    def mask_BT(self) -> Tensor:
        """Return the (B, T) mask, on the CPU, which is True at real response tokens."""
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    @cached_property
    def first_of(self) -> tuple[int, ...]:
        """Return for each row the first row with the same prompt and response, which alone is computed."""
        first: dict[tuple[int, tuple[int, ...]], int] = {}
        return tuple(
            first.setdefault(pair, row) for row, pair in enumerate(zip(self.prompt_of, self.response_ids, strict=True))
        )

    def fed(self, *, packed: bool) -> int:
        """Return the number of tokens fed for this batch without padding: prompts once, or before every response."""
        rows = [row for row, first in enumerate(self.first_of) if row == first]
        prompts = [self.prompt_of[row] for row in rows]
        fed = sum(len(self.prompt_ids[prompt]) for prompt in (set(prompts) if packed else prompts))
        return fed + sum(self.lengths[row] - 1 for row in rows)

    @cached_property
    def longest(self) -> int:
        """Return the tokens of the longest prompt and response together."""
        return max(len(self.prompt_ids[p]) + n for p, n in zip(self.prompt_of, self.lengths, strict=True))


def within(sizes: Sequence[int], tokens: int) -> list[list[int]]:
    """Return the indices of ``sizes``, in order, in runs of at most ``tokens``; a larger size is a run alone."""
    runs: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = tokens
        runs[-1].append(index)
        room -= size
    return runs


Span = tuple[int, int]  # start and end of positions in a pack

SHORT = 32  # tokens: segments up to this length are computed together, whatever their lengths
PADDED_SHARE = 0.25  # of the positions of longer segments that are computed together


@dataclass(frozen=True)
class Prefixes:
    """Which tokens of a pack attend to which: each segment to itself, causally; some also to all of an earlier segment.

    A prompt with one response is one segment with the response. If a prompt has several responses, the prompt is a
    segment and each response is another. The responses follow one another, so that all of them are one span.
    """

    segments: tuple[Span, ...]  # every position is in one of them
    shared: tuple[tuple[Span, Span], ...]  # the responses of a prompt; the prompt

    @property
    def length(self) -> int:
        """Return the number of positions of the pack."""
        return self.segments[-1][1]

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return (index_ST, real_ST) for each batch of S segments of like length: their positions, and the mask of
        those that are not padding.

        Padding stands on the right, where causal attention does not see it, and repeats the segment's last position.
        """
        groups: list[list[Span]] = []
        for start, end in sorted(self.segments, key=lambda span: span[0] - span[1]):
            longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
            if longest > max(SHORT, (end - start) / (1 - PADDED_SHARE)) or not groups:
                groups.append([])
            groups[-1].append((start, end))
        batches = []
        for group in groups:
            start_S1 = torch.tensor([start for start, _ in group])[:, None]
            length_S1 = torch.tensor([end - start for start, end in group])[:, None]
            step_T = torch.arange(int(length_S1.max()))
            batches.append((start_S1 + torch.minimum(step_T, length_S1 - 1), step_T < length_S1))
        return batches

    @cached_property
    def mask_LL(self) -> Tensor:
        """Return the (L, L) mask [q, k], True where q attends to k: the definition of what the fast forms compute."""
        mask_LL = torch.zeros(self.length, self.length, dtype=torch.bool)
        for start, end in self.segments:
            mask_LL[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        for (start, end), (prompt_start, prompt_end) in self.shared:
            mask_LL[start:end, prompt_start:prompt_end] = True
        return mask_LL


@dataclass(frozen=True)
class Pack:
    """Prompts with their responses in one row for a causal model; tensors on the CPU."""

    rows: tuple[int, ...]  # of the batch, in the order of their tokens in predict_N
    ids_L: Tensor
    position_L: Tensor
    predict_N: Tensor  # the position that predicts each response token
    prefixes: Prefixes


def pack(batch: ResponseBatch, tokens: int) -> list[Pack]:
    """Return packs of at most ``tokens`` tokens with the different responses of a batch, each prompt fed once.

    A prompt whose responses do not fit in one pack is fed once for every part of them. A response is never cut: one
    that is longer than ``tokens`` makes a longer pack.
    """
    responses_of: dict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(batch.first_of):
        if row == first:
            responses_of[batch.prompt_of[row]].append(row)
    groups: list[tuple[int, list[int]]] = []
    for prompt, rows in responses_of.items():
        room = max(1, tokens - len(batch.prompt_ids[prompt]))
        for run in within([batch.lengths[row] - 1 for row in rows], room):
            groups.append((prompt, [rows[i] for i in run]))
    sizes = [len(batch.prompt_ids[p]) + sum(batch.lengths[row] - 1 for row in rows) for p, rows in groups]
    return [_laid_out(batch, [groups[i] for i in run]) for run in within(sizes, tokens)]


def _laid_out(batch: ResponseBatch, groups: Sequence[tuple[int, Sequence[int]]]) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    segments: list[Span] = []
    shared: list[tuple[Span, Span]] = []
    for prompt, rows in groups:
        prompt_ids = batch.prompt_ids[prompt]
        start, end = len(ids), len(ids) + len(prompt_ids)
        ids += prompt_ids
        positions += range(len(prompt_ids))
        behind = []
        for row in rows:
            fed = batch.response_ids[row][:-1]
            behind.append((len(ids), len(ids) + len(fed)))
            predict += (end - 1, *range(*behind[-1]))
            positions += range(len(prompt_ids), len(prompt_ids) + len(fed))
            ids += fed
        if len(rows) == 1:
            segments.append((start, len(ids)))
            continue
        segments += [(start, end), *(segment for segment in behind if segment[1] > segment[0])]
        if len(ids) > end:
            shared.append(((end, len(ids)), (start, end)))
    return Pack(
        tuple(row for _, rows in groups for row in rows),
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(predict),
        Prefixes(tuple(segments), tuple(shared)),
    )


def padded(batch: ResponseBatch, rows: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Return the plain layout of some rows: a model's (B, L) inputs, padded on the right, and a (B, L) mask.

    The mask is True where a position predicts a response token. The id 0 pads, because every model has it and padding
    is masked; a tokenizer's pad token may lie beyond the model's vocabulary.
    """
    ids = [batch.prompt_ids[batch.prompt_of[row]] + batch.response_ids[row][:-1] for row in rows]
    end_B = torch.tensor([len(row) for row in ids])
    start_B = end_B - torch.tensor([batch.lengths[row] for row in rows])
    ids_BL = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    position_L = torch.arange(ids_BL.shape[1])
    real_BL = position_L < end_B[:, None]
    predict_BL = real_BL & (position_L >= start_B[:, None])
    return {"input_ids": ids_BL.to(device), "attention_mask": real_BL.long().to(device)}, predict_BL.to(device)


def passes(batch: ResponseBatch, tokens: int) -> list[list[int]]:
    """Return the different rows of a batch in passes of like length for the padded layout.

    A pass has at most ``tokens`` padded positions, but at least one row. A batch laid out as one rectangle is often
    half padding.
    """
    length = [len(batch.prompt_ids[p]) + n - 1 for p, n in zip(batch.prompt_of, batch.lengths, strict=True)]
    parts: list[list[int]] = [[]]
    for row in sorted((row for row, first in enumerate(batch.first_of) if row == first), key=length.__getitem__):
        if parts[-1] and (len(parts[-1]) + 1) * length[row] > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def places(batch: ResponseBatch, parts: Sequence[Sequence[int]]) -> Tensor:
    """Return the (N,) places of the batch's response tokens, row by row, among the concatenated tokens of the parts."""
    start, starts = 0, [0] * len(batch.lengths)
    for row in (row for part in parts for row in part):
        starts[row] = start
        start += batch.lengths[row]
    spans = zip((starts[first] for first in batch.first_of), batch.lengths, strict=True)
    return torch.cat([torch.arange(s, s + n) for s, n in spans])
