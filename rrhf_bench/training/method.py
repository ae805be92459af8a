"""What a method is: a loss over examples that the one loop minimises, a trainer with its own loop, or no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import Policy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.rewards.reward import RewardModel
from rrhf_bench.sampling.sampler import Sampler
from rrhf_bench.settings.methods import Requirement


@dataclass(frozen=True)
class TrainInputs:
    """What the stages before training made. Empty where a method does not require it."""

    preferences: Sequence[Preference] = ()  # of the training prompts
    candidates: Sequence[Candidates] = ()  # scored, one for each training prompt; what is sampled in training is absent

    @property
    def prompts(self) -> list[Prompt]:
        """The training prompts, in order."""
        rows: Sequence[Preference | Candidates] = self.preferences or self.candidates
        return [row.prompt for row in rows]


@dataclass(frozen=True)
class Example:
    """One prompt's worth of training: the unit that batch sizes count. ``rewards`` is empty where no score is used."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True)
class MethodBatch:
    """Some examples and their responses as one batch: row r of it belongs to example ``group_of[r]``."""

    examples: tuple[Example, ...]
    batch: ResponseBatch
    group_of: tuple[int, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], tokenization: Tokenization, max_length: int | None) -> MethodBatch:
        rows = [(example.prompt, response) for example in examples for response in example.responses]
        group_of = tuple(g for g, example in enumerate(examples) for _ in example.responses)
        return cls(tuple(examples), tokenization.batch(rows, max_length), group_of)

    def rewards(self) -> Tensor:
        """Return the (R,) rewards of the rows in float64, the precision in which the records hold them.

        Losses compare rewards. In float32 two rewards that the reward model tells apart could tie.
        """
        return torch.tensor([r for example in self.examples for r in example.rewards], dtype=torch.float64)

    def grouped(self, value_R: Tensor) -> Tensor:
        """Return the (R, ...) values of the rows as (B, G, ...), with G the widest group.

        Narrower groups are filled up with zeros (False).
        """
        sizes = [len(example.responses) for example in self.examples]
        empty = value_R.new_zeros((len(sizes), max(sizes), *value_R.shape[1:]))
        present_BG = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        mask = present_BG.to(value_R.device).reshape(*present_BG.shape, *(1,) * (value_R.dim() - 1))
        return empty.masked_scatter(mask.expand_as(empty), value_R)

    def padded_lengths(self) -> Tensor:
        """Return the (B,) longest query + response of each group in tokens, to which the released RRHF code pads it."""
        lengths = [0] * len(self.examples)
        for group, prompt, response in zip(self.group_of, self.batch.prompt_of, self.batch.response_ids, strict=True):
            lengths[group] = max(lengths[group], len(self.batch.prompt_ids[prompt]) + len(response))
        return torch.tensor(lengths)


@dataclass(frozen=True)
class LossOutput:
    """``loss`` is a mean over ``weight`` units (prompts or tokens, as the method says). The loop accumulates
    loss * weight and divides once by the sum of weights, so uneven micro-batches give the mean over the whole batch."""

    loss: Tensor
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class LossMethod(Protocol):
    """RRHF, SFT and their kind: examples in, a pure loss out."""

    requires: frozenset[Requirement]

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """The examples of one epoch. Raises DataError where nothing could be learnt from the inputs."""
        ...

    def loss(self, policy: Policy, batch: MethodBatch) -> LossOutput: ...


@dataclass(frozen=True)
class Progress:
    """Where a training run stands. ``fraction`` is of its own budget, in [0, 1]."""

    fraction: float
    step: int  # optimiser steps done
    sampled_tokens: int  # tokens this method sampled while training (not the candidates made before it)


class Checkpoints(Protocol):
    """Where a run writes down what it consists of, and finds it when it starts again after it was killed."""

    def last(self) -> Mapping[str, Any] | None:
        """What was written down last, or None; whatever was told to the context after that has then been forgotten."""
        ...

    def offer(self, state: Mapping[str, Any]) -> None:
        """A moment from which the run could go on, between two steps: tensors, and what JSON knows. Read at once or
        not at all: the tensors are those that train."""
        ...


class NoCheckpoints:
    """Runs that start anew."""

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
    reference: Policy | None  # the initial policy, frozen
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
    counts: Mapping[str, int] = field(default_factory=dict)  # dropped, truncated, tied: for the table's footnote


class Trainer(Protocol):
    """Changes a policy's weights in place."""

    requires: frozenset[Requirement]

    def fit(self, policy: Policy, inputs: TrainInputs, context: TrainContext) -> TrainResult: ...


class InferenceMethod(Protocol):
    """Best-of-n and its kind: no weight changes, another way to sample."""

    requires: frozenset[Requirement]

    def wrap(self, sampler: Sampler, reward: RewardModel) -> Sampler: ...
