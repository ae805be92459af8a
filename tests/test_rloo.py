"""RLOO against numbers worked by hand, and on a real, tiny model with a real sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from baselines.rloo import rloo_loss
from baselines.rloo_settings import RLOOSettings
from rrhf_bench.testing import Run, share_of_d
from tests.losses import draw_first_rollouts

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> RLOOSettings:
    base = {"iterations": 2, "rollouts": 16, "replies": 4, "minibatch": 8, "lr": 3e-3}
    return RLOOSettings(**{**base, **changes})


def test_the_loss_weighs_whole_replies() -> None:
    # Replies of 2 and 1 tokens with advantages 2 and -1: -(2 x (-1 - 3) + -1 x -0.5) / 2 = 3.75.
    logp_BT = torch.tensor([[-1.0, -3.0], [-0.5, -9.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    assert rloo_loss(logp_BT, torch.tensor([2.0, -1.0]), mask_BT).item() == 3.75


def test_advantages_are_those_of_the_slow_definition() -> None:
    """R_i = score - penalty of a cut reply - beta log-ratio; the baseline is the mean of the prompt's other replies."""
    run = Run(stop=("ad",))
    with torch.no_grad():
        next(iter(run.policy.parameters())).mul_(1.2)  # away from the reference
    trainer, _, rollouts = draw_first_rollouts(run, settings(kl_coefficient=0.05, missing_eos_penalty=-0.5))
    advantages = trainer.method.advantages(rollouts, 0.05)
    replies = [(group.prompt, reply) for group in rollouts.groups for reply in group.responses]
    assert len(rollouts.groups) == 4
    rewards = []
    for row, (_, reply) in enumerate(replies):
        assert reply.score == share_of_d(reply.text)
        tokens = len(reply.token_ids or ())
        ratio = (rollouts.logp_NT[row, :tokens] - rollouts.ref_logp_NT[row, :tokens]).sum().item()
        rewards.append(reply.score - (0.0 if reply.ended else 0.5) - 0.05 * ratio)
    for row, reward in enumerate(rewards):
        others = [rewards[i] for i in range(row - row % 4, row - row % 4 + 4) if i != row]
        tokens = rollouts.mask_NT[row]
        expected = reward - sum(others) / 3
        assert advantages.advantage_NT[row][tokens].tolist() == pytest.approx([expected] * int(tokens.sum()), abs=1e-5)
        assert not advantages.advantage_NT[row][~tokens].any()
    assert np.std(rewards) > 0.0
    assert rollouts.metrics["objective/kl"] != 0.0


def test_one_reply_has_no_others() -> None:
    with pytest.raises(ValidationError, match="replies"):
        settings(replies=1)
