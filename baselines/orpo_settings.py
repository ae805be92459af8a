"""Settings of ORPO (arXiv 2403.07691)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.methods import OfflineSettings, Requirement


class ORPOSettings(OfflineSettings):
    """SFT on the chosen reply and an odds ratio against the rejected one, without a reference."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"pairs"})

    kind: Literal["orpo"] = "orpo"
    odds_weight: Annotated[float, Field(ge=0.0)] = 0.1  # lambda
    nll: Literal["mean", "sum"] = "mean"  # of a chosen reply, over its tokens; the paper's is the mean
