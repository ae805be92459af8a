"""Candidates drawn anew while training: OP-k and OP-k+KL (arXiv 2304.05302, Table 1, sections 4 and 5).

OP-k differs from the offline sampling policies in where a step's examples come from, and in nothing else: the loop, the
order of prompts and the method are the same.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from rrhf_bench.errors import Diverged
from rrhf_bench.jsonl import from_json, to_json
from rrhf_bench.policy.logprobs import kl_k1
from rrhf_bench.policy.policy import Policy
from rrhf_bench.records import Candidates
from rrhf_bench.rewards.reward import require_finite
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.settings.candidates import SampledCandidates
from rrhf_bench.settings.methods import OfflineSettings, candidates_of
from rrhf_bench.training.method import Example, LossMethod, TrainContext, TrainInputs
from rrhf_bench.training.offline import batches, fed_tokens, fitting, step_count, tally, with_reference, with_tokens
from rrhf_bench.training.reference import ResponseLogprobs, response_logprobs
from rrhf_bench.training.rollouts import RolloutSampler, sample_metrics, sampled_tokens


class OnlineExamples:
    """The Supply of OP-k: every ``refresh`` optimiser steps the policy in training samples candidates for the prompts
    of the next ``refresh`` steps, and the reward model scores them. A group is its samples, then the given candidates
    of ``inputs``, which come scored.

    With ``reward_kl`` (OP-k+KL) a method sees reward - reward_kl * log(pi(y | x) / ref(y | x)) in place of the reward,
    for every candidate of the group, the given ones included: pi is the policy as it is at that refresh, and the
    log-probs are summed over the tokens that y is trained on. The scores that ``context.keep`` is told stay the reward
    model's.

    A response without a token to train on is sampled, scored and kept like any other, but is in no example.

    The method's examples must be one a group, in order. Raises DataError where no prompt fits, or where the method
    could learn nothing from the first refresh; Diverged, with its place, where a reward is not finite, or where no
    response of a step has a token to train on.
    """

    _TOTALS = ("sampled_tokens", "sampled_replies", "trained_tokens")

    def __init__(
        self,
        method: LossMethod,
        settings: OfflineSettings,
        policy: Policy,
        inputs: TrainInputs,
        context: TrainContext,
    ) -> None:
        candidates = candidates_of(settings)
        assert isinstance(candidates, SampledCandidates), "online candidates are samples of the policy"
        self.candidates = candidates
        self.method = method
        self.settings = settings
        self.policy = policy
        self.inputs = inputs
        self.context = context
        self.sampler = self._sampler()
        self.refresh = candidates.refresh
        given = inputs.candidates or [Candidates(prompt, ()) for prompt in inputs.prompts]
        self.given = fitting(given, policy.tokenization, settings.max_length)
        self.steps = step_count(len(self.given), settings)
        self.sampled_tokens = self.sampled_replies = self.trained_tokens = 0
        self.counts = Counter(examples=len(self.given), prompts_too_long=len(given) - len(self.given))
        self._first: Sequence[Candidates] = ()  # the groups of the first refresh
        self._refreshes = 0  # to begin with
        self._within = False  # whether steps of the last refresh are to come

    def state(self) -> dict[str, Any] | None:
        """Between two refreshes only: within one, the examples are of weights that are no longer there."""
        if self._within:
            return None
        first = [to_json(group) for group in self._first]
        tokens = {name: getattr(self, name) for name in self._TOTALS}
        return {**tokens, "counts": dict(self.counts), "first": first}

    def resume(self, steps: int, state: Mapping[str, Any]) -> None:
        self._refreshes = math.ceil(steps / self.refresh)
        for name in self._TOTALS:
            setattr(self, name, state[name])
        self.counts = Counter(state["counts"])
        self._first = [from_json(Candidates, group, "checkpoint") for group in state["first"]]

    def __iter__(self) -> Iterator[list[Example]]:
        steps = batches(self.given, self.settings, self.context.seed)
        for _ in islice(steps, self._refreshes * self.refresh):
            pass
        for number in range(self._refreshes, math.ceil(self.steps / self.refresh)):
            part = list(islice(steps, self.refresh))
            examples = iter(self._refreshed(number, [row for step in part for row in step]))
            for at, step in enumerate(part, number * self.refresh + 1):
                batch = [example for example in islice(examples, len(step)) if example is not None]
                if not batch:
                    raise Diverged(
                        f"refresh {number + 1}, step {at} of {self.steps}: no candidate has a token to train on, the "
                        f"policy says nothing in {self.context.max_new_tokens} tokens; lower lr ({self.settings.lr})",
                        [to_json(row) for row in step],
                    )
                self._within = at < min(self.steps, (number + 1) * self.refresh)
                yield batch

    def _refreshed(self, number: int, given: Sequence[Candidates]) -> list[Example | None]:
        """Return the examples of one refresh (from 0), one for each given group.

        A group without a response to train on has None. The refresh logs one line of metrics. With ``reward_kl`` it has
        ``objective/log_ratio``, the mean log-ratio of the samples to the initial policy.
        """
        done = number * self.refresh
        place = f"refresh {number + 1}, step {done + 1} of {self.steps}"
        drawn = self.sampler.sample(number, [row.prompt for row in given], place)
        groups = [Candidates(row.prompt, row.responses + own.responses) for row, own in zip(drawn, given, strict=True)]
        self.context.keep(groups)
        groups, empty = with_tokens(groups, self.policy.tokenization)

        self.sampled_tokens += sampled_tokens(drawn)
        self.sampled_replies += sum(len(row.responses) for row in drawn)
        best = float(np.mean([max(row.scores) for row in drawn]))  # the mean of each prompt's best sample
        metrics = {**sample_metrics(drawn), "reward/max": best}
        reference = None
        if "reference" in self.settings.needs:
            assert self.context.reference is not None
            reference = self._logprobs(self.context.reference, groups)
        if reference is not None and self.candidates.reward_kl:
            log_ratios = _log_ratios(groups, self._logprobs(self.policy, groups), reference)
            # The mean is over the samples alone, which are the policy's own. It is no KL: they are drawn at another
            # temperature, truncated or searched for.
            replies = [reply for group in groups for reply in group.responses]
            ratios = [
                x for reply, x in zip(replies, log_ratios, strict=True) if reply.source == self.sampler.spec.source
            ]
            if ratios:
                metrics["objective/log_ratio"] = float(np.mean(ratios))
            groups = _shaped(groups, log_ratios, self.candidates.reward_kl)
            _check_finite(groups, f"{place}, less reward_kl x log-ratio")
        examples = self._examples([group for group in groups if group.responses])
        if reference is not None and "reference" in self.settings.requires:
            examples = with_reference(examples, reference)
        self.trained_tokens += sum(fed_tokens(self.policy, e, self.settings.max_length) for e in examples)
        counts = tally(examples, groups, self.policy.tokenization, self.settings.max_length)
        self.counts.update({"refreshes": 1, "groups": len(groups), "responses_empty": empty, **counts})
        self.context.log({"step": done, "refresh": number + 1, "sampled_tokens": self.sampled_tokens, **metrics})
        made = iter(examples)
        return [next(made) if group.responses else None for group in groups]

    def _sampler(self) -> RolloutSampler:
        spec = SamplingSpec(
            **{"temperature": 1.0, **self.candidates.arguments()},  # a search has no temperature
            max_new_tokens=self.context.max_new_tokens,
            seed=self.context.seed,
            purpose="online",
            stop=self.context.stop,
        )
        return RolloutSampler(self.policy, self.context, spec)

    def _examples(self, groups: Sequence[Candidates]) -> Sequence[Example]:
        """The method's examples of these groups.

        The first refresh must have something to learn from, as offline candidates must. A later one need not: when a
        policy has collapsed all its samples tie, which is a result. So the first vouches for it.
        """
        if not groups:
            return []
        self._first = self._first or groups
        judged = groups if groups is self._first else [*self._first, *groups]
        examples = self.method.examples(replace(self.inputs, candidates=judged))
        assert len(examples) == len(judged), "online candidates are for methods with one example a group"
        return examples[len(judged) - len(groups) :]

    def _logprobs(self, policy: Policy, groups: Sequence[Candidates]) -> ResponseLogprobs:
        batch = self.settings.batch_prompts * max(1, *(len(group.responses) for group in groups))
        return response_logprobs(policy, groups, max_length=self.settings.max_length or sys.maxsize, batch=batch)


def _log_ratios(groups: Sequence[Candidates], policy: ResponseLogprobs, reference: ResponseLogprobs) -> list[float]:
    """Return log pi(y | x) - log ref(y | x) of every response in nats, over the tokens that it is trained on."""
    rows = [(group.prompt, reply) for group in groups for reply in group.responses]
    pairs = [(torch.as_tensor(policy.of(*row)), torch.as_tensor(reference.of(*row))) for row in rows]
    return [kl_k1(logp_T, ref_logp_T).sum().item() for logp_T, ref_logp_T in pairs]


def _shaped(groups: Sequence[Candidates], log_ratios: Sequence[float], coefficient: float) -> list[Candidates]:
    """Return the groups with score - coefficient * log-ratio for scores; the log-ratios are in the order of replies."""
    ratio = iter(log_ratios)
    return [
        Candidates(
            group.prompt,
            tuple(
                replace(reply, score=score - coefficient * next(ratio))
                for reply, score in zip(group.responses, group.scores, strict=True)
            ),
        )
        for group in groups
    ]


def _check_finite(groups: Sequence[Candidates], place: str) -> None:
    """Raise Diverged if the score of a response is not finite."""
    prompts = [group.prompt for group in groups for _ in group.responses]
    texts = [reply.text for group in groups for reply in group.responses]
    scores = np.array([score for group in groups for score in group.scores])
    require_finite(scores, prompts, place, texts)
