"""The losses of a reward model that is trained on pairs of replies.

Shape letters: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

NEGATIVE, POSITIVE = "NEGATIVE", "POSITIVE"


@dataclass(frozen=True)
class Objective:
    """A loss of the scores that a head gives, and the labels of that head, if it has any.

    Without labels the head has one output, the score. With two labels, (negative, positive), it has an output for each,
    and the score is the log-odds of positive.
    """

    loss: Callable[..., Tensor]  # (chosen_B, rejected_B) -> scalar
    labels: tuple[str, str] | None = None


def bradley_terry_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    margin_B: Tensor | None = None,
    tie_B: Tensor | None = None,
    tie_threshold: float | None = None,
    weight_B: Tensor | None = None,
    centring: float = 0.0,
) -> Tensor:
    """Return the mean of -log sigma(r_chosen - r_rejected) over pairs; scalar.

    The negative log-likelihood of the labels under the Bradley-Terry model (2203.02155 Eq. 1). Adding a constant to all
    rewards changes nothing, unless there is centring.

    ``margin_B`` is subtracted from the difference (Llama 2, 2307.09288 Eq. 2). Pairs in ``tie_B`` (bool) have the loss
    ``tie_nll`` instead. With ``tie_threshold`` the decided pairs, too, are those of Rao and Kupper: the threshold is
    subtracted like a margin. ``weight_B`` replaces the mean by a weighted sum. ``centring`` is the weight of
    (r_chosen + r_rejected)^2, which holds the rewards near zero (2312.09244; 0.01 is usual).
    """
    difference_B = chosen_B - rejected_B
    decided_B = difference_B if margin_B is None else difference_B - margin_B
    nll_B = -logsigmoid(decided_B if tie_threshold is None else decided_B - tie_threshold)
    if tie_B is not None:
        nll_B = torch.where(tie_B, tie_nll(difference_B, tie_threshold), nll_B)
    if centring:
        nll_B = nll_B + centring * (chosen_B + rejected_B) ** 2
    return nll_B.mean() if weight_B is None else (weight_B * nll_B).sum()


def tie_nll(difference_B: Tensor, threshold: float | None = None) -> Tensor:
    """Return the negative log-likelihood of a tie from the difference d of the two rewards; (B,).

    Without a threshold a tie is half a vote for each side, -(log sigma(d) + log sigma(-d)) / 2 (1706.03741 section
    2.2.3). With threshold t it is an outcome of its own under the model of Rao and Kupper (1967, with theta = e^t; for
    reward models 2410.05328): P(tie) = (e^2t - 1) sigma(d - t) sigma(-d - t), tanh(t / 2) at d = 0.
    """
    if threshold is None:
        return -(logsigmoid(difference_B) + logsigmoid(-difference_B)) / 2
    return -(math.log(math.expm1(2 * threshold)) + logsigmoid(difference_B - threshold)) - logsigmoid(
        -difference_B - threshold
    )


def prompt_weights(group_of_B: Tensor) -> Tensor:
    """Return the weight of each pair by which every prompt counts alike, 1 / (prompts x pairs of the prompt); (B,).

    InstructGPT's mean over the pairs of a prompt (2203.02155 Eq. 1) and then over prompts. Weights add up to 1.
    """
    _, place_B, count_G = group_of_B.unique(return_inverse=True, return_counts=True)
    return 1.0 / (len(count_G) * count_G[place_B])


def classification_loss(positive_B: Tensor, negative_B: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over 2B texts from the log-odds of positive, half of them positive; scalar.

    Over the two labels' logits it is their softmax cross-entropy. Unlike Bradley-Terry it fixes the zero: adding a
    constant to all log-odds changes it. The probability of POSITIVE is the reward of the IMDB experiment of 2304.05302
    (Table 10, after 2210.01241).
    """
    return -(logsigmoid(positive_B) + logsigmoid(-negative_B)).mean() / 2


OBJECTIVES: Mapping[str, Objective] = {
    "bradley-terry": Objective(bradley_terry_loss),
    "classification": Objective(classification_loss, (NEGATIVE, POSITIVE)),
}
