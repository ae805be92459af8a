"""ORPO: Odds Ratio Preference Optimization, supervised fine-tuning with an odds ratio (arXiv 2403.07691).

Letters: B pairs, R = 2 B rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from baselines.orpo_settings import ORPOSettings
from baselines.sft import sft_loss
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import pair_examples, reward_metrics, score_sides

MIN_NLL_NATS = 1e-6  # of a mean over tokens: a response that is certain has infinite odds


def orpo_loss(chosen_B: Tensor, rejected_B: Tensor, nll: Tensor, *, odds_weight: float) -> Tensor:
    """Return nll - odds_weight * mean log sigmoid(log odds_w - log odds_l) (2403.07691).

    ``chosen_B`` and ``rejected_B`` are mean log-probs A of response tokens, log odds = A - log(1 - exp(A)). ``nll`` is
    the negative log-likelihood of the chosen responses: a token mean in the paper. The paper's NLL also covers the
    prompt's tokens in the authors' code; here it covers the response alone, as a policy gives no log-probs of prompts.
    """
    return nll - odds_weight * logsigmoid(log_odds(chosen_B) - log_odds(rejected_B)).mean()


def log_odds(mean_logp_B: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean log-prob), accurate near p = 1."""
    mean_logp_B = mean_logp_B.clamp(max=-MIN_NLL_NATS)
    return mean_logp_B - torch.log(-torch.expm1(mean_logp_B))


class ORPO:
    """ORPO as a LossMethod: an example is a prompt with its chosen and its rejected reply."""

    def __init__(self, settings: ORPOSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each pair. Raises DataError if a prompt has no pair."""
        return pair_examples(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's pairs, which are its weight."""
        s = self.settings
        chosen_B, rejected_B = score_sides(logp_RT, batch, "response")
        mask_RT = batch.responses.mask_BT.to(logp_RT.device)
        reduction: Literal["sequence", "sum"] = "sequence" if s.nll == "mean" else "sum"
        nll = sft_loss(batch.grouped(logp_RT)[:, 0], batch.grouped(mask_RT)[:, 0], reduction=reduction)
        loss = orpo_loss(chosen_B, rejected_B, nll, odds_weight=s.odds_weight)
        metrics = {**reward_metrics(chosen_B, rejected_B), "loss/sft": nll.item()}
        return LossOutput(loss, float(batch.prompts), metrics)
