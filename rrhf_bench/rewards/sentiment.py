"""A sentiment classifier as the reward, from the initial policy's weights: chosen texts positive, rejected negative.

The reward is the probability of POSITIVE, as in the IMDB experiment of arXiv 2304.05302 (Table 10, after 2210.01241).

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

NEGATIVE, POSITIVE = "NEGATIVE", "POSITIVE"


def classification_loss(positive_B: Tensor, negative_B: Tensor) -> Tensor:
    """Mean binary cross-entropy over 2B texts from the log-odds of positive, half of them positive; scalar.

    Over the two labels' logits it is their softmax cross-entropy. Unlike Bradley-Terry it fixes the zero: adding a
    constant to all log-odds changes it.
    """
    return -(logsigmoid(positive_B) + logsigmoid(-negative_B)).mean() / 2


def train_classifier(
    initial: str | Path,
    preferences: Sequence[Preference],
    settings: RewardTrainingSettings,
    folder: Path,
    *,
    seed: int,
    template: TemplateKind = "raw",
    pad_token: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    log: Log | None = None,
    trust_remote_code: bool = False,
) -> RewardTraining:
    """Train a classifier with the labels NEGATIVE (0) and POSITIVE (1), and save it to ``folder`` for
    ``ClassifierReward`` with ``label=POSITIVE``; see ``train_head``.

    The accuracies logged are of pairs, as in Bradley-Terry training: chosen above rejected.
    """
    return train_head(
        initial,
        preferences,
        settings,
        folder,
        loss=classification_loss,
        labels=(NEGATIVE, POSITIVE),
        seed=seed,
        template=template,
        pad_token=pad_token,
        revision=revision,
        device=device,
        log=log,
        trust_remote_code=trust_remote_code,
    )
