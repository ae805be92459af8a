"""Settings of PPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rrhf_bench.settings.online import Count, OnPolicySettings, Positive

Unit = Annotated[float, Field(ge=0.0, le=1.0)]

RewardScaling = Literal["first-batch", "running", "none"]


class PPOSettings(OnPolicySettings):
    """PPO with a KL penalty in the reward (1909.08593) and the implementation details of 2403.17031.

    The reward of a rollout is the reward model's score, then scaled, then clipped, then corrected where the reply did
    not end: ``missing_eos_penalty`` and ``kl_coefficient`` are in units of the scaled score.
    """

    kind: Literal["ppo"] = "ppo"

    lr: Positive = 5e-4
    eps: Positive = 1e-5  # 2403.17031; PPO's own code never had Adam's usual 1e-8

    update_epochs: Count = 4

    gamma: Unit = 1.0
    lam: Unit = 0.95
    clip: Positive = 0.2
    value: Literal["head", "separate"] = "head"  # on the policy's own trunk, or on a copy of it
    value_clip: Positive = 0.2
    value_coefficient: Annotated[float, Field(ge=0.0)] = 0.5

    whiten_advantages: bool = True  # over all rollouts of an iteration
    whiten_rewards: bool = False  # token rewards, variance only
    reward_scale: RewardScaling = "first-batch"  # minus its mean, over its std; "running": over the running std (trlX)
    reward_clip: Positive = 10.0  # of the scaled score, both sides

    def models_in_memory(self) -> tuple[str, ...]:
        models = super().models_in_memory()
        return (*models, "value model") if self.value == "separate" else models
