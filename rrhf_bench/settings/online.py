"""Settings that every method shares that trains on rollouts of the policy in training."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.methods import OptimiserSettings, Requirement

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

MOST_CLIPPED = 0.5  # share of tokens: beyond it most of a pass moves nothing, for the step before went too far

MOST_MOVED = 0.2  # of the relative error of the KL (1909.08593), by which an adaptive coefficient moves

MissingEos = Literal["penalty", "replace", "none"]


class OnPolicySettings(OptimiserSettings):
    """Iterations of rollouts and of updates on them, and the weight of the KL to the initial policy."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"sampler", "reward", "reference"})
    greedy: ClassVar[bool] = False  # True: each prompt also gets a greedy reply, which is scored and not trained on
    whole_groups: ClassVar[bool] = False  # True: the loss sees all replies to a prompt together, in order

    iterations: Count = 14
    rollouts: Annotated[int, Field(ge=2)] = 128  # replies an iteration
    replies: Count = 1  # of them to one prompt
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0  # of the rollouts and of every log-prob
    update_epochs: Count = 1  # passes over an iteration's rollouts
    minibatch: Count = 32  # rollouts an optimiser step

    kl: Literal["fixed", "adaptive"] = "fixed"
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.1  # adaptive: the first one
    kl_target: Positive | None = None  # adaptive only: nats a response
    kl_horizon: Count | None = None  # adaptive only: rollouts

    missing_eos: MissingEos = "penalty"  # "penalty" is added to the score, "replace" takes its place
    missing_eos_penalty: float = -1.0  # a reply that ends at a stop string has ended; one cut by the cap has not

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        if self.minibatch > self.rollouts:
            faults.append(f"minibatch: found {self.minibatch}; expected at most rollouts ({self.rollouts})")
        if self.rollouts % self.replies:
            faults.append(f"rollouts: found {self.rollouts}; expected a multiple of replies ({self.replies})")
        if self.whole_groups and self.minibatch % self.replies:
            faults.append(f"minibatch: found {self.minibatch}; expected a multiple of replies ({self.replies})")
        if self.kl == "adaptive" and (self.kl_target is None or self.kl_horizon is None):
            faults.append(
                'kl: "adaptive" needs kl_target (nats a response) and kl_horizon (rollouts); set them (1909.08593 '
                "moves by kl_horizon = 10000)"
            )
        if self.kl == "adaptive" and self.kl_coefficient == 0.0:
            faults.append(
                "kl_coefficient: found 0; an adaptive one is multiplied and never leaves 0; give a first value"
            )
        if self.kl_horizon is not None and self.kl_horizon <= MOST_MOVED * self.rollouts:
            faults.append(
                f"kl_horizon: found {self.kl_horizon}; expected more than {MOST_MOVED:g} x rollouts ({self.rollouts}): "
                "an iteration would take the whole coefficient away, or turn its sign"
            )
        if self.missing_eos == "none" and self.missing_eos_penalty != -1.0:
            faults.append('missing_eos_penalty: is not read with missing_eos = "none"; remove one of the two')
        if self.kl == "fixed" and (self.kl_target is not None or self.kl_horizon is not None):
            faults.append('kl: found "fixed", which reads no kl_target or kl_horizon; set "adaptive" or remove them')
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def most_clipped(self) -> float:
        """Return the share of clipped tokens beyond which the report calls the steps too large."""
        return MOST_CLIPPED

    @property
    def reference_replies(self) -> int:
        """Return how many of the replies to a prompt, the last ones, the initial policy samples."""
        return 0

    @property
    def rollout_top_p(self) -> float:
        """Return the top-p of the rollouts. Below 1, the method's log-probs must be of the truncated distribution."""
        return 1.0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.iterations * self.update_epochs * math.ceil(self.rollouts / self.minibatch)

    def models_in_memory(self) -> tuple[str, ...]:
        return ("policy", *(() if self.lora else ("reference",)), "reward model")

    def budget(self, prompts: int, responses: int) -> str:
        greedy = f" and {self.rollouts // self.replies} greedy replies" if self.greedy else ""
        return (
            f"{self.iterations} iterations of {self.rollouts} rollouts{greedy}, {self.update_epochs} passes in "
            f"minibatches of {self.minibatch} = {self.steps} steps"
        )
