"""The one on-policy loop: rollouts, advantages, updates. A method brings its critic, its advantages and its loss.

Random choices are derived by name from the seed and the position in the run, so that ``_State`` and the weights are all
that a run consists of between two iterations.

Letters: N rollouts of an iteration, B rows of one pass, T response tokens.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrhf_bench.errors import DataError, Diverged
from rrhf_bench.policy.logprobs import kl_k1, masked_mean
from rrhf_bench.policy.policy import Policy
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.seeding import generator
from rrhf_bench.settings.online import MissingEos, OnPolicySettings
from rrhf_bench.training.kl_control import AdaptiveKL, FixedKL, kl_controller
from rrhf_bench.training.method import Progress, TrainContext, TrainInputs, TrainResult
from rrhf_bench.training.optimiser import AdamW, learning_rate
from rrhf_bench.training.rollouts import Clock, Critic, Rollouts, RolloutSampler, cycle_prompts, sampled_tokens


@dataclass(frozen=True)
class Advantages:
    """The advantages of an iteration's rollouts; (N, T) tensors are 0 beyond each reply's end."""

    advantage_NT: Tensor
    return_NT: Tensor | None = None  # targets of the critic
    metrics: Mapping[str, float] = field(default_factory=dict)
    weight_NT: Tensor | None = None  # of each token, for a loss that is a weighted sum over a reply's tokens


@dataclass(frozen=True)
class Minibatch:
    """The rows of one pass as they were at the rollout; (B, T) tensors, T the longest of these replies."""

    mask_BT: Tensor
    old_logp_BT: Tensor
    ref_logp_BT: Tensor
    advantage_BT: Tensor
    kl_coefficient: float  # of this iteration, for a loss with a KL penalty of its own
    old_value_BT: Tensor | None = None
    return_BT: Tensor | None = None
    weight_BT: Tensor | None = None


class OnPolicyMethod(Protocol):
    """Advantages and a loss for the one on-policy loop.

    A class that names this one as its base has no critic and no state unless it defines them.
    """

    # The unit over which ``loss`` is a mean. The loop weights the passes of a minibatch by it.
    mean_over: ClassVar[Literal["tokens", "responses"]]

    def critic(self, policy: Policy) -> Critic | None:
        """Return a critic for this policy, or None if the method has none."""
        return None

    def begin(self, policy: Policy) -> None:
        """Prepare an iteration with this policy, before its rollouts."""
        return  # not abstract: mypy takes an empty body of a Protocol for that

    @abstractmethod
    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return the advantages of an iteration's rollouts, with metrics of theirs."""

    @abstractmethod
    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a pass, a mean over its tokens or responses, and metrics that are such means."""

    def state(self) -> Mapping[str, Any]:
        """Return JSON values that the method has gathered in earlier iterations."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from such values."""
        return


@dataclass
class _State:
    """The state of a run, without the policy's weights."""

    _COUNTS: ClassVar = ("iteration", "step", "sampled_tokens", "sampled_replies", "trained_tokens", "missing_ends")

    critic: Critic | None
    optimiser: AdamW
    kl: AdaptiveKL | FixedKL
    iteration: int = 0  # finished ones; names every random choice
    step: int = 0  # optimiser steps done
    sampled_tokens: int = 0
    sampled_replies: int = 0
    trained_tokens: int = 0  # fed to the policy in optimiser steps
    missing_ends: int = 0  # rollouts that the length cap cut

    def state(self) -> dict[str, Any]:
        """Return all that the next iteration depends on, the weights of policy and critic included."""
        counts = {name: getattr(self, name) for name in self._COUNTS}
        return {"optimiser": self.optimiser.state(), "kl_coefficient": self.kl.coefficient, **counts}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self.optimiser.load(state["optimiser"])
        self.kl = replace(self.kl, coefficient=state["kl_coefficient"])
        for name in self._COUNTS:
            setattr(self, name, state[name])


