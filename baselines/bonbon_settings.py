"""Settings of BoNBoN (arXiv 2406.00832)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.candidates import Candidates, DrawnCandidates
from rrhf_bench.settings.methods import OfflineSettings, Requirement


class BoNBoNSettings(OfflineSettings):
    """A regression to the log-ratios of best-of-n. The paper's candidates are n samples of the initial policy:
    ``candidates.sources = ["model"]``."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"candidates", "reference"})
    responses_used: ClassVar[int | None] = 2

    kind: Literal["bonbon"] = "bonbon"
    candidates: Candidates = DrawnCandidates()
    n: Annotated[int, Field(ge=2)] | None = None  # of best-of-n, which decides the target; none: the candidates
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.005  # weight of SFT on the best; the rest is the regression's

    @property
    def group_size(self) -> int:
        """Return n: as given, or the samples of the policy and one candidate of each other source."""
        candidates = self.candidates
        return self.n or sum(candidates.n if source == "model" else 1 for source in candidates.sources)

    @model_validator(mode="after")
    def _fixed(self) -> Self:
        if self.candidates.refresh:
            raise ValueError("candidates.refresh: BoNBoN learns from samples of the initial policy; remove the key")
        known = {"model", "chosen", "rejected", "reply"}
        if self.n is None and (other := [name for name in self.candidates.sources if name not in known]):
            raise ValueError(
                f"n: none is given, and candidates.sources names {other[0]!r}, of whose replies to a prompt BoNBoN "
                "cannot know the number; give n, the number of all candidates of a prompt"
            )
        if self.group_size < 2:
            raise ValueError("n: one candidate has no best and worst; raise candidates.n or add sources")
        return self
