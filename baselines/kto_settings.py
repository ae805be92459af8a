"""Settings of KTO (arXiv 2402.01306)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.methods import PairSettings, Requirement


class KTOSettings(PairSettings):
    """A loss of labelled replies; a data set's pair gives one reply of each label.

    ``baseline`` says whose replies are paired with a prompt for the reference point: those of the prompt after it, as
    the authors' HALOs does, or before it, as TRL does. ``none`` takes 0. Here the neighbour is the one in the data, in
    every epoch, and the mean is over the optimiser step; HALOs takes it over a device's batch.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"pairs", "reference", "whole step"})

    kind: Literal["kto"] = "kto"
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    desirable_weight: Annotated[float, Field(gt=0.0)] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0.0)] = 1.0
    baseline: Literal["next", "previous", "none"] = "next"
