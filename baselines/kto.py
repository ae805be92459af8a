"""KTO: Kahneman-Tversky Optimization of replies that are each desirable or undesirable (arXiv 2402.01306).

Letters: B prompts, N labelled replies, R = 4 B rows (2 B without the baseline), T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.kto_settings import KTOSettings
from rrhf_bench.errors import DataError
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import pair_examples, reward_metrics


def kto_loss(
    logratio_N: Tensor,
    desirable_N: Tensor,
    mismatched_M: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the mean over labelled replies of weight - value (2402.01306), with summed log-ratios h.

    Desirable: w_D (1 - sigmoid(beta (h - z))); undesirable: w_U (1 - sigmoid(beta (z - h))). The reference point z
    estimates the KL: max(0, mean of ``mismatched_M``), the log-ratios of replies to other prompts, without gradient. It
    is 0 if there are none. No reply is compared with another one, so the labels need no pairs.
    """
    z = mismatched_M.detach().mean().clamp(min=0.0) if len(mismatched_M) else logratio_N.new_zeros(())
    sign_N = torch.where(desirable_N, 1.0, -1.0).to(logratio_N)
    weight_N = torch.where(desirable_N, desirable_weight, undesirable_weight).to(logratio_N)
    return (weight_N * (1.0 - torch.sigmoid(beta * sign_N * (logratio_N - z)))).mean()


class KTO:
    """KTO as a LossMethod. An example is a prompt with its chosen reply, which is desirable, and its rejected one,
    which is undesirable, then both replies of another prompt, which only give the reference point."""

    def __init__(self, settings: KTOSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each pair. Raises DataError without both labels, or without another prompt."""
        if inputs.preferences and all(pair.rejected is None for pair in inputs.preferences):
            raise DataError(
                f"kto: found {len(inputs.preferences)} desirable replies and no undesirable one; it needs replies of "
                'both labels: give pairs, or use kind = "sft"'
            )
        own = pair_examples(inputs, self.settings.kind)
        if self.settings.baseline == "none":
            return own
        if len(own) < 2:
            raise DataError('kto: found 1 prompt; the reference point needs replies to another; set baseline = "none"')
        step = 1 if self.settings.baseline == "next" else -1
        other = [own[(i + step) % len(own)] for i in range(len(own))]
        return [Example(a.prompt, a.responses + b.responses) for a, b in zip(own, other, strict=True)]

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the labelled replies of the whole step."""
        assert batch.reference_RT is not None
        s, mask_RT = self.settings, batch.responses.mask_BT.to(logp_RT.device)
        ratio_R = sequence_score(logp_RT - batch.reference_RT.to(logp_RT.device), mask_RT, length_norm="none")
        ratio_BG = batch.grouped(ratio_R)
        label_B2 = torch.tensor([True, False], device=logp_RT.device).expand(batch.prompts, 2)
        loss = kto_loss(
            ratio_BG[:, :2].flatten(),
            label_B2.flatten(),
            ratio_BG[:, 2:].flatten(),
            beta=s.beta,
            desirable_weight=s.desirable_weight,
            undesirable_weight=s.undesirable_weight,
        )
        metrics = reward_metrics(s.beta * ratio_BG[:, 0], s.beta * ratio_BG[:, 1])
        if s.baseline != "none":
            metrics["objective/kl"] = max(0.0, ratio_BG[:, 2:].mean().item())
        return LossOutput(loss, float(batch.prompts), metrics)
