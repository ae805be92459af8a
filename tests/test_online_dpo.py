"""Online DPO and XPO against numbers worked by hand, with formulas broken on purpose, and on a real, tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from baselines import online_dpo
from baselines.online_dpo import OnlineDPO
from baselines.online_dpo_settings import OnlineDPOSettings
from rrhf_bench.training.on_policy import Minibatch, OnPolicyTrainer
from rrhf_bench.training.rollouts import RolloutSampler
from tests.losses import assert_fault_is_noticed, draw_first_rollouts
from tests.test_ppo import INPUTS, Run

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> OnlineDPOSettings:
    return OnlineDPOSettings(**{"iterations": 3, "rollouts": 8, "minibatch": 4, "lr": 3e-3, **changes})


def check_pair_signs(pair_signs: Callable[..., Any]) -> None:
    scores = np.array([[1.0, 2.0, 0.0], [3.0, 3.0, 3.0], [0.0, 5.0, 5.0], [2.0, 1.0, 1.0]])
    expected = [[0.0, 1.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [1.0, 0.0, -1.0]]
    assert pair_signs(scores, ties="drop").tolist() == expected
    assert pair_signs(scores, ties="first").tolist() == [expected[0], [1.0, 0.0, -1.0], *expected[2:]]


def check_online_dpo_loss(online_dpo_loss: Callable[..., Tensor]) -> None:
    # Log-probs -12 and -10, reference -13 and -9: log-ratios 1 and -1, D = 2: -log sigmoid(.2) = .598139; as the second
    # reply is the better one D = -2: .798139. IPO with tau .1: (2 - 5)^2 = 9. The last prompt has no pair.
    logp = torch.tensor([[-12.0, -10.0], [-10.0, -12.0], [-1.0, -7.0]])
    ref = torch.tensor([[-13.0, -9.0], [-9.0, -13.0], [-2.0, -2.0]])

    def found(rows: slice, signs: list[list[float]], **options: Any) -> float:
        return online_dpo_loss(logp[rows], ref[rows], torch.tensor(signs), beta=0.1, **options).item()

    right, wrong, none = [1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]
    assert found(slice(0, 1), [right]) == pytest.approx(0.598139, abs=1e-6)
    assert found(slice(0, 1), [wrong]) == pytest.approx(0.798139, abs=1e-6)
    assert found(slice(0, 2), [right, wrong]) == pytest.approx(0.598139, abs=1e-6)
    assert found(slice(0, 1), [right], variant="ipo") == pytest.approx(9.0)
    assert found(slice(0, 3), [right, right, none]) == pytest.approx((0.598139 + 0.798139) / 3, abs=1e-6)
    assert found(slice(2, 3), [none]) == 0.0
    # XPO: alpha .01 x the mean of -10, -12 and -7, whether there is a pair or not.
    extra = {"explored_P": logp[:, 1], "alpha": 0.01}
    expected = (0.598139 + 0.798139) / 3 - 0.29 / 3
    assert found(slice(0, 3), [right, right, none], **extra) == pytest.approx(expected, abs=1e-6)


CHECKS: dict[str, Callable[[Any], None]] = {"pair_signs": check_pair_signs, "online_dpo_loss": check_online_dpo_loss}


@pytest.mark.parametrize("name", CHECKS)
def test_by_hand(name: str) -> None:
    CHECKS[name](getattr(online_dpo, name))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("pair_signs", "argmax(1)", "argmin(1)"),
        ("pair_signs", "[:, ::-1].argmin(1)", "[:, ::-1].argmin(1) * 0"),
        ("online_dpo_loss", "(chosen_PG, rejected_PG)", "(rejected_PG, chosen_PG)"),
        ("online_dpo_loss", "for x_PG in (logp_PG, ref_logp_PG)", "for x_PG in (logp_PG, logp_PG)"),
        ("online_dpo_loss", "* paired_P.sum() / len(paired_P)", ""),
        ("online_dpo_loss", "loss + alpha", "loss - alpha"),
        ("online_dpo_loss", "explored_P.mean()", "explored_P.sum()"),
    ],
)
def test_a_broken_formula_is_noticed(name: str, right: str, wrong: str) -> None:
    assert_fault_is_noticed(online_dpo, name, right, wrong, CHECKS[name])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.598139),
        ({"variant": "ipo"}, 9.0),
        ({"variant": "ipo", "length_norm": "response"}, 21.006944),  # D = 1/6 + 1/4: (.416667 - 5)^2
        ({"xpo_alpha": 0.5, "length_norm": "response", "variant": "ipo"}, 21.006944 - 5.0),  # the bonus stays a sum
    ],
)
def test_a_pair_of_6_and_4_tokens(changes: dict[str, Any], expected: float) -> None:
    mask = torch.arange(7) < torch.tensor([[6], [4]])  # padded
    logp = torch.where(mask, torch.tensor([[-2.0], [-2.5]]), torch.tensor(99.0))
    ref = torch.where(mask, torch.tensor([[-13 / 6], [-2.25]]), torch.tensor(-99.0))
    batch = Minibatch(mask, logp, ref, torch.tensor([[1.0], [-1.0]]) * mask, 0.1)
    loss, metrics = OnlineDPO(settings(**changes)).loss(logp, None, batch)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert metrics["rewards/accuracies"] == 1.0


def test_signs_follow_the_scores_and_the_missing_ends() -> None:
    run = Run()
    _, _, rollouts = draw_first_rollouts(run, settings(replies=4))
    score = np.array([0.0, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0])
    ended = np.array([True, True, True, False, True, True, True, True])
    rows = replace(rollouts, score_N=score, ended_N=ended)
    advantages = OnlineDPO(settings(replies=4, missing_eos_penalty=-9.0)).advantages(rows, 0.1)
    assert advantages.advantage_NT[:, 0].tolist() == [0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    assert advantages.metrics["frac_reward_zero_std"] == 0.5
    assert not advantages.advantage_NT[~rows.mask_NT].any()
    # Scores that float32 cannot tell apart are a pair.
    _, _, pairs = draw_first_rollouts(run, settings())
    near = replace(pairs, score_N=np.array([1.0, 1.0 + 1e-12] * 4), ended_N=np.ones(8, bool))
    assert OnlineDPO(settings()).advantages(near, 0.1).advantage_NT[:, 0].tolist() == [-1.0, 1.0] * 4


@pytest.mark.parametrize("replies", [2, 4])
def test_the_replies_of_a_prompt_stay_in_one_minibatch(replies: int) -> None:
    made = settings(replies=replies)
    for rows in OnPolicyTrainer(OnlineDPO(made), made)._minibatches(0, 0):
        assert all(row == rows[i - i % replies] + i % replies for i, row in enumerate(rows))


def test_the_second_reply_of_xpo_is_the_initial_policys() -> None:
    run = Run(stop=("ad",))
    before = draw_first_rollouts(run, settings(xpo_alpha=1e-5))[2]
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(0.3)
    _, state, rollouts = draw_first_rollouts(run, settings(xpo_alpha=1e-5))
    for moved, start in zip(rollouts.groups, before.groups, strict=True):
        assert len(moved.responses) == 2
        assert moved.responses[1] == start.responses[1]
        assert moved.responses[1].logprobs is None
    assert [g.responses[0] for g in rollouts.groups] != [g.responses[0] for g in before.groups]
    # What is reported of the policy leaves the initial policy's replies out; what was sampled does not.
    own = [group.responses[0] for group in rollouts.groups]
    assert rollouts.metrics["reward/mean"] == pytest.approx(np.mean([reply.score for reply in own]))
    ratio_N = (rollouts.logp_NT - rollouts.ref_logp_NT).sum(-1)
    assert rollouts.metrics["objective/kl"] == pytest.approx(ratio_N[::2].mean().item(), abs=1e-5)
    assert rollouts.metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert state.sampled_tokens == sum(len(ids) for _, ids in rollouts.pairs)


def test_a_greedy_reply_is_not_of_the_reference() -> None:
    """A sampler that gives both samples greedily before it takes the reference's weights."""
    run = Run()
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(1.3)
    trainer = OnPolicyTrainer(OnlineDPO(settings()), settings())
    spec = replace(trainer.sampler(run.policy, run.context).spec, n=1)
    prompts = INPUTS.prompts[:4]
    alone = RolloutSampler(run.policy, run.context, spec, greedy=True).draw(0, prompts, None, "here")
    both = RolloutSampler(run.policy, run.context, spec, greedy=True, reference_replies=1)
    assert both.draw(0, prompts, None, "here").greedy == alone.greedy


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"replies": 1}, "replies"),
        ({"replies": 4, "xpo_alpha": 1e-5}, "replies"),
        ({"replies": 4, "minibatch": 6}, "minibatch"),
        ({"kl_coefficient": 0.0}, "kl_coefficient"),
        ({"kl": "adaptive"}, "kl"),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**changes)
