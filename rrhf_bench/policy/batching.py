"""What a policy is asked about: responses to prompts as token ids, and the layout of them that a model is fed.

A ``ResponseBatch`` says which tokens, not how they are laid out: every prompt once, every response with the prompt it
belongs to. The policy chooses the layout. ``padded`` is the plain one: prompt + response a row, padding on the right.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class PaddedLayout:
    """Rows of prompt + response for a causal model, padded on the right to L, the longest of them."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    predict_BL: Tensor  # bool: True where the position predicts a response token


def padded(batch: ResponseBatch, rows: Sequence[int], pad_id: int, device: torch.device) -> PaddedLayout:
    """The plain layout of some rows of a batch. A response's last token is not fed: nothing is predicted from it."""
    ids = [batch.prompt_ids[batch.prompt_of[row]] + batch.response_ids[row][:-1] for row in rows]
    end_B = torch.tensor([len(row) for row in ids])
    start_B = end_B - torch.tensor([batch.lengths[row] for row in rows])
    ids_BL = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in ids], batch_first=True, padding_value=pad_id)
    position_L = torch.arange(ids_BL.shape[1])
    real_BL = position_L < end_B[:, None]
    predict_BL = real_BL & (position_L >= start_B[:, None])
    return PaddedLayout(ids_BL.to(device), real_BL.long().to(device), predict_BL.to(device))


def passes(batch: ResponseBatch, tokens: int) -> list[list[int]]:
    """The rows of a batch in passes of like length, at most ``tokens`` padded positions each (one row at least).

    Rows of one length need no padding; a batch laid out as one rectangle is often half padding.
    """
    length = [len(batch.prompt_ids[p]) + n - 1 for p, n in zip(batch.prompt_of, batch.lengths, strict=True)]
    parts: list[list[int]] = [[]]
    for row in sorted(range(len(length)), key=length.__getitem__):
        if parts[-1] and (len(parts[-1]) + 1) * length[row] > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def original_order(batch: ResponseBatch, parts: Sequence[Sequence[int]]) -> Tensor:
    """(N,) where each response token of the batch, row by row, stands in the concatenation of the parts' tokens."""
    start, starts = 0, [0] * len(batch.lengths)
    for row in (row for part in parts for row in part):
        starts[row] = start
        start += batch.lengths[row]
    return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, batch.lengths, strict=True)])
