"""Settings of VCB (arXiv 2402.16030)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.candidates import Candidates, DrawnCandidates
from rrhf_bench.settings.methods import OfflineSettings, Requirement


class VCBSettings(OfflineSettings):
    """A loss of reward gaps. The paper's spread is that of the SFT model's samples: ``candidates.sources = ["model"]``.

    The paper's gamma could not be read: 0.1 makes a gap of one spread worth 10 nats, like DPO's beta.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"candidates", "reference"})

    kind: Literal["vcb"] = "vcb"
    candidates: Candidates = DrawnCandidates()
    gamma: Annotated[float, Field(gt=0.0)] = 0.1  # strength of the KL
    spread: Literal["sample", "population"] = "sample"  # standard deviation, which the paper does not specify
    spread_floor: Annotated[float, Field(gt=0.0)] = 1e-3  # of the spread, in units of the reward; not in the paper
    length_norm: Literal["none", "response"] = "none"  # of the log-ratio: the paper's sum, or a mean over tokens
