"""GRPO and its relatives against numbers worked by hand, with formulas broken on purpose, and on a real, tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from baselines import grpo
from baselines.advantages import group_advantages
from baselines.grpo import GRPO, grpo_loss, overlong_penalty, token_weights
from baselines.grpo_settings import GRPOSettings
from rrhf_bench.errors import StageError
from rrhf_bench.testing import Run
from rrhf_bench.training.on_policy import Advantages, OnPolicyTrainer
from rrhf_bench.training.rollouts import Rollouts
from tests.losses import assert_fault_is_noticed, draw_first_rollouts
from tests.test_ppo import INPUTS

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = math.nan
# Two prompts with two replies each, of 1, 3, 2 and 2 tokens.
MASK = torch.tensor([[True, False, False], [True, True, True], [True, True, False], [True, True, False]])


def settings(**changes: Any) -> GRPOSettings:
    base = {"iterations": 2, "rollouts": 16, "replies": 4, "minibatch": 8, "lr": 3e-3}
    return GRPOSettings(**{**base, **changes})


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=1e-6)


def of(rollouts: Rollouts, **changes: Any) -> Advantages:
    return GRPO(settings(**changes)).advantages(rollouts, 0.1)


@pytest.fixture
def rollouts() -> Rollouts:
    """4 prompts with 4 replies each of a policy that has left its reference."""
    run = Run(stop=("ad",))
    with torch.no_grad():
        next(iter(run.policy.parameters())).mul_(1.2)
    return draw_first_rollouts(run, settings())[2]


def check_token_weights(token_weights: Callable[..., Tensor]) -> None:
    def mean(aggregation: str, mask: Tensor = MASK) -> float:
        # Losses 1 at each token of the first reply, 2 of the second, 3 and 5 of the others.
        loss = torch.tensor([1.0, 2.0, 3.0, 5.0])[:, None].expand(4, 3)
        return (token_weights(mask, aggregation=aggregation, replies=2, cap=4) * loss).sum(-1).mean().item()

    assert mean("sequence") == pytest.approx(11 / 4)  # (1 + 2 + 3 + 5) / 4
    assert mean("group") == pytest.approx(2.875)  # ((1 + 3 x 2) / 4 + (2 x 3 + 2 x 5) / 4) / 2
    assert mean("token") == pytest.approx(23 / 8)  # (1 + 6 + 6 + 10) / 8
    assert mean("cap") == pytest.approx(23 / 16)  # (1 + 6 + 6 + 10) / (4 x 4), whatever the width of the batch
    kept = MASK & torch.tensor([False, False, True, True])[:, None]  # the second prompt alone: the same means over it
    assert [mean(a, kept) for a in ("sequence", "group", "token", "cap")] == pytest.approx([4.0, 4.0, 4.0, 2.0])
    assert mean("token", torch.zeros_like(MASK)) == 0.0
    lopsided = torch.tensor([[True, False, False], [True, True, True], [True, False, False], [True, False, False]])
    # ((1 + 6) / 4 + (3 + 5) / 2) / 2 = 2.875 against (1 + 6 + 3 + 5) / 6 = 2.5.
    assert [mean("group", lopsided), mean("token", lopsided)] == pytest.approx([2.875, 2.5])


def check_grpo_loss(grpo_loss: Callable[..., Any]) -> None:
    # Row 0: rho 1.5 and .5 with A = 1, bounds [.8, 1.28]: max(-1.5, -1.28) = -1.28, clipped; max(-.5, -.8) = -.5.
    # Row 1: rho 1.5 with A = -2: max(3, 2.56) = 3. Weights 1/2 and 1: (-.89 + 3) / 2 = 1.055.
    # KL: log pi - log ref = d. Row 0: d = log 2 twice: k3 = 1/2 - 1 + .693147 = .193147; row 1: d = 0. Mean .0965736.
    mask = torch.tensor([[True, True], [True, False]])
    rho = torch.tensor([[1.5, 0.5], [1.5, NAN]])
    logp = (rho.log() - 2.0).requires_grad_()
    ref = logp.detach() - torch.tensor([[math.log(2), math.log(2)], [0.0, NAN]])
    advantage = torch.tensor([[1.0, 1.0], [-2.0, NAN]])
    weight = torch.tensor([[0.5, 0.5], [1.0, NAN]])
    arguments = (logp, torch.full_like(rho, -2.0), ref, advantage, weight, mask)
    found = grpo_loss(*arguments, clip_low=0.2, clip_high=0.28, kl_coefficient=0.1)
    close(found.policy, 1.055)
    close(found.kl, 0.0965736)
    close(found.loss, 1.055 + 0.00965736)
    close(found.clip_fraction, 0.25)  # (1/2 + 0/1) / 2
    # Gradients: clipped 0, -rho w / 2 = -.125, 2 rho / 2 = 1.5; of k3 (1 - ref / pi) .1 w / 2 = .0125 in row 0.
    (gradient,) = torch.autograd.grad(found.loss, logp)
    close(gradient, [[0.0125, -0.1125], [1.5, 0.0]])
    # k2: .5 log(2)^2 = .240227, half of it over two replies.
    close(grpo_loss(*arguments, clip_low=0.2, clip_high=0.28, kl_coefficient=1.0, kl="k2").kl, 0.1201133)


def check_sequence_ratio(grpo_loss: Callable[..., Any]) -> None:
    # GSPO: log-ratios .1, -.2, .3 have mean .0666667, ratio 1.068939. A = -1 at each token, weights 1/3.
    old, mask = torch.full((1, 4), -1.0), torch.tensor([[True, True, True, False]])
    logp = (old + torch.tensor([[0.1, -0.2, 0.3, 9.0]])).requires_grad_()
    weight = mask / 3
    found = grpo_loss(
        logp, old, old, -torch.ones(1, 4), weight, mask,
        clip_low=3e-4, clip_high=4e-4, kl_coefficient=0.0, ratio="sequence",
    )  # fmt: skip
    close(found.loss, 1.068939)
    (gradient,) = torch.autograd.grad(found.loss, logp)
    close(gradient, [[1.068939 / 3, 1.068939 / 3, 1.068939 / 3, 0.0]])


def check_overlong_penalty(overlong_penalty: Callable[..., Tensor]) -> None:
    # Cap 20, the last 8 tokens: free to 12, then an eighth a token.
    close(overlong_penalty(torch.tensor([3, 12, 14, 20]), cap=20, tokens=8), [0.0, 0.0, 0.25, 1.0])


CHECKS: dict[str, list[Callable[[Any], None]]] = {
    "token_weights": [check_token_weights],
    "grpo_loss": [check_grpo_loss, check_sequence_ratio],
    "overlong_penalty": [check_overlong_penalty],
}


def run_checks(name: str, function: Any) -> None:
    for check in CHECKS[name]:
        check(function)


@pytest.mark.parametrize("name", CHECKS)
def test_by_hand(name: str) -> None:
    run_checks(name, getattr(grpo, name))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("token_weights", '"sequence": length_N', '"sequence": torch.full_like(length_N, mask_NT.shape[1])'),  # padded
        ("token_weights", "torch.full_like(length_N, cap)", "torch.full_like(length_N, mask_NT.shape[1])"),
        ("token_weights", "mean(1).repeat", "mean().expand(len(length_N) // replies).repeat"),  # the batch's tokens
        ("token_weights", "(len(length_N) / kept)", "1.0"),
        ("grpo_loss", ".sum(-1).mean() for", ".mean(-1).mean() for"),
        ("grpo_loss", "clip_high=clip_high", "clip_high=clip_low"),
        ("grpo_loss", '"k3": kl_k3', '"k3": kl_k2'),
        ("grpo_loss", "(logp_BT, ref_logp_BT)\n", "(ref_logp_BT, logp_BT)\n"),
        ("grpo_loss", ".sum(-1, keepdim=True) / length_B1).expand", ".mean(-1, keepdim=True)).expand"),
        ("grpo_loss", ".sum(-1, keepdim=True) / length_B1).expand", ".sum(-1, keepdim=True)).expand"),
        ("grpo_loss", "log_ratio_BT = logp_BT - old_logp_BT", "log_ratio_BT = logp_BT - ref_logp_BT"),
        ("overlong_penalty", "clamp(0.0, 1.0)", "clamp(0.0)*2"),
    ],
)
def test_a_broken_formula_is_noticed(name: str, right: str, wrong: str) -> None:
    assert_fault_is_noticed(grpo, name, right, wrong, partial(run_checks, name))


def test_at_one_update_a_ratio_changes_no_gradient() -> None:
    """At ratio 1 the gradient is -A times that of the mean log-prob, with the ratio of tokens and of the sequence."""
    logp = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage = torch.tensor([[1.5], [-0.5]]).expand(2, 3)
    weight = token_weights(mask, aggregation="sequence", replies=2, cap=9)
    for ratio in ("token", "sequence"):
        found = grpo_loss(
            logp, logp.detach(), logp.detach(), advantage, weight, mask,
            clip_low=0.2, clip_high=0.2, kl_coefficient=0.1, ratio=ratio,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(found.loss, logp)
        close(gradient, [[-0.25, -0.25, -0.25], [0.125, 0.125, 0.0]])  # -1.5 / 3 / 2 and .5 / 2 / 2


def test_advantages_are_those_of_the_slow_definition(rollouts: Rollouts) -> None:
    mask, cap = rollouts.mask_NT, 8
    length = mask.sum(-1)
    assert rollouts.max_new_tokens == cap
    score = rollouts.score_N - np.where(rollouts.ended_N, 0.0, 1.0)
    ratio = (rollouts.logp_NT - rollouts.ref_logp_NT).sum(-1).double().numpy()
    over = np.clip((length.numpy() - 5) / 3, 0.0, 1.0)
    cases: list[tuple[dict[str, Any], Any, Callable[[Any], float]]] = [
        ({}, score, lambda group: group.std(ddof=1) + 1e-4),
        ({"std": "population", "std_epsilon": 1e-6}, score, lambda group: group.std(ddof=0) + 1e-6),
        ({"std": "none"}, score, lambda group: 1.0),
        ({"std": "none", "kl_penalty": "reward"}, score - 0.1 * ratio, lambda group: 1.0),
        ({"std": "none", "overlong_tokens": 3, "overlong_penalty": 0.5}, score - 0.5 * over, lambda group: 1.0),
    ]
    seen = []
    for changes, reward, divisor in cases:
        advantage = of(rollouts, **changes).advantage_NT
        groups = reward.reshape(4, 4)
        expected = np.concatenate([(group - group.mean()) / divisor(group) for group in groups])
        close(advantage, torch.as_tensor(expected)[:, None] * mask)
        seen.append(advantage)
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(seen) for b in seen[:i])


def test_equal_groups_are_dropped(rollouts: Rollouts) -> None:
    """3 prompts of 4 are left, so each of their replies counts 4/3."""
    score = rollouts.score_N.copy()
    score[:4] = 0.5
    equal = replace(rollouts, score_N=score, ended_N=np.ones_like(rollouts.ended_N))
    kept, dropped = of(equal), of(equal, equal_groups="drop")
    assert kept.weight_NT is not None
    assert dropped.weight_NT is not None
    assert kept.metrics["frac_reward_zero_std"] == dropped.metrics["frac_reward_zero_std"] == 0.25
    assert not dropped.weight_NT[:4].any()
    close(dropped.weight_NT[4:], kept.weight_NT[4:] * 4 / 3)


def test_invariances() -> None:
    """A constant added to the rewards of a prompt changes nothing; without an epsilon neither does their scale."""
    scores = torch.tensor([[0.3, 2.0, -1.0], [5.0, 4.0, 4.5]], dtype=torch.float64)
    for std in ("none", "std"):
        one = group_advantages(scores, baseline="mean", scale=std, epsilon=0.0)  # type: ignore[arg-type]
        moved = group_advantages(scores + 7.0, baseline="mean", scale=std, epsilon=0.0)  # type: ignore[arg-type]
        scaled = group_advantages(scores * 3.0, baseline="mean", scale=std, epsilon=0.0)  # type: ignore[arg-type]
        torch.testing.assert_close(moved, one)
        torch.testing.assert_close(scaled, one * (3.0 if std == "none" else 1.0))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="grpo"),
        pytest.param({"std": "none", "aggregation": "cap", "lr": 5e-3}, id="dr_grpo", marks=pytest.mark.slow),
        # Small clips take small steps: 0.18 after 10 iterations, since the rate warms up and decays.
        pytest.param(
            {"ratio": "sequence", "clip_low": 0.02, "clip_high": 0.02, "iterations": 16},
            id="gspo",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_reward_rises(changes: dict[str, Any]) -> None:
    run = Run()
    base = {
        "iterations": 10,
        "rollouts": 48,
        "minibatch": 12,
        "lr": 5e-3,
        "kl_coefficient": 0.01,
        "missing_eos": "none",
    }
    made = settings(**{**base, **changes})
    OnPolicyTrainer(GRPO(made), made).fit(run.policy, INPUTS, run.context)
    rewards = [row["reward/mean"] for row in run.log]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2, rewards


def test_bad_input_is_refused(rollouts: Rollouts) -> None:
    for changes, key in [
        ({"replies": 1}, "replies"),
        ({"ratio": "sequence", "aggregation": "token"}, "aggregation"),
        ({"clip_low": 1.0}, "clip_low"),
        ({"overlong_tokens": 0}, "overlong_tokens"),
        ({"overlong_penalty": 2.0}, "overlong_penalty"),
        ({"std": "none", "std_epsilon": 1e-6}, "std_epsilon"),
        ({"rollouts": 18}, "rollouts"),
    ]:
        with pytest.raises(ValidationError, match=key):
            settings(**changes)
    with pytest.raises(StageError, match="overlong_tokens: found 9"):
        of(rollouts, overlong_tokens=9)
    assert settings().models_in_memory() == ("policy", "reference", "reward model")
    assert overlong_penalty(torch.tensor([0]), cap=8, tokens=8).item() == 0.0
