"""Settings of RLOO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rrhf_bench.settings.online import OnPolicySettings


class RLOOSettings(OnPolicySettings):
    """REINFORCE with a leave-one-out baseline (2402.14740): several replies to a prompt, no value function.

    ``missing_eos_penalty`` and ``kl_coefficient`` are in units of the reward model's score.
    """

    kind: Literal["rloo"] = "rloo"

    lr: Annotated[float, Field(gt=0.0)] = 5e-4
    replies: Annotated[int, Field(ge=2)] = 4  # the paper's k is 2 or 4
