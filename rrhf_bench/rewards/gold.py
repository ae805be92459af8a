"""The gold rewards of the embedded worlds: judges that no method trains against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.data.toy import gold, reviews
from rrhf_bench.records import Prompt


class Gold(Protocol):
    """The true reward of an embedded world: a RewardModel that also says why."""

    identity: str

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]: ...

    def features(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict[str, int]]: ...


class GoldReward:
    """``data/toy/gold.py`` as a RewardModel. Raises DataError for a prompt that is not of the embedded world."""

    identity = "toy-gold 1"  # the number grows with every change of a gold score

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """(N,) gold rewards."""
        pairs = zip(prompts, responses, strict=True)
        return np.array([gold.judge(prompt.text, response)[0] for prompt, response in pairs], dtype=np.float64)

    def features(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict[str, int]]:
        """What the judge counted in each reply: the reasons of its score."""
        return [gold.features(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]


class ReviewsGold:
    """``data/toy/reviews.py`` as a RewardModel: true sentiment less penalties for repeating and garbling. Raises
    DataError for a prompt that is not of the embedded reviews."""

    identity = "toy-reviews-gold 1"  # the number grows with every change of a gold score

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """(N,) gold rewards, at most 1."""
        pairs = zip(prompts, responses, strict=True)
        return np.array([reviews.judge(prompt.text, response)[0] for prompt, response in pairs], dtype=np.float64)

    def features(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict[str, int]]:
        """What was counted in each completion: the reasons of its score."""
        return [reviews.features(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]
