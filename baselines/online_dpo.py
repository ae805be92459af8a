"""Online DPO and XPO: pairs of replies that are sampled while training (arXiv 2402.04792, 2405.21046).

Letters: P prompts, G replies to each, N = P G rollouts, B = P G rows of one pass, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baselines.dpo import dpo_loss
from baselines.online_dpo_settings import OnlineDPOSettings
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.training.on_policy import Advantages, Minibatch, OnPolicyMethod, penalise_missing_ends, reply_rewards
from rrhf_bench.training.rollouts import Rollouts


def pair_signs(score_PG: NDArray[np.float64], *, ties: Literal["drop", "first"]) -> NDArray[np.float64]:
    """Return (P, G): 1 at a prompt's best reply, -1 at its worst, 0 elsewhere and for a prompt whose scores are equal.

    With ``ties`` "first" the first of equal replies is the best and the last the worst.
    """
    best_P = score_PG.argmax(1)
    worst_P = score_PG.shape[1] - 1 - score_PG[:, ::-1].argmin(1)
    sign_PG = np.zeros_like(score_PG)
    np.put_along_axis(sign_PG, worst_P[:, None], -1.0, axis=1)
    np.put_along_axis(sign_PG, best_P[:, None], 1.0, axis=1)
    equal_P1 = (score_PG == score_PG[:, :1]).all(1, keepdims=True)
    return np.where(equal_P1, 0.0, sign_PG) if ties == "drop" else sign_PG


def online_dpo_loss(
    logp_PG: Tensor,
    ref_logp_PG: Tensor,
    sign_PG: Tensor,
    *,
    beta: float,
    variant: Literal["dpo", "ipo"] = "dpo",
    explored_P: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """Return the mean over prompts of DPO's loss on the replies with sign 1 and -1, plus alpha * ``explored_P``.

    2402.04792, from the log-probs of whole replies. A prompt without signs has loss 0 and counts in the mean.
    ``explored_P`` is the log-prob of the initial policy's reply (2405.21046, Algorithm 1).
    """
    paired_P = sign_PG.any(1)
    chosen_PG, rejected_PG = sign_PG > 0, sign_PG < 0
    chosen_P, ref_chosen_P, rejected_P, ref_rejected_P = (
        x_PG.masked_fill(~at_PG, 0.0).sum(1)[paired_P]
        for at_PG in (chosen_PG, rejected_PG)
        for x_PG in (logp_PG, ref_logp_PG)
    )
    loss = logp_PG.sum() * 0.0  # of no pair at all
    if paired_P.any():
        mean = dpo_loss(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta=beta, kind=variant)
        loss = mean * paired_P.sum() / len(paired_P)
    return loss if explored_P is None else loss + alpha * explored_P.mean()


class OnlineDPO(OnPolicyMethod):
    """Online DPO. An advantage is 1 for the chosen reply of a prompt, -1 for the rejected one."""

    mean_over: ClassVar[Literal["tokens", "responses"]] = "responses"

    def __init__(self, settings: OnlineDPOSettings) -> None:
        self.settings = settings

    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return the signs of the pairs. Scores are compared in float64: in float32 two different ones could tie."""
        s = self.settings
        score_N = penalise_missing_ends(
            rollouts.score_N, rollouts.ended_N, mode=s.missing_eos, penalty=s.missing_eos_penalty
        )
        score_PG = score_N.reshape(len(rollouts.groups), -1)
        sign_N = torch.as_tensor(pair_signs(score_PG, ties=s.ties).reshape(-1)).to(rollouts.logp_NT)
        _, metrics = reply_rewards(rollouts, s, 0.0)
        metrics["frac_reward_zero_std"] = float((score_PG == score_PG[:, :1]).all(1).mean())
        return Advantages(sign_N[:, None] * rollouts.mask_NT, metrics=metrics)

    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a pass, a mean over its prompts."""
        s = self.settings
        logp_PG, ref_logp_PG = (
            sequence_score(x_BT, batch.mask_BT, length_norm=s.length_norm).reshape(-1, s.replies)
            for x_BT in (logp_BT, batch.ref_logp_BT)
        )
        sign_PG = batch.advantage_BT[:, 0].reshape(-1, s.replies)
        explored_P = None
        if s.xpo_alpha:
            explored_P = sequence_score(logp_BT, batch.mask_BT, length_norm="none").reshape(-1, s.replies)[:, -1]
        loss = online_dpo_loss(
            logp_PG,
            ref_logp_PG,
            sign_PG,
            beta=batch.kl_coefficient,
            variant=s.variant,
            explored_P=explored_P,
            alpha=s.xpo_alpha,
        )
        margin_P = batch.kl_coefficient * (sign_PG * (logp_PG.detach() - ref_logp_PG)).sum(1)
        return loss, {
            "loss/policy_avg": loss.item(),
            "rewards/margins": margin_P.mean().item(),
            "rewards/accuracies": (margin_P > 0).float().mean().item(),
        }
