"""Settings of REINFORCE++-baseline."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.online import OnPolicySettings, Positive


class ReinforcePPSettings(OnPolicySettings):
    """REINFORCE++ with a baseline (2501.03262): rewards less their prompt's mean, whitened over all rollouts.

    ``missing_eos_penalty`` is in units of the reward model's score.
    """

    kind: Literal["reinforce_pp"] = "reinforce_pp"

    lr: Positive = 5e-4
    replies: Annotated[int, Field(ge=2)] = 4

    # The paper says "over the batch". By "tokens" (OpenRLHF, verl) a long reply counts more, so the mean of the replies
    # is not 0 afterwards and depends on their lengths; by "replies" (TRL) each counts once.
    whiten: Literal["tokens", "replies"] = "tokens"
    std: Literal["population", "sample"] = "population"  # OpenRLHF; "sample" in verl

    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: Positive = 0.2
    aggregation: Literal["sequence", "group", "token", "cap"] = "token"  # as in GRPO's settings

    # "loss-k2" is the paper's from its ninth version on. "reward" subtracts the summed log-ratio from the score before
    # the prompt's mean; "reward-to-go" (OpenRLHF's default) subtracts from each token the log-ratios from it on, after
    # the prompt's mean, so that the KL is in no baseline.
    kl_penalty: Literal["loss-k2", "loss-k3", "reward", "reward-to-go"] = "loss-k2"

    @model_validator(mode="after")
    def _replies_have_one_advantage(self) -> Self:
        if self.whiten == "replies" and self.kl_penalty == "reward-to-go":
            raise ValueError(
                'whiten: found "replies" with kl_penalty = "reward-to-go", whose tokens differ; expected "tokens"'
            )
        return self
