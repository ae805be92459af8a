"""PPO's formulas against arithmetic by hand, slow definitions and broken copies of themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines import ppo_math
from baselines.ppo_math import (
    AdaptiveKL,
    FixedKL,
    explained_variance,
    gae,
    policy_loss,
    shaped_reward,
    value_loss,
    whiten,
)
from tests.losses import assert_fault_is_noticed

NAN, INF = math.nan, math.inf

unhurried = settings(deadline=None, max_examples=60)  # a busy machine is no failure


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ragged(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def close(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=1e-9)


# -- goldens, as functions of what they check: broken copies go through them too --------------------------------------


def check_shaped_reward(shaped_reward: Callable[..., Tensor]) -> None:
    # Row 0: -.1 (-1 + 1.5) = -.05; -.1 (-2 + 1) + 3 = 3.1. Row 1, one token: -.1 * 0 - 1 = -1.
    found = shaped_reward(
        torch.tensor([3.0, -1.0], dtype=torch.float64),
        tensor([-1.0, -2.0], [-0.5, NAN]),
        tensor([-1.5, -1.0], [-0.5, INF]),
        ragged(2, 1),
        kl_coefficient=0.1,
    )
    close(found, tensor([-0.05, 3.1], [-1.0, 0.0]))


def check_gae(gae: Callable[..., tuple[Tensor, Tensor]]) -> None:
    # gamma = lam = .5. Row 0, backwards: delta 2 + 0 + 1 = 3; 0 + .5 (-1) - 1 = -1.5; 1 + .5 (1) - .5 = 1, so the
    # advantages are 3; -1.5 + .25 (3) = -.75; 1 + .25 (-.75) = .8125. Row 1 has one token: 4 + 0 - 1 = 3.
    advantage, returns = gae(
        tensor([1.0, 0.0, 2.0], [4.0, NAN, 7.0]),
        tensor([0.5, 1.0, -1.0], [1.0, 5.0, INF]),
        ragged(3, 1),
        gamma=0.5,
        lam=0.5,
    )
    close(advantage, tensor([0.8125, -0.75, 3.0], [3.0, 0.0, 0.0]))
    close(returns, tensor([1.3125, 0.25, 2.0], [4.0, 0.0, 0.0]))


def check_clipped_surrogate(clipped_surrogate: Callable[..., tuple[Tensor, Tensor]]) -> None:
    # Bounds .8 and 1.3. rho 1.5: A = 1: max(-1.5, -1.3), clipped; A = -1: max(1.5, 1.3). rho .5: A = 1: max(-.5, -.8);
    # A = -1: max(.5, .8), clipped.
    loss, clipped = clipped_surrogate(
        tensor([1.5, 1.5, 0.5, 0.5]).log(), tensor([1.0, -1.0, 1.0, -1.0]), clip_low=0.2, clip_high=0.3
    )
    close(loss, tensor([-1.3, 1.5, -0.5, 0.8]))
    assert clipped.tolist() == [[True, False, False, True]]


def check_policy_loss(policy_loss: Callable[..., Any]) -> None:
    # clip .2, all four branches. rho 1.5: A = 1: max(-1.5, -1.2) = -1.2, clipped; A = -1: max(1.5, 1.2) = 1.5.
    # rho .5: A = 1: max(-.5, -.8) = -.5; A = -1: max(.5, .8) = .8, clipped. Mean .6 / 4 = .15, two of four clipped.
    # k3 = rho - 1 - log rho: .5 - .405465 = .094535 and -.5 + .693147 = .193147, mean .143841.
    rho = tensor([1.5, 1.5, 0.5], [0.5, NAN, NAN])
    logp = (rho.log() - 2.0).requires_grad_()
    advantage = tensor([1.0, -1.0, 1.0], [-1.0, INF, NAN])
    found = policy_loss(logp, torch.full_like(rho, -2.0), advantage, ragged(3, 1), clip=0.2)
    close(found.loss, 0.15)
    close(found.clip_fraction, 0.5)
    close(found.approx_kl, 0.5 * (0.5 - math.log(1.5)) + 0.5 * (-0.5 - math.log(0.5)))
    close(found.ratio_mean, 1.0)
    close(found.ratio_deviation, 0.5)
    # Only unclipped tokens push: -A rho / 4 = 1.5 / 4 and -.5 / 4.
    (gradient,) = torch.autograd.grad(found.loss, logp)
    close(gradient, tensor([0.0, 0.375, -0.125], [0.0, 0.0, 0.0]))


def check_value_loss(value_loss: Callable[..., Tensor]) -> None:
    # clip .2, V_old 0. V 1, R 2: plain 1, clipped (.2 - 2)^2 = 3.24. V .1, R 2: both 3.61. V -1, R .5: plain 2.25,
    # clipped (-.2 - .5)^2 = .49. Half the mean of 3.24, 3.61, 2.25 is 9.1 / 6.
    value = tensor([1.0, 0.1], [-1.0, NAN]).requires_grad_()
    found = value_loss(value, tensor([0.0, 0.0], [0.0, INF]), tensor([2.0, 2.0], [0.5, NAN]), ragged(2, 1), clip=0.2)
    close(found, 9.1 / 6)
    # Clipped: none; (V - R) / 3 = -1.9 / 3 and -1.5 / 3.
    (gradient,) = torch.autograd.grad(found, value)
    close(gradient, tensor([0.0, -1.9 / 3], [-0.5, 0.0]))


def check_whiten(whiten: Callable[..., Tensor]) -> None:
    # 1, 3, 5: mean 3, variance 8/3, so -2, 0, 2 over 1.632993.
    x, mask = tensor([1.0, 3.0], [5.0, NAN]), ragged(2, 1)
    scaled = 2.0 / math.sqrt(8 / 3 + 1e-8)
    close(whiten(x, mask), tensor([-scaled, 0.0], [scaled, 0.0]))
    bessel = 2.0 / math.sqrt(4 + 1e-8)  # variance 8/2
    close(whiten(x, mask, ddof=1), tensor([-bessel, 0.0], [bessel, 0.0]))
    close(whiten(x, mask, shift_mean=False), tensor([3 - scaled, 3.0], [3 + scaled, 0.0]))


def check_explained_variance(explained_variance: Callable[..., Tensor]) -> None:
    # R 1, 2, 3: variance 2/3. R - V = 0, 0, 1: variance 1/3 - 1/9 = 2/9. 1 - (2/9) / (2/3) = 2/3.
    mask = ragged(2, 1)
    close(explained_variance(tensor([1.0, 2.0], [2.0, NAN]), tensor([1.0, 2.0], [3.0, INF]), mask), 2 / 3)
    assert explained_variance(tensor([1.0]), tensor([2.0]), ragged(1)).isnan()


GOLDENS: dict[str, Callable[[Any], None]] = {
    "shaped_reward": check_shaped_reward,
    "gae": check_gae,
    "clipped_surrogate": check_clipped_surrogate,
    "policy_loss": check_policy_loss,
    "value_loss": check_value_loss,
    "whiten": check_whiten,
    "explained_variance": check_explained_variance,
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    GOLDENS[name](getattr(ppo_math, name))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("shaped_reward", "(-kl_coefficient * kl_k1", "(kl_coefficient * kl_k1"),
        (
            "shaped_reward",
            "mask_BT.sum(-1, keepdim=True) - 1",
            "mask_BT.shape[1] - 1 + torch.zeros_like(mask_BT[:, :1], dtype=torch.long)",
        ),
        ("gae", "gamma * lam * advantage_B", "gamma * advantage_B"),
        ("gae", "value_BT = value_BT.masked_fill(~mask_BT, 0.0)", "value_BT = value_BT.nan_to_num(0.0)"),
        ("gae", "return advantage_BT, advantage_BT + value_BT", "return advantage_BT, advantage_BT"),
        ("clipped_surrogate", "torch.maximum(plain_BT, clipped_BT)", "torch.minimum(plain_BT, clipped_BT)"),
        ("clipped_surrogate", "1.0 + clip_high", "1.0 + clip_low"),
        ("clipped_surrogate", "clipped_BT > plain_BT", "clipped_BT != plain_BT"),
        ("policy_loss", "clip_low=clip, clip_high=clip", "clip_low=clip, clip_high=0.0"),
        ("policy_loss", "(logp_BT - old_logp_BT)", "(old_logp_BT - logp_BT)"),
        ("value_loss", "torch.maximum(plain_BT, clipped_BT)", "clipped_BT"),
        ("value_loss", "0.5 * masked_mean", "masked_mean"),
        ("whiten", "if ddof", "if not ddof"),
        ("whiten", "masked_mean((value_BT - mean) ** 2, mask_BT)", "((value_BT.nan_to_num() - mean) ** 2).mean()"),
        ("explained_variance", "x_N.var(correction=0)", "(x_N**2).mean()"),
    ],
)
def test_a_broken_formula_is_noticed(name: str, right: str, wrong: str) -> None:
    assert_fault_is_noticed(ppo_math, name, right, wrong, GOLDENS[name])


# -- slow definitions and invariants ----------------------------------------------------------------------------------


def slow_gae(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    """The definition as a sum: advantage_t = sum_l (gamma lam)^l delta_{t+l}."""
    ahead = [*value[1:], 0.0]
    delta = [r + gamma * n - v for r, n, v in zip(reward, ahead, value, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    """Two values at every token of some ragged rows."""
    number = st.floats(-3.0, 3.0)
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    first, second = ([draw(st.lists(number, min_size=n, max_size=n)) for n in lengths] for _ in range(2))
    return first, second


def pad(rows: list[list[float]], extra: int = 0, filler: float = 0.0) -> Tensor:
    width = max(map(len, rows)) + extra
    return tensor(*([*row, *[filler] * (width - len(row))] for row in rows))


@unhurried
@given(rows(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_gae_is_its_definition_row_by_row(
    pair: tuple[list[list[float]], list[list[float]]], g: float, lam: float
) -> None:
    reward, value = pair
    advantage, returns = gae(pad(reward), pad(value), ragged(*map(len, reward)), gamma=g, lam=lam)
    expected = [slow_gae(r, v, g, lam) for r, v in zip(reward, value, strict=True)]
    close(advantage, pad(expected))
    close(returns, pad(expected) + pad(value))


@unhurried
@given(rows())
def test_with_gamma_and_lambda_1_returns_are_rewards_to_go(pair: tuple[list[list[float]], list[list[float]]]) -> None:
    reward, value = pair
    returns = gae(pad(reward), pad(value), ragged(*map(len, reward)), gamma=1.0, lam=1.0)[1]
    close(returns, pad([[sum(row[t:]) for t in range(len(row))] for row in reward]))


@unhurried
@given(rows(), st.integers(1, 3), st.sampled_from([NAN, INF, -INF, 5.0]))
def test_padding_changes_nothing(pair: tuple[list[list[float]], list[list[float]]], extra: int, filler: float) -> None:
    first, second = pair
    lengths = list(map(len, first))
    mask, wide = ragged(*lengths), ragged(*lengths, max(lengths) + extra)[:-1]
    a, b, c, d = pad(first), pad(second), pad(first, extra, filler), pad(second, extra, filler)
    score = a[:, 0]
    for narrow, padded in (
        (policy_loss(a, b, a, mask, clip=0.2), policy_loss(c, d, c, wide, clip=0.2)),
        ((value_loss(a, b, a - b, mask, clip=0.2),), (value_loss(c, d, c - d, wide, clip=0.2),)),
    ):
        for x, y in zip(narrow, padded, strict=True):
            close(y, x)
    for narrow_BT, padded_BT in (
        (gae(a, b, mask, gamma=0.9, lam=0.8)[0], gae(c, d, wide, gamma=0.9, lam=0.8)[0]),
        (whiten(a, mask), whiten(c, wide)),
        (
            shaped_reward(score, a, b, mask, kl_coefficient=0.1),
            shaped_reward(score, c, d, wide, kl_coefficient=0.1),
        ),
    ):
        close(padded_BT, torch.nn.functional.pad(narrow_BT, (0, extra)))


@unhurried
@given(rows())
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(
    pair: tuple[list[list[float]], list[list[float]]],
) -> None:
    mask = ragged(*map(len, pair[0]))
    logp, advantage = pad(pair[0]).requires_grad_(), pad(pair[1])
    found = policy_loss(logp, logp.detach(), advantage, mask, clip=0.2)
    assert (found.ratio_mean, found.ratio_deviation, found.clip_fraction, found.approx_kl) == (1.0, 0.0, 0.0, 0.0)
    close(found.loss, -advantage.sum() / mask.sum())
    close(torch.autograd.grad(found.loss, logp)[0], -advantage / mask.sum())


@unhurried
@given(rows(), st.floats(0.5, 2.0), st.floats(-5.0, 5.0))
def test_whitening_is_blind_to_scale_and_shift(
    pair: tuple[list[list[float]], list[list[float]]], scale: float, shift: float
) -> None:
    mask = ragged(*map(len, pair[0]))
    x = pad(pair[0])
    if x[mask].var(correction=0) < 1e-2:
        return  # the 1e-8 under the root shows
    white = whiten(x, mask)
    torch.testing.assert_close(whiten(scale * x + shift, mask), white, rtol=0, atol=1e-5)
    assert abs(white[mask].mean()) < 1e-9
    assert abs(white[mask].var(correction=0) - 1.0) < 1e-5
    assert abs(whiten(x, mask, shift_mean=False)[mask].mean() - x[mask].mean()) < 1e-9


@unhurried
@given(rows())
def test_the_clipped_value_loss_is_never_below_the_plain_one(
    pair: tuple[list[list[float]], list[list[float]]],
) -> None:
    mask, value, returns = ragged(*map(len, pair[0])), pad(pair[0]), pad(pair[1])
    plain = 0.5 * ((value - returns)[mask] ** 2).mean()
    assert value_loss(value, torch.zeros_like(value), returns, mask, clip=0.2) >= plain - 1e-12
    close(value_loss(value, torch.zeros_like(value), returns, mask, clip=1e6), plain)


def test_a_score_needs_a_token() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        shaped_reward(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3), ragged(3, 0), kl_coefficient=0.1)


def test_arguments_are_left_alone() -> None:
    reward, value = pad([[1.0, 2.0], [3.0]], filler=7.0), pad([[0.5, 0.5], [0.5]], filler=9.0)
    kept = reward.clone(), value.clone()
    gae(reward, value, ragged(2, 1), gamma=1.0, lam=0.9)
    whiten(reward, ragged(2, 1))
    shaped_reward(reward[:, 0], reward, value, ragged(2, 1), kl_coefficient=0.1)
    assert torch.equal(reward, kept[0])
    assert torch.equal(value, kept[1])


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.6, 1.01),  # e = 6.6 / 6 - 1 = .1; 1 + .1 * 10 / 100
        (6.0, 1.0),
        (60.0, 1.02),  # e = 9, clipped to .2
        (0.0, 0.98),  # e = -1, clipped to -.2
        (-3.0, 0.98),  # k1 may be negative
    ],
)
def test_the_adaptive_coefficient(kl: float, factor: float) -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    controller.update(kl, n_steps=10)
    assert controller.coefficient == pytest.approx(0.1 * factor, rel=1e-12)
    fixed = FixedKL(0.1)
    fixed.update(kl, n_steps=10)
    assert fixed.coefficient == 0.1


def test_explained_variance_of_a_constant_is_0() -> None:
    close(explained_variance(tensor([5.0, 5.0, 5.0]), tensor([1.0, 2.0, 4.0]), ragged(3)), 0.0)
