"""SimPO against numbers worked by hand and a slow definition."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from baselines.simpo import SimPO, simpo_loss
from baselines.simpo_settings import SimPOSettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import PAIRS

# A pair of 6 and 4 tokens with summed log-probs -12 and -10: means -2 and -2.5.
CHOSEN, REJECTED = torch.tensor([-2.0]), torch.tensor([-2.5])


def test_the_loss_is_that_worked_by_hand() -> None:
    # -log sigmoid(2 x 0.5 - 1) = log 2; with a margin of 0.5 of beta the same.
    assert simpo_loss(CHOSEN, REJECTED, beta=2.0, gamma=1.0).item() == pytest.approx(0.693147, abs=1e-6)
    ratio = simpo_loss(CHOSEN, REJECTED, beta=2.0, gamma=0.5, margin="ratio")
    assert ratio.item() == pytest.approx(0.693147, abs=1e-6)
    # Broken on purpose: sums, -log sigmoid(2 x -2 - 1) = 5.006715; swapped sides, -log sigmoid(-1 - 1) = 2.126928.
    sums = simpo_loss(6 * CHOSEN, 4 * REJECTED, beta=2.0, gamma=1.0)
    assert sums.item() == pytest.approx(5.006715, abs=1e-5)
    assert simpo_loss(REJECTED, CHOSEN, beta=2.0, gamma=1.0).item() == pytest.approx(2.126928, abs=1e-5)


def test_a_batch_has_the_loss_of_its_pairs_one_by_one(policy: TransformersPolicy) -> None:
    method = SimPO(SimPOSettings())
    logp_RT, batch = random_batch(method, TrainInputs(PAIRS), policy.tokenization)
    losses = []
    for (chosen,), (rejected,) in by_response(batch, logp_RT):
        margin = 2.5 * (statistics.mean(chosen) - statistics.mean(rejected)) - 1.375
        losses.append(math.log1p(math.exp(-margin)))
    output = method.loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert output.weight == len(PAIRS)
