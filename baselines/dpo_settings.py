"""Settings of DPO, cDPO, robust DPO and IPO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.methods import PairSettings, Requirement


class DPOSettings(PairSettings):
    """A loss of pairs and of their log-probs under the initial policy. cDPO is ``dpo`` with ``label_smoothing``."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"pairs", "reference"})

    kind: Literal["dpo"] = "dpo"
    variant: Literal["dpo", "robust", "ipo"] = "dpo"
    beta: Annotated[float, Field(gt=0.0)] = 0.1  # of IPO: tau
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0  # the assumed share of pairs with swapped labels
    # "none" sums a response's log-probs, as the DPO paper does; "response" divides by its tokens, as IPO's authors do.
    length_norm: Literal["none", "response"] = "none"

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> Self:
        if self.variant == "ipo" and self.label_smoothing:
            raise ValueError('label_smoothing: variant = "ipo" has none; remove the key')
        return self
