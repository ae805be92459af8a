"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from rrhf_bench.settings.methods import OfflineSettings, Requirement


class SFTSettings(OfflineSettings):
    """Cross-entropy on the chosen replies. `reduction` says what the loss is a mean over."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"pairs"})

    kind: Literal["sft"] = "sft"
    reduction: Literal["token", "sequence", "sum"] = "token"
