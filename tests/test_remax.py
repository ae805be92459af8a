"""ReMax against numbers worked by hand, with formulas broken on purpose, and on a real, tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from baselines import remax
from baselines.remax_settings import ReMaxSettings
from rrhf_bench.training.rollouts import sampled_tokens
from tests.losses import assert_fault_is_noticed, draw_first_rollouts
from tests.test_ppo import Run, share_of_d

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> ReMaxSettings:
    return ReMaxSettings(**{"iterations": 2, "rollouts": 8, "minibatch": 4, "lr": 3e-3, **changes})


def check_remax_advantages(remax_advantages: Callable[..., Tensor]) -> None:
    # Score gaps 8 and -2, replies of 3 and 1 tokens, log-ratios 1, 2, -1 and 3, kl .5.
    gap = torch.tensor([8.0, -2.0])
    ratio = torch.tensor([[1.0, 2.0, -1.0], [3.0, torch.nan, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def found(**options: Any) -> list[list[float]]:
        return remax_advantages(gap, ratio, mask, kl_coefficient=0.5, **options).tolist()

    assert found() == [[7.0, 7.0, 7.0], [-3.5, 0.0, 0.0]]  # 8 - .5 (1 + 2 - 1), -2 - .5 (3)
    assert found(kl_return="to-go") == [[7.0, 7.5, 8.5], [-3.5, 0.0, 0.0]]  # 8 - .5 (2), (1), (-1)
    assert found(kl_return="immediate") == [[7.5, 7.0, 8.5], [-3.5, 0.0, 0.0]]
    # The authors' code: clipped to 5, the last token discounted once: 5/8, 5/4, 5/2 and -2/2, less .5 of each ratio.
    assert found(kl_return="immediate", gamma=0.5, score_clip=5.0) == [[0.125, 0.25, 3.0], [-2.5, 0.0, 0.0]]


def check_remax_loss(remax_loss: Callable[..., Tensor]) -> None:
    # -((1 x 2 x -1 + 1 x -1 x -3) + .5 x 4 x -2) / 2 = -(1 - 4) / 2.
    logp = torch.tensor([[-1.0, -3.0], [-2.0, torch.nan]])
    weight = torch.tensor([[1.0, 1.0], [0.5, 1.0]])
    advantage = torch.tensor([[2.0, -1.0], [4.0, 5.0]])
    assert remax_loss(logp, advantage, weight, torch.tensor([[True, True], [True, False]])).item() == 1.5


CHECKS: dict[str, Callable[[Any], None]] = {"remax_advantages": check_remax_advantages, "remax_loss": check_remax_loss}


@pytest.mark.parametrize("name", CHECKS)
def test_by_hand(name: str) -> None:
    CHECKS[name](getattr(remax, name))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("remax_advantages", "gamma**left_NT", "gamma**(left_NT - 1)"),
        ("remax_advantages", "mask_NT.flip(-1).cumsum(-1).flip(-1)", "mask_NT.cumsum(-1)"),
        ("remax_advantages", "log_ratio_NT.flip(-1).cumsum(-1).flip(-1)", "log_ratio_NT.cumsum(-1)"),
        ("remax_advantages", '"immediate": log_ratio_NT', '"immediate": log_ratio_NT.sum(-1, keepdim=True)'),
        ("remax_advantages", "- kl_coefficient * kl_NT", "+ kl_coefficient * kl_NT"),
        ("remax_advantages", "clamp(-score_clip, score_clip)", "clamp(-score_clip)"),
        ("remax_loss", ".sum(-1).mean()", ".mean(-1).mean()"),  # the padded width
        ("remax_loss", "weight_BT * ", ""),
    ],
)
def test_a_broken_formula_is_noticed(name: str, right: str, wrong: str) -> None:
    assert_fault_is_noticed(remax, name, right, wrong, CHECKS[name])


@pytest.mark.parametrize("replies", [1, 2])
def test_the_baseline_is_the_greedy_reply_of_the_present_weights(replies: int) -> None:
    run = Run(stop=("ad",))
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(1.3)  # away from the reference, whose greedy replies differ
    trainer, state, rollouts = draw_first_rollouts(run, settings(replies=replies, rollouts=16, kl_coefficient=0.05))
    greedy = [group.responses[0] for group in rollouts.greedy]
    for group, reply in zip(rollouts.greedy, greedy, strict=True):
        ids = list(run.policy.tokenization.prompt_ids(group.prompt))
        for token in reply.token_ids or ():
            assert run.policy.model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)
    advantages = trainer.method.advantages(rollouts, 0.05)
    replied = [(at, reply) for at, group in enumerate(rollouts.groups) for reply in group.responses]
    assert len(rollouts.greedy) == 16 // replies
    for row, (at, reply) in enumerate(replied):
        own, baseline = (share_of_d(r.text) - (0.0 if r.ended else 1.0) for r in (reply, greedy[at]))
        ratio = (rollouts.logp_NT[row] - rollouts.ref_logp_NT[row]).sum().item()
        expected = (own - baseline - 0.05 * ratio) * rollouts.mask_NT[row]
        torch.testing.assert_close(advantages.advantage_NT[row], expected, rtol=0, atol=1e-5)
    # The greedy replies cost tokens, one for each of the 12 prompts or fewer, and are not trained on.
    once = {group.prompt: group.responses[0] for group in rollouts.greedy}.values()
    assert len(once) == min(12, 16 // replies)
    assert state.sampled_tokens == sampled_tokens(rollouts.groups) + sum(len(reply.token_ids or ()) for reply in once)
    assert state.sampled_replies == 16 + len(once)
    assert len(rollouts.pairs) == 16


def test_settings() -> None:
    assert "8 rollouts and 4 greedy replies" in settings(replies=2).budget(12, 0)
    for changes, key in [({"gamma": 0.0}, "gamma"), ({"score_clip": 0.0}, "score_clip"), ({"kl_return": "k3"}, "kl")]:
        with pytest.raises(ValidationError, match=key):
            settings(**changes)
