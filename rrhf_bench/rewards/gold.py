"""The gold rewards of the embedded worlds, against which no method trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.data.toy import gold, reviews
from rrhf_bench.records import Prompt


class Gold:
    """The true reward of the embedded dialogues (``data/toy/gold.py``) as a RewardModel.

    Raises DataError for a prompt that is not of this world.
    """

    identity = "toy-gold 1"  # the number grows with every change of a gold score
    world: ClassVar[Any] = gold

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """Return the (N,) gold rewards."""
        pairs = zip(prompts, responses, strict=True)
        return np.array([self.world.judge(prompt.text, text)[0] for prompt, text in pairs], dtype=np.float64)

    def features(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict[str, int]]:
        """Return what each score counts in its reply."""
        return [self.world.features(prompt.text, text) for prompt, text in zip(prompts, responses, strict=True)]


class ReviewsGold(Gold):
    """The true sentiment of the embedded reviews (``data/toy/reviews.py``), less penalties for repeating and garbling.

    Scores are at most 1.
    """

    identity = "toy-reviews-gold 1"
    world: ClassVar[Any] = reviews
