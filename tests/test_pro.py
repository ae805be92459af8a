"""PRO against numbers worked by hand, a slow definition on ragged groups, and its invariances."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from baselines.pro import PRO, pro_loss
from baselines.pro_settings import PROSettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import CANDIDATES

D = torch.float64
SCORE, REWARD = torch.tensor([[-1.0, -0.7, -1.2]], dtype=D), torch.tensor([[3.0, 2.0, 0.5]], dtype=D)


def ranked(score: torch.Tensor, reward: torch.Tensor, **keys: Any) -> float:
    return pro_loss(score, reward, score, **{"sft_weight": 0.0, **keys}).item()


def test_the_losses_are_those_worked_by_hand() -> None:
    # k = 1: gaps 1 and 2.5; exp(-2.5) against exp(-0.7) + exp(-3): log(1 + (.496585 + .049787) / .082085) = 2.035513.
    # k = 2: gap 1.5; exp(-1.05) against exp(-1.8): log(1 + exp(-.75)) = .386871.
    assert ranked(SCORE, REWARD) == pytest.approx(2.035513 + 0.386871, abs=1e-6)
    assert ranked(SCORE, REWARD, temperatures=False) == pytest.approx(1.627364, abs=1e-6)
    # The SFT term: 0.05 x 2^2 x 12 of the best response's sum, -12.
    total = pro_loss(SCORE, REWARD, torch.tensor([[-12.0, -9.0, -8.0]], dtype=D)).item()
    assert total == pytest.approx(2.422384 + 2.4, abs=1e-6)
    # Broken on purpose: the ranking upside down, and sums of 10 tokens in place of means.
    # Upside down: log(1 + exp(3 - 1.05) + exp(3 - 2.5)) + log(1 + exp(.7 - 1)) = 2.269794 + .554355.
    assert ranked(SCORE, -REWARD) == pytest.approx(2.824149, abs=1e-6)
    assert ranked(10 * SCORE, REWARD) > 10.0


def test_absent_candidates_and_lone_ones_add_nothing() -> None:
    nan = math.nan
    score = torch.tensor([[-1.0, -0.7, -1.2, 0.0], [-4.0, 0.0, 0.0, 0.0]], dtype=D, requires_grad=True)
    reward = torch.tensor([[3.0, 2.0, 0.5, nan], [1.0, nan, nan, nan]], dtype=D)
    loss = pro_loss(score, reward, score)
    assert loss.item() == pytest.approx((2.422384 + 0.05 * 4 * 1.0) / 2, abs=1e-6)
    loss.backward()
    assert score.grad is not None
    assert score.grad[1].tolist() == [0.0] * 4
    assert score.grad[0, 3].item() == 0.0
    assert torch.isfinite(score.grad).all()


def test_the_order_of_candidates_and_a_shift_of_rewards_do_not_count_but_their_unit_does() -> None:
    for order in ([2, 0, 1], [1, 2, 0]):
        assert ranked(SCORE[:, order], REWARD[:, order]) == pytest.approx(ranked(SCORE, REWARD))
    assert ranked(SCORE, REWARD + 5.0) == pytest.approx(ranked(SCORE, REWARD))
    # Twice the gaps: log(1 + exp(5 - 1.4) + exp(5 - 6)) + log(1 + exp(2.1 - 3.6)) = 3.636694 + .201413.
    assert ranked(SCORE, 2.0 * REWARD) == pytest.approx(3.838107, abs=1e-6)
    near_tie = torch.tensor([[1.0, 1.0 - 1e-9]], dtype=D)
    assert ranked(SCORE[:, :2], near_tie) == pytest.approx(math.log(2))


@pytest.mark.parametrize("keys", [{}, {"temperatures": False, "sft_weight": 0.3}, {"sft": "mean"}])
def test_a_ragged_batch_has_the_loss_of_the_slow_definition(policy: TransformersPolicy, keys: dict[str, Any]) -> None:
    """The rewards tie: equals keep their order, and a gap of 0 makes a term of log 2."""
    settings = PROSettings(**keys)
    logp_RT, batch = random_batch(PRO(settings), TrainInputs(candidates=CANDIDATES), policy.tokenization)
    losses = []
    for group, row in zip(by_response(batch, logp_RT), CANDIDATES, strict=True):
        order = sorted(range(len(group)), key=lambda i: -row.scores[i])
        s, r = [statistics.mean(group[i][0]) for i in order], [row.scores[i] for i in order]
        loss = 0.0
        for k in range(len(s) - 1):
            gaps = [r[k] - x if settings.temperatures else 1.0 for x in r[k + 1 :]]
            top = math.exp(s[k] * max(gaps))
            below = sum(math.exp(x * gap) for x, gap in zip(s[k + 1 :], gaps, strict=True))
            loss -= math.log(top / (top + below))
        best = group[order[0]][0]
        target = sum(best) if settings.sft == "sum" else statistics.mean(best)
        losses.append(loss - settings.sft_weight * (len(s) - 1) ** 2 * target)
    output = PRO(settings).loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert output.weight == len(CANDIDATES)
