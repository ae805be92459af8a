"""Settings of SimPO (arXiv 2405.14734)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rrhf_bench.settings.methods import PairSettings


class SimPOSettings(PairSettings):
    """A loss of pairs without a reference. The defaults of beta and gamma are those of the paper's appendix."""

    kind: Literal["simpo"] = "simpo"
    beta: Annotated[float, Field(gt=0.0)] = 2.5
    gamma: Annotated[float, Field(ge=0.0)] = 1.375  # the margin: 0.55 of beta
    margin: Literal["absolute", "ratio"] = "absolute"  # of gamma: the paper's, or a share of beta
