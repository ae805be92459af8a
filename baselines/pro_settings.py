"""Settings of PRO (arXiv 2306.17492)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.candidates import Candidates, DrawnCandidates
from rrhf_bench.settings.methods import OfflineSettings, Requirement


class PROSettings(OfflineSettings):
    """A loss of rankings with SFT on the best response. The paper's ranking term averages log-probs over tokens and its
    SFT term sums them."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"candidates"})

    kind: Literal["pro"] = "pro"
    candidates: Candidates = DrawnCandidates()
    temperatures: bool = True  # from reward gaps, as with the paper's reward model; false: the order alone
    sft_weight: Annotated[float, Field(ge=0.0)] = 0.05  # times (n - 1)^2, n the candidates of a prompt
    sft: Literal["sum", "mean"] = "sum"  # of the best response's log-probs
