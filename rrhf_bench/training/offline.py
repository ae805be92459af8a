"""The one offline loop around a LossMethod: order, accumulation, schedule, clipping. Methods bring the loss only, and a
supply the examples."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from rrhf_bench.errors import DataError, Diverged
from rrhf_bench.jsonl import to_json
from rrhf_bench.policy.batching import within
from rrhf_bench.policy.policy import Policy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates
from rrhf_bench.seeding import generator
from rrhf_bench.settings.methods import OfflineSettings, PairSettings
from rrhf_bench.training.method import (
    Example,
    LossMethod,
    MethodBatch,
    Progress,
    TrainContext,
    TrainInputs,
    TrainResult,
)
from rrhf_bench.training.optimiser import AdamW, learning_rate
from rrhf_bench.training.reference import ResponseLogprobs, response_logprobs

T = TypeVar("T")
Row = TypeVar("Row", Example, Candidates)


class Supply(Protocol):
    """The source of each optimiser step's examples: those of an epoch over and over, or new ones.

    Iterated once, in step with the training: examples may be made from the policy's weights when they are asked for.
    """

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        ...

    @property
    def sampled_tokens(self) -> int:
        """Tokens sampled so far."""
        ...

    @property
    def sampled_replies(self) -> int:
        """Replies sampled and scored so far."""
        ...

    @property
    def trained_tokens(self) -> int:
        """Tokens fed to the policy in the steps of all examples so far; of fixed examples, of the whole run."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Return the counts of responses that were dropped, cut or tied so far."""
        ...

    def state(self) -> Mapping[str, Any] | None:
        """Beside the steps done, what the next step's examples depend on; None where it is not the moment to ask."""
        ...

    def resume(self, steps: int, state: Mapping[str, Any]) -> None:
        """Go on behind ``steps`` steps, from the state that there was then."""
        ...

    def __iter__(self) -> Iterator[Sequence[Example]]: ...


Supplier = Callable[[LossMethod, OfflineSettings, Policy, TrainInputs, TrainContext], Supply]


class FixedExamples:
    """The Supply of offline methods: the method's examples of what it was given, the same in every epoch.

    Raises DataError where no candidate has a token to train on, or no prompt leaves room for one.
    """

    sampled_tokens = sampled_replies = 0

    def __init__(
        self,
        method: LossMethod,
        settings: OfflineSettings,
        policy: Policy,
        inputs: TrainInputs,
        context: TrainContext,
    ) -> None:
        groups, empty = with_tokens(inputs.candidates, policy.tokenization)
        groups = [group for group in groups if group.responses]
        if empty and not groups:
            raise DataError(
                f"candidates: none of {empty} responses has a token to train on, each was cut before any text; "
                "sample longer ones, or look at the policy that they come from"
            )
        made = method.examples(replace(inputs, candidates=groups, tokenization=policy.tokenization))
        examples = fitting(made, policy.tokenization, settings.max_length)
        if "reference" in settings.requires:
            assert inputs.reference is not None
            # Of responses that the method has made itself. The policy still is the initial one, adapters included.
            unknown = [
                Candidates(e.prompt, tuple(r for r in e.responses if (e.prompt, r) not in inputs.reference))
                for e in examples
            ]
            own = response_logprobs(policy, unknown, max_length=settings.max_length or sys.maxsize)
            examples = with_reference(examples, inputs.reference | own)
        self.steps = step_count(len(examples), settings)
        fed = (fed_tokens(policy, example, settings.max_length) for example in examples)
        self.trained_tokens = settings.epochs * sum(fed)
        self.counts = {
            "examples": len(examples),
            "prompts_too_long": len(made) - len(examples),
            "responses_empty": empty,
            **tally(examples, groups, policy.tokenization, settings.max_length),
        }
        unused = len(groups) - len(made)
        if isinstance(settings, PairSettings):  # which may make several examples of a pair
            unused = sum(len(set(group.scores)) < 2 for group in groups)
        if unused > 0:
            self.counts["prompts_without_example"] = unused
        self._batches = batches(examples, settings, context.seed)

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, steps: int, state: Mapping[str, Any]) -> None:
        self._batches = islice(self._batches, steps, None)

    def __iter__(self) -> Iterator[list[Example]]:
        return self._batches


