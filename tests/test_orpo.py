"""ORPO against numbers worked by hand and a slow definition."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from baselines.orpo import ORPO, log_odds, orpo_loss
from baselines.orpo_settings import ORPOSettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import PAIRS

# A pair of 6 and 4 tokens with summed log-probs -12 and -10: means -2 and -2.5.
CHOSEN, REJECTED, NLL = torch.tensor([-2.0]), torch.tensor([-2.5]), torch.tensor(2.0)


def test_the_loss_is_that_worked_by_hand() -> None:
    # (-2 + 2.5) - (log(1 - e^-2) - log(1 - e^-2.5)) = .5 + .145413 - .085651 = .559763.
    assert (log_odds(CHOSEN) - log_odds(REJECTED)).item() == pytest.approx(0.559763, abs=1e-6)
    # 2 - 0.1 log sigmoid(.559763) = 2 + 0.1 x 0.451930.
    assert orpo_loss(CHOSEN, REJECTED, NLL, odds_weight=0.1).item() == pytest.approx(2.045193, abs=1e-6)
    # Broken on purpose: sides swapped, 2 + 0.1 x 1.011693; sums in place of means, log odds -12 against -10.
    assert orpo_loss(REJECTED, CHOSEN, NLL, odds_weight=0.1).item() == pytest.approx(2.101169, abs=1e-6)
    sums = orpo_loss(6 * CHOSEN, 4 * REJECTED, NLL, odds_weight=0.1)
    assert sums.item() == pytest.approx(2 + 0.1 * math.log1p(math.exp(2)), abs=1e-4)


def test_a_certain_response_has_finite_odds_and_gradients() -> None:
    certain = torch.tensor([0.0, -1e-9, -1e-3], requires_grad=True)
    orpo_loss(certain, torch.tensor([-1.0, -1.0, 0.0]), NLL, odds_weight=0.1).backward()
    assert torch.isfinite(certain.grad).all()  # type: ignore[arg-type]
    assert log_odds(torch.tensor([-1e-3], dtype=torch.float64)).item() == pytest.approx(-math.log(math.expm1(1e-3)))


@pytest.mark.parametrize("keys", [{}, {"nll": "sum", "odds_weight": 0.7}])
def test_a_batch_has_the_loss_of_its_pairs_one_by_one(policy: TransformersPolicy, keys: dict[str, Any]) -> None:
    settings = ORPOSettings(**keys)
    logp_RT, batch = random_batch(ORPO(settings), TrainInputs(PAIRS), policy.tokenization)
    losses = []
    for (chosen,), (rejected,) in by_response(batch, logp_RT):
        odds = [math.exp(statistics.mean(x)) / (1 - math.exp(statistics.mean(x))) for x in (chosen, rejected)]
        nll = -(sum(chosen) if settings.nll == "sum" else statistics.mean(chosen))
        losses.append(nll + settings.odds_weight * math.log1p(odds[1] / odds[0]))
    output = ORPO(settings).loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert output.weight == len(PAIRS)
