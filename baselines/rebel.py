"""REBEL: regression of log-ratios on reward differences (arXiv 2404.16767; ZhaolinGao/REBEL).

The paper samples its pairs from the policy of the iteration before and regresses log-ratios to that policy. Here the
candidates come before training and the ratios are to the initial policy, which is the first iteration. Its reward less
0.05 KL to the initial policy is then the reward itself. Letters: B prompts, G candidates, R rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from baselines.rebel_settings import REBELSettings
from baselines.vcb import squared_differences
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import log_ratios, order_accuracy, scored_groups


def rebel_loss(
    logratio_BG: Tensor, reward_BG: Tensor, *, eta: float, form: Literal["code", "paper"] = "code"
) -> Tensor:
    """Return the mean over prompts of the mean over pairs of a squared error of regression (2404.16767).

    With D the difference of two summed log-ratios and Delta r that of their rewards, ``code`` is (D - eta Delta r)^2
    and ``paper`` is (D / eta - Delta r)^2: the same minimum with eta^2 times the gradient. The paper has two responses
    to a prompt; of more, all pairs count alike. A candidate whose reward is NaN is absent; one alone adds 0. With
    eta = 1 / (gamma spread) ``code`` is VCB's loss divided by gamma^2.
    """
    value_BG = logratio_BG - eta * reward_BG if form == "code" else logratio_BG / eta - reward_BG
    return squared_differences(value_BG).mean()


class REBEL:
    """REBEL as a LossMethod. An example is a prompt with all its scored candidates."""

    def __init__(self, settings: REBELSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each prompt. Raises DataError if no prompt has two different rewards."""
        return scored_groups(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's prompts, which are its weight."""
        logratio_BG, reward_BG = log_ratios(logp_RT, batch)
        loss = rebel_loss(logratio_BG, reward_BG, eta=self.settings.eta, form=self.settings.form)
        metrics = {"rewards/accuracies": order_accuracy(logratio_BG.detach(), reward_BG)}
        return LossOutput(loss, float(batch.prompts), metrics)
