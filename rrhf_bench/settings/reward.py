"""How a reward model is trained on preference pairs. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.seeding import derive_seed
from rrhf_bench.settings.base import Settings


def _unless(default: Any, **bounds: Any) -> Any:
    """Return the field of a key that enters a cache key only if it differs from its default."""
    return Field(exclude_if=lambda value: value == default, **bounds)


class PerplexityFilterSettings(Settings):
    """Which training pairs stay, by the perplexity of their replies under the initial policy.

    The idea is that of 2410.01789, whose thresholds are not published: these are options, not its values.
    """

    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # both replies at or below it, of all replies
    ratio: Annotated[float, Field(gt=1.0)] | None = None  # the pair's higher perplexity over its lower, at most
    keep: Literal["filtered", "random"] = "filtered"  # random: as many pairs, drawn without looking at perplexity

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.quantile is None and self.ratio is None:
            raise ValueError("quantile: missing, and so is ratio; expected at least one of them")
        return self


class EnsembleSettings(Settings):
    """Reward models that differ in their training seed, read as one (2310.02743).

    Each member is standardised on training replies first. ``uncertainty`` is mean - weight x variance over members.
    """

    members: Annotated[int, Field(ge=2, le=16)] = 3
    combine: Literal["mean", "minimum", "uncertainty"] = "mean"
    weight: Annotated[float, Field(gt=0.0)] = 0.5  # of the variance

    def seeds(self, seed: int) -> list[int]:
        """Return the training seed of each member; the first has that of the reward model without an ensemble."""
        return [seed, *(derive_seed(seed, "reward model member", i) for i in range(1, self.members))]


class RewardTrainingSettings(Settings):
    """Training from the initial policy on pairs: Bradley-Terry, or a classifier to which the chosen text is positive
    and the rejected one negative. The defaults are for models of a few million parameters; at
    billions of parameters a rate of 1e-5 is usual."""

    objective: Literal["bradley-terry", "classification"] = "bradley-terry"
    # It decays linearly to 0. AdamW's first step is ten times this rate, which must fit float32.
    lr: Annotated[float, Field(gt=0.0, le=3e37)] = 2e-3
    epochs: Annotated[int, Field(ge=1)] = 1  # more than one over-fits the pairs
    batch_pairs: Annotated[int, Field(ge=1)] = 32
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # share of all optimiser steps
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_length: Annotated[int, Field(ge=2)] | None = None  # prompt + reply + EOS tokens; none: the model's context
    # Bradley-Terry counts a tie as half a vote for each side or as an outcome of its own, or drops it (tie_nll).
    ties: Annotated[Literal["half", "rao-kupper", "drop"], _unless("half")] = "half"
    tie_threshold: Annotated[float, _unless(0.5, gt=0.0, le=20.0)] = 0.5  # of rao-kupper: log theta, in reward units
    margin_scale: Annotated[float, _unless(1.0, ge=0.0)] = 1.0  # times the margin of a row; 0 ignores margins
    centring: Annotated[float, _unless(0.0, ge=0.0)] = 0.0  # weight of (r_chosen + r_rejected)^2
    # All pairs of so many prompts a step, each reply read once and each prompt counted alike, in place of batch_pairs.
    batch_prompts: Annotated[int | None, _unless(None, ge=1)] = None
    pairs: Annotated[int | None, _unless(None, ge=1)] = None  # the first so many of the labelled pairs; none: all
    filter: Annotated[PerplexityFilterSettings | None, _unless(None)] = None
    ensemble: Annotated[EnsembleSettings | None, _unless(None)] = None

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.objective == "classification":
            for key in ("ties", "tie_threshold", "margin_scale", "centring", "batch_prompts"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f'{key}: has no effect with objective = "classification"; remove the key')
        if self.ties != "rao-kupper" and self.tie_threshold != type(self).model_fields["tie_threshold"].default:
            raise ValueError('tie_threshold: has no effect without ties = "rao-kupper"; remove the key')
        if self.batch_prompts is not None and self.batch_pairs != type(self).model_fields["batch_pairs"].default:
            raise ValueError("batch_pairs: has no effect beside batch_prompts; remove one of the two")
        return self
