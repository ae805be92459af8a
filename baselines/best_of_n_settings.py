"""Settings of best-of-n sampling."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.methods import MethodSettings, Requirement


class BestOfNSettings(MethodSettings):
    """n samples of the initial policy a prompt; the reward model picks one. No training."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"sampler", "reward"})
    candidate_keys: ClassVar[frozenset[str]] = frozenset({"n"})
    why_unread: ClassVar[str] = "its samples are decoded as [evaluation] says"

    kind: Literal["best_of_n"] = "best_of_n"
    n: Annotated[int, Field(ge=1, le=1024)] = 4

    def models_in_memory(self) -> tuple[str, ...]:
        return ("policy", "reward model")
