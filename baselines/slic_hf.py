"""SLiC-HF: Sequence Likelihood Calibration with human feedback (arXiv 2305.10425).

Letters: B pairs, R = 2 B rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from baselines.slic_hf_settings import SLiCHFSettings
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import pair_examples, reward_metrics, score_sides


def slic_hf_loss(
    chosen_B: Tensor, rejected_B: Tensor, target_B: Tensor, *, delta: float, regularisation: float
) -> Tensor:
    """Return the mean of max(0, delta - S_w + S_l) - regularisation * S_ref (2305.10425).

    S is the summed log-prob of a response. ``target_B`` is S of the regularisation target: the SFT data's reply or the
    best decode in the paper, the chosen reply here. There is no frozen reference: the "hinge" losses of libraries,
    max(0, 1 - beta D) with D the difference of log-ratios, are RSO's and not this loss.
    """
    hinge_B = (delta - chosen_B + rejected_B).clamp(min=0.0)
    return (hinge_B - regularisation * target_B).mean()


class SLiCHF:
    """SLiC-HF on given pairs ("direct" in the paper) as a LossMethod: a prompt with its chosen and rejected reply."""

    def __init__(self, settings: SLiCHFSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each pair. Raises DataError if a prompt has no pair."""
        return pair_examples(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's pairs, which are its weight."""
        s = self.settings
        chosen_B, rejected_B = score_sides(logp_RT, batch, s.length_norm)
        loss = slic_hf_loss(chosen_B, rejected_B, chosen_B, delta=s.delta, regularisation=s.regularisation)
        satisfied = (chosen_B - rejected_B >= s.delta).float().mean().item()
        metrics = {**reward_metrics(chosen_B, rejected_B), "loss/zero_hinges": satisfied}
        return LossOutput(loss, float(batch.prompts), metrics)
