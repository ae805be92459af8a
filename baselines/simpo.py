"""SimPO: Simple Preference Optimization, with mean log-probs as rewards and no reference (arXiv 2405.14734).

Letters: B pairs, R = 2 B rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from baselines.simpo_settings import SimPOSettings
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import pair_examples, reward_metrics, score_sides


def simpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    beta: float,
    gamma: float,
    margin: Literal["absolute", "ratio"] = "absolute",
) -> Tensor:
    """Return -mean log sigmoid(beta (A_w - A_l) - gamma), A the mean log-prob of a response's tokens (2405.14734).

    With ``margin = "ratio"`` gamma is given as a share of beta: -mean log sigmoid(beta (A_w - A_l - gamma)), as HALOs
    has it. ``absolute`` is the paper's form.
    """
    target = gamma if margin == "absolute" else beta * gamma
    return -logsigmoid(beta * (chosen_B - rejected_B) - target).mean()


class SimPO:
    """SimPO as a LossMethod: an example is a prompt with its chosen and its rejected reply."""

    def __init__(self, settings: SimPOSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each pair. Raises DataError if a prompt has no pair."""
        return pair_examples(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's pairs, which are its weight."""
        s = self.settings
        chosen_B, rejected_B = score_sides(logp_RT, batch, "response")
        loss = simpo_loss(chosen_B, rejected_B, beta=s.beta, gamma=s.gamma, margin=s.margin)
        return LossOutput(loss, float(batch.prompts), reward_metrics(s.beta * chosen_B, s.beta * rejected_B))
