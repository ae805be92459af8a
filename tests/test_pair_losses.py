"""The losses of a reward model on pairs against numbers worked by hand, and their invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rrhf_bench.rewards.pair_losses import bradley_terry_loss, prompt_weights, tie_nll

# Differences 1 and -2, as in tests/test_rewards.py: -log sigma(1) = 0.3132617, -log sigma(-2) = 2.1269280.
CHOSEN, REJECTED = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 2.5])
SECOND_TIES = torch.tensor([False, True])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # -log sigma(1 - 1) = log 2 = 0.6931472; -log sigma(-2 - 0.5) = log(1 + e^2.5) = 2.5788897; mean 1.6360184.
        ({"margin_B": torch.tensor([1.0, 0.5])}, 1.6360184),
        # The tie has d = -2: (2.1269280 + 0.1269280) / 2 = 1.1269280; the mean with 0.3132617 is 0.7200949.
        ({"tie_B": SECOND_TIES}, 0.7200949),
        # t = 0.5, theta = e^0.5. Decided, d = 1: -log sigma(0.5) = 0.4740770. Tie, d = -2: P = (e - 1) x
        # sigma(-2.5) sigma(1.5) = 1.7182818 x 0.0758582 x 0.8175745 = 0.1065673, -log P = 2.2389782; mean 1.3565276.
        ({"tie_B": SECOND_TIES, "tie_threshold": 0.5}, 1.3565276),
        # Sums 3 and 3: 0.1 x 9 = 0.9 more than 1.2200948.
        ({"centring": 0.1}, 2.1200948),
    ],
)
def test_the_loss_is_that_worked_by_hand(options: dict[str, Any], expected: float) -> None:
    assert bradley_terry_loss(CHOSEN, REJECTED, **options).item() == pytest.approx(expected, abs=2e-6)


def test_a_prompt_counts_once_however_many_pairs_it_has() -> None:
    # Prompt 0 has three pairs with differences 1, 1, -2, prompt 1 one pair with -2:
    # ((0.3132617 x 2 + 2.1269280) / 3 + 2.1269280) / 2 = (0.9178171 + 2.1269280) / 2 = 1.5223726.
    weight = prompt_weights(torch.tensor([0, 0, 0, 1]))
    loss = bradley_terry_loss(CHOSEN[[0, 0, 1, 1]], REJECTED[[0, 0, 1, 1]], weight_B=weight)
    assert loss.item() == pytest.approx(1.5223726, abs=2e-6)


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
