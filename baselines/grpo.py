"""GRPO and its relatives: Dr. GRPO, DAPO, GSPO (arXiv 2402.03300, 2503.20783, 2503.14476, 2507.18071).

Letters: P prompts, G replies to each, N = P G rollouts, B rows of one pass, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from baselines.advantages import group_advantages
from baselines.grpo_settings import GRPOSettings
from baselines.ppo_math import clipped_surrogate
from rrhf_bench.errors import StageError
from rrhf_bench.policy.logprobs import kl_k2, kl_k3
from rrhf_bench.training.on_policy import Advantages, Minibatch, OnPolicyMethod, reply_rewards
from rrhf_bench.training.rollouts import Rollouts

Aggregation = Literal["sequence", "group", "token", "cap"]


def token_weights(mask_NT: Tensor, *, aggregation: Aggregation, replies: int, cap: int) -> Tensor:
    """Return (N, T) weights, with which the mean over replies of a weighted sum over tokens is the aggregation.

    ``sequence``: the mean over a reply's tokens, then over replies (2402.03300 Eq. 3). ``group``: the mean over the
    tokens of a prompt's replies, then over prompts (2503.14476 Eq. 8). ``token``: the mean over the tokens of all
    replies. ``cap``: a reply's sum over the length cap, then the mean over replies (2503.20783).
    A row without a True position counts as no reply.
    """
    length_N = mask_NT.sum(-1)
    kept = (length_N > 0).sum().clamp(min=1)
    tokens_N = {
        "sequence": length_N,
        "group": length_N.reshape(-1, replies).float().mean(1).repeat_interleave(replies),
        "token": (length_N.sum() / kept).expand_as(length_N),
        "cap": torch.full_like(length_N, cap),
    }[aggregation]
    return mask_NT / tokens_N.clamp(min=1)[:, None] * (len(length_N) / kept)


class GRPOLoss(NamedTuple):
    """The loss carries gradients, the diagnostics do not."""

    loss: Tensor  # policy + kl_coefficient * kl
    policy: Tensor
    kl: Tensor
    clip_fraction: Tensor  # the mean over replies of the share of tokens without a gradient


def grpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    ref_logp_BT: Tensor,
    advantage_BT: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
    ratio: Literal["token", "sequence"] = "token",
    kl: Literal["k2", "k3"] = "k3",
) -> GRPOLoss:
    """Return the mean over replies of the weighted sum over tokens of clipped surrogate + kl_coefficient * KL.

    2402.03300 Eq. 3 with the weights of ``token_weights``. ``ratio`` is pi / pi_old of each token, or at every token of
    a reply the geometric mean of these (2507.18071 Eq. 7). ``kl`` is the estimator of the KL to the reference.
    """
    # Masked first: what stands at a padded position could make its zero gradient not-a-number.
    logp_BT, old_logp_BT, ref_logp_BT = (x.masked_fill(~mask_BT, 0.0) for x in (logp_BT, old_logp_BT, ref_logp_BT))
    advantage_BT, weight_BT = advantage_BT.masked_fill(~mask_BT, 0.0), weight_BT.masked_fill(~mask_BT, 0.0)
    length_B1 = mask_BT.sum(-1, keepdim=True)
    log_ratio_BT = logp_BT - old_logp_BT
    if ratio == "sequence":
        log_ratio_BT = (log_ratio_BT.sum(-1, keepdim=True) / length_B1).expand_as(log_ratio_BT)
    surrogate_BT, clipped_BT = clipped_surrogate(log_ratio_BT, advantage_BT, clip_low=clip_low, clip_high=clip_high)
    kl_BT = {"k2": kl_k2, "k3": kl_k3}[kl](logp_BT, ref_logp_BT)
    policy, penalty = ((weight_BT * x).sum(-1).mean() for x in (surrogate_BT, kl_BT))
    clip_fraction = ((clipped_BT & mask_BT).sum(-1, keepdim=True) / length_B1).mean()
    return GRPOLoss(policy + kl_coefficient * penalty, policy.detach(), penalty.detach(), clip_fraction)


def weighted_loss(
    logp_BT: Tensor,
    batch: Minibatch,
    *,
    clip_low: float,
    clip_high: float,
    kl_penalty: str,
    ratio: Literal["token", "sequence"] = "token",
) -> tuple[Tensor, dict[str, float]]:
    """Return ``grpo_loss`` of a pass with its metrics. The KL is in the loss if ``kl_penalty`` names it so."""
    assert batch.weight_BT is not None
    found = grpo_loss(
        logp_BT,
        batch.old_logp_BT,
        batch.ref_logp_BT,
        batch.advantage_BT,
        batch.weight_BT,
        batch.mask_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coefficient=batch.kl_coefficient if kl_penalty.startswith("loss") else 0.0,
        ratio=ratio,
        kl="k2" if kl_penalty == "loss-k2" else "k3",
    )
    return found.loss, {
        "loss/policy_avg": found.policy.item(),
        "loss/kl_avg": found.kl.item(),
        "policy/clipfrac_avg": found.clip_fraction.item(),
    }


def overlong_penalty(length_N: Tensor, *, cap: int, tokens: int) -> Tensor:
    """Return DAPO's soft penalty (2503.14476 Eq. 13): it grows from 0 to 1 over the last ``tokens`` before the cap."""
    return ((length_N - (cap - tokens)) / tokens).clamp(0.0, 1.0)


class GRPO(OnPolicyMethod):
    """GRPO and its relatives, as the settings say."""

    mean_over: ClassVar[Literal["tokens", "responses"]] = "responses"

    def __init__(self, settings: GRPOSettings) -> None:
        self.settings = settings

    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return rewards standardised within their prompt, the same at every token of a reply, and token weights.

        Raises StageError if ``overlong_tokens`` exceeds the length cap.
        """
        s, mask_NT, cap = self.settings, rollouts.mask_NT, rollouts.max_new_tokens
        reward_N, metrics = reply_rewards(rollouts, s, kl_coefficient if s.kl_penalty == "reward" else 0.0)
        if s.overlong_tokens is not None:
            if s.overlong_tokens > cap:
                raise StageError(f"overlong_tokens: found {s.overlong_tokens}; expected at most the length cap, {cap}")
            over_N = overlong_penalty(mask_NT.sum(-1), cap=cap, tokens=s.overlong_tokens)
            reward_N = reward_N - s.overlong_penalty * over_N
            metrics["objective/rlhf_reward"] = reward_N.mean().item()
        reward_PG = rollouts.grouped(reward_N)
        advantage_PG = group_advantages(
            reward_PG,
            baseline="mean",
            scale="none" if s.std == "none" else "std",
            ddof=0 if s.std == "population" else 1,
            epsilon=s.std_epsilon,
        )
        equal_P1 = (reward_PG == reward_PG[:, :1]).all(1, keepdim=True)
        metrics["frac_reward_zero_std"] = equal_P1.float().mean().item()
        kept_NT = mask_NT
        if s.equal_groups == "drop":
            kept_NT = mask_NT & ~equal_P1.expand_as(reward_PG).reshape(-1, 1)
        weight_NT = token_weights(kept_NT, aggregation=s.aggregation, replies=s.replies, cap=cap)
        return Advantages(advantage_PG.reshape(-1, 1) * mask_NT, metrics=metrics, weight_NT=weight_NT)

    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a pass, a mean over its replies."""
        s = self.settings
        return weighted_loss(
            logp_BT, batch, clip_low=s.clip_low, clip_high=s.clip_high, kl_penalty=s.kl_penalty, ratio=s.ratio
        )
