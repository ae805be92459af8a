"""The losses of a reward model that is trained on pairs of replies.

Shape letters: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

NEGATIVE, POSITIVE = "NEGATIVE", "POSITIVE"


@dataclass(frozen=True)
class Objective:
    """A loss of the scores that a head gives, and the labels of that head, if it has any.

    Without labels the head has one output, the score. With two labels, (negative, positive), it has an output for each,
    and the score is the log-odds of positive.
    """

    loss: Callable[[Tensor, Tensor], Tensor]  # (chosen_B, rejected_B) -> scalar
    labels: tuple[str, str] | None = None


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Return the mean of -log sigma(r_chosen - r_rejected) over pairs; scalar.

    The negative log-likelihood of the labels under the Bradley-Terry model (2203.02155 Eq. 1). Adding a constant to all
    rewards changes nothing.
    """
    return -logsigmoid(chosen_B - rejected_B).mean()


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
