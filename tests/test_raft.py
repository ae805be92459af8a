"""RAFT: which candidate it trains on, and the loss of SFT on it."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from baselines.raft import RAFT
from baselines.raft_settings import RAFTSettings
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Response
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_training import CANDIDATES, PROMPTS


def group(*scores: float) -> Candidates:
    return Candidates(PROMPTS[0], tuple(Response(f" {i}.", "model", score=s) for i, s in enumerate(scores)))


def test_it_trains_on_the_best_of_each_prompt_and_the_first_of_ties() -> None:
    examples = RAFT(RAFTSettings()).examples(
        TrainInputs(candidates=[group(0.0, 2.0, 1.0), group(-1.0, -1.0), group(-3.0), group(-9.0, -8.0, -8.0)])
    )
    assert [(e.responses[0].text, e.rewards) for e in examples] == [
        (" 1.", (2.0,)),  # the ranking is within a prompt: the worst of all prompts stay
        (" 0.", (-1.0,)),
        (" 0.", (-3.0,)),
        (" 1.", (-8.0,)),
    ]


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
def test_a_batch_has_the_loss_of_the_slow_definition(policy: TransformersPolicy, reduction: Any) -> None:
    method = RAFT(RAFTSettings(reduction=reduction))
    logp_RT, batch = random_batch(method, TrainInputs(candidates=CANDIDATES), policy.tokenization)
    rows = [tokens for ((tokens,),) in by_response(batch, logp_RT)]
    losses = {
        "token": -statistics.mean(x for row in rows for x in row),
        "sequence": -statistics.mean(statistics.mean(row) for row in rows),
        "sum": -statistics.mean(sum(row) for row in rows),
    }
    output = method.loss(logp_RT, batch)
    assert output.loss.item() == pytest.approx(losses[reduction], rel=1e-5)
    assert len({round(x, 4) for x in losses.values()}) == 3  # a reduction in another's place would show
    assert output.weight == (sum(map(len, rows)) if reduction == "token" else len(CANDIDATES))
    assert output.metrics["rewards/chosen"] == statistics.mean(max(row.scores) for row in CANDIDATES)
