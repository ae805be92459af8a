"""What a policy is asked about: responses to prompts as token ids, and the two layouts of them that a model is fed.

A ``ResponseBatch`` says which tokens, not how they are laid out: every prompt once, every response with the prompt it
belongs to. ``pack`` feeds every prompt once, its responses behind it, each at the positions that follow the prompt;
``padded`` is the plain layout: prompt + response a row, padding on the right. In both, a response's last token is not
fed: nothing is predicted from it.

Letters: B responses, T tokens of the longest, L tokens of a pack (or of a padded row), N response tokens in all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
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
        """A batch from (prompt ids, response ids) pairs; equal prompts are held once."""
        index: dict[tuple[int, ...], int] = {}
        prompt_of = tuple(index.setdefault(tuple(prompt), len(index)) for prompt, _ in pairs)
        return cls(tuple(index), tuple(tuple(response) for _, response in pairs), prompt_of, temperature)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Response tokens of each row."""
        return tuple(map(len, self.response_ids))

    @cached_property
    def mask_BT(self) -> Tensor:
        """(B, T) bool on the CPU, True at real response tokens; T is the longest response."""
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    @cached_property
    def token_BT(self) -> Tensor:
        """(B, T) int64 on the CPU: the response tokens, 0 beyond each row's end."""
        rows = [torch.tensor(ids) for ids in self.response_ids]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @cached_property
    def first_of(self) -> tuple[int, ...]:
        """For each row the first one with the same prompt and response: those that are their own first are computed."""
        first: dict[tuple[int, tuple[int, ...]], int] = {}
        return tuple(
            first.setdefault(pair, row) for row, pair in enumerate(zip(self.prompt_of, self.response_ids, strict=True))
        )

    def fed(self, *, packed: bool) -> int:
        """Tokens that a model is fed for this batch, padding apart: prompts once, or before every response."""
        rows = [row for row, first in enumerate(self.first_of) if row == first]
        prompts = [self.prompt_of[row] for row in rows]
        fed = sum(len(self.prompt_ids[prompt]) for prompt in (set(prompts) if packed else prompts))
        return fed + sum(self.lengths[row] - 1 for row in rows)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together."""
        return max(len(self.prompt_ids[p]) + n for p, n in zip(self.prompt_of, self.lengths, strict=True))


def within(sizes: Sequence[int], tokens: int) -> list[list[int]]:
    """The indices of ``sizes``, in order, in runs of at most ``tokens`` together; one that is larger is a run alone."""
    runs: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = tokens
        runs[-1].append(index)
        room -= size
    return runs


ALONE = 32  # tokens of a segment that is worth a call of its own
LONG = 256  # tokens of a segment that is worth taking in halves

Span = tuple[int, int]  # start and end of positions in a pack


@dataclass(frozen=True)
class Prefixes:
    """Who attends to whom in a pack: each segment to itself, causally; some also to all of one earlier segment.

    A prompt with one response is one segment with it. Of a prompt with several, the prompt is one, each response
    another, and these lie behind one another, so that what attends to the prompt is one slice. In the last layer, where
    of such a prompt only the last token asks, the prompt is no segment, and what attends to it begins with that token.
    """

    segments: tuple[Span, ...]
    shared: tuple[tuple[Span, Span], ...]  # who attends to a prompt beside its own segment; the prompt

    @cached_property
    def length(self) -> int:
        """Positions of the pack."""
        return max(end for _, end in (*self.segments, *(queries for queries, _ in self.shared)))

    @cached_property
    def whole(self) -> bool:
        """Whether every position is in a segment. One that is in none has no output but what it is shared."""
        return sum(end - start for start, end in self.segments) == self.length

    @cached_property
    def rectangle(self) -> tuple[Tensor, Tensor] | None:
        """(index_ST, real_ST) of the segments of fewer than ``ALONE`` tokens, which go together: where their tokens
        lie, and which are padding. Longer ones go without padding: copies and padding cost more than calls.

        Padding stands on the right, where causal attention does not see it, and points to the segment's last token.
        """
        short = [(start, end) for start, end in self.segments if start < end < start + ALONE]
        if not short:
            return None
        start_S1 = torch.tensor([start for start, _ in short])[:, None]
        length_S1 = torch.tensor([end - start for start, end in short])[:, None]
        step_T = torch.arange(int(length_S1.max()))
        return start_S1 + torch.minimum(step_T, length_S1 - 1), step_T < length_S1

    @cached_property
    def causal(self) -> tuple[Span, ...]:
        """The other segments, a long one in parts: each attends to itself."""
        return tuple(part for segment in self._long for part in _parts(segment)[0])

    @cached_property
    def full(self) -> tuple[tuple[Span, Span], ...]:
        """(queries, keys), all of them seen: later parts of a long segment and earlier ones, responses and prompts."""
        return *(pair for segment in self._long for pair in _parts(segment)[1]), *self.shared

    @property
    def _long(self) -> Iterator[Span]:
        return ((start, end) for start, end in self.segments if end - start >= ALONE)

    @cached_property
    def mask_LL(self) -> Tensor:
        """(L, L) bool: [q, k], q attends to k. The definition that the fast forms are held to."""
        mask_LL = torch.zeros(self.length, self.length, dtype=torch.bool)
        for start, end in self.segments:
            mask_LL[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        for (start, end), (prompt_start, prompt_end) in self.shared:
            mask_LL[start:end, prompt_start:prompt_end] = True
        return mask_LL


def _parts(span: Span) -> tuple[list[Span], list[tuple[Span, Span]]]:
    """A segment on itself: its causal parts, and which of them attend to which others in full. A long one is taken in
    halves: of up to 512 keys the CPU's kernel computes all, also those that causal attention does not see."""
    start, end = span
    if end - start < LONG:
        return [span], []
    middle = (start + end) // 2
    (first, first_full), (second, second_full) = _parts((start, middle)), _parts((middle, end))
    return first + second, [*first_full, *second_full, ((middle, end), (start, middle))]


