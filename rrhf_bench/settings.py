"""What every method's settings share. Free of torch: `plan` validates every key without importing it."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Requirement = Literal["pairs", "candidates", "scores", "reference", "sampler", "reward"]
Family = Literal["loss", "trainer", "inference"]
Schedule = Literal["linear", "cosine", "constant"]

# TOML has lists only; strict mode would refuse them for a tuple.
Names = Annotated[tuple[str, ...], Field(strict=False)]
Floats = Annotated[tuple[float, ...], Field(strict=False)]


class Settings(BaseModel):
    """A table of the experiment file: no unknown keys, no silent conversions, no change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class CandidateSettings(Settings):
    """How a training prompt's candidates come about. A method inherits what it does not say from [sampling]."""

    sources: Names | None = None  # of "model", "chosen", "rejected"
    n: Annotated[int, Field(ge=1, le=1024)] | None = None  # samples of "model"
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None

    @property
    def responses(self) -> int:
        """k, the responses a prompt; 0 where nothing was said about them."""
        return sum((self.n or 0) if source == "model" else 1 for source in self.sources or ())


class MethodSettings(CandidateSettings):
    """One row of the tables. `kind` names the method in the registry; the key of the table names the row."""

    family: ClassVar[Family]
    requires: ClassVar[frozenset[Requirement]]

    kind: str

    def models_in_memory(self) -> tuple[str, ...]:
        """The full-size models resident while this method trains (2304.05302 Figure 1 counts them)."""
        raise AssertionError("every method states its models")

    def budget(self, prompts: int) -> str:
        """The batch arithmetic on that many training prompts, in words."""
        return "no training"


class OptimiserSettings(MethodSettings):
    """AdamW and its schedule, for methods that change weights."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    schedule: Schedule = "linear"  # to 0 over the whole budget
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05  # share of all optimiser steps
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0  # of the global norm
    max_length: Annotated[int, Field(ge=2)] | None = None  # prompt + response tokens; none: the model's context


class OfflineSettings(OptimiserSettings):
    """The one offline loop: epochs over fixed examples."""

    family: ClassVar[Family] = "loss"

    epochs: Annotated[int, Field(ge=1)] = 3
    batch_prompts: Annotated[int, Field(ge=1)] = 16  # examples (prompts) an optimiser step
    micro_batch_prompts: Annotated[int, Field(ge=1)] | None = None  # examples a pass; none: the whole batch at once

    def budget(self, prompts: int) -> str:
        steps = self.epochs * math.ceil(prompts / self.batch_prompts)
        examples = f"{prompts} prompts x {self.responses or 1} responses"
        return f"{examples}, {self.epochs} epochs of {self.batch_prompts} prompts a step = {steps} steps"
