"""Reward models that differ in their training seed, read as one (arXiv 2310.02743).

Shape letters: M members, N texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import finite_number
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards.checks import Check
from rrhf_bench.rewards.reward import require_finite
from rrhf_bench.settings.reward import EnsembleSettings

FILE = "ensemble.json"
STANDARDISED_ON = 1000  # pairs at most, from the first on

Floats = NDArray[np.float64]


def combine(score_MN: Floats, settings: EnsembleSettings) -> Floats:
    """Return the (N,) scores of an ensemble: the mean, the minimum, or mean - weight x population variance over M."""
    if settings.combine == "minimum":
        return score_MN.min(axis=0)
    mean_N = score_MN.mean(axis=0)
    return mean_N if settings.combine == "mean" else mean_N - settings.weight * score_MN.var(axis=0)


class EnsembleReward:
    """The members' standardised scores, combined, as a RewardModel. Each member states and checks its own input."""

    def __init__(self, members: Sequence[Any], mean_M: Floats, std_M: Floats, settings: EnsembleSettings) -> None:
        self.members = tuple(members)
        self.mean_M, self.std_M, self.settings = mean_M, std_M, settings
        self.identity = f"ensemble {settings!r} of " + "; ".join(member.identity for member in self.members)
        self.checks: tuple[Check, ...] = tuple(check for member in self.members for check in member.checks)

    @property
    def truncated(self) -> int:
        """Return how many texts were cut; all members read a text alike."""
        return self.members[0].truncated

    def encode(self, prompt: Prompt, response: str) -> list[int]:
        return self.members[0].encode(prompt, response)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Floats:
        """Return the (N,) scores as computed."""
        score_MN = np.stack([member.score(prompts, responses) for member in self.members])
        return combine((score_MN - self.mean_M[:, None]) / self.std_M[:, None], self.settings)

    @classmethod
    def load(cls, folder: Path, load: Callable[[str], Any]) -> EnsembleReward:
        """Load the folder that ``write_ensemble`` wrote; ``load`` loads the folder of one member."""
        path = folder / FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            settings = EnsembleSettings.model_validate(found["settings"])
            moments = [[finite_number(value) for value in found[name]] for name in ("mean", "std")]
            if any(len(values) != settings.members or None in values for values in moments) or 0.0 in moments[1]:
                raise ValueError("mean and std are not a finite number of each member")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: is not the file of an ensemble ({reason}); train the ensemble again") from error
        members = [load(str(folder / f"member_{i}")) for i in range(settings.members)]
        return cls(members, np.array(moments[0]), np.array(moments[1]), settings)


def write_ensemble(
    folder: Path, settings: EnsembleSettings, pairs: Sequence[Preference], load: Callable[[str], Any]
) -> None:
    """Write ``ensemble.json`` beside the folders ``member_0``, ``member_1``, ...: mean and standard deviation of each
    member's scores of the training replies. Raises DataError for a member that scores all of them alike."""
    used = pairs[:STANDARDISED_ON]
    prompts = [pair.prompt for pair in used for _ in range(2)]
    texts = [reply or "" for pair in used for reply in (pair.chosen, pair.rejected)]
    moments: dict[str, list[float]] = {"mean": [], "std": []}
    for i in range(settings.members):
        member = load(str(folder / f"member_{i}"))
        score_N = require_finite(member.score(prompts, texts), prompts, f"reward model, member {i}")
        if score_N.std() == 0.0:
            raise DataError(
                f"reward model, member {i}: scores all {len(texts)} training replies alike; train it longer"
            )
        moments["mean"].append(float(score_N.mean()))
        moments["std"].append(float(score_N.std()))
    (folder / FILE).write_text(json.dumps({"settings": settings.model_dump(mode="json"), **moments}, indent=1))
