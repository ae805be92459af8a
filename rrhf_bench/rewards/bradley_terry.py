"""A reward model trained on preference pairs: Bradley-Terry on a linear head, from the initial policy's weights.

Shape letters: B pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import logsigmoid

from rrhf_bench.data.dialogue import TemplateKind
from rrhf_bench.records import Preference
from rrhf_bench.rewards.train_head import Log, RewardTraining, train_head
from rrhf_bench.settings.reward import RewardTrainingSettings


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, *, margin_B: Tensor | None = None) -> Tensor:
    """Mean of -log sigma(r_chosen - r_rejected - margin) over pairs; scalar.

    The negative log-likelihood of the labels under the Bradley-Terry model (2203.02155 Eq. 1); the margin by strength
    of preference is Llama 2's (2307.09288 Eq. 2). Adding a constant to all rewards changes nothing.
    """
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        difference_B = difference_B - margin_B
    return -logsigmoid(difference_B).mean()


def train_reward_model(
    initial: str | Path,
    preferences: Sequence[Preference],
    settings: RewardTrainingSettings,
    folder: Path,
    *,
    seed: int,
    template: TemplateKind = "hh",
    pad_token: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    log: Log | None = None,
    trust_remote_code: bool = False,
) -> RewardTraining:
    """Train a one-label head and the body below it, and save them to ``folder`` for ``ClassifierReward``; see
    ``train_head``."""
    return train_head(
        initial,
        preferences,
        settings,
        folder,
        loss=bradley_terry_loss,
        labels=None,
        seed=seed,
        template=template,
        pad_token=pad_token,
        revision=revision,
        device=device,
        log=log,
        trust_remote_code=trust_remote_code,
    )
