"""Supervised fine-tuning on chosen replies: cross-entropy over response tokens.

Letters: B responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from baselines.sft_settings import SFTSettings
from rrhf_bench.errors import DataError
from rrhf_bench.policy.logprobs import masked_mean, sequence_score
from rrhf_bench.records import Response
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs


def sft_loss(logp_BT: Tensor, mask_BT: Tensor, *, reduction: Literal["token", "sequence", "sum"] = "token") -> Tensor:
    """Negative log-likelihood of responses; the prompt is not in it, the end-of-text token is.

    ``token``: mean over all response tokens of the batch, so long replies weigh more; ``sequence``: mean over responses
    of each one's token mean; ``sum``: mean over responses of the summed NLL (RRHF's Eq. 4, 2304.05302).
    Raises ValueError for a response without tokens where its own mean is asked for.
    """
    if reduction == "token":
        return -masked_mean(logp_BT, mask_BT)
    return -sequence_score(logp_BT, mask_BT, length_norm="response" if reduction == "sequence" else "none").mean()


class SFT:
    """SFT as a LossMethod: an example is a prompt with its chosen reply."""

    def __init__(self, settings: SFTSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """One example a pair. Raises DataError without pairs."""
        if not inputs.preferences:
            raise DataError("sft: no pairs to train on; give preferences with a chosen reply")
        return [
            Example(pair.prompt, (Response(pair.chosen, "chosen", "given" if pair.ended else "length"),))
            for pair in inputs.preferences
        ]

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's response tokens, or over its responses, as ``reduction`` says."""
        mask_RT = batch.responses.mask_BT.to(logp_RT.device)
        loss = sft_loss(logp_RT, mask_RT, reduction=self.settings.reduction)
        weight = float(mask_RT.sum()) if self.settings.reduction == "token" else float(batch.prompts)
        return LossOutput(loss, weight, {"logps/chosen": sequence_score(logp_RT, mask_RT).mean().item()})
