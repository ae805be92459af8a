"""RLOO: REINFORCE whose baseline is the mean reward of the prompt's other replies (arXiv 2402.14740).

Letters: P prompts, G replies to each, N = P G rollouts, B rows of one pass, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from baselines.advantages import group_advantages
from baselines.rloo_settings import RLOOSettings
from rrhf_bench.training.on_policy import Advantages, Minibatch, OnPolicyMethod, reply_rewards
from rrhf_bench.training.rollouts import Rollouts


def rloo_loss(logp_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Return -mean over responses of advantage * log pi(y | x): REINFORCE on whole responses (2402.14740 Eq. 7).

    The reply counts as one action, so the log-prob is summed over its tokens and no ratio is clipped.
    """
    return -(advantage_B * logp_BT.masked_fill(~mask_BT, 0.0).sum(-1)).mean()


class RLOO(OnPolicyMethod):
    """RLOO on whole replies. A reply's reward is its score less kl_coefficient * log-ratio to the reference."""

    mean_over: ClassVar[Literal["tokens", "responses"]] = "responses"

    def __init__(self, settings: RLOOSettings) -> None:
        self.settings = settings

    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return leave-one-out advantages, the same at every token of a reply."""
        reward_N, metrics = reply_rewards(rollouts, self.settings, kl_coefficient)
        advantage_N = group_advantages(rollouts.grouped(reward_N), baseline="leave-one-out").flatten()
        return Advantages(advantage_N[:, None] * rollouts.mask_NT, metrics=metrics)

    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a pass, a mean over its responses."""
        loss = rloo_loss(logp_BT, batch.advantage_BT[:, 0], batch.mask_BT)
        return loss, {"loss/policy_avg": loss.item()}
