"""The reward-model interface, and the checks that scores are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.errors import DataError, Diverged
from rrhf_bench.records import Prompt


class RewardModel(Protocol):
    """Scores replies; higher is better. Each implementation documents how it builds its input text."""

    @property
    def identity(self) -> str:
        """Return what decides the scores: model, revision, input contract."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """Return the (N,) scores of the (prompt, response) pairs; order and batching do not change them.

        A score may be non-finite, for instance when half precision overflows. The caller checks that, because only
        the caller knows whether one row or every row depends on the scores.
        """
        ...


def require_finite(
    scores: NDArray[np.float64], prompts: Sequence[Prompt], where: str, responses: Sequence[str] | None = None
) -> NDArray[np.float64]:
    """Return the scores. Raises DataError if one is not finite; ``where`` names the reward model in the message.

    With ``responses`` the scores are those of one row alone: it raises Diverged with the replies as evidence, and
    ``where`` says where the row stands, such as its iteration and step.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if not bad.size:
        return scores
    fault = (
        f"{where}: {bad.size} of {scores.size} rewards are not finite, the first {scores[bad[0]]} for prompt "
        f"{prompts[bad[0]].id}; a reward model in half precision may overflow: load it in float32"
    )
    if responses is None:
        raise DataError(fault)
    raise Diverged(fault, scored_replies(prompts, responses, scores))


def scored_replies(
    prompts: Sequence[Prompt], responses: Sequence[str], scores: NDArray[np.float64]
) -> list[Mapping[str, Any]]:
    """Return scored replies as JSON objects; a reward that is not finite becomes text, as JSON has no such number."""
    return [
        {"prompt": prompt.text, "response": response, "reward": reward if math.isfinite(reward) else str(reward)}
        for prompt, response, reward in zip(prompts, responses, scores.tolist(), strict=True)
    ]
