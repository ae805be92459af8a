"""What losses of pairs share: examples of two replies or of scored groups, the scores of both sides, metrics.

Letters: B prompts, R responses (2 B of B pairs), G candidates of a prompt, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from rrhf_bench.errors import DataError
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.records import Candidates, Response
from rrhf_bench.training.method import Example, MethodBatch, TrainInputs


def pair_examples(inputs: TrainInputs, kind: str) -> Sequence[Example]:
    """Return one example for each pair: the chosen reply, then the rejected one.

    The pairs are of the candidates, if there are any: the best and the worst one of each prompt whose scores differ.
    Raises DataError, with the method's ``kind``, if a prompt has no pair, or no prompt has two different scores.
    """
    if inputs.candidates:
        found = [_best_and_worst(row) for row in inputs.candidates if len(set(row.scores)) > 1]
        if not found:
            raise DataError(
                f"{kind}: none of {len(inputs.candidates)} prompts has two candidates with different scores; expected "
                "a better and a worse one; raise candidates.n or check the reward model"
            )
        return found
    pairs = [(pair.prompt, pair.chosen, pair.rejected) for pair in inputs.preferences]
    if not pairs or any(rejected is None for _, _, rejected in pairs):
        raise DataError(f"{kind}: found prompts without a pair; expected a chosen and a rejected reply to each")
    return [
        Example(prompt, (Response(chosen, "chosen"), Response(rejected, "rejected")))
        for prompt, chosen, rejected in pairs
        if rejected is not None
    ]


def _best_and_worst(row: Candidates) -> Example:
    """Return the example of the first best and the last worst candidate."""
    ordered = sorted(row.responses, key=lambda response: -(response.score or 0.0))  # stable
    return Example(row.prompt, (ordered[0], ordered[-1]))


def scored_groups(inputs: TrainInputs, kind: str) -> Sequence[Example]:
    """Return one example for each prompt with its scored candidates.

    Raises DataError, with the method's ``kind``, if no prompt has two candidates with different scores.
    """
    examples = [Example(row.prompt, row.responses, row.scores) for row in inputs.candidates]
    if not any(len(set(example.rewards)) > 1 for example in examples):
        raise DataError(
            f"{kind}: none of {len(examples)} prompts has two candidates with different scores; it needs two scored "
            "responses to a prompt; raise candidates.n or check the reward model"
        )
    return examples


def log_ratios(
    logp_RT: Tensor, batch: MethodBatch, length_norm: Literal["none", "response"] = "none"
) -> tuple[Tensor, Tensor]:
    """Return the (B, G) log-ratios to the reference and rewards of scored groups; rewards are NaN where none is."""
    assert batch.reference_RT is not None
    ratio_RT = logp_RT - batch.reference_RT.to(logp_RT.device)
    ratio_R = sequence_score(ratio_RT, batch.responses.mask_BT.to(logp_RT.device), length_norm=length_norm)
    return batch.grouped(ratio_R), batch.grouped(batch.reward_R.to(logp_RT.device), absent=math.nan)


def score_sides(logp_RT: Tensor, batch: MethodBatch, length_norm: Literal["none", "response"]) -> tuple[Tensor, Tensor]:
    """Return the (B,) scores of the chosen and of the rejected replies: summed log-probs, or their means."""
    mask_RT = batch.responses.mask_BT.to(logp_RT.device)
    chosen_B, rejected_B = batch.grouped(sequence_score(logp_RT, mask_RT, length_norm=length_norm)).unbind(1)
    return chosen_B, rejected_B


def reward_metrics(chosen_B: Tensor, rejected_B: Tensor) -> dict[str, float]:
    """Return the metrics of what a loss regards as the reward of each side."""
    chosen_B, rejected_B = chosen_B.detach(), rejected_B.detach()
    return {
        "rewards/chosen": chosen_B.mean().item(),
        "rewards/rejected": rejected_B.mean().item(),
        "rewards/margins": (chosen_B - rejected_B).mean().item(),
        "rewards/accuracies": (chosen_B > rejected_B).float().mean().item(),
    }


def order_accuracy(score_BG: Tensor, reward_BG: Tensor) -> float:
    """Return the share of a batch's pairs with different rewards that the scores order as the rewards do.

    A candidate whose reward is NaN is absent. Without such a pair the share is 0.
    """
    pair_BGG = reward_BG[:, :, None] < reward_BG[:, None, :]
    ordered_BGG = score_BG[:, :, None] < score_BG[:, None, :]
    return (ordered_BGG & pair_BGG).sum().item() / max(1, int(pair_BGG.sum()))
