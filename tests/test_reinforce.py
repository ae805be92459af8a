"""REINFORCE with a running baseline against numbers worked by hand, and on a real, tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from baselines import reinforce
from baselines.reinforce import Reinforce, RunningMean
from baselines.reinforce_settings import ReinforceSettings
from rrhf_bench.training.rollouts import Rollouts
from tests.losses import assert_fault_is_noticed, draw_first_rollouts
from tests.test_ppo import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> ReinforceSettings:
    return ReinforceSettings(**{"iterations": 4, "rollouts": 8, "minibatch": 4, "lr": 3e-3, **changes})


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return draw_first_rollouts(Run(), settings())[2]


def check_running_mean(running_mean: Callable[..., RunningMean]) -> None:
    # 2 numbers of mean 1, 6 of mean 3: (2 + 18) / 8 = 2.5.
    assert running_mean().after(1.0, 2).after(3.0, 6).mean == 2.5
    # With a decay of .5 the first 2 count as 1: (1 x 1 + 6 x 3) / 7 = 19 / 7; these 7 then count as 3.5:
    # (3.5 x 19 / 7 + 2 x 0) / 5.5 = 9.5 / 5.5.
    decayed = running_mean(decay=0.5).after(1.0, 2)
    assert decayed.mean == 1.0  # not drawn to 0
    decayed = decayed.after(3.0, 6)
    assert decayed.mean == pytest.approx(19 / 7)
    assert decayed.after(0.0, 2).mean == pytest.approx(9.5 / 5.5)


def test_the_running_mean_by_hand() -> None:
    check_running_mean(RunningMean)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self.decay * self.weight", "self.weight"),
        ("count * batch_mean", "batch_mean"),
        ("(kept + count)", "(1 + kept)"),
    ],
)
def test_a_broken_formula_is_noticed(right: str, wrong: str) -> None:
    assert_fault_is_noticed(reinforce, "RunningMean", right, wrong, check_running_mean)


@pytest.mark.parametrize(
    ("changes", "baselines"),
    [
        # Iterations with mean rewards 1, 3 and -1 after the KL: running means 1, 2, 1.
        ({}, [1.0, 2.0, 1.0]),
        ({"include_present": False}, [1.0, 1.0, 2.0]),
        ({"baseline": "batch"}, [1.0, 3.0, -1.0]),
        ({"baseline": "none"}, [0.0, 0.0, 0.0]),
        # Weights 1/2, 1: (1/2 + 3) / (3/2) = 7/3; 1/4, 1/2, 1: (1/4 + 3/2 - 1) / (7/4) = 3/7.
        ({"baseline": "ema", "decay": 0.5}, [1.0, 7 / 3, 3 / 7]),
    ],
)
def test_the_baseline_of_each_iteration(rollouts: Rollouts, changes: dict[str, Any], baselines: list[float]) -> None:
    method = Reinforce(settings(missing_eos="none", **changes))
    spread = np.linspace(-0.7, 0.7, 8)
    for mean, baseline in zip([1.0, 3.0, -1.0], baselines, strict=True):
        # Half a nat a token from the reference, .1 each: the score is higher by .05 a token than the reward.
        ratio_NT = 0.5 * rollouts.mask_NT
        score_N = mean + spread + 0.05 * rollouts.mask_NT.sum(-1).numpy()
        rows = replace(rollouts, score_N=score_N, ref_logp_NT=rollouts.logp_NT - ratio_NT)
        advantages = method.advantages(rows, 0.1)
        expected_N = torch.as_tensor(mean + spread - baseline, dtype=torch.float32)
        torch.testing.assert_close(advantages.advantage_NT, expected_N[:, None] * rows.mask_NT, rtol=0, atol=1e-5)
        assert advantages.metrics["objective/baseline"] == pytest.approx(baseline, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"decay": 0.9}, "decay"),
        ({"baseline": "ema"}, "decay"),
        ({"baseline": "ema", "decay": 1.0}, "decay"),
        ({"baseline": "batch", "include_present": False}, "include_present"),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**changes)
