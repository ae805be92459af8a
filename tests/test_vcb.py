"""VCB against numbers worked by hand, a slow definition over pairs, and its invariances."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from baselines.vcb import VCB, reward_spread, vcb_loss
from baselines.vcb_settings import VCBSettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import CANDIDATES

D = torch.float64


def test_the_loss_of_a_pair_worked_by_hand() -> None:
    # h = (1, -1), r = (2, 1), spread 0.5, gamma 0.1: (0.1 x 2 - 1 / 0.5)^2 = 1.8^2 = 3.24.
    pair = torch.tensor([[1.0, -1.0]], dtype=D), torch.tensor([[2.0, 1.0]], dtype=D)
    assert vcb_loss(*pair, torch.tensor([0.5], dtype=D), gamma=0.1).item() == pytest.approx(3.24)
    # Broken on purpose: a spread of the wrong prompt, and rewards on the wrong side: (0.2 + 2)^2 = 4.84.
    assert vcb_loss(*pair, torch.tensor([1.0], dtype=D), gamma=0.1).item() == pytest.approx(0.64)
    assert vcb_loss(pair[0], pair[1].flip(1), torch.tensor([0.5], dtype=D), gamma=0.1).item() == pytest.approx(4.84)
    with pytest.raises(ValueError, match="spread"):
        vcb_loss(*pair, torch.tensor([0.0], dtype=D), gamma=0.1)


def test_a_group_is_the_mean_over_its_pairs_and_a_group_of_one_adds_nothing() -> None:
    # a = gamma h - r / spread of the first prompt: (0, 1, 3); squared differences 1, 9, 4 have the mean 14 / 3.
    logratio = torch.tensor([[0.0, 1.0, 3.0], [5.0, 0.0, 0.0]], dtype=D, requires_grad=True)
    reward = torch.tensor([[0.0, 0.0, 0.0], [7.0, math.nan, math.nan]], dtype=D)
    loss = vcb_loss(logratio, reward, torch.ones(2, dtype=D), gamma=1.0)
    assert loss.item() == pytest.approx(14 / 3 / 2)
    loss.backward()
    assert logratio.grad is not None
    assert logratio.grad[1].tolist() == [0.0, 0.0, 0.0]


def test_the_loss_is_zero_at_its_optimal_policy() -> None:
    reward = torch.tensor([[2.0, 0.0, 1.0, -1.0]], dtype=D)
    spread = reward_spread(reward, correction=1, floor=1e-3)
    assert spread.item() == pytest.approx(statistics.stdev([2, 0, 1, -1]))
    optimum = reward / (0.3 * spread[:, None]) + 17.0  # of any partition function
    assert vcb_loss(optimum, reward, spread, gamma=0.3).item() == pytest.approx(0.0, abs=1e-20)
    assert vcb_loss(optimum, reward, spread, gamma=0.31).item() > 1e-4


def test_the_spread_has_a_floor_and_two_definitions() -> None:
    reward = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, math.nan]], dtype=D)
    assert reward_spread(reward, correction=1, floor=0.01).tolist() == pytest.approx([0.01, math.sqrt(2)])
    assert reward_spread(reward, correction=0, floor=0.01).tolist() == pytest.approx([0.01, 1.0])


@pytest.mark.parametrize("keys", [{}, {"spread": "population", "gamma": 0.3}, {"length_norm": "response"}])
def test_a_ragged_batch_has_the_loss_of_the_slow_definition(policy: TransformersPolicy, keys: dict[str, Any]) -> None:
    settings = VCBSettings(**keys)
    logp_RT, batch = random_batch(VCB(settings), TrainInputs(candidates=CANDIDATES), policy.tokenization)
    assert batch.reference_RT is not None
    losses = []
    for group, row in zip(by_response(batch, logp_RT, batch.reference_RT), CANDIDATES, strict=True):
        spread = (statistics.stdev if settings.spread == "sample" else statistics.pstdev)(row.scores)
        h = [(sum(p) - sum(q)) / (len(p) if settings.length_norm == "response" else 1) for p, q in group]
        pairs = itertools.combinations(range(len(h)), 2)
        losses.append(
            statistics.mean(
                (settings.gamma * (h[i] - h[j]) - (row.scores[i] - row.scores[j]) / spread) ** 2 for i, j in pairs
            )
        )
    output = VCB(settings).loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert output.weight == len(CANDIDATES)


def test_the_unit_and_the_zero_of_the_reward_do_not_count_but_its_gaps_do(policy: TransformersPolicy) -> None:
    method = VCB(VCBSettings())
    logp_RT, batch = random_batch(method, TrainInputs(candidates=CANDIDATES), policy.tokenization)
    loss = method.loss(logp_RT, batch).loss.item()
    for reward_R in (10.0 * batch.reward_R, batch.reward_R + 1e6):
        assert method.loss(logp_RT, replace(batch, reward_R=reward_R)).loss.item() == pytest.approx(loss, rel=1e-6)
    squeezed = method.loss(logp_RT, replace(batch, reward_R=batch.reward_R**3)).loss.item()  # the same order
    assert squeezed != pytest.approx(loss, rel=1e-4)
