"""REINFORCE++-baseline against numbers worked by hand, with its formula broken on purpose, and on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from baselines import reinforce_pp
from baselines.reinforce_pp import ReinforcePP
from baselines.reinforce_pp_settings import ReinforcePPSettings
from rrhf_bench.training.rollouts import Rollouts
from tests.losses import assert_fault_is_noticed, draw_first_rollouts
from tests.test_ppo import Run

pytestmark = pytest.mark.usefixtures("one_thread")

REWARDS = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
LENGTHS = [2, 4, 1, 3]
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]  # wider than the longest


def settings(**changes: Any) -> ReinforcePPSettings:
    return ReinforcePPSettings(**{"iterations": 2, "rollouts": 16, "replies": 4, "minibatch": 8, "lr": 3e-3, **changes})


def check(globally_whitened: Callable[..., Tensor]) -> None:
    # Less the mean .5: 1.5, -.5, .5, -1.5 at 2, 4, 1, 3 tokens: mean (3 - 2 + .5 - 4.5) / 10 = -.3, to it 1.8, -.2,
    # .8, -1.2: (2 x 3.24 + 4 x .04 + .64 + 3 x 1.44) / 10 = 1.16, root 1.077033; with Bessel 11.6 / 9, root 1.135292.
    for ddof, expected in [
        (0, [1.671258, -0.185695, 0.742781, -1.114172]),
        (1, [1.585495, -0.176166, 0.704664, -1.056996]),
    ]:
        close(globally_whitened(REWARDS, MASK, ddof=ddof), torch.tensor(expected)[:, None] * MASK)
    # By replies: mean 0, variance 5 / 4 and 5 / 3.
    for ddof, std in [(0, 1.118034), (1, 1.290994)]:
        expected_N = torch.tensor([1.5, -0.5, 0.5, -1.5]) / std
        close(globally_whitened(REWARDS, MASK, over="replies", ddof=ddof), expected_N[:, None] * MASK)
    # A penalty of tokens comes after the prompt's mean: 1.5 - 1 and 1.5 at the first reply, mean -.4.
    penalty = torch.zeros(4, 6)
    penalty[0, 0] = 1.0
    values = torch.tensor([0.5, 1.5] + [-0.5] * 4 + [0.5] + [-1.5] * 3)
    found = globally_whitened(REWARDS, MASK, penalty_NT=penalty)
    close(found[MASK], (values + 0.4) / ((values + 0.4) ** 2).mean().sqrt())
    # Two prompts: each has its own mean, the batch one deviation.
    two = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    found = globally_whitened(two, torch.ones(4, 1, dtype=torch.bool))
    close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0])[:, None] * 2**0.5)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_by_hand() -> None:
    check(reinforce_pp.globally_whitened)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('baseline="mean"', 'baseline="none"'),
        ('baseline="mean"', 'baseline="mean", scale="std"'),  # GRPO's
        ("penalty_NT), mask_NT, ddof=ddof)", "penalty_NT), mask_NT)"),
        ("penalty_NT), mask_NT, ddof=ddof)", "penalty_NT), torch.ones_like(mask_NT), ddof=ddof) * mask_NT"),  # padding
        ('over == "replies"', 'over == "tokens"'),
    ],
)
def test_a_broken_formula_is_noticed(right: str, wrong: str) -> None:
    assert_fault_is_noticed(reinforce_pp, "globally_whitened", right, wrong, check)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    run = Run(stop=("ad",))
    with torch.no_grad():
        next(iter(run.policy.parameters())).mul_(1.2)
    return draw_first_rollouts(run, settings())[2]


def test_the_kl_is_in_the_baseline_or_not(rollouts: Rollouts) -> None:
    """Equal scores: with the KL summed into the reward, replies of one prompt differ less than with the KL to go."""
    equal = replace(rollouts, score_N=np.ones(16), ended_N=np.ones(16, bool))
    ratio_NT = rollouts.logp_NT - rollouts.ref_logp_NT
    found = {}
    for penalty in ("loss-k2", "reward", "reward-to-go"):
        found[penalty] = ReinforcePP(settings(kl_penalty=penalty)).advantages(equal, 0.1).advantage_NT
    assert not found["loss-k2"].any()
    summed_N = -0.1 * ratio_NT.sum(-1)
    centred_N = (summed_N.reshape(4, 4) - summed_N.reshape(4, 4).mean(1, keepdim=True)).flatten()
    to_go_NT = -0.1 * torch.stack([ratio_NT[:, t:].sum(-1) for t in range(ratio_NT.shape[1])], 1)
    for penalty, raw_NT in [("reward", centred_N[:, None].expand_as(ratio_NT)), ("reward-to-go", to_go_NT)]:
        raw = raw_NT[rollouts.mask_NT].double()
        expected = (raw - raw.mean()) / raw.std(correction=0)
        torch.testing.assert_close(found[penalty][rollouts.mask_NT].double(), expected, rtol=0, atol=1e-3)


def test_bad_input_is_refused() -> None:
    for changes, key in [({"replies": 1}, "replies"), ({"whiten": "replies", "kl_penalty": "reward-to-go"}, "whiten")]:
        with pytest.raises(ValidationError, match=key):
            settings(**changes)
    with pytest.raises(ValueError, match="1 reply"):  # and not its raw reward
        reinforce_pp.globally_whitened(torch.ones(3, 1), torch.ones(3, 2, dtype=torch.bool))
