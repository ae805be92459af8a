"""BoNBoN against numbers worked by hand, a simulation of its target, and a slow definition."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from baselines.bonbon import BoNBoN, bonbon_loss, bonbon_target
from baselines.bonbon_settings import BoNBoNSettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Response
from rrhf_bench.settings.candidates import DrawnCandidates
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import CANDIDATES, PROMPTS


def group(*scores: float) -> Candidates:
    return Candidates(PROMPTS[0], tuple(Response(f" {i}.", "model", score=s) for i, s in enumerate(scores)))


def test_the_target_is_that_worked_by_hand_and_simulated() -> None:
    # (n - 1) H_{n-1}: 1 x 1, 3 x (1 + 1/2 + 1/3), ...; the released beta at n = 8 is 0.0275482.
    assert [bonbon_target(n) for n in (2, 4, 8, 16)] == pytest.approx([1.0, 5.5, 18.15, 49.7734], abs=1e-4)
    assert 1 / (2 * bonbon_target(8)) == pytest.approx(0.0275482, abs=1e-7)
    # Best-of-n has the density n U^(n-1) of a reward's quantile U, so the log-ratio is log n + (n - 1) log U.
    quantile = np.sort(np.random.default_rng(0).random((200_000, 4)), axis=1)
    # The standard error of the simulated mean is 0.008; three of them.
    assert np.mean(3 * np.log(quantile[:, -1] / quantile[:, 0])) == pytest.approx(5.5, abs=0.024)


def test_the_loss_is_that_worked_by_hand() -> None:
    best, ratio, worst = torch.tensor([-12.0]), torch.tensor([1.0]), torch.tensor([-1.0])
    assert bonbon_loss(best, ratio, worst, target=5.5, alpha=0.0).item() == pytest.approx(12.25)  # (2 - 5.5)^2
    # 0.005 x 12 + 0.995 x 12.25.
    assert bonbon_loss(best, ratio, worst, target=5.5).item() == pytest.approx(0.06 + 12.18875)
    # Broken on purpose: best and worst swapped, (-2 - 5.5)^2; averages over 6 and 4 tokens, (.416667 - 5.5)^2.
    assert bonbon_loss(best, worst, ratio, target=5.5, alpha=0.0).item() == pytest.approx(56.25)
    means = bonbon_loss(best, ratio / 6, worst / 4, target=5.5, alpha=0.0)
    assert means.item() == pytest.approx(25.840278, abs=1e-5)


def test_examples_are_the_best_and_the_worst_and_n_is_the_size_of_the_group() -> None:
    method = BoNBoN(BoNBoNSettings())
    examples = method.examples(TrainInputs(candidates=[group(1.0, 3.0, 0.0, 3.0, 0.0), group(2.0, 2.0), group(1.0)]))
    assert [([r.text for r in e.responses], e.rewards) for e in examples] == [([" 1.", " 2."], (3.0, 0.0))]
    assert method.target == bonbon_target(6)  # 4 samples, chosen, rejected
    assert BoNBoN(BoNBoNSettings(candidates=DrawnCandidates(sources=("model",), n=8))).target == bonbon_target(8)
    assert BoNBoN(BoNBoNSettings(n=16)).target == bonbon_target(16)


def test_a_batch_has_the_loss_of_the_slow_definition(policy: TransformersPolicy) -> None:
    method = BoNBoN(BoNBoNSettings(n=4, alpha=0.3))
    logp_RT, batch = random_batch(method, TrainInputs(candidates=CANDIDATES), policy.tokenization)
    assert batch.reference_RT is not None
    losses = []
    for (p, q), (u, v) in by_response(batch, logp_RT, batch.reference_RT):
        losses.append(-0.3 * sum(p) + 0.7 * (sum(p) - sum(q) - sum(u) + sum(v) - 5.5) ** 2)
    output = method.loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert output.weight == len(CANDIDATES)


def test_a_refresh_is_refused() -> None:
    with pytest.raises(ValidationError, match="refresh"):
        BoNBoNSettings(candidates=DrawnCandidates(refresh=4))
