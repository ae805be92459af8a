"""Settings of NLPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from baselines.ppo_settings import PPOSettings


class NLPOSettings(PPOSettings):
    """PPO that masks unlikely tokens: those outside the top-p of a lagged copy of the policy (2210.01241).

    Departures: the copy is taken at the start of each iteration, when the engine's own top-p is that mask (RL4LMs takes
    it every fifth update on IMDB); a set may have fewer than RL4LMs' 100 tokens; the KL penalty is that of the masked
    policy, which samples, to the unmasked reference.
    """

    kind: Literal["nlpo"] = "nlpo"  # type: ignore[assignment]
    top_p: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9

    @property
    def rollout_top_p(self) -> float:
        return self.top_p

    def models_in_memory(self) -> tuple[str, ...]:
        return (*super().models_in_memory(), "mask policy")
