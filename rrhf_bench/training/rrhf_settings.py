"""Settings of RRHF (arXiv 2304.05302)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.candidates import Candidates, DrawnCandidates
from rrhf_bench.settings.methods import OfflineSettings, Requirement


class RRHFSettings(OfflineSettings):
    """`variant` says which objective: the paper's equations, their intended reading, or the released code's."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"candidates"})

    kind: Literal["rrhf"] = "rrhf"
    candidates: Candidates = DrawnCandidates()
    variant: Literal["paper", "intended", "official"] = "paper"
    rank_weight: Annotated[float, Field(ge=0.0)] = 1.0
    sft_weight: Annotated[float, Field(ge=0.0)] = 1.0
    margin: Annotated[float, Field(ge=0.0)] = 0.0  # of the BRIO form, per rank apart; the paper drops it

    @model_validator(mode="after")
    def _margin_is_read(self) -> Self:
        if self.margin and not self.rank_weight:
            raise ValueError("margin: is of the ranking term, which rank_weight = 0 leaves out; remove one of the two")
        return self
