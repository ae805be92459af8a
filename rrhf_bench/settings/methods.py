"""Define the settings that all methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rrhf_bench.registry import Family, find
from rrhf_bench.schedule import Schedule
from rrhf_bench.settings.base import Names, Settings
from rrhf_bench.settings.candidates import Candidates

Requirement = Literal["pairs", "candidates", "reference", "whole step", "half temperature", "sampler", "reward"]


class MethodSettings(Settings):
    """One row of the tables. `kind` names the method in the registry; the key of the table names the row.

    A method that trains on candidates requires them and has a field ``candidates: Candidates``; others have neither,
    but for losses of pairs, which may train on pairs of candidates.
    """

    requires: ClassVar[frozenset[Requirement]]

    kind: str
    initial: str | None = None  # the initial policy, of [policies]; none: [policy]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        requires, field = getattr(cls, "requires", None), cls.model_fields.get("candidates")
        if requires is not None and ("candidates" in requires) != (field is not None and field.default is not None):
            raise TypeError(f'{cls.__name__}: requires "candidates" if and only if it has a field of that name')

    @property
    def family(self) -> Family:
        """The family that the registry gives the method."""
        return find(self.kind).family

    @property
    def needs(self) -> frozenset[Requirement]:
        """Return the requirements of the row: those of its kind, and those of sampling while it trains."""
        candidates = candidates_of(self)
        online: tuple[Requirement, ...] = ()
        if candidates is not None and candidates.refresh:
            online = ("sampler", "reward", "reference") if candidates.reward_kl else ("sampler", "reward")
        return self.requires.union(online)

    def changed(self, values: Mapping[str, Any]) -> Self:
        """Return the settings with other values of some keys. Raises ValidationError for values that are refused."""
        return type(self).model_validate({**self.model_dump(mode="json", exclude_none=True), **values})

    @property
    def cue(self) -> str:
        """Text that stands behind every prompt of the trained policy, wherever it is sampled or its replies are scored.

        The training itself sees no cue: such a method puts it into the prompts of its examples.
        """
        return ""

    def models_in_memory(self) -> tuple[str, ...]:
        """The full-size models resident while this method trains (2304.05302 Figure 1 counts them)."""
        raise AssertionError("every method states its models")

    def budget(self, prompts: int, responses: int) -> str:
        """The batch arithmetic on that many training prompts with k responses each, in words."""
        return "no training"


def candidates_of(settings: MethodSettings) -> Candidates | None:
    """Return where the candidates of a row come from, or None if it trains on none."""
    return getattr(settings, "candidates", None)


class LoraSettings(Settings):
    """Low-rank adapters (2106.09685): W + alpha / rank * B A, where W stays as it is."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    targets: Names | Literal["all-linear"] = "all-linear"  # names of layers; all-linear: all but the LM head

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not targets:
            raise ValueError('found []; expected names of layers, or "all-linear"')
        return targets


FLOAT32_MAX = 3.4028234663852886e38
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimiserSettings(MethodSettings):
    """AdamW and its schedule, for methods that change weights."""

    lora: LoraSettings | None = None  # none: all weights train

    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    schedule: Schedule = "linear"  # to 0 over the whole budget
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05  # share of all optimiser steps
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0  # of the global norm

    @model_validator(mode="after")
    def _first_step_fits(self) -> Self:
        highest = FLOAT32_MAX * (1.0 - self.betas[0])
        if self.lr > highest:
            raise ValueError(
                f"lr: found {self.lr:g}; expected at most {highest:.3g}, or AdamW's first step, lr / (1 - betas[0]), "
                "is beyond float32; lower lr"
            )
        return self


class OfflineSettings(OptimiserSettings):
    """The one offline loop: epochs over fixed examples."""

    responses_used: ClassVar[int | None] = None  # of a prompt's, by its examples; None: all of them

    epochs: Annotated[int, Field(ge=1)] = 3
    batch_prompts: Annotated[int, Field(ge=1)] = 16  # examples (prompts) an optimiser step
    max_length: Annotated[int, Field(ge=2)] | None = None  # prompt + response tokens; none: the model's context

    def models_in_memory(self) -> tuple[str, ...]:
        # Offline, the log-probs of the reference are data. With adapters it is the policy with these off.
        resident = "sampler" in self.needs and not self.lora
        others: Mapping[Requirement, str] = {"reference": "reference"} if resident else {}
        others = {**others, "reward": "reward model"}
        return ("policy", *(model for need, model in others.items() if need in self.needs))

    def budget(self, prompts: int, responses: int) -> str:
        steps, rest = self.epochs * math.ceil(prompts / self.batch_prompts), prompts % self.batch_prompts
        examples = f"{prompts} prompts x {self.responses_used or responses or 1} responses"
        last = f" (an epoch's last: {rest})" if rest else ""
        return f"{examples}, {self.epochs} epochs of {self.batch_prompts} prompts a step{last} = {steps} steps"


class PairSettings(OfflineSettings):
    """Settings of a loss of pairs: those of the data set or, with ``candidates``, two candidates of each prompt.

    The pair of a prompt's candidates is its best and its worst one by reward. Prompts without two different rewards are
    left out and counted.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"pairs"})
    responses_used: ClassVar[int | None] = 2

    candidates: Candidates | None = None

    @model_validator(mode="after")
    def _pairs_stay(self) -> Self:
        if self.candidates is not None and self.candidates.refresh:
            raise ValueError("candidates.refresh: a loss of pairs keeps its pairs; remove the key")
        return self
