"""Plain REINFORCE with a running baseline (Williams 1992; arXiv 2402.14740, section 2.2).

Letters: N rollouts, B rows of one pass, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from baselines.reinforce_settings import ReinforceSettings
from baselines.rloo import rloo_loss
from rrhf_bench.training.on_policy import Advantages, Minibatch, OnPolicyMethod, reply_rewards
from rrhf_bench.training.rollouts import Rollouts


@dataclass(frozen=True)
class RunningMean:
    """The mean of numbers that come in batches. A ``decay`` is the share of earlier weights that each batch leaves."""

    decay: float = 1.0
    mean: float = 0.0
    weight: float = 0.0  # of the numbers so far; 0 before the first

    def after(self, batch_mean: float, count: int) -> RunningMean:
        """Return the mean after one more batch. A decayed mean has no bias to 0 at its start."""
        kept = self.decay * self.weight
        return replace(self, mean=(kept * self.mean + count * batch_mean) / (kept + count), weight=kept + count)


class Reinforce(OnPolicyMethod):
    """REINFORCE on whole replies. A reply's reward is its score less kl_coefficient * log-ratio to the reference."""

    mean_over: ClassVar[Literal["tokens", "responses"]] = "responses"

    def __init__(self, settings: ReinforceSettings) -> None:
        self.settings = settings
        self.running = RunningMean(settings.decay or 1.0)

    def advantages(self, rollouts: Rollouts, kl_coefficient: float) -> Advantages:
        """Return rewards less the baseline, the same at every token of a reply. Updates the running mean."""
        reward_N, metrics = reply_rewards(rollouts, self.settings, kl_coefficient)
        before, mean = self.running, reward_N.double().mean().item()
        self.running = before.after(mean, len(reward_N))
        if self.settings.baseline == "none":
            baseline = 0.0
        elif self.settings.baseline == "batch":
            baseline = mean
        elif self.settings.include_present or not before.weight:
            baseline = self.running.mean
        else:
            baseline = before.mean
        metrics["objective/baseline"] = baseline
        return Advantages((reward_N - baseline)[:, None] * rollouts.mask_NT, metrics=metrics)

    def loss(self, logp_BT: Tensor, value_BT: Tensor | None, batch: Minibatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of a pass, a mean over its replies. It is RLOO's: only the baselines differ."""
        loss = rloo_loss(logp_BT, batch.advantage_BT[:, 0], batch.mask_BT)
        return loss, {"loss/policy_avg": loss.item()}

    def state(self) -> dict[str, Any]:
        """Return the running mean of the rewards so far."""
        return {"mean": self.running.mean, "weight": self.running.weight}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from such a mean."""
        self.running = replace(self.running, **state)
