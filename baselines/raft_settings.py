"""Settings of RAFT (arXiv 2304.06767)."""

from __future__ import annotations

from typing import ClassVar, Literal

from rrhf_bench.settings.candidates import Candidates, DrawnCandidates
from rrhf_bench.settings.methods import OfflineSettings, Requirement


class RAFTSettings(OfflineSettings):
    """Cross-entropy on the best candidate. The paper's candidates are the model's: ``candidates.sources = ["model"]``.

    `reduction` says what the loss is a mean over, which the paper leaves open.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"candidates"})
    responses_used: ClassVar[int | None] = 1

    kind: Literal["raft"] = "raft"
    candidates: Candidates = DrawnCandidates()
    reduction: Literal["token", "sequence", "sum"] = "token"