@dataclass(frozen=True)
class Pack:
    """Prompts with their responses in one row for a causal model; tensors on the CPU."""

    rows: tuple[int, ...]  # of the batch, in the order of their tokens in predict_N
    ids_L: Tensor
    position_L: Tensor
    predict_N: Tensor  # the position that predicts each response token
    prefixes: Prefixes
    last: Prefixes  # of the last layer, where of a prompt with several responses only its last token asks

    @cached_property
    def asked(self) -> tuple[Tensor, Tensor]:
        """The M different positions of ``predict_N``, ascending, and which of them each of its N is."""
        position_M, index_N = self.predict_N.unique(return_inverse=True)
        return position_M, index_N


def pack(batch: ResponseBatch, tokens: int) -> list[Pack]:
    """The different responses of a batch, each prompt fed once, in packs of at most ``tokens`` tokens.

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
    positions: list[Tensor] = []
    predict: list[Tensor] = []
    segments: list[Span] = []
    shared: list[tuple[Span, Span]] = []
    last_segments: list[Span] = []
    last_shared: list[tuple[Span, Span]] = []
    for prompt, rows in groups:
        prompt_ids = batch.prompt_ids[prompt]
        start, end = len(ids), len(ids) + len(prompt_ids)
        ids.extend(prompt_ids)
        positions.append(torch.arange(len(prompt_ids)))
        behind = []
        for row in rows:
            fed = batch.response_ids[row][:-1]
            behind.append((len(ids), len(ids) + len(fed)))
            predict.append(torch.tensor([end - 1, *range(*behind[-1])]))
            positions.append(torch.arange(len(prompt_ids), len(prompt_ids) + len(fed)))
            ids.extend(fed)
        behind = [segment for segment in behind if segment[1] > segment[0]]
        if len(rows) == 1:
            segments.append((start, len(ids)))
            last_segments.append(segments[-1])  # one call costs less than the rest of its prompt does
            continue
        segments += [(start, end), *behind]
        last_segments += behind
        last_shared.append(((end - 1, len(ids)), (start, end)))
        if len(ids) > end:
            shared.append(((end, len(ids)), (start, end)))
    return Pack(
        tuple(row for _, rows in groups for row in rows),
        torch.tensor(ids),
        torch.cat(positions),
        torch.cat(predict),
        Prefixes(tuple(segments), tuple(shared)),
        Prefixes(tuple(last_segments), tuple(last_shared)),
    )


@dataclass(frozen=True)
class PaddedLayout:
    """Rows of prompt + response for a causal model, padded on the right to L, the longest of them."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    predict_BL: Tensor  # bool: True where the position predicts a response token


def padded(batch: ResponseBatch, rows: Sequence[int], pad_id: int, device: torch.device) -> PaddedLayout:
    """The plain layout of some rows of a batch."""
    ids = [batch.prompt_ids[batch.prompt_of[row]] + batch.response_ids[row][:-1] for row in rows]
    end_B = torch.tensor([len(row) for row in ids])
    start_B = end_B - torch.tensor([batch.lengths[row] for row in rows])
    ids_BL = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in ids], batch_first=True, padding_value=pad_id)
    position_L = torch.arange(ids_BL.shape[1])
    real_BL = position_L < end_B[:, None]
    predict_BL = real_BL & (position_L >= start_B[:, None])
    return PaddedLayout(ids_BL.to(device), real_BL.long().to(device), predict_BL.to(device))


def passes(batch: ResponseBatch, tokens: int) -> list[list[int]]:
    """The different rows of a batch in passes of like length, at most ``tokens`` padded positions each (one row at
    least), for the padded layout.

    Rows of one length need no padding; a batch laid out as one rectangle is often half padding.
    """
    length = [len(batch.prompt_ids[p]) + n - 1 for p, n in zip(batch.prompt_of, batch.lengths, strict=True)]
    parts: list[list[int]] = [[]]
    for row in sorted((row for row, first in enumerate(batch.first_of) if row == first), key=length.__getitem__):
        if parts[-1] and (len(parts[-1]) + 1) * length[row] > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def places(batch: ResponseBatch, parts: Sequence[Sequence[int]]) -> Tensor:
    """(N,) where each response token of the batch, row by row, stands in the concatenation of the parts' tokens."""
    start, starts = 0, [0] * len(batch.lengths)
    for row in (row for part in parts for row in part):
        starts[row] = start
        start += batch.lengths[row]
    spans = zip((starts[first] for first in batch.first_of), batch.lengths, strict=True)
    return torch.cat([torch.arange(s, s + n) for s, n in spans])
