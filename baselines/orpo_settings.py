"""Settings of ORPO (arXiv 2403.07691)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rrhf_bench.settings.methods import PairSettings


class ORPOSettings(PairSettings):
    """SFT on the chosen reply and an odds ratio against the rejected one, without a reference."""

    kind: Literal["orpo"] = "orpo"
    odds_weight: Annotated[float, Field(ge=0.0)] = 0.1  # lambda
    nll: Literal["mean", "sum"] = "mean"  # of a chosen reply, over its tokens; the paper's is the mean