class OnPolicyTrainer:
    """The Trainer of online methods. Replies are sampled at ``temperature``, and from the full distribution
    unless the settings have a ``rollout_top_p``.

    Ratios are of the ids as they were sampled. The reward model reads the text, cut at the first stop string. An engine
    stops at the token that completes a stop string, so the only tokens trained on that the reward model does not read
    are the stop string's own. They stay in, because they are how the policy ended its reply.
    """

    def __init__(self, method: OnPolicyMethod, settings: OnPolicySettings) -> None:
        self.method = method
        self.settings = settings
        self.name = settings.kind

    def start(self, policy: Policy) -> _State:
        """Return the state of a run before its first iteration."""
        critic = self.method.critic(policy)
        parameters = [*policy.parameters(), *(() if critic is None else critic.parameters())]
        return _State(critic, AdamW(parameters, self.settings), kl_controller(self.settings))

    def fit(self, policy: Policy, inputs: TrainInputs, context: TrainContext) -> TrainResult:
        """Train in place. ``context.watch`` is called before the first iteration and after each, ``context.log`` after
        each. Raises DataError without prompts, Diverged if a reward, loss, gradient or weight is not finite.
        """
        if not inputs.prompts:
            raise DataError(f"{self.name}: found no training prompts; expected at least one to sample rollouts for")
        settings, clock = self.settings, Clock()
        state = self.start(policy)
        if (kept := context.checkpoints.last()) is not None:
            state.load(kept)
            self.method.load(kept["method"])
        else:
            context.watch(self._progress(state), policy)
        sampler = self.sampler(policy, context, clock)
        while state.iteration < settings.iterations:
            clock.start()
            coefficient = state.kl.coefficient
            rollouts = self.roll_out(sampler, inputs, state)
            advantages = self.method.advantages(rollouts, coefficient)
            with clock("update"):
                of_updates = self._update(policy, rollouts, advantages, context.seed, state)
            metrics = {**rollouts.metrics, **advantages.metrics, **of_updates}
            state.kl.update(metrics["objective/kl"], settings.rollouts)
            state.iteration += 1
            counts = {"iteration": state.iteration, "step": state.step, "sampled_tokens": state.sampled_tokens}
            context.log({**counts, "kl_coefficient": coefficient, **metrics})
            context.took(clock.read())
            context.watch(self._progress(state), policy)
            context.checkpoints.offer({**state.state(), "method": self.method.state()})
        state.optimiser.close()
        counts = {"rollouts": settings.iterations * settings.rollouts, "rollouts_without_end": state.missing_ends}
        return TrainResult(state.step, state.sampled_tokens, state.sampled_replies, counts, state.trained_tokens)

    def sampler(self, policy: Policy, context: TrainContext, clock: Clock | None = None) -> RolloutSampler:
        """Return the sampler of the run's rollouts."""
        spec = SamplingSpec(
            n=self.settings.replies - self.settings.reference_replies,
            temperature=self.settings.temperature,
            top_p=self.settings.rollout_top_p,
            max_new_tokens=context.max_new_tokens,
            seed=context.seed,
            purpose=self.name,
            stop=context.stop,
            logprobs=True,
        )
        return RolloutSampler(
            policy,
            context,
            spec,
            clock,
            greedy=self.settings.greedy,
            reference_replies=self.settings.reference_replies,
        )

    def roll_out(self, sampler: RolloutSampler, inputs: TrainInputs, state: _State) -> Rollouts:
        """Return the rollouts of the next iteration, and count them in ``state``."""
        self.method.begin(sampler.policy)
        count = self.settings.rollouts // self.settings.replies
        seed = sampler.context.seed
        prompts = cycle_prompts(inputs.prompts, state.iteration * count, count, seed, self.name)
        rollouts = sampler.draw(state.iteration, prompts, state.critic, self._place(state))
        greedy = list(dict.fromkeys(rollouts.greedy))  # sampled once for a prompt that comes twice
        state.sampled_tokens += sampled_tokens(rollouts.groups) + sampled_tokens(greedy)
        state.sampled_replies += len(rollouts.pairs) + len(greedy)
        state.missing_ends += int((~rollouts.ended_N).sum())
        return rollouts

    def _progress(self, state: _State) -> Progress:
        return Progress(state.iteration / self.settings.iterations, state.step, state.sampled_tokens)

    def _place(self, state: _State) -> str:
        """Return where the run is, for an error message, counted from 1 as in its log."""
        return f"{self.name}, iteration {state.iteration + 1}, step {state.step + 1}"

    def _minibatches(self, seed: int, iteration: int) -> Iterator[list[int]]:
        """Yield the rows of each optimiser step: every rollout once an epoch, in an order fixed by the seed."""
        settings, unit = self.settings, self._unit
        for epoch in range(settings.update_epochs):
            order = generator(seed, self.name, "minibatches", iteration, epoch).permutation(settings.rollouts // unit)
            rows = [int(number) * unit + i for number in order for i in range(unit)]
            for start in range(0, len(rows), settings.minibatch):
                yield rows[start : start + settings.minibatch]

    @property
    def _unit(self) -> int:
        """Return how many rollouts in a row stay together."""
        return self.settings.replies if self.settings.whole_groups else 1

    def _update(
        self, policy: Policy, rollouts: Rollouts, advantages: Advantages, seed: int, state: _State
    ) -> dict[str, float]:
        """Take an optimiser step for each minibatch and return the mean metrics of the steps."""
        settings = self.settings
        steps: list[Mapping[str, float]] = []
        for rows in self._minibatches(seed, state.iteration):
            lr = learning_rate(state.step, settings.steps, settings)
            steps.append(self.accumulate(policy, rollouts, advantages, rows, state))
            norm = state.optimiser.clip()
            if not math.isfinite(norm):
                raise Diverged(
                    f"{self._place(state)}: the gradient's norm is {norm}; lower lr, or compute in float32",
                    rollouts.evidence(rows),
                )
            state.optimiser.step(lr)
            state.step += 1
            if not state.optimiser.has_finite_weights():
                raise Diverged(
                    f"{self.name}, iteration {state.iteration + 1}: the weights are not finite after step {state.step} "
                    f"of {settings.steps}; lower lr ({settings.lr}), or train in float32",
                    rollouts.evidence(rows),
                )
        # The ratios are those before any step: 1 and 0 to rounding, unless old and new log-probs disagree.
        first = {name: value for name, value in steps[0].items() if name.startswith("val/")}
        means = {name: sum(s[name] for s in steps) / len(steps) for name in steps[0] if name not in first}
        return {**means, **first, "lr": lr}

    def accumulate(
        self, policy: Policy, rollouts: Rollouts, advantages: Advantages, rows: Sequence[int], state: _State
    ) -> dict[str, float]:
        """Add the gradient of one minibatch's loss to the parameters', in passes of the policy's ``pass_tokens``.

        A pass counts by its share of the minibatch's tokens or responses, so the split does not change the gradient.
        Returns the minibatch's metrics. Raises Diverged for a loss that is not finite.
        """
        tokens = [len(response_ids) for _, response_ids in rollouts.pairs]
        size = tokens if self.method.mean_over == "tokens" else [1] * len(tokens)
        whole, all_tokens = (sum(values[row] for row in rows) for values in (size, tokens))
        total: dict[str, float] = {}
        ratio, deviation = 0.0, 0.0
        for part in rollouts.passes(policy, rows, self._unit):
            batch = rollouts.batch(part)
            state.trained_tokens += policy.fed_tokens(batch)
            value_BT = None
            if state.critic is None:
                logp_BT = policy.token_logprobs(batch)
            else:
                logp_BT, value_BT = state.critic.forward(policy, batch)
            minibatch = _minibatch(rollouts, advantages, part, max(batch.lengths), state.kl.coefficient)
            loss, metrics = self.method.loss(logp_BT, value_BT, minibatch)
            if not torch.isfinite(loss):
                of_loss = ", ".join(f"{name} {value}" for name, value in metrics.items() if name.startswith("loss/"))
                raise Diverged(
                    f"{self._place(state)}: the loss is {loss.item()} ({of_loss}); lower lr, or compute in float32",
                    rollouts.evidence(rows),
                )
            share = sum(size[row] for row in part) / whole
            (loss * share).backward()
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + share * value
            mean, largest = _ratio(logp_BT.detach(), minibatch)
            ratio, deviation = ratio + sum(batch.lengths) / all_tokens * mean, max(deviation, largest)
        return {**total, "val/ratio": ratio, "val/ratio_deviation": deviation}


def _minibatch(
    rollouts: Rollouts, advantages: Advantages, rows: Sequence[int], width: int, kl_coefficient: float
) -> Minibatch:
    def cut(whole_NT: Tensor | None) -> Tensor | None:
        return None if whole_NT is None else whole_NT[list(rows), :width]

    return Minibatch(
        rollouts.mask_NT[list(rows), :width],
        rollouts.logp_NT[list(rows), :width],
        rollouts.ref_logp_NT[list(rows), :width],
        advantages.advantage_NT[list(rows), :width],
        kl_coefficient,
        cut(rollouts.value_NT),
        cut(advantages.return_NT),
        cut(advantages.weight_NT),
    )


def _ratio(logp_BT: Tensor, batch: Minibatch) -> tuple[float, float]:
    """Return the mean over tokens of pi / pi_old, and the largest |pi / pi_old - 1|."""
    # Masked before exp: an infinite ratio at a padded position would make the mean not-a-number.
    ratio_BT = (logp_BT - batch.old_logp_BT).masked_fill(~batch.mask_BT, 0.0).exp()
    return masked_mean(ratio_BT, batch.mask_BT).item(), (ratio_BT - 1.0).abs().max().item()


def reply_rewards(
    rollouts: Rollouts, settings: OnPolicySettings, kl_coefficient: float
) -> tuple[Tensor, dict[str, float]]:
    """Return the (N,) rewards of whole replies, score - kl_coefficient * log-ratio to the reference, with metrics.

    The score is corrected for a missing end. The log-ratio is summed over a reply's tokens (k1).
    """
    score_N = penalise_missing_ends(
        rollouts.score_N, rollouts.ended_N, mode=settings.missing_eos, penalty=settings.missing_eos_penalty
    )
    logp_NT = rollouts.logp_NT
    log_ratio_N = kl_k1(logp_NT, rollouts.ref_logp_NT).sum(-1)
    reward_N = torch.as_tensor(score_N, dtype=logp_NT.dtype, device=logp_NT.device) - kl_coefficient * log_ratio_N
    return reward_N, {"objective/scores": float(score_N.mean()), "objective/rlhf_reward": reward_N.mean().item()}


def greedy_rewards(rollouts: Rollouts, settings: OnPolicySettings) -> Tensor:
    """Return the (N,) scores of the greedy reply to each rollout's prompt, corrected for a missing end."""
    replies = [group.responses[0] for group in rollouts.greedy]
    score_P = penalise_missing_ends(
        np.array([reply.score for reply in replies], np.float64),
        np.array([reply.ended for reply in replies]),
        mode=settings.missing_eos,
        penalty=settings.missing_eos_penalty,
    )
    score_N = np.repeat(score_P, len(rollouts.pairs) // len(replies))
    return torch.as_tensor(score_N, dtype=rollouts.logp_NT.dtype, device=rollouts.logp_NT.device)


def penalise_missing_ends(
    score_N: NDArray[np.float64], ended_N: NDArray[np.bool_], *, mode: MissingEos, penalty: float
) -> NDArray[np.float64]:
    """Return the (N,) scores, corrected where the length cap cut a reply (2403.17031, detail 4)."""
    if mode == "penalty":
        return np.where(ended_N, score_N, score_N + penalty)
    return np.where(ended_N, score_N, penalty) if mode == "replace" else score_N
