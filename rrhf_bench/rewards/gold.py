"""The embedded world's gold reward: the judge that no method trains against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.data.toy.gold import judge
from rrhf_bench.records import Prompt


class GoldReward:
    """``data/toy/gold.py`` as a RewardModel. Raises DataError for a prompt that is not of the embedded world."""

    identity = "toy-gold 1"  # the number grows with every change of a gold score

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """(N,) gold rewards."""
        pairs = zip(prompts, responses, strict=True)
        return np.array([judge(prompt.text, response)[0] for prompt, response in pairs], dtype=np.float64)

    def features(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict[str, int]]:
        """What the judge counted in each reply: the reasons of its score."""
        return [judge(prompt.text, response)[1] for prompt, response in zip(prompts, responses, strict=True)]
