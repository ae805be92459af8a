"""SLiC-HF against numbers worked by hand and a slow definition."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from baselines.slic_hf import SLiCHF, slic_hf_loss
from baselines.slic_hf_settings import SLiCHFSettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import PAIRS

CHOSEN, REJECTED = torch.tensor([-12.0]), torch.tensor([-10.0])  # 6 and 4 tokens
WEIGHTS: dict[str, Any] = {"delta": 1.0, "regularisation": 0.1}


def test_the_loss_is_that_worked_by_hand() -> None:
    # max(0, 1 + 12 - 10) + 0.1 x 12 = 4.2.
    assert slic_hf_loss(CHOSEN, REJECTED, CHOSEN, **WEIGHTS).item() == pytest.approx(4.2)
    # Broken on purpose: sides swapped, max(0, 1 + 10 - 12) + 0.1 x 10 = 1; means, max(0, 1 + 2 - 2.5) + 0.2 = 0.7;
    # the sign of the regularisation, 3 - 1.2 = 1.8.
    assert slic_hf_loss(REJECTED, CHOSEN, REJECTED, **WEIGHTS).item() == pytest.approx(1.0)
    assert slic_hf_loss(CHOSEN / 6, REJECTED / 4, CHOSEN / 6, **WEIGHTS).item() == pytest.approx(0.7)
    assert slic_hf_loss(CHOSEN, REJECTED, -CHOSEN, **WEIGHTS).item() == pytest.approx(1.8)


def test_a_pair_beyond_the_margin_has_the_gradient_of_the_regularisation_alone() -> None:
    chosen, rejected = torch.tensor([-5.0], requires_grad=True), torch.tensor([-6.5], requires_grad=True)
    slic_hf_loss(chosen, rejected, chosen, **WEIGHTS).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == (pytest.approx(-0.1), 0.0)


@pytest.mark.parametrize("length_norm", ["none", "response"])
def test_a_batch_has_the_loss_of_its_pairs_one_by_one(policy: TransformersPolicy, length_norm: Any) -> None:
    method = SLiCHF(SLiCHFSettings(length_norm=length_norm))
    logp_RT, batch = random_batch(method, TrainInputs(PAIRS), policy.tokenization)
    score = sum if length_norm == "none" else statistics.mean
    sides = [(score(chosen), score(rejected)) for (chosen,), (rejected,) in by_response(batch, logp_RT)]
    losses = [max(0.0, 1.0 - chosen + rejected) - 0.1 * chosen for chosen, rejected in sides]
    output = method.loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert output.weight == len(PAIRS)
    assert output.metrics["loss/zero_hinges"] == statistics.mean(a - b >= 1.0 for a, b in sides)
