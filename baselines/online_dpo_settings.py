"""Settings of online DPO and XPO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.online import OnPolicySettings, Positive


class OnlineDPOSettings(OnPolicySettings):
    """DPO on pairs of the present policy's own replies, which the reward model orders (2402.04792).

    ``kl_coefficient`` is DPO's beta (IPO's tau): the KL is in the loss and not in the reward. The pair is the best and
    the worst of ``replies``, 2 in the paper; further replies cost time and carry no gradient.
    """

    kind: Literal["online_dpo"] = "online_dpo"
    whole_groups: ClassVar[bool] = True

    lr: Positive = 5e-4
    replies: Annotated[int, Field(ge=2)] = 2
    kl: Literal["fixed"] = "fixed"
    kl_coefficient: Positive = 0.1

    variant: Literal["dpo", "ipo"] = "dpo"  # the paper has both
    length_norm: Literal["none", "response"] = "none"  # "response" divides a reply's log-prob by its tokens
    ties: Literal["drop", "first"] = "drop"  # a pair with equal scores: no loss, or the first reply is chosen (TRL)

    # XPO (2405.21046): the second reply comes from the initial policy, and alpha * its log-prob is added to the loss,
    # which moves the policy away from it. TRL's alpha is 1e-5.
    xpo_alpha: Annotated[float, Field(ge=0.0)] = 0.0

    @property
    def reference_replies(self) -> int:
        return 1 if self.xpo_alpha else 0

    @model_validator(mode="after")
    def _xpo_has_pairs(self) -> Self:
        if self.xpo_alpha and self.replies != 2:
            raise ValueError(f"replies: found {self.replies} with xpo_alpha; expected 2, one of each policy")
        return self
