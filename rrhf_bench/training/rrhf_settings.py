"""Settings of RRHF (arXiv 2304.05302)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.methods import OfflineSettings, Requirement


class RRHFSettings(OfflineSettings):
    """`variant` says which objective: the paper's equations, their intended reading, or the released code's."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"candidates", "scores"})

    kind: Literal["rrhf"] = "rrhf"
    variant: Literal["paper", "intended", "official"] = "paper"
    rank_weight: Annotated[float, Field(ge=0.0)] = 1.0
    sft_weight: Annotated[float, Field(ge=0.0)] = 1.0
    margin: Annotated[float, Field(ge=0.0)] = 0.0  # of the BRIO form, per rank apart; the paper drops it
