"""Settings of PPO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from rrhf_bench.settings.online import Count, OnPolicySettings, Positive

Unit = Annotated[float, Field(ge=0.0, le=1.0)]

RewardScaling = Literal["first-batch", "running", "none"]


class PPOSettings(OnPolicySettings):
    """PPO with a KL penalty in the reward (1909.08593) and the implementation details of 2403.17031.

    The reward of a rollout is the reward model's score, then scaled, then clipped, then corrected where the reply did
    not end: ``missing_eos_penalty`` and ``kl_coefficient`` are in units of the scaled score.
    """

    candidate_keys: ClassVar[frozenset[str]] = frozenset({"temperature"})
    why_unread: ClassVar[str] = "PPO samples one reply a rollout from the full distribution"

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

    @field_validator("sources", "n")
    @classmethod
    def _no_candidates(cls, value: object) -> object:
        if value is not None:
            raise ValueError(
                f"found {value!r}; PPO samples its own rollouts from the policy in training, one per prompt; remove "
                "the key, and say with rollouts how many an iteration"
            )
        return value

    @field_validator("top_p", "top_k")
    @classmethod
    def _full_distribution(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value not in (None, 1.0 if info.field_name == "top_p" else 0):
            raise ValueError(f"found {value!r}; PPO's ratios need log-probs of the full distribution; remove the key")
        return value

    @field_validator("max_length")
    @classmethod
    def _never_cut(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError(f"found {value!r}; PPO trains on all it sampled; set sampling.max_new_tokens instead")
        return value

    def models_in_memory(self) -> tuple[str, ...]:
        models = super().models_in_memory()
        return (*models, "value model") if self.value == "separate" else models
