"""RRHF: Rank Responses to align with Human Feedback (arXiv 2304.05302).

Letters: B prompts, G candidates of a prompt (the widest group; narrower ones are masked), T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rrhf_bench.errors import DataError
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import order_accuracy
from rrhf_bench.training.rrhf_settings import RRHFSettings


class RRHFLosses(NamedTuple):
    """The terms of one batch, and the scores that they are computed from."""

    total: Tensor  # rank_weight * rank + sft_weight * sft
    rank: Tensor
    sft: Tensor
    score_BG: Tensor  # p_i; 0 where a candidate is absent


def rrhf_loss(
    logp_BGT: Tensor,
    mask_BGT: Tensor,
    reward_BG: Tensor,
    *,
    variant: Literal["paper", "intended", "official"] = "paper",
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
    margin: float = 0.0,
    padded_length_B: Tensor | None = None,
) -> RRHFLosses:
    """Return the RRHF objective (2304.05302 Eqs. 1 to 5). Every term is a mean over prompts.

    p_i is the mean log-prob of response i. L_rank is the sum of max(0, p_i - p_j) over the pairs with r_i < r_j. L_ft
    is the negative log-prob of the best response. Tied rewards make no pair; of tied best responses the first is the
    best. A candidate without mask is absent, whatever its reward.

    ``reward_BG`` is only compared, so the caller passes float64: float32 would tie rewards that the reward model tells
    apart. The terms keep the dtype of ``logp_BGT``.

    Variants: ``paper`` sums L_ft over tokens, as Eq. 4 prints it. ``intended`` takes the token mean of L_ft.
    ``official`` is what the released train.py computes: p_i and L_ft are *sums* divided by ``padded_length_B``, the
    longest query + response of the group, because that code overwrites the ignore marks before it counts the length.
    ``official`` is the loss alone: the released tokenisation also puts a BOS at the head of each response of a LLaMA.
    ``margin`` adds margin * (difference of ranks) inside the hinge, which is BRIO's form and absent from the paper.
    Tied candidates share a rank.

    Raises ValueError if a prompt has no candidate, if the reward of a present candidate is not finite, or if
    ``official`` has no lengths.
    """
    present_BG = mask_BGT.any(-1)
    if not present_BG.any(-1).all():
        raise ValueError("a prompt has no candidate with tokens; drop it before the loss")
    if not torch.isfinite(reward_BG[present_BG]).all():
        raise ValueError("a present candidate's reward is not finite; score it again or drop it")
    reward_BG = reward_BG.masked_fill(~present_BG, -torch.inf)

    norm: Literal["response", "none"] = "none" if variant == "official" else "response"
    score_BG = logp_BGT.new_zeros(present_BG.shape).masked_scatter(
        present_BG, sequence_score(logp_BGT[present_BG], mask_BGT[present_BG], length_norm=norm)
    )
    if variant == "official":
        if padded_length_B is None:
            raise ValueError("variant 'official' divides by padded_length_B, the group's longest query + response")
        score_BG = score_BG / padded_length_B[:, None]

    worse_BGG = reward_BG[:, :, None] < reward_BG[:, None, :]  # [b, i, j]: i is worse than j
    worse_BGG = worse_BGG & present_BG[:, :, None] & present_BG[:, None, :]
    gap_BGG = score_BG[:, :, None] - score_BG[:, None, :]
    if margin:
        rank_BG = worse_BGG.sum(-1).to(score_BG)  # how many candidates are better
        gap_BGG = gap_BGG + margin * (rank_BG[:, :, None] - rank_BG[:, None, :])
    rank = (gap_BGG.clamp(min=0.0) * worse_BGG).sum((1, 2)).mean()

    best_B1 = reward_BG.argmax(-1, keepdim=True)
    if variant == "paper":
        sum_BG = logp_BGT.masked_fill(~mask_BGT, 0.0).sum(-1)
        sft = -sum_BG.gather(1, best_B1).mean()
    else:
        sft = -score_BG.gather(1, best_B1).mean()
    return RRHFLosses(rank_weight * rank + sft_weight * sft, rank, sft, score_BG)


class RRHF:
    """RRHF as a LossMethod. An example is a prompt with all its scored candidates."""

    def __init__(self, settings: RRHFSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each prompt.

        Raises DataError if no group has two different rewards, because then nothing can be ranked.
        """
        examples = [Example(row.prompt, row.responses, row.scores) for row in inputs.candidates]
        if self.settings.rank_weight and not any(len(set(example.rewards)) > 1 for example in examples):
            raise DataError(
                f"candidates: none of {len(examples)} prompts has two responses with different scores, so nothing can "
                "be ranked; check the reward model, or set rank_weight = 0"
            )
        return examples

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's prompts, which are its weight, with the metrics of the ranking."""
        logp_BGT = batch.grouped(logp_RT)
        mask_BGT = batch.grouped(batch.responses.mask_BT.to(logp_RT.device))
        reward_BG = batch.grouped(batch.reward_R.to(logp_RT.device), absent=torch.nan)
        s = self.settings
        losses = rrhf_loss(
            logp_BGT,
            mask_BGT,
            reward_BG,
            variant=s.variant,
            rank_weight=s.rank_weight,
            sft_weight=s.sft_weight,
            margin=s.margin,
            padded_length_B=batch.padded_lengths().to(logp_RT) if s.variant == "official" else None,
        )
        present_BG = mask_BGT.any(-1)
        metrics = {
            "loss/rank": losses.rank.item(),
            "loss/sft": losses.sft.item(),
            "logps/mean": losses.score_BG[present_BG].mean().item(),
            "rewards/accuracies": order_accuracy(losses.score_BG, reward_BG),
        }
        return LossOutput(losses.total, float(batch.prompts), metrics)
