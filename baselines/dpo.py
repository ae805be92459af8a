"""DPO and its kin on pairs: Direct Preference Optimization (arXiv 2305.18290), cDPO, robust DPO, IPO, APO, RPO, WPO.

Letters: B pairs, R = 2 B responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
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
    kind: Literal["dpo", "robust", "ipo", "apo_zero", "apo_down"] = "dpo",
    weight_B: Tensor | None = None,
) -> Tensor:
    """Return the mean loss over pairs from the log-probs of whole responses under the policy and the reference.

    D = log-ratio of the chosen response - log-ratio of the rejected one, e = ``label_smoothing``.
    ``dpo``: -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D); 2305.18290 Eq. 7 with e = 0, cDPO with e > 0.
    ``robust``: (-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)) / (1 - 2 e); 2403.00409, unbounded below.
    ``ipo``: (D - 1 / (2 beta))^2; 2310.12036 Eq. 17 with tau = beta. For responses of many tokens, sums need a far
    smaller beta than means over tokens.
    ``apo_zero``: 1 - sigmoid(beta h_w) + sigmoid(beta h_l), h the log-ratio of a response, for chosen responses better
    than the policy's own; ``apo_down``: sigmoid(beta h_w) + 1 - sigmoid(beta D), for worse ones; 2408.06266.
    ``weight_B`` multiplies the loss of each pair.
    """
    ratio_chosen_B, ratio_rejected_B = chosen_B - ref_chosen_B, rejected_B - ref_rejected_B
    difference_B = ratio_chosen_B - ratio_rejected_B
    right_B, swapped_B = -logsigmoid(beta * difference_B), -logsigmoid(-beta * difference_B)
    if kind == "ipo":
        loss_B = (difference_B - 1.0 / (2.0 * beta)) ** 2
    elif kind == "apo_zero":
        loss_B = torch.sigmoid(-beta * ratio_chosen_B) + torch.sigmoid(beta * ratio_rejected_B)
    elif kind == "apo_down":
        loss_B = torch.sigmoid(beta * ratio_chosen_B) + torch.sigmoid(-beta * difference_B)
    elif kind == "robust":
        loss_B = ((1.0 - label_smoothing) * right_B - label_smoothing * swapped_B) / (1.0 - 2.0 * label_smoothing)
    else:
        loss_B = (1.0 - label_smoothing) * right_B + label_smoothing * swapped_B
    return (loss_B if weight_B is None else weight_B * loss_B).mean()


def wpo_weight(sharp_chosen_B: Tensor, sharp_rejected_B: Tensor, *, capped: bool = True) -> Tensor:
    """Return WPO's weight W_w W_l of each pair, without gradient and at most 1 if ``capped`` (2406.11827).

    W = exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2) says how like the policy's own samples a response is.
    The arguments are these means: those of the log-probs at temperature 1/2 less those at 1, because the log-prob at
    1/2 is 2 log pi(y_t) - log sum_v pi(v)^2. The released code caps the product; TRL does not.
    """
    weight_B = (sharp_chosen_B + sharp_rejected_B).detach().exp()
    return weight_B.clamp(max=1.0) if capped else weight_B


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
        weight_B = None
        if s.weights != "none":
            assert batch.half_temperature_RT is not None
            sharp_RT = batch.half_temperature_RT.to(logp_RT.device) - logp_RT
            weight_B = wpo_weight(*score_sides(sharp_RT, batch, "response"), capped=s.weights == "wpo")
        loss = dpo_loss(
            chosen_B,
            rejected_B,
            ref_chosen_B,
            ref_rejected_B,
            beta=s.beta,
            label_smoothing=s.label_smoothing,
            kind=s.variant,
            weight_B=weight_B,
        )
        if s.nll_weight:
            loss = loss - s.nll_weight * score_sides(logp_RT, batch, "none" if s.nll == "sum" else "response")[0].mean()
        metrics = {
            **reward_metrics(s.beta * (chosen_B - ref_chosen_B), s.beta * (rejected_B - ref_rejected_B)),
            "logps/chosen": chosen_B.mean().item(),
            "logps/rejected": rejected_B.mean().item(),
        }
        if weight_B is not None:
            metrics["weights/mean"] = weight_B.mean().item()
        return LossOutput(loss, float(batch.prompts), metrics)
