"""Settings of ReMax."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rrhf_bench.settings.online import OnPolicySettings, Positive


class ReMaxSettings(OnPolicySettings):
    """REINFORCE whose baseline is the score of the greedy reply to the same prompt (2310.10505).

    The defaults are the paper's estimator: one advantage for a whole reply. The authors' code has ``kl_return =
    "immediate"``, ``gamma = 0.99``, ``score_clip = 5.0``, ``aggregation = "token"`` and samples with top-p 0.9, which
    is no option here: every online method samples from the full distribution. The greedy replies come on top of
    ``rollouts`` and are counted as sampled tokens.
    """

    kind: Literal["remax"] = "remax"
    greedy: ClassVar[bool] = True

    lr: Positive = 5e-4

    # The KL penalty that a token's log-prob is weighed with: that of the whole reply, that from the token on (verl), or
    # that of the token alone. The greedy reply pays none.
    kl_return: Literal["sum", "to-go", "immediate"] = "sum"
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = (
        1.0  # the score difference counts gamma^(T - t + 1) at token t of T
    )
    score_clip: Positive | None = None  # of the score difference, both sides
    aggregation: Literal["response", "token"] = "response"  # a reply's sum, then over replies; or over all tokens
