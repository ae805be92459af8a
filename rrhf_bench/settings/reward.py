"""How a reward model is trained on preference pairs. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rrhf_bench.settings.methods import Settings


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
