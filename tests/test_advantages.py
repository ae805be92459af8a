"""Advantages of group methods against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from baselines.advantages import group_advantages

SCORES = torch.tensor([[2.0, 0.0, 1.0, -1.0]])  # mean 0.5, sample std sqrt(5/3) = 1.29099


def test_the_baselines_are_those_of_the_papers() -> None:
    # RLOO: 2 - (0 + 1 - 1)/3 = 2; 0 - (2 + 1 - 1)/3 = -2/3; 1 - (2 + 0 - 1)/3 = 2/3; -1 - (2 + 0 + 1)/3 = -2.
    rloo = group_advantages(SCORES, baseline="leave-one-out")
    torch.testing.assert_close(rloo, torch.tensor([[2.0, -2 / 3, 2 / 3, -2.0]]))
    # GRPO: 1.5 / 1.29109 = 1.16181, 0.5 / 1.29109 = 0.38727.
    grpo = group_advantages(SCORES, baseline="mean", scale="std")
    torch.testing.assert_close(grpo, torch.tensor([[1.16181, -0.38727, 0.38727, -1.16181]]), rtol=0, atol=1e-5)
    # Population std sqrt(5/4) = 1.11803, without an epsilon: 1.5 / 1.11803 = 1.34164, 0.5 / 1.11803 = 0.44721.
    population = group_advantages(SCORES, baseline="mean", scale="std", ddof=0, epsilon=0.0)
    torch.testing.assert_close(population, torch.tensor([[1.34164, -0.44721, 0.44721, -1.34164]]), rtol=0, atol=1e-5)
    assert torch.equal(group_advantages(SCORES, baseline="none"), SCORES)


def test_a_constant_changes_nothing_and_equal_scores_teach_nothing() -> None:
    for scale in ("none", "std"):
        for baseline in ("mean", "leave-one-out"):
            moved = group_advantages(SCORES + 3.0, baseline=baseline, scale=scale)
            torch.testing.assert_close(moved, group_advantages(SCORES, baseline=baseline, scale=scale))
            assert torch.equal(group_advantages(torch.ones(2, 3), baseline=baseline, scale=scale), torch.zeros(2, 3))
    for score in (0.1, 0.7, 1.3):  # a mean of 3 or 5 of them may be off by a rounding
        for replies in (3, 5):
            scores = torch.full((1, replies), score)
            assert not group_advantages(scores, baseline="mean", scale="std", epsilon=0.0).any()


def test_one_reply_has_no_others() -> None:
    with pytest.raises(ValueError, match="1 reply"):
        group_advantages(torch.ones(3, 1), baseline="leave-one-out")
