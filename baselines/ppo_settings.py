"""Settings of PPO."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rrhf_bench.settings.methods import OptimiserSettings, Requirement, Schedule

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]

MissingEos = Literal["penalty", "replace", "none"]
RewardScaling = Literal["first-batch", "running", "none"]


class PPOSettings(OptimiserSettings):
    """PPO with a KL penalty in the reward (1909.08593) and the implementation details of 2403.17031.

    The reward of a rollout is the reward model's score, then scaled, then clipped, then corrected where the reply did
    not end: ``missing_eos_penalty`` and ``kl_coefficient`` are in units of the scaled score.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"sampler", "reward", "reference"})
    candidate_keys: ClassVar[frozenset[str]] = frozenset({"temperature"})
    why_unread: ClassVar[str] = "PPO samples one reply a rollout from the full distribution"

    kind: Literal["ppo"] = "ppo"

    lr: Positive = 5e-4
    schedule: Schedule = "constant"
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    eps: Positive = 1e-5  # 2403.17031; PPO's own code never had Adam's usual 1e-8

    iterations: Count = 14
    rollouts: Annotated[int, Field(ge=2)] = 128  # prompts an iteration, one reply each
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0  # of the rollouts and of every log-prob
    ppo_epochs: Count = 4  # passes over an iteration's rollouts
    minibatch: Count = 32  # rollouts an optimiser step

    kl: Literal["fixed", "adaptive"] = "fixed"
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.1  # adaptive: the first one
    kl_target: Positive | None = None  # adaptive only: nats a response
    kl_horizon: Count | None = None  # adaptive only: rollouts

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
    missing_eos: MissingEos = "penalty"  # "penalty" is added to the score, "replace" takes its place
    missing_eos_penalty: float = -1.0  # a reply that ends at a stop string has ended; one cut by the cap has not

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

    @model_validator(mode="after")
    def _consistent(self) -> PPOSettings:
        faults = []
        if self.minibatch > self.rollouts:
            faults.append(f"minibatch: found {self.minibatch}; expected at most rollouts ({self.rollouts})")
        if self.kl == "adaptive" and (self.kl_target is None or self.kl_horizon is None):
            faults.append(
                'kl: "adaptive" needs kl_target (nats a response) and kl_horizon (rollouts); set them (1909.08593 '
                "moves by kl_horizon = 10000)"
            )
        if self.kl == "adaptive" and self.kl_coefficient == 0.0:
            faults.append(
                "kl_coefficient: found 0; an adaptive one is multiplied and never leaves 0; give a first value"
            )
        if self.kl == "fixed" and (self.kl_target is not None or self.kl_horizon is not None):
            faults.append('kl: found "fixed", which reads no kl_target or kl_horizon; set "adaptive" or remove them')
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def models_in_memory(self) -> tuple[str, ...]:
        models = ("policy", *(() if self.lora else ("reference",)), "reward model")
        return (*models, "value model") if self.value == "separate" else models

    def budget(self, prompts: int, responses: int) -> str:
        steps = self.iterations * self.ppo_epochs * math.ceil(self.rollouts / self.minibatch)
        return (
            f"{self.iterations} iterations of {self.rollouts} rollouts, {self.ppo_epochs} passes in minibatches of "
            f"{self.minibatch} = {steps} steps"
        )
