"""Settings of plain REINFORCE."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.online import OnPolicySettings, Positive


class ReinforceSettings(OnPolicySettings):
    """REINFORCE on whole replies with a running baseline, as 2402.14740 compares RLOO with (section 2.2).

    ``missing_eos_penalty`` and ``kl_coefficient`` are in units of the reward model's score.
    """

    kind: Literal["reinforce"] = "reinforce"

    lr: Positive = 5e-4

    # The baseline is taken over all replies so far: "mean" (the paper's) weighs them alike, "ema" decays them
    # iteration by iteration. "batch" is the mean of this iteration, "none" is 0.
    baseline: Literal["mean", "ema", "batch", "none"] = "mean"
    # The paper does not say if the present replies are in the running baseline. Without them the gradient is unbiased,
    # but the first iteration, which has no earlier one, takes its own mean.
    include_present: bool = True
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # of "ema" only: the share that stays, such as 0.9

    @model_validator(mode="after")
    def _keys_are_read(self) -> Self:
        if (self.baseline == "ema") != (self.decay is not None):
            raise ValueError('decay: goes with baseline = "ema"; set both, such as decay = 0.9, or neither')
        if self.baseline in ("batch", "none") and not self.include_present:
            raise ValueError(f'include_present: baseline = "{self.baseline}" has no earlier replies; remove the key')
        return self
