"""DPO and its kin on pairs: Direct Preference Optimization (arXiv 2305.18290), cDPO, robust DPO, IPO.

Letters: B pairs, R = 2 B responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from baselines.dpo_settings import DPOSettings
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import pair_examples, reward_metrics, score_sides


def dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: Literal["dpo", "robust", "ipo"] = "dpo",
) -> Tensor:
    """Return the mean loss over pairs from the log-probs of whole responses under the policy and the reference.

    D = log-ratio of the chosen response - log-ratio of the rejected one, e = ``label_smoothing``.
    ``dpo``: -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D); 2305.18290 Eq. 7 with e = 0, cDPO with e > 0.
    ``robust``: (-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)) / (1 - 2 e); 2403.00409, unbounded below.
    ``ipo``: (D - 1 / (2 beta))^2; 2310.12036 Eq. 17 with tau = beta. For responses of many tokens, sums need a far
    smaller beta than means over tokens.
    """
    difference_B = (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)
    if kind == "ipo":
        return ((difference_B - 1.0 / (2.0 * beta)) ** 2).mean()
    right_B, swapped_B = -logsigmoid(beta * difference_B), -logsigmoid(-beta * difference_B)
    if kind == "robust":
        loss_B = ((1.0 - label_smoothing) * right_B - label_smoothing * swapped_B) / (1.0 - 2.0 * label_smoothing)
    else:
        loss_B = (1.0 - label_smoothing) * right_B + label_smoothing * swapped_B
    return loss_B.mean()


class DPO:
    """DPO as a LossMethod: an example is a prompt with its chosen and its rejected reply."""

    def __init__(self, settings: DPOSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each pair. Raises DataError if a prompt has no pair."""
        return pair_examples(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's pairs, which are its weight, with the metrics of the implicit rewards."""
        assert batch.reference_RT is not None
        s = self.settings
        chosen_B, rejected_B = score_sides(logp_RT, batch, s.length_norm)
        ref_chosen_B, ref_rejected_B = score_sides(batch.reference_RT.to(logp_RT.device), batch, s.length_norm)
        loss = dpo_loss(
            chosen_B,
            rejected_B,
            ref_chosen_B,
            ref_rejected_B,
            beta=s.beta,
            label_smoothing=s.label_smoothing,
            kind=s.variant,
        )
        metrics = {
            **reward_metrics(s.beta * (chosen_B - ref_chosen_B), s.beta * (rejected_B - ref_rejected_B)),
            "logps/chosen": chosen_B.mean().item(),
            "logps/rejected": rejected_B.mean().item(),
        }
        return LossOutput(loss, float(batch.prompts), metrics)
