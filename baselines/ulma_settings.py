"""Settings of ULMA and pointwise DPO (arXiv 2312.02554)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.methods import PairSettings, Requirement


class ULMASettings(PairSettings):
    """A loss of labelled replies; a data set's pair gives one reply of each label."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"pairs", "reference"})

    kind: Literal["ulma"] = "ulma"
    variant: Literal["ulma", "pointwise_dpo"] = "ulma"
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    constant: float = 0.0  # for the log partition function
    nll_weight: Annotated[float, Field(ge=0.0)] = 1.0  # of good replies in ULMA; beta brings both labels to one scale
    # "none": log-ratios and log-probs are summed over tokens, as in the paper; "response": averaged, as released.
    length_norm: Literal["none", "response"] = "none"
    groups: Literal["added", "pooled"] = "added"  # means of good and bad replies added, as released, or one mean

    @model_validator(mode="after")
    def _nll_is_read(self) -> Self:
        if self.variant == "pointwise_dpo" and self.nll_weight != 1.0:
            raise ValueError('nll_weight: variant = "pointwise_dpo" has no NLL; remove the key')
        return self
