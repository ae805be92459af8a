"""PPO as 2304.05302 compares with it: a KL penalty in the reward, a value function, clipped updates.

The loop and the rollouts are those of every online method (``rrhf_bench/training/on_policy.py``), and the formulas are
in ``ppo_math``. Here are the critic, the scaling of rewards, the advantages and the loss.

Letters: N rollouts of an iteration, B rows of one pass, T response tokens, D hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baselines.ppo_math import explained_variance, gae, policy_loss, shaped_reward, value_loss, whiten
from baselines.ppo_settings import PPOSettings, RewardScaling
from rrhf_bench.errors import Diverged
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import Policy
from rrhf_bench.training.on_policy import Advantages, Minibatch, OnPolicyMethod, penalise_missing_ends
from rrhf_bench.training.rollouts import Rollouts


class ValueFunction:
    """The critic V(prompt, tokens so far): a linear map, zero at first, of the state that predicts the next token.

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
        """Return a value function for this policy; ``separate`` copies the policy as it is now."""
        one_token = ResponseBatch.of_pairs([((policy.tokenization.eos_id,), (policy.tokenization.eos_id,))])
        with torch.no_grad():
            hidden_BTD = policy.response_states(one_token).hidden_BTD
        return cls(copy.deepcopy(policy) if separate else None, hidden_BTD.shape[-1], hidden_BTD.device)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that are not the policy's."""
        return [*(() if self.trunk is None else self.trunk.parameters()), self.weight_D, self.bias]

    def forward(self, policy: Policy, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """Return the (B, T) log-probs and values of the response tokens, on the policy's device."""
        if self.trunk is None:
            logp_BT, hidden_BTD = _states(policy, batch)
        else:
            logp_BT, hidden_BTD = policy.token_logprobs(batch), _states(self.trunk, batch)[1]
        return logp_BT, self.values(hidden_BTD, batch)

    def values(self, hidden_BTD: Tensor, batch: ResponseBatch) -> Tensor:
        """Return the (B, T) values of the trunk's states."""
        value_BT = hidden_BTD.to(self.weight_D.dtype) @ self.weight_D + self.bias
        return value_BT.masked_fill(~batch.mask_BT.to(value_BT.device), 0.0)


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
        """Return the scaled scores of one iteration. Raises Diverged if the scores so far do not vary."""
        if self.kind == "none":
            return score_N
        if self.kind == "running" or self.count == 0:
            self._add(score_N)
        std = math.sqrt(self.squares / self.count)
        if std <= 1e-9 * max(1.0, abs(self.mean)):
            raise Diverged(
                f"all {self.count} rewards so far are {self.mean:g}, so they have no scale and nothing to teach; "
                'check the reward model, take more rollouts, or set reward_scale = "none"'
            )
        return (score_N - self.mean) / std if self.kind == "first-batch" else score_N / std

    def _add(self, score_N: NDArray[np.float64]) -> None:
        """Add the moments of more scores to those so far (Chan, Golub, LeVeque 1979)."""
        mean, total = float(score_N.mean()), self.count + score_N.size
        gap = mean - self.mean
        self.squares += float(((score_N - mean) ** 2).sum()) + gap**2 * self.count * score_N.size / total
        self.mean += gap * score_N.size / total
        self.count = total


class PPO(OnPolicyMethod):
    """PPO: one reply a prompt and iteration, advantages by GAE, a clipped surrogate.

    The score stands at a reply's last token.
    """

    mean_over: ClassVar[Literal["tokens", "responses"]] = "tokens"

    def __init__(self, settings: PPOSettings) -> None:
        self.settings = settings
        self.scale = RewardScale(settings.reward_scale)

    def critic(self, policy: Policy) -> ValueFunction:
        """Return the value function, on the policy's trunk or on a copy of it."""
        return ValueFunction.of(policy, separate=self.settings.value == "separate")

    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return whitened advantages and the critic's targets. Updates the reward scale.

        The score is scaled, clipped, and corrected where the reply did not end; the KL penalty is added to every token.
        Advantages are whitened over all N rollouts. Raises Diverged if the scores so far do not vary.
        """
        s = self.settings
        score_N = np.clip(self.scale.scale(rollouts.score_N), -s.reward_clip, s.reward_clip)
        score_N = penalise_missing_ends(score_N, rollouts.ended_N, mode=s.missing_eos, penalty=s.missing_eos_penalty)
        logp_NT, mask_NT, value_NT = rollouts.logp_NT, rollouts.mask_NT, rollouts.value_NT
        assert value_NT is not None
        score_tensor_N = torch.as_tensor(score_N, dtype=logp_NT.dtype, device=logp_NT.device)
        reward_NT = shaped_reward(score_tensor_N, logp_NT, rollouts.ref_logp_NT, mask_NT, kl_coefficient=kl_coefficient)
        metrics = {
            "objective/scores": float(score_N.mean()),
            "objective/rlhf_reward": reward_NT.sum(-1).mean().item(),
        }
        if s.whiten_rewards:
            # The mean stays: taking it out of every token would pay or charge for length.
            reward_NT = whiten(reward_NT, mask_NT, shift_mean=False)
        advantage_NT, return_NT = gae(reward_NT, value_NT, mask_NT, gamma=s.gamma, lam=s.lam)
        if s.whiten_advantages:
            advantage_NT = whiten(advantage_NT, mask_NT)
        explained = explained_variance(value_NT, return_NT, mask_NT).item()
        if math.isfinite(explained):
            metrics["val/explained_variance"] = explained
        return Advantages(advantage_NT, return_NT, metrics)

    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return policy loss + value_coefficient * value loss, each a mean over tokens."""
        assert value_BT is not None
        assert batch.old_value_BT is not None
        assert batch.return_BT is not None
        s = self.settings
        surrogate = policy_loss(logp_BT, batch.old_logp_BT, batch.advantage_BT, batch.mask_BT, clip=s.clip)
        error = value_loss(value_BT, batch.old_value_BT, batch.return_BT, batch.mask_BT, clip=s.value_clip)
        return surrogate.loss + s.value_coefficient * error, {
            "loss/policy_avg": surrogate.loss.item(),
            "loss/value_avg": error.item(),
            "policy/clipfrac_avg": surrogate.clip_fraction.item(),
            "policy/approxkl_avg": surrogate.approx_kl.item(),
        }

    def state(self) -> dict[str, Any]:
        """Return the moments of the rewards so far."""
        return {"scale": (self.scale.count, self.scale.mean, self.scale.squares)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from such moments."""
        self.scale = RewardScale(self.scale.kind, *state["scale"])
