"""ULMA and pointwise DPO: losses of replies that are each labelled good or bad (arXiv 2312.02554).

The released code is Unified-Language-Model-Alignment/src. Its losses of continuous labels are not here.
Letters: B prompts, N labelled replies, R = 2 B rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from baselines.ulma_settings import ULMASettings
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import pair_examples, reward_metrics


def ulma_loss(
    logratio_N: Tensor,
    logp_N: Tensor,
    positive_N: Tensor,
    *,
    beta: float,
    constant: float = 0.0,
    variant: Literal["ulma", "pointwise_dpo"] = "ulma",
    nll_weight: float = 1.0,
    groups: Literal["added", "pooled"] = "added",
) -> Tensor:
    """Return the loss of labelled replies from their log-ratios h and log-probs (2312.02554).

    ``pointwise_dpo``: -log sigmoid(beta h + constant) of a good reply, -log sigmoid(-beta h - constant) of a bad one;
    the constant stands for the log partition function. ``ulma``: a good reply has nll_weight * -log pi(y | x) instead.
    ``groups``: the released code averages good and bad replies apart and adds the two means, so the share of a label
    does not count; ``pooled`` is the mean over all replies. The paper's text sums h and log pi over tokens, and the
    released trainer averages both.
    """
    z_N = beta * logratio_N + constant
    good_N = -logsigmoid(z_N) if variant == "pointwise_dpo" else -nll_weight * logp_N
    good = (good_N * positive_N).sum()
    bad = (-logsigmoid(-z_N) * ~positive_N).sum()
    if groups == "pooled":
        return (good + bad) / len(positive_N)
    return good / positive_N.sum().clamp(min=1) + bad / (~positive_N).sum().clamp(min=1)


class ULMA:
    """ULMA and pointwise DPO as a LossMethod: a prompt with its chosen reply, which is good, and its rejected one."""

    def __init__(self, settings: ULMASettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each pair. Raises DataError if a prompt has no pair."""
        return pair_examples(inputs, self.settings.kind)

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's prompts, which are its weight: each has one reply of each label."""
        assert batch.reference_RT is not None
        s, mask_RT = self.settings, batch.responses.mask_BT.to(logp_RT.device)
        ratio_RT = logp_RT - batch.reference_RT.to(logp_RT.device)
        ratio_R, logp_R = (sequence_score(x_RT, mask_RT, length_norm=s.length_norm) for x_RT in (ratio_RT, logp_RT))
        ratio_B2 = batch.grouped(ratio_R)
        positive_B2 = ratio_B2.new_tensor([1, 0]).bool().expand(ratio_B2.shape)
        loss = ulma_loss(
            ratio_R,
            logp_R,
            positive_B2.flatten(),
            beta=s.beta,
            constant=s.constant,
            variant=s.variant,
            nll_weight=s.nll_weight,
            groups=s.groups,
        )
        return LossOutput(loss, float(batch.prompts), reward_metrics(s.beta * ratio_B2[:, 0], s.beta * ratio_B2[:, 1]))
