"""PPO's formulas as pure functions of plain tensors.

Letters: B responses, T response tokens. Masks are bool, True at real tokens; rows are padded on the right. Whatever
stands at a masked position, not-a-number included, changes no result and no gradient. Log-probs are natural logarithms
at the sampling temperature. Position t holds token t: the log-prob and the reward *of* it, the value *before* it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rrhf_bench.policy.logprobs import kl_k1, kl_k3, masked_mean
from rrhf_bench.training.kl_control import AdaptiveKL, FixedKL

__all__ = [
    "AdaptiveKL", "FixedKL", "PolicyLoss", "clipped_surrogate", "explained_variance", "gae", "policy_loss",
    "shaped_reward", "value_loss", "whiten",
]  # fmt: skip


def shaped_reward(
    score_B: Tensor, logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor, *, kl_coefficient: float
) -> Tensor:
    """Token rewards: -kl_coefficient * (log pi - log ref) at every token, plus the score at the last real one: (B, T).

    1909.08593 Eq. 2 spread over tokens; the KL estimator is the plain log-ratio, k1 (2403.17031, detail 10).
    Raises ValueError for a row without tokens: its score has nowhere to land.
    """
    if not mask_BT.any(-1).all():
        raise ValueError("a response has no tokens, so no token can carry its score; drop empty responses")
    last_B1 = mask_BT.sum(-1, keepdim=True) - 1
    reward_BT = (-kl_coefficient * kl_k1(logp_BT, ref_logp_BT)).masked_fill(~mask_BT, 0.0)
    return reward_BT.scatter_add(-1, last_B1, score_B[:, None].to(reward_BT.dtype))


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and value targets, (B, T) each, 0 at masked positions.

    delta_t = reward_t + gamma V_{t+1} - V_t with V = 0 after the last real token, advantage_t = delta_t +
    gamma lam advantage_{t+1} (1506.02438 Eq. 16 as a recursion); return_t = advantage_t + V_t.
    """
    reward_BT = reward_BT.masked_fill(~mask_BT, 0.0)
    value_BT = value_BT.masked_fill(~mask_BT, 0.0)
    next_value_BT = torch.nn.functional.pad(value_BT[:, 1:], (0, 1))
    delta_BT = reward_BT + gamma * next_value_BT - value_BT
    advantage_B = torch.zeros_like(delta_BT[:, 0])
    backwards = []
    # Padding is on the right and its delta is 0, so the recursion reaches each row's last token with advantage 0.
    for delta_B in reversed(delta_BT.unbind(-1)):
        advantage_B = delta_B + gamma * lam * advantage_B
        backwards.append(advantage_B)
    advantage_BT = torch.stack(backwards[::-1], -1)
    return advantage_BT, advantage_BT + value_BT


def clipped_surrogate(
    log_ratio_BT: Tensor, advantage_BT: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Return (loss_BT, clipped_BT): max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(log-ratio).

    1707.06347 Eq. 7 with the sign of a loss and a bound for each side. ``clipped_BT`` is True where the clipped branch
    is the larger one, so that no gradient flows.
    """
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(plain_BT, clipped_BT), clipped_BT > plain_BT


class PolicyLoss(NamedTuple):
    """The loss carries gradients, the diagnostics do not. All are means over real tokens except the last."""

    loss: Tensor
    clip_fraction: Tensor  # tokens at which the clipped branch is the larger one, so that no gradient flows
    approx_kl: Tensor  # k3 estimate of KL(old || new), nats a token
    ratio_mean: Tensor
    ratio_deviation: Tensor  # max |ratio - 1|


def policy_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, *, clip: float
) -> PolicyLoss:
    """Return the mean of ``clipped_surrogate`` over real tokens, with log pi - log pi_old for log-ratio.

    Gradients flow through ``logp_BT`` only as far as the caller detached the others.
    """
    # Masked before exp: an infinite ratio at a padded position would make its zero gradient not-a-number.
    log_ratio_BT = (logp_BT - old_logp_BT).masked_fill(~mask_BT, 0.0)
    advantage_BT = advantage_BT.masked_fill(~mask_BT, 0.0)
    loss_BT, clipped_BT = clipped_surrogate(log_ratio_BT, advantage_BT, clip_low=clip, clip_high=clip)
    with torch.no_grad():
        ratio_BT = log_ratio_BT.exp()
        diagnostics = (
            masked_mean(clipped_BT.to(ratio_BT.dtype), mask_BT),
            masked_mean(kl_k3(torch.zeros_like(log_ratio_BT), log_ratio_BT), mask_BT),
            masked_mean(ratio_BT, mask_BT),
            (ratio_BT - 1.0).abs().max(),
        )
    return PolicyLoss(masked_mean(loss_BT, mask_BT), *diagnostics)


def value_loss(value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, *, clip: float) -> Tensor:
    """0.5 * mean over real tokens of max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2).

    The clipped value loss of the original PPO code, kept by 1909.08593 and 2403.17031; 1707.06347 does not have it.
    ``clip`` is in units of the return.
    """
    value_BT = value_BT.masked_fill(~mask_BT, 0.0)
    near_BT = torch.maximum(torch.minimum(value_BT, old_value_BT + clip), old_value_BT - clip)
    plain_BT = (value_BT - return_BT).masked_fill(~mask_BT, 0.0) ** 2
    clipped_BT = (near_BT - return_BT).masked_fill(~mask_BT, 0.0) ** 2
    return 0.5 * masked_mean(torch.maximum(plain_BT, clipped_BT), mask_BT)


def whiten(value_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, ddof: Literal[0, 1] = 0) -> Tensor:
    """Scaled to variance 1 over the real tokens of all rows, and to mean 0 if ``shift_mean``; 0 at masked positions.

    (x - mean) / sqrt(var + 1e-8), the variance without Bessel's correction (2403.17031, detail 9) unless ``ddof`` is 1.
    Padding takes no part; in trlX it does.
    """
    mean = masked_mean(value_BT, mask_BT)
    variance = masked_mean((value_BT - mean) ** 2, mask_BT)
    if ddof:
        variance = variance * (mask_BT.sum() / (mask_BT.sum() - ddof))
    white_BT = (value_BT - mean) * torch.rsqrt(variance + 1e-8)
    return (white_BT if shift_mean else white_BT + mean).masked_fill(~mask_BT, 0.0)


def explained_variance(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - var(R - V) / var(R) over real tokens: 1 is perfect, 0 no better than a constant; NaN for equal returns."""

    def variance(x_N: Tensor) -> Tensor:
        return x_N.var(correction=0)

    return_N = return_BT[mask_BT]
    total = variance(return_N)
    return torch.where(total > 0, 1.0 - variance(return_N - value_BT[mask_BT]) / total, torch.nan)