class OfflineTrainer:
    """Epochs over prompts, ``batch_prompts`` of them an optimiser step, in an order fixed by the seed."""

    def __init__(self, method: LossMethod, settings: OfflineSettings, supply: Supplier = FixedExamples) -> None:
        self.method = method
        self.settings = settings
        self.supply = supply

    def fit(self, policy: Policy, inputs: TrainInputs, context: TrainContext) -> TrainResult:
        """Train the policy in place.

        Raises DataError if no example fits, Diverged (with its step) if a loss, gradient or weight is not finite.
        """
        settings = self.settings
        supply = self.supply(self.method, settings, policy, inputs, context)
        total = supply.steps
        optimiser = AdamW(policy.parameters(), settings)
        done = 0
        if (kept := context.checkpoints.last()) is not None:
            done = kept["step"]
            optimiser.load(kept["optimiser"])
            supply.resume(done, kept["supply"])
        else:
            context.watch(Progress(0.0, 0, 0), policy)
        for step, batch in enumerate(supply, done):
            lr = learning_rate(step, total, settings)
            metrics, weight = self.accumulate(policy, batch)
            norm = optimiser.clip(weight)
            if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
                prompts = ", ".join(example.prompt.id for example in batch[:4])
                raise Diverged(
                    f"step {step + 1} of {total}: loss {metrics['loss']} with gradient norm {norm}; "
                    f"lower lr ({settings.lr}) or look at the prompts of this batch ({prompts}, ...)",
                    [to_json(example) for example in batch],
                )
            optimiser.step(lr)
            if not optimiser.has_finite_weights():
                raise Diverged(
                    f"the weights are not finite after step {step + 1} of {total}; lower lr ({settings.lr}), or train "
                    "in float32",
                    [to_json(example) for example in batch],
                )
            context.log({"step": step + 1, **metrics, "lr": lr, "grad_norm": norm})
            context.watch(Progress((step + 1) / total, step + 1, supply.sampled_tokens), policy)
            if (examples := supply.state()) is not None:
                state = {"step": step + 1, "supply": examples, "optimiser": optimiser.state()}
                context.checkpoints.offer(state)
        optimiser.close()
        counts, sampled = dict(supply.counts), (supply.sampled_tokens, supply.sampled_replies)
        return TrainResult(total, *sampled, counts, supply.trained_tokens)

    def accumulate(self, policy: Policy, batch: Sequence[Example]) -> tuple[dict[str, float], float]:
        """Gradients of the summed loss over the batch, in passes of the policy's pass_tokens, whole prompts each; the
        metrics' weighted means, and the weight that the gradients are to be divided by."""
        max_length = self.settings.max_length
        sizes = [fed_tokens(policy, example, max_length) for example in batch]
        runs = [[batch[i] for i in run] for run in within(sizes, policy.pass_tokens)]
        if "whole step" in self.settings.requires and len(runs) > 1:
            return self._accumulate_whole(policy, runs)
        weight = 0.0
        sums: dict[str, float] = defaultdict(float)
        for run in runs:
            method_batch = MethodBatch.of(run, policy.tokenization, max_length)
            if "half temperature" in self.settings.needs:
                with torch.no_grad():
                    half_RT = policy.token_logprobs(replace(method_batch.responses, temperature=0.5))
                method_batch = replace(method_batch, half_temperature_RT=half_RT)
            output = self.method.loss(policy.token_logprobs(method_batch.responses), method_batch)
            (output.loss * output.weight).backward()
            weight += output.weight
            for name, value in {"loss": output.loss.item(), **output.metrics}.items():
                sums[name] += value * output.weight
        return {name: value / weight for name, value in sums.items()}, weight

    def _accumulate_whole(self, policy: Policy, runs: Sequence[Sequence[Example]]) -> tuple[dict[str, float], float]:
        """Return the same for a loss that is no mean over passes: the log-probs of all passes without gradients, the
        loss of them together, then each pass again with the loss's gradient."""

        def batch_of(examples: Sequence[Example]) -> MethodBatch:
            return MethodBatch.of(examples, policy.tokenization, self.settings.max_length)

        passes = [batch_of(run).responses for run in runs]
        with torch.no_grad():
            rows = [logp_T for responses in passes for logp_T in policy.token_logprobs(responses)]
        logp_RT = pad_sequence(rows, batch_first=True).requires_grad_()
        output = self.method.loss(logp_RT, batch_of([example for run in runs for example in run]))
        (grad_RT,) = torch.autograd.grad(output.loss * output.weight, logp_RT)
        start = 0
        for responses in passes:
            logp_BT = policy.token_logprobs(responses)
            logp_BT.backward(grad_RT[start : start + len(logp_BT), : logp_BT.shape[1]])
            start += len(logp_BT)
        return {"loss": output.loss.item(), **output.metrics}, output.weight


