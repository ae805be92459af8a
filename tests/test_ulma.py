"""ULMA and pointwise DPO against numbers worked by hand and a slow definition, in sums and in averages."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from baselines.ulma import ULMA, ulma_loss
from baselines.ulma_settings import ULMASettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import PAIRS

# A good reply of 6 tokens (log-prob -12, log-ratio 1) and a bad one of 4 (-10, -1).
RATIO, LOGP, POSITIVE = torch.tensor([1.0, -1.0]), torch.tensor([-12.0, -10.0]), torch.tensor([True, False])
LENGTH = torch.tensor([6.0, 4.0])


def loss(ratio: torch.Tensor, logp: torch.Tensor = LOGP, positive: torch.Tensor = POSITIVE, **keys: Any) -> float:
    return ulma_loss(ratio, logp, positive, **{"beta": 0.1, "variant": "pointwise_dpo", **keys}).item()


def test_the_losses_are_those_worked_by_hand() -> None:
    # Sums: -log sigmoid(0.1) = .644397 for each reply. Their means are added, 1.288794, or pooled, .644397.
    assert loss(RATIO) == pytest.approx(1.288794, abs=1e-5)
    assert loss(RATIO, groups="pooled") == pytest.approx(0.644397, abs=1e-6)
    # Averages: -log sigmoid(.1 / 6) = .684849 and -log sigmoid(.1 / 4) = .680725.
    assert loss(RATIO / LENGTH) == pytest.approx(0.684849 + 0.680725, abs=1e-6)
    # ULMA: 12 nats (2 a token) of the good reply, and the same of the bad one.
    assert loss(RATIO, variant="ulma") == pytest.approx(12.0 + 0.644397, abs=1e-5)
    assert loss(RATIO / LENGTH, LOGP / LENGTH, variant="ulma") == pytest.approx(2.0 + 0.680725, abs=1e-6)
    assert loss(RATIO, variant="ulma", nll_weight=0.1) == pytest.approx(1.2 + 0.644397, abs=1e-5)
    # With c = 0.5: -log sigmoid(.6) = .437488 and -log sigmoid(.1 - .5) = .913015.
    assert loss(RATIO, constant=0.5) == pytest.approx(0.437488 + 0.913015, abs=1e-5)
    # Broken on purpose: labels swapped, -log sigmoid(-0.1) = .744397 each.
    assert loss(RATIO, positive=~POSITIVE) == pytest.approx(1.488794, abs=1e-5)


def test_the_groups_are_averaged_apart() -> None:
    three = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([True, True, False])
    assert loss(*three) == pytest.approx(1.288794, abs=1e-5)  # not 2 x .644397 + .644397
    assert loss(*(x[:2] for x in three)) == pytest.approx(0.644397, abs=1e-6)  # one label alone adds its own mean


@pytest.mark.parametrize(
    "keys",
    [{}, {"length_norm": "response", "groups": "pooled", "nll_weight": 0.3}, {"variant": "pointwise_dpo", "beta": 0.4}],
)
def test_a_batch_has_the_loss_of_the_slow_definition(policy: TransformersPolicy, keys: dict[str, Any]) -> None:
    s = ULMASettings(**keys)
    logp_RT, batch = random_batch(ULMA(s), TrainInputs(PAIRS), policy.tokenization)
    assert batch.reference_RT is not None
    good, bad = [], []
    for replies in by_response(batch, logp_RT, batch.reference_RT):
        score = sum if s.length_norm == "none" else statistics.mean
        p, h = [score(x) for x, _ in replies], [score(x) - score(y) for x, y in replies]
        good.append(math.log1p(math.exp(-s.beta * h[0])) if s.variant != "ulma" else -s.nll_weight * p[0])
        bad.append(math.log1p(math.exp(s.beta * h[1])))
    expected = (statistics.mean(good) + statistics.mean(bad)) / (2 if s.groups == "pooled" else 1)
    output = ULMA(s).loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.weight == len(PAIRS)


def test_keys_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="nll_weight"):
        ULMASettings(variant="pointwise_dpo", nll_weight=0.5)
