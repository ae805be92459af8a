"""Properties of the loop of every on-policy method, on a tiny model with a real sampler."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from baselines.grpo_settings import GRPOSettings
from baselines.online_dpo_settings import OnlineDPOSettings
from baselines.ppo_settings import PPOSettings
from baselines.reinforce_pp_settings import ReinforcePPSettings
from baselines.remax_settings import ReMaxSettings
from baselines.rloo_settings import RLOOSettings
from rrhf_bench.policy.policy import Policy
from rrhf_bench.testing import Run
from rrhf_bench.training.method import Progress
from rrhf_bench.training.optimiser import learning_rate
from tests.losses import build_trainer, draw_first_rollouts
from tests.test_ppo import INPUTS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"iterations": 2, "rollouts": 16, "minibatch": 8, "lr": 3e-3}
GROUPS = {**SMALL, "replies": 4}
WITHOUT_KL = {**GROUPS, "kl_coefficient": 0.0}
CASES: dict[str, Any] = {
    "ppo": PPOSettings(**SMALL),
    "ppo with a value model": PPOSettings(**SMALL, value="separate"),
    "rloo": RLOOSettings(**GROUPS),
    "reinforce++": ReinforcePPSettings(**GROUPS),
    "remax": ReMaxSettings(**SMALL, aggregation="token", gamma=0.9, kl_return="immediate"),
    "grpo": GRPOSettings(**GROUPS),
    "dr grpo": GRPOSettings(**WITHOUT_KL, std="none", aggregation="cap"),
    "dapo": GRPOSettings(**WITHOUT_KL, clip_high=0.28, aggregation="group", equal_groups="drop", overlong_tokens=3),
    "gspo": GRPOSettings(**WITHOUT_KL, ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "grpo by tokens": GRPOSettings(**GROUPS, aggregation="token", kl_penalty="loss-k2"),
    "online dpo": OnlineDPOSettings(**SMALL),
    "online dpo of four": OnlineDPOSettings(**GROUPS),
    "xpo": OnlineDPOSettings(**SMALL, xpo_alpha=1e-2),
}


@pytest.mark.parametrize(
    ("name", "onednn"),
    [*((name, "off") for name in CASES), ("ppo", "on"), ("ppo with a value model", "on")],
    indirect=["onednn"],
)
def test_micro_batches_do_not_change_the_gradient(name: str, onednn: str) -> None:
    gradients, metrics = [], []
    for tokens in (4096, 1, 60):
        run = Run(stop=("ad",))
        run.policy.pass_tokens = tokens
        trainer, state, rollouts = draw_first_rollouts(run, CASES[name])
        advantages = trainer.method.advantages(rollouts, state.kl.coefficient)
        with torch.no_grad():  # away from the old policy and the reference, so that ratios and clipping matter
            for index, parameter in enumerate(state.optimiser.parameters):
                noise = np.random.default_rng(index).normal(scale=0.05, size=tuple(parameter.shape))
                parameter.add_(torch.as_tensor(noise, dtype=parameter.dtype))
        metrics.append(trainer.accumulate(run.policy, rollouts, advantages, range(8), state))
        gradients.append([p.grad for p in state.optimiser.parameters if p.grad is not None])
    assert len({len(ids) for _, ids in rollouts.pairs}) > 1, "the rows must differ in length"
    assert all(metrics[0][key] > 0.0 for key in ("policy/clipfrac_avg", "loss/kl_avg") if key in metrics[0])
    for other, row in zip(gradients[1:], metrics[1:], strict=True):
        assert row == pytest.approx(metrics[0], abs=1e-5)
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_tokens_are_counted_once_a_rollout_and_once_an_epoch() -> None:
    """A prompt is fed once for its only reply, and of the reply all tokens but the last."""
    made = PPOSettings(**{**SMALL, "iterations": 1, "rollouts": 8}, update_epochs=3)
    run = Run()
    result = build_trainer(made).fit(run.policy, INPUTS, run.context)
    pairs = draw_first_rollouts(Run(), made)[2].pairs
    assert result.sampled_tokens == sum(len(reply) for _, reply in pairs)
    assert result.trained_tokens == 3 * sum(len(prompt) + len(reply) - 1 for prompt, reply in pairs)


def test_the_steps_have_the_rates_of_the_schedule() -> None:
    """If both betas are 0, AdamW moves a weight by lr times the sign of its gradient, so the largest move of an
    iteration of two steps is the sum of their rates."""
    made = GRPOSettings(**{**GROUPS, "iterations": 3}, schedule="cosine", warmup=0.3, betas=(0.0, 0.0))
    run = Run()
    weights: list[torch.Tensor] = []

    def watch(progress: Progress, policy: Policy) -> None:
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))

    build_trainer(made).fit(run.policy, INPUTS, replace(run.context, watch=watch))
    rates = [learning_rate(step, 6, made) for step in range(6)]
    assert [row["lr"] for row in run.log] == rates[1::2]
    moves = [(after - before).abs().max().item() for before, after in pairwise(weights)]
    assert moves == pytest.approx([rates[i] + rates[i + 1] for i in (0, 2, 4)], rel=1e-3)
