"""VCB: value-based calibration of scored candidates (arXiv 2402.16030, EMNLP 2024 main 976).

No public code exists: the authors' repository holds a README and a licence. The loss is the paper's, as a public review
prints it; the paper's gamma, learning rate, number of samples and tables could not be read.
Letters: B prompts, G candidates of a prompt (NaN where a narrower group has none), R rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.vcb_settings import VCBSettings
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import log_ratios, order_accuracy, scored_groups


def vcb_loss(logratio_BG: Tensor, reward_BG: Tensor, spread_B: Tensor, *, gamma: float) -> Tensor:
    """Return the mean over prompts of the mean over pairs of (gamma (h_i - h_j) - (r_i - r_j) / spread)^2.

    ``logratio_BG`` is h, the log-ratio of each response to the SFT model, summed over tokens in the paper. ``spread_B``
    is the standard deviation of the rewards of a prompt's SFT samples. The loss is 0 at the policy that maximises
    E[r / spread] - gamma KL(policy || SFT): h = r / (gamma spread) + a constant of the prompt. So the size of a reward
    gap counts, unlike in RRHF and DPO, and its unit does not. A candidate whose reward is NaN is absent; a prompt with
    one candidate has no pair and adds 0. Raises ValueError if a spread is not positive.
    """
    if not (spread_B > 0).all():
        raise ValueError("the spread of a prompt's rewards is not positive; set a floor or drop the prompt")
    return squared_differences(gamma * logratio_BG - reward_BG / spread_B[:, None]).mean()


def squared_differences(value_BG: Tensor) -> Tensor:
    """Return the mean of (a_i - a_j)^2 over the pairs of each prompt's values, NaN apart: twice their sample variance.

    Without a pair it is 0.
    """
    present_BG = ~value_BG.isnan()
    count_B1 = present_BG.sum(-1, keepdim=True)
    value_BG = torch.where(present_BG, value_BG, 0.0)
    centred_BG = (value_BG - value_BG.sum(-1, keepdim=True) / count_B1) * present_BG
    return 2.0 * (centred_BG**2).sum(-1) / (count_B1.squeeze(-1) - 1).clamp(min=1)


def reward_spread(reward_BG: Tensor, *, correction: int, floor: float) -> Tensor:
    """Return the (B,) standard deviation of each prompt's rewards, NaN apart, and at least ``floor``.

    ``correction`` is 1 for the sample standard deviation and 0 for the population's.
    """
    present_BG = ~reward_BG.isnan()
    count_B = present_BG.sum(-1)
    mean_B1 = (torch.where(present_BG, reward_BG, 0.0).sum(-1) / count_B)[:, None]
    square_B = torch.where(present_BG, (reward_BG - mean_B1) ** 2, 0.0).sum(-1)
    return (square_B / (count_B - correction).clamp(min=1)).sqrt().clamp(min=floor)


class VCB:
    """VCB as a LossMethod. An example is a prompt with all its scored candidates."""

    def __init__(self, settings: VCBSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each prompt. Raises DataError if no prompt has two different rewards."""
        return scored_groups(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's prompts, which are its weight."""
        s = self.settings
        logratio_BG, reward_BG = log_ratios(logp_RT, batch, s.length_norm)
        spread_B = reward_spread(reward_BG, correction=int(s.spread == "sample"), floor=s.spread_floor)
        loss = vcb_loss(logratio_BG, reward_BG, spread_B, gamma=s.gamma)
        metrics = {
            "rewards/accuracies": order_accuracy(logratio_BG.detach(), reward_BG),
            "rewards/spread": spread_B.mean().item(),
        }
        return LossOutput(loss, float(batch.prompts), metrics)
