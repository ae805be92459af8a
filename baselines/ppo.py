"""PPO as 2304.05302 compares with it: rollouts of the policy in training, a KL penalty in the reward, clipped updates.

Letters: N rollouts of an iteration, B rows of one pass, T response tokens, D hidden size. The formulas are in
``ppo_math``; here is the loop around them. Random choices are derived by name from the seed and the position in the
run, so that ``PPOState`` and the policy's weights are all that a run consists of between two iterations.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baselines.ppo_math import (
    AdaptiveKL,
    FixedKL,
    explained_variance,
    gae,
    policy_loss,
    shaped_reward,
    value_loss,
    whiten,
)
from baselines.ppo_settings import PPOSettings, RewardScaling
from rrhf_bench.errors import DataError, Diverged, StageError
from rrhf_bench.policy.batching import ResponseBatch, within
from rrhf_bench.policy.logprobs import kl_k1, masked_mean
from rrhf_bench.policy.policy import Policy
from rrhf_bench.records import Prompt, Response
from rrhf_bench.rewards.reward import require_finite_of_row, scored_replies
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.seeding import generator
from rrhf_bench.training.method import Progress, TrainContext, TrainInputs, TrainResult
from rrhf_bench.training.optimiser import AdamW, lr_factor

Ids = tuple[int, ...]


class ValueFunction:
    """V(prompt, tokens so far): a linear map, zero at first, of the hidden state that predicts the next token.

    The state is the policy's own (``trunk`` None: one pass gives log-probs and values, and the value loss trains the
    policy's trunk too) or that of a copy of the policy with weights of its own.
    """

    def __init__(self, trunk: Policy | None, hidden_size: int, device: torch.device) -> None:
        self.trunk = trunk
        # In float32 whatever the trunk computes in: returns differ by less than half precision resolves.
        self.weight_D = torch.nn.Parameter(torch.zeros(hidden_size, device=device))
        self.bias = torch.nn.Parameter(torch.zeros((), device=device))

    @classmethod
    def of(cls, policy: Policy, *, separate: bool) -> ValueFunction:
        """A value function for this policy; ``separate`` copies it as it is now."""
        one_token = ResponseBatch.of_pairs([((policy.tokenization.eos_id,), (policy.tokenization.eos_id,))])
        with torch.no_grad():
            hidden_BTD = policy.response_states(one_token).hidden_BTD
        return cls(copy.deepcopy(policy) if separate else None, hidden_BTD.shape[-1], hidden_BTD.device)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are not the policy's."""
        return [*(() if self.trunk is None else self.trunk.parameters()), self.weight_D, self.bias]

    def forward(self, policy: Policy, batch: ResponseBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, values, mask) of the response tokens, (B, T) each, on the policy's device."""
        if self.trunk is None:
            logp_BT, hidden_BTD = _states(policy, batch)
        else:
            logp_BT, hidden_BTD = policy.token_logprobs(batch), _states(self.trunk, batch)[1]
        mask_BT = batch.mask_BT.to(logp_BT.device)
        value_BT = hidden_BTD.to(self.weight_D.dtype) @ self.weight_D + self.bias
        return logp_BT, value_BT.masked_fill(~mask_BT, 0.0), mask_BT


