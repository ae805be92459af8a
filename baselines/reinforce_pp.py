"""REINFORCE++-baseline: rewards less their prompt's mean, whitened over all rollouts (arXiv 2501.03262).

Letters: P prompts, G replies to each, N = P G rollouts, B rows of one pass, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from baselines.advantages import group_advantages
from baselines.grpo import token_weights, weighted_loss
from baselines.ppo_math import whiten
from baselines.reinforce_pp_settings import ReinforcePPSettings
from rrhf_bench.policy.logprobs import kl_k1
from rrhf_bench.training.on_policy import Advantages, Minibatch, OnPolicyMethod, reply_rewards
from rrhf_bench.training.rollouts import Rollouts


def globally_whitened(
    reward_PG: Tensor,
    mask_NT: Tensor,
    *,
    over: Literal["tokens", "replies"] = "tokens",
    ddof: Literal[0, 1] = 0,
    penalty_NT: Tensor | None = None,
) -> Tensor:
    """Return (N, T) advantages: rewards less their prompt's mean, less a token penalty, whitened over the batch.

    2501.03262, "REINFORCE++ w/ baseline". ``over`` says what the mean and the variance of the batch weigh alike. Raises
    ValueError for one reply to a prompt, which would be its own baseline.
    """
    if reward_PG.shape[1] < 2:
        raise ValueError("found 1 reply to a prompt; expected at least 2")
    centred_N1 = group_advantages(reward_PG, baseline="mean").reshape(-1, 1)
    if over == "replies":
        assert penalty_NT is None, "tokens of a reply differ"
        return whiten(centred_N1, torch.ones_like(centred_N1, dtype=torch.bool), ddof=ddof) * mask_NT
    return whiten(centred_N1 - (mask_NT * 0.0 if penalty_NT is None else penalty_NT), mask_NT, ddof=ddof)


class ReinforcePP(OnPolicyMethod):
    """REINFORCE++-baseline, with the clipped loss of GRPO."""

    mean_over: ClassVar[Literal["tokens", "responses"]] = "responses"

    def __init__(self, settings: ReinforcePPSettings) -> None:
        self.settings = settings

    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return the whitened advantages, and token weights."""
        s, mask_NT = self.settings, rollouts.mask_NT
        reward_N, metrics = reply_rewards(rollouts, s, kl_coefficient if s.kl_penalty == "reward" else 0.0)
        penalty_NT = None
        if s.kl_penalty == "reward-to-go":
            ratio_NT = kl_k1(rollouts.logp_NT, rollouts.ref_logp_NT)
            penalty_NT = kl_coefficient * ratio_NT.flip(-1).cumsum(-1).flip(-1)
        advantage_NT = globally_whitened(
            rollouts.grouped(reward_N),
            mask_NT,
            over=s.whiten,
            ddof=1 if s.std == "sample" else 0,
            penalty_NT=penalty_NT,
        )
        weight_NT = token_weights(mask_NT, aggregation=s.aggregation, replies=s.replies, cap=rollouts.max_new_tokens)
        return Advantages(advantage_NT, metrics=metrics, weight_NT=weight_NT)

    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a pass, a mean over its replies."""
        s = self.settings
        return weighted_loss(logp_BT, batch, clip_low=s.clip_low, clip_high=s.clip_high, kl_penalty=s.kl_penalty)
