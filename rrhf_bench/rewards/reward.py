"""What a reward model is to the rest of the bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.errors import DataError
from rrhf_bench.records import Prompt


class RewardModel(Protocol):
    """Scores replies; higher is better. Implementations state how the text is put together for them."""

    @property
    def identity(self) -> str:
        """What decides the scores: model, revision, input contract."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """(N,) finite scores, one for each (prompt, response), whatever order or batch they come in."""
        ...


def finite(scores: NDArray[np.float64], prompts: Sequence[Prompt], who: str) -> NDArray[np.float64]:
    """The scores, or a DataError that names the first prompt whose score is not a number."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise DataError(
            f"{who}: {bad.size} of {scores.size} scores are not finite, the first {scores[bad[0]]} for prompt "
            f"{prompts[bad[0]].id}; a reward model in half precision may overflow: load it in float32"
        )
    return scores
