"""The losses of a reward model on pairs: vectors by hand, each of which a broken copy of its loss must miss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rrhf_bench.rewards.pair_losses import bradley_terry_loss, prompt_weights, tie_nll

Loss = Callable[..., Tensor]
# Differences 1 and -2, as in tests/test_rewards.py: -log sigma(1) = 0.3132617, -log sigma(-2) = 2.1269280.
CHOSEN, REJECTED = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 2.5])


def margins(loss: Loss) -> float:
    # -log sigma(1 - 1) = log 2 = 0.6931472; -log sigma(-2 - 0.5) = log(1 + e^2.5) = 2.5788897; mean 1.6360184.
    return loss(CHOSEN, REJECTED, margin_B=torch.tensor([1.0, 0.5])).item() - 1.6360184


def half_ties(loss: Loss) -> float:
    # The second pair is a tie with d = -2: (2.1269280 + 0.1269280) / 2 = 1.1269280 and
    # the mean with 0.3132617 is 0.7200949.
    return loss(CHOSEN, REJECTED, tie_B=torch.tensor([False, True])).item() - 0.7200949


def rao_kupper(loss: Loss) -> float:
    # t = 0.5, theta = e^0.5. Decided, d = 1: -log sigma(0.5) = 0.4740770. Tie, d = -2: P = (e - 1) x
    # sigma(-2.5) sigma(1.5) = 1.7182818 x 0.0758582 x 0.8175745 = 0.1065673, -log P = 2.2389782; mean 1.3565276.
    return loss(CHOSEN, REJECTED, tie_B=torch.tensor([False, True]), tie_threshold=0.5).item() - 1.3565276


def centred(loss: Loss) -> float:
    # Sums 3 and 3: 0.1 x 9 = 0.9 more than 1.2200948.
    return loss(CHOSEN, REJECTED, centring=0.1).item() - 2.1200948


def k_way(loss: Loss) -> float:
    # Prompt 0 has three pairs with differences 1, 1, -2, prompt 1 one pair with -2:
    # ((0.3132617 x 2 + 2.1269280) / 3 + 2.1269280) / 2 = (0.9178171 + 2.1269280) / 2 = 1.5223726.
    chosen, rejected = CHOSEN[[0, 0, 1, 1]], REJECTED[[0, 0, 1, 1]]
    return loss(chosen, rejected, weight_B=prompt_weights(torch.tensor([0, 0, 0, 1]))).item() - 1.5223726


def swapped(chosen: Tensor, rejected: Tensor, **options: Any) -> Tensor:
    return bradley_terry_loss(rejected, chosen, **options)


def added_margin(chosen: Tensor, rejected: Tensor, **options: Any) -> Tensor:
    return bradley_terry_loss(chosen, rejected, **options | {"margin_B": -options["margin_B"]})


def summed(chosen: Tensor, rejected: Tensor, **options: Any) -> Tensor:
    return len(chosen) * bradley_terry_loss(chosen, rejected, **options)


def decided(chosen: Tensor, rejected: Tensor, **options: Any) -> Tensor:
    return bradley_terry_loss(chosen, rejected, **options | {"tie_B": None})


def squared_difference(chosen: Tensor, rejected: Tensor, centring: float) -> Tensor:
    return bradley_terry_loss(chosen, rejected) + centring * ((chosen - rejected) ** 2).mean()


def mean_over_pairs(chosen: Tensor, rejected: Tensor, **options: Any) -> Tensor:
    return bradley_terry_loss(chosen, rejected)


@pytest.mark.parametrize(
    ("vector", "broken"),
    [
        (margins, (swapped, added_margin, summed)),
        (half_ties, (swapped, summed, decided)),
        (rao_kupper, (swapped, summed, decided)),
        (centred, (swapped, summed, squared_difference)),
        (k_way, (swapped, mean_over_pairs)),
    ],
)
def test_vector_and_what_breaks_it(vector: Callable[[Loss], float], broken: tuple[Loss, ...]) -> None:
    assert abs(vector(bradley_terry_loss)) < 2e-6
    for loss in broken:
        assert abs(vector(loss)) > 1e-3, loss.__name__


@pytest.mark.parametrize("threshold", [0.1, 0.5, 3.0])
def test_outcomes_of_rao_kupper_add_up_to_one(threshold: float) -> None:
    difference = torch.linspace(-6, 6, 25, dtype=torch.float64)
    tie = torch.exp(-tie_nll(difference, threshold))
    wins = [torch.sigmoid(sign * difference - threshold) for sign in (1, -1)]
    torch.testing.assert_close(tie + wins[0] + wins[1], torch.ones_like(difference))
    assert tie[12].item() == pytest.approx(math.tanh(threshold / 2))
    torch.testing.assert_close(tie, tie.flip(0))  # which side is called chosen decides nothing
    assert tie.argmax() == 12


def test_ties_pull_rewards_together_and_centring_to_zero() -> None:
    chosen = torch.tensor([2.0], requires_grad=True)
    for options in ({}, {"tie_threshold": 0.5}):
        loss = bradley_terry_loss(chosen, torch.zeros(1), tie_B=torch.tensor([True]), **options)
        (gradient,) = torch.autograd.grad(loss, chosen)
        assert gradient.item() > 0.2
    for shift in (-3.0, 3.0):
        both = torch.tensor([shift, shift], requires_grad=True)
        (gradient,) = torch.autograd.grad(bradley_terry_loss(both[:1], both[1:], centring=0.01), both)
        assert math.copysign(1, gradient.sum().item()) == math.copysign(1, shift)
    far = bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4]), tie_B=torch.tensor([True]), tie_threshold=0.5)
    assert torch.isfinite(far)
