"""Settings of the initial policy at a lower temperature."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.methods import MethodSettings, Requirement


class TemperedSettings(MethodSettings):
    """Samples of the initial policy at another temperature than the evaluation's. No training, no reward model."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"sampler"})

    kind: Literal["tempered"] = "tempered"
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 0.5

    def models_in_memory(self) -> tuple[str, ...]:
        return ("policy",)
