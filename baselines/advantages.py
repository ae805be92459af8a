"""Advantages of the group methods: a reply's score against the other replies to its prompt.

Letters: P prompts, G replies to each.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def group_advantages(
    score_PG: Tensor,
    *,
    baseline: Literal["none", "mean", "leave-one-out"],
    scale: Literal["none", "std"] = "none",
    ddof: Literal[0, 1] = 1,
    epsilon: float = 1e-4,
) -> Tensor:
    """Return the (P, G) scores minus a baseline of their prompt, over the standard deviation of the prompt's scores.

    ``mean`` is GRPO's baseline (2402.03300), the mean of all G scores. ``leave-one-out`` is RLOO's (2402.14740), the
    mean of the other G - 1 scores. ``std`` divides by the standard deviation + ``epsilon``, so equal scores give 0: the
    sample one with ``ddof`` 1, the population one with 0; 2402.03300 does not say which.
    Raises ValueError for a leave-one-out baseline or a scale with fewer than two replies.
    """
    replies = score_PG.shape[1]
    if replies < 2 and (baseline == "leave-one-out" or scale == "std"):
        raise ValueError(f"found {replies} reply to a prompt; expected at least 2")
    mean_P1 = score_PG.mean(1, keepdim=True)
    advantage_PG = score_PG if baseline == "none" else score_PG - mean_P1
    if baseline == "leave-one-out":  # r_i - sum_{j != i} r_j / (G - 1) = (r_i - mean) G / (G - 1)
        advantage_PG = advantage_PG * (replies / (replies - 1))
    if scale == "none":
        return advantage_PG
    # The mean of equal scores may round to another number, over a standard deviation as small.
    equal_P1 = (score_PG == score_PG[:, :1]).all(1, keepdim=True)
    advantage_PG = advantage_PG / (score_PG.std(1, correction=ddof, keepdim=True) + epsilon)
    return advantage_PG.masked_fill(equal_P1, 0.0)