def fed_tokens(policy: Policy, example: Example, max_length: int | None) -> int:
    """Tokens that the policy is fed for one example."""
    rows = [(example.prompt, response) for response in example.responses]
    return policy.fed_tokens(policy.tokenization.batch(rows, max_length))


def with_reference(examples: Sequence[Example], reference: ResponseLogprobs) -> list[Example]:
    """Return the examples with the reference log-probs of their responses."""
    return [replace(e, reference=tuple(reference.of(e.prompt, r) for r in e.responses)) for e in examples]


def fitting(rows: Sequence[Row], tokenization: Tokenization, max_length: int | None) -> list[Row]:
    """The rows whose prompt leaves room for a response. Raises DataError where none does."""
    lengths = [len(tokenization.prompt_ids(row.prompt)) for row in rows]
    kept = [row for row, length in zip(rows, lengths, strict=True) if max_length is None or length < max_length]
    if not kept:
        raise DataError(
            f"max_length {max_length}: none of {len(rows)} prompts leaves room for a response "
            f"(the shortest has {min(lengths, default=0)} tokens); raise max_length"
        )
    return kept


def with_tokens(groups: Sequence[Candidates], tokenization: Tokenization) -> tuple[list[Candidates], int]:
    """The groups without the responses that have no token to train on, and how many these were: the length cap cut them
    before there was any text, as where a policy says nothing but pad tokens. A group may be left with none."""
    kept = [
        replace(
            group,
            responses=tuple(r for r in group.responses if r.ended or tokenization.response_ids(r.text, ended=False)),
        )
        for group in groups
    ]
    return kept, sum(len(group.responses) for group in groups) - sum(len(group.responses) for group in kept)


def tally(
    examples: Sequence[Example], groups: Sequence[Candidates], tokenization: Tokenization, max_length: int | None
) -> dict[str, int]:
    """Return the counts of responses that ``max_length`` cuts, of responses that contain the name of a special token
    such as ``</s>``, and of groups with tied rewards.

    The prompts of all examples must fit. A response that stands in several examples counts once. Ties are those of all
    candidates, also if a method trains on some of them, and on the same float64 rewards that the loss compares. Groups
    whose prompts do not fit are left out.
    """
    responses = {id(response): response for example in examples for response in example.responses}
    cut: set[int] = set()
    if max_length is not None:
        for example in examples:
            room = max_length - len(tokenization.prompt_ids(example.prompt))
            cut |= {id(r) for r in example.responses if len(tokenization.response_ids(r.text, ended=r.ended)) > room}
        groups = [group for group in groups if len(tokenization.prompt_ids(group.prompt)) < max_length]
    return {
        "responses_truncated": len(cut),
        "responses_with_special_tokens": sum(tokenization.names_special_token(r.text) for r in responses.values()),
        "groups_with_ties": sum(len(set(group.scores)) < len(group.scores) for group in groups),
        "groups_all_equal": sum(len(set(group.scores)) == 1 < len(group.scores) for group in groups),
    }


def step_count(rows: int, settings: OfflineSettings) -> int:
    """Return the number of batches of that many rows, over all epochs."""
    return settings.epochs * math.ceil(rows / settings.batch_prompts)


def batches(rows: Sequence[T], settings: OfflineSettings, seed: int) -> Iterator[list[T]]:
    """Every row once an epoch, shuffled by (seed, epoch); the last batch of an epoch may be smaller."""
    for epoch in range(settings.epochs):
        order = generator(seed, "order", epoch).permutation(len(rows))
        for start in range(0, len(rows), settings.batch_prompts):
            yield [rows[i] for i in order[start : start + settings.batch_prompts]]
