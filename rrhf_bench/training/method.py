"""Define the interfaces of a method: a loss over examples, a trainer with a loop of its own, or no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import Policy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.rewards.reward import RewardModel
from rrhf_bench.sampling.sampler import Sampler
from rrhf_bench.training.reference import ResponseLogprobs


@dataclass(frozen=True)
class TrainInputs:
    """The products of the stages before training. A field is empty if the method does not require it."""

    preferences: Sequence[Preference] = ()  # of the training prompts
    candidates: Sequence[Candidates] = ()  # scored, one for each training prompt; what is sampled in training is absent
    reference: ResponseLogprobs | None = None  # of every response above, for a method that requires it
    tokenization: Tokenization | None = None  # of the policy, for a method that puts text into its prompts

    @property
    def prompts(self) -> list[Prompt]:
        """The training prompts, in order."""
        rows: Sequence[Preference | Candidates] = self.preferences or self.candidates
        return [row.prompt for row in rows]


@dataclass(frozen=True)
class Example:
    """One prompt's worth of training: the unit that batch sizes count."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: tuple[float, ...] = ()  # of the responses; empty if the method uses none
    # Token log-probs of each response under the frozen initial policy; empty if the method requires no reference.
    reference: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class MethodBatch:
    """R responses to B prompts: row r belongs to prompt ``group_of[r]``. Rows of one prompt follow one another."""

    responses: ResponseBatch
    group_of: tuple[int, ...]
    reward_R: Tensor  # float64 on the CPU, NaN where there is none
    reference_RT: Tensor | None = None  # float32 on the CPU, 0 beyond each row's end
    half_temperature_RT: Tensor | None = None  # the policy's log-probs at temperature 1/2, without gradient

    @classmethod
    def of(cls, examples: Sequence[Example], tokenization: Tokenization, max_length: int | None) -> MethodBatch:
        """Return the batch of some examples. Responses are cut where prompt and response exceed ``max_length``."""
        rows = [(example.prompt, response) for example in examples for response in example.responses]
        group_of = tuple(g for g, example in enumerate(examples) for _ in example.responses)
        # Losses compare rewards. In float32 two rewards that the reward model tells apart could tie.
        rewards = [r for example in examples for r in example.rewards or (math.nan,) * len(example.responses)]
        responses = tokenization.batch(rows, max_length)
        reference = [logp_T for example in examples for logp_T in example.reference]
        return cls(
            responses,
            group_of,
            torch.tensor(rewards, dtype=torch.float64),
            _pad(reference, responses.lengths) if reference else None,
        )

    @property
    def prompts(self) -> int:
        """B, the number of prompts."""
        return self.group_of[-1] + 1

    def grouped(self, value_R: Tensor, absent: float = 0.0) -> Tensor:
        """Return the (R, ...) values of the rows as (B, G, ...), with G the widest group.

        Narrower groups are filled up with ``absent``: zeros (False), or NaN for rewards.
        """
        size_B = torch.bincount(torch.tensor(self.group_of), minlength=self.prompts)
        widest = int(size_B.max())
        empty = value_R.new_full((self.prompts, widest, *value_R.shape[1:]), absent)
        present_BG = torch.arange(widest) < size_B[:, None]
        mask = present_BG.to(value_R.device).reshape(*present_BG.shape, *(1,) * (value_R.dim() - 1))
        return empty.masked_scatter(mask.expand_as(empty), value_R)

    def padded_lengths(self) -> Tensor:
        """Return the (B,) longest query + response of each group in tokens, to which the released RRHF code pads it."""
        batch = self.responses
        lengths = [0] * self.prompts
        for group, prompt, response in zip(self.group_of, batch.prompt_of, batch.response_ids, strict=True):
            lengths[group] = max(lengths[group], len(batch.prompt_ids[prompt]) + len(response))
        return torch.tensor(lengths)


def _pad(rows: Sequence[NDArray[np.float32]], lengths: Sequence[int]) -> Tensor:
    """Return the (R, T) first ``lengths`` values of each row, 0 beyond them."""
    padded_RT = torch.zeros(len(rows), max(lengths))
    for row, (values, length) in enumerate(zip(rows, lengths, strict=True)):
        assert len(values) >= length, "reference log-probs are of other tokens than the response"
        padded_RT[row, :length] = torch.as_tensor(values[:length])
    return padded_RT


@dataclass(frozen=True)
class LossOutput:
    """``loss`` is a mean over ``weight`` units (prompts or tokens, as the method says). The loop accumulates
    loss * weight and divides once by the sum of weights, so uneven micro-batches give the mean over the whole batch."""

    loss: Tensor
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class LossMethod(Protocol):
    """An offline method such as RRHF or SFT: it chooses examples and computes a loss of log-probs. It sees no model."""

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return the examples of one epoch. Raises DataError if nothing could be learnt from the inputs.

        The loop fills in ``Example.reference`` for a method that requires a reference. The responses of an example need
        not be those of ``inputs``: they may be made here, such as another prompt's reply.
        """
        ...

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss of a batch from the (R, T) log-probs of its responses, which carry the gradient."""
        ...


@dataclass(frozen=True)
class Progress:
    """The progress of a training run. ``fraction`` is of its own budget, in [0, 1]."""

    fraction: float
    step: int  # optimiser steps done
    sampled_tokens: int  # tokens this method sampled while training (not the candidates made before it)


class Checkpoints(Protocol):
    """The store of a run's resumable state, which a run that was killed reads when it starts again."""

    def last(self) -> Mapping[str, Any] | None:
        """Return the last state, or None. The context then holds nothing that was logged after that state."""
        ...

    def offer(self, state: Mapping[str, Any]) -> None:
        """Offer a resumable state (tensors and JSON values) between two steps.

        Implementations must copy it before they return, because the tensors keep training.
        """
        ...


class NoCheckpoints:
    """Checkpoints of a run that keeps none."""

    def last(self) -> None:
        return None

    def offer(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class TrainContext:
    """The seed, models and callbacks of one training run. A trainer uses no process-wide state and writes no files."""

    seed: int
    sampler: Sampler | None  # holds some weights; sync before use
    reward: RewardModel | None
    reference: Policy | None  # the initial policy, frozen, for a method that samples while it trains
    max_new_tokens: int  # length cap of what a method samples while training
    stop: tuple[str, ...]  # stop strings of the same
    # Called once before the first optimiser step, then after every step (offline loop) or every iteration (PPO).
    watch: Callable[[Progress, Policy], None]
    log: Callable[[Mapping[str, float]], None]  # one line of metrics.jsonl
    checkpoints: Checkpoints = field(default_factory=lambda: NoCheckpoints())
    took: Callable[[Mapping[str, float]], None] = lambda seconds: None  # an iteration's wall-clock by part
    keep: Callable[[Sequence[Candidates]], None] = lambda candidates: None  # scored candidates made while training


@dataclass(frozen=True)
class TrainResult:
    steps: int
    sampled_tokens: int
    sampled_replies: int = 0  # while training; each was scored once
    counts: Mapping[str, int] = field(default_factory=dict)  # dropped, truncated, tied: for the table's footnote
    trained_tokens: int = 0  # fed to the policy with gradients, prompts included


class Trainer(Protocol):
    """Changes a policy's weights in place."""

    def fit(self, policy: Policy, inputs: TrainInputs, context: TrainContext) -> TrainResult: ...


class InferenceMethod(Protocol):
    """A method such as best-of-n: it changes no weights and samples in another way."""

    def wrap(self, sampler: Sampler, reward: RewardModel) -> Sampler: ...
