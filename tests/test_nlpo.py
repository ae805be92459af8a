"""NLPO's masked log-probs against numbers worked by hand, and its loop on a real, tiny model with a real sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from baselines import nlpo
from baselines.nlpo import NLPO
from baselines.nlpo_settings import NLPOSettings
from rrhf_bench.training.on_policy import OnPolicyTrainer
from tests.losses import assert_fault_is_noticed
from tests.test_ppo import INPUTS, Run

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> NLPOSettings:
    return NLPOSettings(**{"iterations": 3, "rollouts": 8, "minibatch": 4, "update_epochs": 2, "lr": 3e-3, **changes})


def check(masked_logprobs: Callable[..., Tensor]) -> None:
    # The mask policy gives .5, .3, .15, .05: its top-.7 set is the first two. The policy gives .2, .2, .4, .2 there.
    mask_logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 2).log()
    logits = torch.tensor([[0.2, 0.2, 0.4, 0.2]] * 2).log().requires_grad_()
    found = masked_logprobs(logits, mask_logits, torch.tensor([0, 3]), top_p=0.7)
    # .2 / (.2 + .2); the last token is added to the set: .2 / (.2 + .2 + .2).
    assert found.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 3)])
    (gradient,) = torch.autograd.grad(found[0], logits)
    assert gradient[0].tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0])
    # At temperature 1/2 the mask is .25, .09, .0225, .0025 over .365: the first alone has .685, so the set is the first
    # two again at .7 and the first at .6; the policy's .04, .04, ... over those.
    half = masked_logprobs(logits, mask_logits, torch.tensor([0, 1]), top_p=0.6, temperature=0.5)
    assert half.tolist() == pytest.approx([0.0, math.log(1 / 2)])


def test_by_hand() -> None:
    check(nlpo.masked_logprobs)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("outside_top_p(mask_logits_NV", "outside_top_p(logits_NV"),
        ("logits_NV.masked_fill(outside_NV, -torch.inf)", "logits_NV"),
        (".scatter(1, token_N[:, None], False)", ""),
        (".float() / temperature", ".float()"),
    ],
)
def test_a_broken_formula_is_noticed(right: str, wrong: str) -> None:
    assert_fault_is_noticed(nlpo, "masked_logprobs", right, wrong, check)


@pytest.mark.parametrize(("value", "temperature"), [("head", 1.0), ("separate", 0.7)])
def test_the_mask_is_that_of_the_engine(value: str, temperature: float) -> None:
    """The engine's log-probs are under its truncated distribution: they are those of the masked policy."""
    run = Run(stop=("ad",))
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(1.5)  # less flat
    run.policy.pass_tokens = 60
    made = settings(value=value, temperature=temperature, top_p=0.6)
    OnPolicyTrainer(NLPO(made), made).fit(run.policy, INPUTS, run.context)
    for row in run.log:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    full = Run(stop=("ad",))
    made = settings(value=value, temperature=temperature, top_p=0.999999)
    OnPolicyTrainer(NLPO(made), made).fit(full.policy, INPUTS, full.context)
    assert full.log[0]["policy/entropy_estimate"] > run.log[0]["policy/entropy_estimate"] + 0.1


def test_settings() -> None:
    assert settings().models_in_memory() == ("policy", "reference", "reward model", "mask policy")
    for top_p in (0.0, 1.0):
        with pytest.raises(ValidationError, match="top_p"):
            settings(top_p=top_p)
