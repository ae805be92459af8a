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
    """Rows of prompt + response for a causal model, L the longest row."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    predict_BL: Tensor  # bool: True where the position predicts a response token; row-major order is that of mask_BT


def padded(batch: ResponseBatch, pad_id: int, device: torch.device) -> PaddedLayout:
    """The plain layout. The last token of a response is not fed: nothing is predicted from it."""
    rows = [batch.prompt_ids[p] + r[:-1] for p, r in zip(batch.prompt_of, batch.response_ids, strict=True)]
    end_B = torch.tensor([len(row) for row in rows])
    start_B = end_B - torch.tensor(batch.lengths)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=pad_id)
    position = torch.arange(ids.shape[1])
    real = position < end_B[:, None]
    return PaddedLayout(ids.to(device), real.long().to(device), (real & (position >= start_B[:, None])).to(device))
