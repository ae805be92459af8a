"""The coefficient of a KL penalty: fixed, or steered towards a target."""

from __future__ import annotations

from dataclasses import dataclass

from rrhf_bench.settings.online import MOST_MOVED, OnPolicySettings


@dataclass
class FixedKL:
    """A KL coefficient that does not change."""

    coefficient: float

    def update(self, kl: float, n_steps: int) -> None:
        """Change nothing."""


@dataclass
class AdaptiveKL:
    """A KL coefficient steered towards ``target`` (1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2); coefficient *= 1 + e * n_steps / horizon. KL is the mean summed log-ratio of a
    response in nats; n_steps and ``horizon`` count responses.
    """

    coefficient: float
    target: float
    horizon: float

    def update(self, kl: float, n_steps: int) -> None:
        """Move the coefficient after ``n_steps`` responses with mean KL ``kl``."""
        error = min(max(kl / self.target - 1.0, -MOST_MOVED), MOST_MOVED)
        self.coefficient *= 1.0 + error * n_steps / self.horizon


def kl_controller(settings: OnPolicySettings) -> FixedKL | AdaptiveKL:
    """Return the controller that the settings ask for."""
    if settings.kl == "fixed":
        return FixedKL(settings.kl_coefficient)
    assert settings.kl_target is not None
    assert settings.kl_horizon is not None
    return AdaptiveKL(settings.kl_coefficient, settings.kl_target, settings.kl_horizon)