def _states(policy: Policy, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
    states = policy.response_states(batch)
    return states.logp_BT, states.hidden_BTD


@dataclass
class RewardScale:
    """Scores in units that make a KL coefficient mean the same for every reward model.

    ``"first-batch"``: minus the mean and over the std of the first iteration's scores, for the whole run;
    ``"running"``: over the std of all scores so far, the mean left in (trlX); ``"none"``: as they are.
    """

    kind: RewardScaling
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # summed squared deviations from the mean

    def scale(self, score_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scaled scores of one iteration. Raises Diverged where the scores so far do not vary."""
        if self.kind == "none":
            return score_N
        if self.kind == "running" or self.count == 0:
            self._add(score_N)
        std = math.sqrt(self.squares / self.count)
        if std <= 1e-9 * max(1.0, abs(self.mean)):
            raise Diverged(
                f"ppo: all {self.count} rewards so far are {self.mean:g}, so they have no scale and nothing to teach; "
                'check the reward model, take more rollouts, or set reward_scale = "none"'
            )
        return (score_N - self.mean) / std if self.kind == "first-batch" else score_N / std

    def _add(self, score_N: NDArray[np.float64]) -> None:
        """Moments of two sets from the moments of each (Chan, Golub, LeVeque 1979)."""
        mean, total = float(score_N.mean()), self.count + score_N.size
        gap = mean - self.mean
        self.squares += float(((score_N - mean) ** 2).sum()) + gap**2 * self.count * score_N.size / total
        self.mean += gap * score_N.size / total
        self.count = total


class Clock:
    """Seconds of an iteration by part, the device's work included."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """An iteration begins."""
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
        """What the parts of this iteration took, and the whole so far."""
        return {**self._seconds, "iteration": time.perf_counter() - self._began}


@dataclass
class PPOState:
    """What changes while PPO trains, the policy's weights apart."""

    _COUNTS: ClassVar = ("iteration", "step", "sampled_tokens", "missing_ends")

    value: ValueFunction
    optimiser: AdamW
    kl: AdaptiveKL | FixedKL
    scale: RewardScale
    iteration: int = 0  # finished ones; names every random choice
    step: int = 0  # optimiser steps done
    sampled_tokens: int = 0
    missing_ends: int = 0  # rollouts that the length cap cut
    clock: Clock = field(default_factory=lambda: Clock())

    @classmethod
    def start(cls, policy: Policy, settings: PPOSettings) -> PPOState:
        value = ValueFunction.of(policy, separate=settings.value == "separate")
        optimiser = AdamW([*policy.parameters(), *value.parameters()], settings)
        kl: AdaptiveKL | FixedKL = FixedKL(settings.kl_coefficient)
        if settings.kl == "adaptive":
            assert settings.kl_target is not None
            assert settings.kl_horizon is not None
            kl = AdaptiveKL(settings.kl_coefficient, settings.kl_target, settings.kl_horizon)
        return cls(value, optimiser, kl, RewardScale(settings.reward_scale))

    def state(self) -> dict[str, Any]:
        """All that the next iteration depends on, the weights of policy and value function among it."""
        return {
            "optimiser": self.optimiser.state(),
            "kl_coefficient": self.kl.coefficient,
            "scale": (self.scale.count, self.scale.mean, self.scale.squares),
            **{name: getattr(self, name) for name in self._COUNTS},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.optimiser.load(state["optimiser"])
        self.kl = replace(self.kl, coefficient=state["kl_coefficient"])
        self.scale = RewardScale(self.scale.kind, *state["scale"])
        for name in self._COUNTS:
            setattr(self, name, state[name])

    @property
    def place(self) -> str:
        """Where the run is, for an error message, counted from 1 as in its log."""
        return f"ppo, iteration {self.iteration + 1}, step {self.step + 1}"


@dataclass(frozen=True)
class Rollouts:
    """One iteration's replies and all that the updates read of them; (N, T) tensors, 0 beyond each row's end."""

    pairs: tuple[tuple[Ids, Ids], ...]  # (prompt ids, sampled ids)
    temperature: float
    old_logp_NT: Tensor
    old_value_NT: Tensor
    advantage_NT: Tensor
    return_NT: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)
    records: tuple[Mapping[str, Any], ...] = ()

    def evidence(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        """What some of them were, for an error."""
        return [self.records[row] for row in rows if self.records]

    def batch(self, rows: Sequence[int]) -> ResponseBatch:
        return ResponseBatch.of_pairs([self.pairs[row] for row in rows], self.temperature)


class PPO:
    """The Trainer. One reply a prompt and iteration, sampled at ``temperature`` from the full distribution.

    Ratios are of the ids as they were sampled. The reward model reads the text, cut at the first stop string. An engine
    stops at the token that completes a stop string, so the only tokens trained on that the reward model does not read
    are the stop string's own. They stay in, and the score stands at the last of them: they are how the policy ended.
    """

    requires = PPOSettings.requires

    def __init__(self, settings: PPOSettings) -> None:
        self.settings = settings
        # Optimiser steps of the whole run.
        self.steps = settings.iterations * settings.ppo_epochs * math.ceil(settings.rollouts / settings.minibatch)

    def fit(self, policy: Policy, inputs: TrainInputs, context: TrainContext) -> TrainResult:
        """Train in place. ``context.watch`` is called before the first iteration and after each, ``context.log`` after
        each. Raises DataError without prompts, Diverged if a reward, loss, gradient or weight is not finite.
        """
        if not inputs.prompts:
            raise DataError("ppo: found no training prompts; expected at least one to sample rollouts for")
        settings = self.settings
        state = PPOState.start(policy, settings)
        if (kept := context.checkpoints.last()) is not None:
            state.load(kept)
        else:
            context.watch(self._progress(state), policy)
        while state.iteration < settings.iterations:
            state.clock.start()
            coefficient = state.kl.coefficient
            rollouts = roll_out(policy, inputs.prompts, context, state, settings)
            with state.clock("update"):
                metrics = {**rollouts.metrics, **self._update(policy, rollouts, context.seed, state)}
            state.kl.update(metrics["objective/kl"], settings.rollouts)
            state.iteration += 1
            counts = {"iteration": state.iteration, "step": state.step, "sampled_tokens": state.sampled_tokens}
            context.log({**counts, "kl_coefficient": coefficient, **metrics})
            context.took(state.clock.read())
            context.watch(self._progress(state), policy)
            context.checkpoints.offer(state.state())
        state.optimiser.close()
        counts = {"rollouts": settings.iterations * settings.rollouts, "rollouts_without_end": state.missing_ends}
        return TrainResult(state.step, state.sampled_tokens, counts)

    def _progress(self, state: PPOState) -> Progress:
        return Progress(state.iteration / self.settings.iterations, state.step, state.sampled_tokens)

    def _update(self, policy: Policy, rollouts: Rollouts, seed: int, state: PPOState) -> dict[str, float]:
        """ppo_epochs passes over the rollouts in shuffled minibatches, an optimiser step each; their mean metrics."""
        settings = self.settings
        steps: list[Mapping[str, float]] = []
        for epoch in range(settings.ppo_epochs):
            order = generator(seed, "ppo", "minibatches", state.iteration, epoch).permutation(len(rollouts.pairs))
            for start in range(0, len(order), settings.minibatch):
                rows = order[start : start + settings.minibatch].tolist()
                lr = settings.lr * lr_factor(state.step, self.steps, settings)
                steps.append(accumulate_gradient(policy, rollouts, rows, state, settings))
                norm = state.optimiser.clip()
                if not math.isfinite(norm):
                    raise Diverged(
                        f"{state.place}: the gradient's norm is {norm}; lower lr, or compute in float32",
                        rollouts.evidence(rows),
                    )
                state.optimiser.step(lr)
                state.step += 1
                if not state.optimiser.has_finite_weights():
                    raise Diverged(
                        f"ppo, iteration {state.iteration + 1}: the weights are not finite after step {state.step} of "
                        f"{self.steps}; lower lr ({settings.lr}), or train in float32",
                        rollouts.evidence(rows),
                    )
        return {
            "loss/policy_avg": _mean(steps, "loss/policy"),
            "loss/value_avg": _mean(steps, "loss/value"),
            "policy/clipfrac_avg": _mean(steps, "clip_fraction"),
            "policy/approxkl_avg": _mean(steps, "approx_kl"),
            # Of the first minibatch, before any step: 1 and 0 to rounding, or old and new log-probs disagree.
            "val/ratio": steps[0]["ratio"],
            "val/ratio_deviation": steps[0]["ratio_deviation"],
            "lr": lr,
        }


def roll_out(
    policy: Policy, prompts: Sequence[Prompt], context: TrainContext, state: PPOState, settings: PPOSettings
) -> Rollouts:
    """Sample, score and value one iteration's replies. Updates the reward scale and the counts of ``state``.

    The log-probs that ratios are taken against come from the policy here, not from the sampler: the same code as in the
    updates, so a ratio differs from 1 only by what an update did. Advantages are whitened over all N rollouts.
    """
    asked = cycled(prompts, state.iteration * settings.rollouts, settings.rollouts, context.seed)
    responses = _sample(policy, asked, context, state, settings)
    pairs = []
    for prompt, response in zip(asked, responses, strict=True):
        if not response.token_ids:
            raise StageError(
                f"{state.place}: the sampler gave no token ids for prompt {prompt.id}; expected at least one"
            )
        pairs.append((policy.tokenization.prompt_ids(prompt), response.token_ids))

    with state.clock("score"):
        raw_N = _rewards(asked, responses, context, state)
    ended_N = np.array([response.ended for response in responses])
    score_N = np.clip(state.scale.scale(raw_N), -settings.reward_clip, settings.reward_clip)
    if settings.missing_eos == "penalty":
        score_N = np.where(ended_N, score_N, score_N + settings.missing_eos_penalty)
    elif settings.missing_eos == "replace":
        score_N = np.where(ended_N, score_N, settings.missing_eos_penalty)

    assert context.reference is not None
    logp_rows: list[Tensor] = []
    value_rows: list[Tensor] = []
    ref_rows: list[Tensor] = []
    with torch.no_grad(), state.clock("logprobs"):
        for rows in _passes(policy, pairs, range(len(pairs))):
            batch = ResponseBatch.of_pairs([pairs[row] for row in rows], settings.temperature)
            logp_BT, value_BT, _ = state.value.forward(policy, batch)
            logp_rows.extend(logp_BT)
            value_rows.extend(value_BT)
            ref_rows.extend(context.reference.token_logprobs(batch).to(logp_BT.device))
    logp_NT, value_NT, ref_logp_NT = map(_stack, (logp_rows, value_rows, ref_rows))
    mask_NT = ResponseBatch.of_pairs(pairs).mask_BT.to(logp_NT.device)

    score_tensor_N = torch.as_tensor(score_N, dtype=logp_NT.dtype, device=logp_NT.device)
    reward_NT = shaped_reward(score_tensor_N, logp_NT, ref_logp_NT, mask_NT, kl_coefficient=state.kl.coefficient)
    rlhf_reward = reward_NT.sum(-1).mean()
    if settings.whiten_rewards:
        # The mean stays: taking it out of every token would pay or charge for length.
        reward_NT = whiten(reward_NT, mask_NT, shift_mean=False)
    advantage_NT, return_NT = gae(reward_NT, value_NT, mask_NT, gamma=settings.gamma, lam=settings.lam)
    if settings.whiten_advantages:
        advantage_NT = whiten(advantage_NT, mask_NT)

    lengths = [len(response_ids) for _, response_ids in pairs]
    state.sampled_tokens += sum(lengths)
    state.missing_ends += int((~ended_N).sum())
    metrics = {
        "reward/mean": float(raw_N.mean()),
        "objective/scores": float(score_N.mean()),
        "objective/kl": kl_k1(logp_NT, ref_logp_NT).sum(-1).mean().item(),
        "objective/rlhf_reward": rlhf_reward.item(),
        "policy/entropy_estimate": -masked_mean(logp_NT, mask_NT).item(),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": float((~ended_N).mean()),
        **_sampler_difference(responses, logp_NT),
    }
    explained = explained_variance(value_NT, return_NT, mask_NT).item()
    if math.isfinite(explained):
        metrics["val/explained_variance"] = explained
    records = tuple(scored_replies(asked, [response.text for response in responses], raw_N))
    return Rollouts(tuple(pairs), settings.temperature, logp_NT, value_NT, advantage_NT, return_NT, metrics, records)


def accumulate_gradient(
    policy: Policy, rollouts: Rollouts, rows: Sequence[int], state: PPOState, settings: PPOSettings
) -> dict[str, float]:
    """Add the gradient of one minibatch's loss, policy + value_coefficient * value, to the parameters'.

    Both terms are means over the minibatch's tokens, so a pass counts by its share of them and the split does not
    change the gradient. Returns the minibatch's metrics. Raises Diverged for a loss that is not finite.
    """
    tokens = sum(len(rollouts.pairs[row][1]) for row in rows)
    total: dict[str, float] = dict.fromkeys(("loss/policy", "loss/value", "clip_fraction", "approx_kl", "ratio"), 0.0)
    deviation = 0.0
    for part in _passes(policy, rollouts.pairs, rows):
        batch = rollouts.batch(part)
        logp_BT, value_BT, mask_BT = state.value.forward(policy, batch)
        old_logp_BT, old_value_BT, advantage_BT, return_BT = (
            whole_NT[part, : mask_BT.shape[1]]
            for whole_NT in (rollouts.old_logp_NT, rollouts.old_value_NT, rollouts.advantage_NT, rollouts.return_NT)
        )
        surrogate = policy_loss(logp_BT, old_logp_BT, advantage_BT, mask_BT, clip=settings.clip)
        error = value_loss(value_BT, old_value_BT, return_BT, mask_BT, clip=settings.value_clip)
        loss = surrogate.loss + settings.value_coefficient * error
        if not torch.isfinite(loss):
            raise Diverged(
                f"{state.place}: the loss is {loss.item()} (policy {surrogate.loss.item()}, value {error.item()}); "
                "lower lr, or compute in float32",
                rollouts.evidence(rows),
            )
        share = sum(batch.lengths) / tokens
        (loss * share).backward()
        terms = (surrogate.loss, error, surrogate.clip_fraction, surrogate.approx_kl, surrogate.ratio_mean)
        for name, term in zip(total, terms, strict=True):
            total[name] += share * term.item()
        deviation = max(deviation, surrogate.ratio_deviation.item())
    return {**total, "ratio_deviation": deviation}


def cycled(prompts: Sequence[Prompt], start: int, count: int, seed: int) -> list[Prompt]:
    """``count`` prompts from position ``start`` of an endless pass over them, each round in an order of its own."""
    rounds = {place // len(prompts) for place in range(start, start + count)}
    order = {r: generator(seed, "ppo", "prompts", r).permutation(len(prompts)) for r in rounds}
    return [prompts[order[place // len(prompts)][place % len(prompts)]] for place in range(start, start + count)]


def _sample(
    policy: Policy, asked: Sequence[Prompt], context: TrainContext, state: PPOState, settings: PPOSettings
) -> list[Response]:
    """One reply to each prompt, from the policy's present weights."""
    assert context.sampler is not None
    with state.clock("sync"):
        context.sampler.sync(policy)
    # A prompt that comes twice in one iteration needs a second purpose: its seed would be the same, and so its reply.
    seen: dict[Prompt, int] = {}
    again = []
    for prompt in asked:
        again.append(seen.get(prompt, 0))
        seen[prompt] = again[-1] + 1
    replies: dict[int, Response] = {}
    for turn in range(max(again) + 1):
        places = [place for place, nth in enumerate(again) if nth == turn]
        spec = SamplingSpec(
            n=1,
            temperature=settings.temperature,
            max_new_tokens=context.max_new_tokens,
            seed=context.seed,
            purpose=f"ppo/{state.iteration}" + (f"/{turn}" if turn else ""),
            stop=context.stop,
            logprobs=True,
        )
        with state.clock("sample"):
            sampled = context.sampler.sample([asked[place] for place in places], spec)
        replies |= {place: candidates.responses[0] for place, candidates in zip(places, sampled, strict=True)}
    return [replies[place] for place in range(len(asked))]


def _rewards(
    asked: Sequence[Prompt], responses: Sequence[Response], context: TrainContext, state: PPOState
) -> NDArray[np.float64]:
    """Return the (N,) rewards of the replies. Raises Diverged if one is not finite."""
    assert context.reward is not None
    texts = [response.text for response in responses]
    raw_N = np.asarray(context.reward.score(asked, texts), np.float64)
    return require_finite_of_row(raw_N, asked, texts, state.place)


def _sampler_difference(responses: Sequence[Response], logp_NT: Tensor) -> dict[str, float]:
    """How far the engine's log-probs are from the policy's on the same tokens; empty where the engine gave none."""
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


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _passes(policy: Policy, pairs: Sequence[tuple[Ids, Ids]], rows: Sequence[int]) -> list[list[int]]:
    """Some rows in passes of the policy's pass_tokens."""
    sizes = [policy.fed_tokens(ResponseBatch.of_pairs([pairs[row]])) for row in rows]
    return [[rows[i] for i in run] for run in within(sizes, policy.pass_tokens)]


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)
