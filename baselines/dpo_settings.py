"""Settings of DPO, cDPO, robust DPO, IPO, APO, RPO and WPO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.methods import PairSettings, Requirement


class DPOSettings(PairSettings):
    """A loss of pairs and of their log-probs under the initial policy. cDPO is ``dpo`` with ``label_smoothing``, RPO
    (2405.16436) is ``dpo`` with ``nll_weight``, WPO (2406.11827) is ``dpo`` with ``weights = "wpo"``."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"pairs", "reference"})

    kind: Literal["dpo"] = "dpo"
    variant: Literal["dpo", "robust", "ipo", "apo_zero", "apo_down"] = "dpo"
    beta: Annotated[float, Field(gt=0.0)] = 0.1  # of IPO: tau
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0  # the assumed share of pairs with swapped labels
    # "none" sums a response's log-probs, as the DPO paper does; "response" divides by its tokens, as IPO's authors do.
    length_norm: Literal["none", "response"] = "none"
    # The weight of SFT on the chosen response, beside the loss. RPO: the paper's code has 0.005 x beta on the sum over
    # tokens, its second code 0.2 on the mean, and TRL a token mean.
    nll_weight: Annotated[float, Field(ge=0.0)] = 0.0
    nll: Literal["sum", "mean"] = "sum"
    # WPO weighs a pair by how like the policy's own samples it is: capped at 1 (its authors), or not (TRL).
    weights: Literal["none", "wpo", "wpo_uncapped"] = "none"

    @property
    def needs(self) -> frozenset[Requirement]:
        """Return the requirements of the row; weights need a second distribution."""
        own: frozenset[Requirement] = frozenset({"half temperature"} if self.weights != "none" else ())
        return super().needs | own

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> Self:
        if self.variant not in ("dpo", "robust") and self.label_smoothing:
            raise ValueError(f'label_smoothing: variant = "{self.variant}" has none; remove the key')
        if self.nll != "sum" and not self.nll_weight:
            raise ValueError("nll: has no effect without nll_weight; remove the key, or set nll_weight")
        return self
