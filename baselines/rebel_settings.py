"""Settings of REBEL (arXiv 2404.16767)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.candidates import Candidates, DrawnCandidates
from rrhf_bench.settings.methods import OfflineSettings, Requirement


class REBELSettings(OfflineSettings):
    """A regression on reward differences. The paper's candidates are two samples: ``candidates.sources = ["model"]``
    and ``candidates.n = 2``."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"candidates", "reference"})

    kind: Literal["rebel"] = "rebel"
    candidates: Candidates = DrawnCandidates()
    eta: Annotated[float, Field(gt=0.0)] = 1.0  # nats of log-ratio for a unit of reward
    form: Literal["code", "paper"] = "code"
