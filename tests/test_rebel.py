"""REBEL against numbers worked by hand, a slow definition over pairs, and VCB."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch

from baselines.rebel import REBEL, rebel_loss
from baselines.rebel_settings import REBELSettings
from baselines.vcb import vcb_loss
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import CANDIDATES

D = torch.float64
# Log-ratios to the sampling policy with a difference of 0.4, rewards 2 and 1.
RATIO, REWARD = torch.tensor([[0.1, -0.3]], dtype=D), torch.tensor([[2.0, 1.0]], dtype=D)


def test_the_losses_are_those_worked_by_hand() -> None:
    assert rebel_loss(RATIO, REWARD, eta=1.0).item() == pytest.approx(0.36)  # (0.4 - 1)^2
    assert rebel_loss(RATIO, REWARD, eta=0.5).item() == pytest.approx(0.01)  # (0.4 - 0.5)^2
    assert rebel_loss(RATIO, REWARD, eta=0.5, form="paper").item() == pytest.approx(0.04)  # (0.8 - 1)^2
    # Broken on purpose: rewards on the wrong side, (0.4 + 1)^2.
    assert rebel_loss(RATIO, REWARD.flip(1), eta=1.0).item() == pytest.approx(1.96)
    alone = torch.tensor([[2.0, math.nan]], dtype=D)
    assert rebel_loss(RATIO, alone, eta=1.0).item() == 0.0


def test_it_is_vcb_up_to_a_factor_where_eta_is_the_inverse_of_gamma_and_spread() -> None:
    ratio, reward = torch.tensor([[0.3, -2.0, 1.0]], dtype=D), torch.tensor([[1.0, -1.0, 4.0]], dtype=D)
    gamma, spread = 0.2, torch.tensor([1.7], dtype=D)
    rebel = rebel_loss(ratio, reward, eta=1 / (gamma * 1.7)).item()
    assert vcb_loss(ratio, reward, spread, gamma=gamma).item() == pytest.approx(gamma**2 * rebel)


@pytest.mark.parametrize("keys", [{}, {"eta": 0.5, "form": "paper"}])
def test_a_ragged_batch_has_the_loss_of_the_slow_definition(policy: TransformersPolicy, keys: dict[str, Any]) -> None:
    s = REBELSettings(**keys)
    logp_RT, batch = random_batch(REBEL(s), TrainInputs(candidates=CANDIDATES), policy.tokenization)
    assert batch.reference_RT is not None
    losses = []
    for group, row in zip(by_response(batch, logp_RT, batch.reference_RT), CANDIDATES, strict=True):
        h, r = [sum(p) - sum(q) for p, q in group], row.scores
        pairs = [(h[i] - h[j], r[i] - r[j]) for i, j in itertools.combinations(range(len(h)), 2)]
        scale = 1.0 if s.form == "code" else s.eta**-2
        losses.append(statistics.mean(scale * (d - s.eta * gap) ** 2 for d, gap in pairs))
    output = REBEL(s).loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert output.weight == len(CANDIDATES)
