"""Rollouts: replies of the policy in training, with their scores and log-probs, as every online method uses them.

Letters: P prompts, n replies to each, N = P n rollouts, B rows of one pass, T response tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrhf_bench.errors import StageError
from rrhf_bench.policy.batching import ResponseBatch, within
from rrhf_bench.policy.logprobs import kl_k1, masked_mean
from rrhf_bench.policy.policy import Policy
from rrhf_bench.records import Candidates, Prompt, Response
from rrhf_bench.rewards.reward import require_finite, scored_replies
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.seeding import generator
from rrhf_bench.training.method import TrainContext

Ids = tuple[int, ...]


class Critic(Protocol):
    """A value function that is trained beside the policy."""

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """Return the parameters that are not the policy's."""
        ...

    def forward(self, policy: Policy, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """Return the (B, T) log-probs and values of the response tokens, on the policy's device."""
        ...


class Clock:
    """The seconds of an iteration by part, the device's work included."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin an iteration."""
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Return the seconds of this iteration's parts, and those of the iteration so far."""
        return {**self._seconds, "iteration": time.perf_counter() - self._began}


@dataclass(frozen=True)
class Rollouts:
    """N replies as they were sampled. (N, T) tensors are on the policy's device and zero beyond each reply's end.

    The log-probs come from the policy and not from the sampler: the code is the one of the updates, so a ratio of
    probabilities differs from 1 only by what an update did.
    """

    groups: tuple[Candidates, ...]  # P prompts with n replies each, scored by the reward model
    pairs: tuple[tuple[Ids, Ids], ...]  # N (prompt ids, sampled ids)
    temperature: float  # of the samples and of every log-prob
    max_new_tokens: int  # the length cap of a reply
    score_N: NDArray[np.float64]  # raw scores of the reward model
    ended_N: NDArray[np.bool_]  # False if the length cap cut the reply
    mask_NT: Tensor  # bool
    logp_NT: Tensor  # under the policy that sampled
    ref_logp_NT: Tensor  # under the initial policy
    value_NT: Tensor | None  # the critic's
    metrics: Mapping[str, float]
    greedy: tuple[Candidates, ...] = ()  # the P prompts with one greedy reply each, scored, for a method that has them

    def batch(self, rows: Sequence[int]) -> ResponseBatch:
        """Return some of the rollouts as a batch."""
        return ResponseBatch.of_pairs([self.pairs[row] for row in rows], self.temperature)

    def grouped(self, value_N: Tensor) -> Tensor:
        """Return the (P, n) values of the rollouts by prompt."""
        return value_N.reshape(len(self.groups), -1)

    def passes(self, policy: Policy, rows: Sequence[int], together: int = 1) -> list[list[int]]:
        """Return some rows in passes of the policy's ``pass_tokens``; ``together`` rows in a row share a pass."""
        return _passes(policy, self.pairs, rows, together)

    def evidence(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        """Return some of the replies as JSON objects, for an error."""
        replies = [(group.prompt, reply) for group in self.groups for reply in group.responses]
        prompts, texts = [replies[row][0] for row in rows], [replies[row][1].text for row in rows]
        return scored_replies(prompts, texts, self.score_N[list(rows)])


class RolloutSampler:
    """Samples from the policy's present weights, and scores what it has sampled.

    ``spec`` says how; its purpose names the random choices of this sampler. With ``greedy``, ``draw`` adds a greedy
    reply to each prompt. It adds ``reference_replies`` samples of the reference to each group, behind the policy's own.
    """

    def __init__(
        self,
        policy: Policy,
        context: TrainContext,
        spec: SamplingSpec,
        clock: Clock | None = None,
        *,
        greedy: bool = False,
        reference_replies: int = 0,
    ) -> None:
        self.policy = policy
        self.context = context
        self.spec = spec
        self.clock = clock or Clock()
        self.greedy = greedy
        self.reference_replies = reference_replies

    def sample(self, number: int, prompts: Sequence[Prompt], place: str) -> list[Candidates]:
        """Return ``spec.n`` scored replies to each prompt. ``number`` counts the calls of the run and enters the seeds.

        Raises Diverged, with ``place`` in its message, if a score is not finite.
        """
        return self._sampled(self.policy, self.spec, number, prompts, place)

    def _sampled(
        self, policy: Policy, of_all: SamplingSpec, number: int, prompts: Sequence[Prompt], place: str
    ) -> list[Candidates]:
        assert self.context.sampler is not None
        with self.clock("sync"):
            self.context.sampler.sync(policy)
        # A prompt that comes twice in one call needs a second purpose: its seeds would be the same, and so its replies.
        seen: Counter[Prompt] = Counter()
        turns: list[list[int]] = []  # places of the prompts that come for the first time, the second time, ...
        for at, prompt in enumerate(prompts):
            if seen[prompt] == len(turns):
                turns.append([])
            turns[seen[prompt]].append(at)
            seen[prompt] += 1
        found: dict[int, Candidates] = {}
        for turn, places in enumerate(turns):
            spec = replace(of_all, purpose=f"{of_all.purpose}/{number}" + (f"/{turn}" if turn else ""))
            with self.clock("sample"):
                sampled = self.context.sampler.sample([prompts[at] for at in places], spec)
            found |= zip(places, sampled, strict=True)
        with self.clock("score"):
            return self._scored([found[at] for at in range(len(prompts))], place)

    def _greedy(self, prompts: Sequence[Prompt], place: str) -> list[Candidates]:
        """Return a scored greedy reply to each prompt, of the weights that were synced last."""
        assert self.context.sampler is not None
        distinct = list(dict.fromkeys(prompts))
        with self.clock("sample"):
            spec = replace(self.spec, n=1, temperature=0.0, logprobs=False)
            sampled = dict(zip(distinct, self.context.sampler.sample(distinct, spec), strict=True))
        with self.clock("score"):
            return self._scored([sampled[prompt] for prompt in prompts], place)

    def _with_reference_replies(
        self, groups: Sequence[Candidates], number: int, prompts: Sequence[Prompt], place: str
    ) -> list[Candidates]:
        reference, purpose = self.context.reference, f"{self.spec.purpose}-reference"
        assert reference is not None
        spec = replace(self.spec, n=self.reference_replies, logprobs=False, purpose=purpose)
        sampled = self._sampled(reference, spec, number, prompts, place)
        return [replace(g, responses=g.responses + r.responses) for g, r in zip(groups, sampled, strict=True)]

    def _scored(self, groups: Sequence[Candidates], place: str) -> list[Candidates]:
        assert self.context.reward is not None
        prompts = [group.prompt for group in groups for _ in group.responses]
        texts = [reply.text for group in groups for reply in group.responses]
        score_N = np.asarray(self.context.reward.score(prompts, texts), np.float64)
        scores = iter(require_finite(score_N, prompts, place, texts).tolist())
        return [
            replace(g, responses=tuple(replace(reply, score=next(scores)) for reply in g.responses)) for g in groups
        ]

    def draw(self, number: int, prompts: Sequence[Prompt], critic: Critic | None, place: str) -> Rollouts:
        """Return the rollouts of some prompts with their log-probs under the policy and under the reference.

        ``critic`` adds its values, computed in the same pass. Raises Diverged if a score is not finite.
        """
        own = groups = self.sample(number, prompts, place)
        greedy = self._greedy(prompts, place) if self.greedy else []
        if self.reference_replies:
            groups = self._with_reference_replies(own, number, prompts, place)
        replies = [reply for group in groups for reply in group.responses]
        pairs = tuple(
            (self.policy.tokenization.prompt_ids(group.prompt), _sampled_ids(group.prompt, reply, place))
            for group in groups
            for reply in group.responses
        )
        with self.clock("logprobs"):
            logp_NT, ref_logp_NT, value_NT = self._logprobs(pairs, critic)
        mask_NT = ResponseBatch.of_pairs(pairs).mask_BT.to(logp_NT.device)
        score_N = np.array([reply.score for reply in replies], np.float64)
        ended_N = np.array([reply.ended for reply in replies])
        size = self.spec.n + self.reference_replies
        rows = [row for row in range(len(replies)) if row % size < self.spec.n]  # the policy's own
        metrics = {
            **sample_metrics(own),
            "objective/kl": kl_k1(logp_NT[rows], ref_logp_NT[rows]).sum(-1).mean().item(),
            "policy/entropy_estimate": -masked_mean(logp_NT[rows], mask_NT[rows]).item(),
            **_sampler_difference([replies[row] for row in rows], logp_NT[rows]),
        }
        return Rollouts(
            tuple(groups), pairs, self.spec.temperature, self.spec.max_new_tokens, score_N, ended_N, mask_NT, logp_NT,
            ref_logp_NT, value_NT, metrics, tuple(greedy),
        )  # fmt: skip

    @torch.no_grad()
    def _logprobs(
        self, pairs: Sequence[tuple[Ids, Ids]], critic: Critic | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the (N, T) log-probs under the policy and under the reference, and the critic's values."""
        policy, reference = self.policy, self.context.reference
        assert reference is not None
        logp_rows: list[Tensor] = []
        ref_rows: list[Tensor] = []
        value_rows: list[Tensor] = []
        for rows in _passes(policy, pairs, range(len(pairs))):
            batch = ResponseBatch.of_pairs([pairs[row] for row in rows], self.spec.temperature)
            if critic is None:
                logp_BT = policy.token_logprobs(batch)
            else:
                logp_BT, value_BT = critic.forward(policy, batch)
                value_rows.extend(value_BT)
            logp_rows.extend(logp_BT)
            ref_rows.extend(reference.token_logprobs(batch).to(logp_BT.device))
        return _stack(logp_rows), _stack(ref_rows), _stack(value_rows) if critic is not None else None


def sample_metrics(groups: Sequence[Candidates]) -> dict[str, float]:
    """Return the mean score, mean length in tokens and share of cut replies of a sampler's scored replies."""
    replies = [reply for group in groups for reply in group.responses]
    return {
        "reward/mean": float(np.mean([reply.score for reply in replies])),
        "completions/mean_length": sampled_tokens(groups) / len(replies),
        "completions/clipped_ratio": float(np.mean([not reply.ended for reply in replies])),
    }


def sampled_tokens(groups: Sequence[Candidates]) -> int:
    """Return the number of sampled tokens."""
    return sum(len(reply.token_ids or ()) for group in groups for reply in group.responses)


def cycle_prompts(prompts: Sequence[Prompt], start: int, count: int, seed: int, name: str) -> list[Prompt]:
    """Return ``count`` prompts from position ``start`` of an endless pass over them, each round in its own order."""
    rounds = {place // len(prompts) for place in range(start, start + count)}
    order = {r: generator(seed, name, "prompts", r).permutation(len(prompts)) for r in rounds}
    return [prompts[order[place // len(prompts)][place % len(prompts)]] for place in range(start, start + count)]


def _sampled_ids(prompt: Prompt, reply: Response, place: str) -> Ids:
    if not reply.token_ids:
        raise StageError(f"{place}: the sampler gave no token ids for prompt {prompt.id}; expected at least one")
    return reply.token_ids


def _sampler_difference(responses: Sequence[Response], logp_NT: Tensor) -> dict[str, float]:
    """Return how far the engine's log-probs are from the policy's on the same tokens, if the engine gave them all."""
    if any(response.logprobs is None for response in responses):
        return {}
    gaps = [
        abs(ours - theirs)
        for response, row_T in zip(responses, logp_NT.tolist(), strict=True)
        for ours, theirs in zip(row_T, response.logprobs or (), strict=False)  # the row is padded
    ]
    return {
        "sampling/sampling_logp_difference/mean": sum(gaps) / len(gaps),
        "sampling/sampling_logp_difference/max": max(gaps),
    }


def _passes(
    policy: Policy, pairs: Sequence[tuple[Ids, Ids]], rows: Sequence[int], together: int = 1
) -> list[list[int]]:
    units = [rows[start : start + together] for start in range(0, len(rows), together)]
    sizes = [policy.fed_tokens(ResponseBatch.of_pairs([pairs[row] for row in unit])) for unit in units]
    return [[row for i in run for row in units[i]] for run in within(sizes, policy.pass_tokens)]


def _stack(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
