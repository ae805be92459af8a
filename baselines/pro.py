"""PRO: Preference Ranking Optimization of a whole ranking (arXiv 2306.17492; AlibabaResearch/DAMO-ConvAI/PRO).

Letters: B prompts, G candidates of a prompt (NaN rewards where a narrower group has none), K a rank, R rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.pro_settings import PROSettings
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import order_accuracy, scored_groups


def pro_loss(
    score_BG: Tensor, reward_BG: Tensor, target_BG: Tensor, *, temperatures: bool = True, sft_weight: float = 0.05
) -> Tensor:
    """Return the mean over prompts of PRO's ranking loss plus sft_weight (n - 1)^2 * -target of the best response.

    ``score_BG`` is s, the mean log-prob of a response; the paper's ``target_BG`` is the summed one. Responses are
    ranked by reward. Rank k competes with the ranks below it: -log[exp(s_k g_k) / (exp(s_k g_k) + sum_i exp(s_i g_ki))]
    with g_ki = r_k - r_i and g_k their largest, the inverse temperatures of the paper. Without ``temperatures`` every g
    is 1, which is Plackett-Luce. n is the number of a prompt's candidates; a candidate whose reward is NaN is absent,
    and one candidate alone adds 0. Tied rewards keep the order of the candidates, and so are ranked by position.
    """
    present_BG = ~reward_BG.isnan()
    order_BG = reward_BG.masked_fill(~present_BG, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    score_BK, present_BK = score_BG.gather(1, order_BG), present_BG.gather(1, order_BG)
    reward_BK = torch.where(present_BG, reward_BG, 0.0).gather(1, order_BG)

    ranks = score_BG.shape[1]
    lower_KK = torch.ones(ranks, ranks, dtype=torch.bool, device=score_BG.device).triu(1)  # [k, i]: i is below k
    below_BKK = lower_KK & present_BK[:, None, :] & present_BK[:, :, None]
    gap_BKK = (reward_BK[:, :, None] - reward_BK[:, None, :]) * below_BKK
    if not temperatures:
        gap_BKK = below_BKK.to(gap_BKK)
    own_BK1 = (score_BK * gap_BKK.amax(-1))[:, :, None]
    others_BKK = (score_BK[:, None, :] * gap_BKK).masked_fill(~below_BKK, -torch.inf)
    rank_B = (torch.cat([own_BK1, others_BKK], dim=-1).logsumexp(-1) - own_BK1.squeeze(-1)).sum(-1)

    best_B = target_BG.gather(1, order_BG[:, :1]).squeeze(-1)
    return (rank_B - sft_weight * (present_BG.sum(-1) - 1) ** 2 * best_B).mean()


class PRO:
    """PRO as a LossMethod. An example is a prompt with all its scored candidates."""

    def __init__(self, settings: PROSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each prompt. Raises DataError if no prompt has two different rewards."""
        return scored_groups(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's prompts, which are its weight."""
        s, mask_RT = self.settings, batch.responses.mask_BT.to(logp_RT.device)
        mean_BG = batch.grouped(sequence_score(logp_RT, mask_RT))
        target_BG = mean_BG if s.sft == "mean" else batch.grouped(sequence_score(logp_RT, mask_RT, length_norm="none"))
        reward_BG = batch.grouped(batch.reward_R.to(logp_RT.device), absent=math.nan)
        loss = pro_loss(mean_BG, reward_BG, target_BG, temperatures=s.temperatures, sft_weight=s.sft_weight)
        metrics = {"rewards/accuracies": order_accuracy(mean_BG.detach(), reward_BG)}
        return LossOutput(loss, float(batch.prompts), metrics)
