"""Settings of SLiC-HF (arXiv 2305.10425)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rrhf_bench.settings.methods import PairSettings


class SLiCHFSettings(PairSettings):
    """A hinge on the log-probs of a pair, without a reference. The paper's regularisation weight could not be read:
    0.1 is that of the HALOs library."""

    kind: Literal["slic_hf"] = "slic_hf"
    delta: Annotated[float, Field(ge=0.0)] = 1.0  # the margin, in nats
    regularisation: Annotated[float, Field(ge=0.0)] = 0.1  # lambda
    length_norm: Literal["none", "response"] = "none"  # the paper's sum, or a mean over tokens
