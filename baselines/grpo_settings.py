"""Settings of GRPO, Dr. GRPO, DAPO and GSPO."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.online import Count, OnPolicySettings, Positive


class GRPOSettings(OnPolicySettings):
    """Several replies to a prompt, scores standardised within the prompt, clipped updates, no value function.

    The defaults are GRPO's (2402.03300), except ``replies`` (64 there), ``kl_coefficient`` (0.04 there) and what the
    paper leaves open, as the comments say. Its relatives, each with ``kl_coefficient = 0``:
    Dr. GRPO (2503.20783): ``std = "none"``, ``aggregation = "cap"``;
    DAPO (2503.14476): ``clip_high = 0.28``, ``aggregation = "group"``, ``equal_groups = "drop"``, ``overlong_tokens``;
    GSPO (2507.18071): ``ratio = "sequence"``, ``clip_low = 3e-4``, ``clip_high = 4e-4``.
    ``missing_eos_penalty`` and ``overlong_penalty`` are in units of the reward model's score.
    """

    kind: Literal["grpo"] = "grpo"

    lr: Positive = 5e-4
    replies: Annotated[int, Field(ge=2)] = 4

    # The paper does not say which; libraries take the sample one. "none" (Dr. GRPO) only subtracts the mean.
    std: Literal["sample", "population", "none"] = "sample"
    std_epsilon: Annotated[float, Field(ge=0.0)] = (
        1e-4  # beside it: TRL; 1e-6 in verl, 1e-9 in OpenRLHF, none in the paper
    )

    ratio: Literal["token", "sequence"] = "token"  # "sequence" (GSPO): exp of the mean token log-ratio of a reply
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2  # the ratio stays in [1 - clip_low, 1 + clip_high]
    clip_high: Positive = 0.2
    # "sequence" (GRPO, GSPO): the mean over a reply's tokens, then over replies. "group" (DAPO's paper): over tokens
    # of a prompt's replies, then over prompts. "token" (DAPO in libraries): over the tokens of an iteration's replies.
    # "cap" (Dr. GRPO): the sum over a reply's tokens by the length cap, then the mean over replies.
    aggregation: Literal["sequence", "group", "token", "cap"] = "sequence"

    # The estimator that kl_coefficient weighs. k3 in the loss is the paper's; k2 there has the KL's own gradient;
    # "reward" subtracts the summed log-ratio from the score before the group is standardised.
    kl_penalty: Literal["loss-k3", "loss-k2", "reward"] = "loss-k3"

    overlong_tokens: Count | None = (
        None  # DAPO: the last tokens before the length cap, over which a penalty grows to ...
    )
    overlong_penalty: Positive = 1.0  # ... this
    # A prompt whose rewards are equal teaches nothing. "drop" takes its tokens out of the mean. DAPO samples prompts
    # until the batch is full; here every method has the same number of rollouts.
    equal_groups: Literal["keep", "drop"] = "keep"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.overlong_tokens is None and self.overlong_penalty != 1.0:
            raise ValueError("overlong_penalty: is not read without overlong_tokens; set them, or remove it")
        if self.std == "none" and self.std_epsilon != 1e-4:
            raise ValueError('std_epsilon: is not read with std = "none"; remove one of the two')
        if self.ratio == "sequence" and self.aggregation != "sequence":
            raise ValueError(
                f'aggregation: found "{self.aggregation}" with ratio = "sequence"; expected "sequence", as in GSPO'
            )
        return self

    @property
    def most_clipped(self) -> float:
        """Return 1 for the ratio of a sequence: its clip of a few 1e-4 is meant to clip most tokens (2507.18071)."""
        return 1.0 if self.ratio == "sequence" else super().most_clipped
