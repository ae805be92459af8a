"""ReMax: REINFORCE whose baseline is the greedy reply to the same prompt (arXiv 2310.10505).

Letters: N rollouts, B rows of one pass, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from baselines.grpo import token_weights
from baselines.remax_settings import ReMaxSettings
from rrhf_bench.policy.logprobs import kl_k1
from rrhf_bench.training.on_policy import Advantages, Minibatch, OnPolicyMethod, greedy_rewards, reply_rewards
from rrhf_bench.training.rollouts import Rollouts


def remax_advantages(
    score_gap_N: Tensor,
    log_ratio_NT: Tensor,
    mask_NT: Tensor,
    *,
    kl_coefficient: float,
    kl_return: Literal["sum", "to-go", "immediate"] = "sum",
    gamma: float = 1.0,
    score_clip: float | None = None,
) -> Tensor:
    """Return (N, T) weights of the log-probs: gamma^(T - t + 1) * score gap - kl_coefficient * log-ratio.

    ``score_gap_N`` is the score less that of the greedy reply. The log-ratio to the reference is that of the whole
    reply (``sum``, as in 2310.10505 with the KL in the reward), from token t on, or of token t alone (the code).
    """
    if score_clip is not None:
        score_gap_N = score_gap_N.clamp(-score_clip, score_clip)
    log_ratio_NT = log_ratio_NT.masked_fill(~mask_NT, 0.0)
    kl_NT = {
        "sum": log_ratio_NT.sum(-1, keepdim=True).expand_as(log_ratio_NT),
        "to-go": log_ratio_NT.flip(-1).cumsum(-1).flip(-1),
        "immediate": log_ratio_NT,
    }[kl_return]
    left_NT = mask_NT.flip(-1).cumsum(-1).flip(-1)  # tokens from t to the end: T - t + 1
    return (gamma**left_NT * score_gap_N[:, None] - kl_coefficient * kl_NT).masked_fill(~mask_NT, 0.0)


def remax_loss(logp_BT: Tensor, advantage_BT: Tensor, weight_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return -mean over replies of the weighted sum over tokens of advantage * log pi."""
    return -(weight_BT * advantage_BT * logp_BT).masked_fill(~mask_BT, 0.0).sum(-1).mean()


class ReMax(OnPolicyMethod):
    """ReMax: no critic and no group, but a second, greedy reply to each prompt."""

    mean_over: ClassVar[Literal["tokens", "responses"]] = "responses"

    def __init__(self, settings: ReMaxSettings) -> None:
        self.settings = settings

    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return the advantages over the greedy replies, and token weights."""
        s, mask_NT = self.settings, rollouts.mask_NT
        score_N, _ = reply_rewards(rollouts, s, 0.0)
        greedy_N = greedy_rewards(rollouts, s)
        advantage_NT = remax_advantages(
            score_N - greedy_N,
            kl_k1(rollouts.logp_NT, rollouts.ref_logp_NT),
            mask_NT,
            kl_coefficient=kl_coefficient,
            kl_return=s.kl_return,
            gamma=s.gamma,
            score_clip=s.score_clip,
        )
        weight_NT = mask_NT.to(advantage_NT.dtype)
        if s.aggregation == "token":
            weight_NT = token_weights(mask_NT, aggregation="token", replies=s.replies, cap=rollouts.max_new_tokens)
        _, metrics = reply_rewards(rollouts, s, kl_coefficient)
        metrics["reward/greedy_mean"] = greedy_N.mean().item()
        return Advantages(advantage_NT, metrics=metrics, weight_NT=weight_NT)

    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a pass, a mean over its replies."""
        assert batch.weight_BT is not None
        loss = remax_loss(logp_BT, batch.advantage_BT, batch.weight_BT, batch.mask_BT)
        return loss, {"loss/policy_avg": loss.item()}
