"""PPO for long: what it holds in memory does not grow."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.test_ppo import INPUTS, Run, settings, trainer


@pytest.mark.slow
def test_two_hundred_iterations_hold_no_more_than_the_first_fifty() -> None:
    """A tensor of 50 floats kept of each rollout would be 3200 tensors and 0.6 MB by the end; the graph of one update a
    hundred times that."""
    torch.set_num_threads(1)
    run = Run(stop=("ad",))
    resident: list[int] = []
    tensors: list[int] = []

    def took(seconds: Any) -> None:
        if len(resident) % 10 == 9:
            gc.collect()
        resident.append(psutil.Process().memory_info().rss)
        if len(resident) in (50, 200):
            tensors.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))

    made = settings(iterations=200, rollouts=16, minibatch=8, update_epochs=1, lr=1e-4)
    trainer(made).fit(run.policy, INPUTS, replace(run.context, took=took))
    assert len(run.log) == 200
    assert tensors[1] <= tensors[0] + 20  # the iteration at hand may be at another point
    quarters = [float(np.median(part)) for part in np.array_split(np.array(resident), 4)]
    # The last half against the second quarter, when all pools have their size: 1% is a few MB.
    assert max(quarters[2:]) < 1.01 * quarters[1], quarters
