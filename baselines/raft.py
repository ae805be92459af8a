"""RAFT: supervised fine-tuning on the best candidate of each prompt (arXiv 2304.06767); expert iteration in AlpacaFarm.

``candidates.rounds`` repeats it with samples of the model that the round before trained. Each round starts from the
initial policy; in the paper it goes on from the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from baselines.raft_settings import RAFTSettings
from baselines.sft import sft_loss
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import scored_groups

raft_loss = sft_loss  # The update is SFT's; the method is in the choice of the responses.


def best_candidate(example: Example) -> Example:
    """Return the example with its best-scored response alone; of tied ones the first."""
    best = max(range(len(example.rewards)), key=lambda i: example.rewards[i])
    return replace(example, responses=(example.responses[best],), rewards=(example.rewards[best],))


class RAFT:
    """RAFT as a LossMethod. An example is a prompt with its best candidate; the ranking is within a prompt."""

    def __init__(self, settings: RAFTSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each prompt. Raises DataError if no prompt has two different rewards."""
        return [best_candidate(example) for example in scored_groups(inputs, self.settings.kind)]

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's response tokens, or over its responses, as ``reduction`` says."""
        mask_RT = batch.responses.mask_BT.to(logp_RT.device)
        loss = raft_loss(logp_RT, mask_RT, reduction=self.settings.reduction)
        weight = float(mask_RT.sum()) if self.settings.reduction == "token" else float(batch.prompts)
        metrics = {
            "logps/chosen": sequence_score(logp_RT, mask_RT).mean().item(),
            "rewards/chosen": batch.reward_R.mean().item(),
        }
        return LossOutput(loss, weight, metrics)
