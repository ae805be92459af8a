"""The computation of the released RRHF training script, written from its description; not that script.

The prompt is repeated before each of its k responses, the rows are padded to the longest, the whole model is called,
and a log-softmax over the vocabulary is kept for every position, prompts and padding included, and copied. A score is
the sum of a response's log-probs over the padded length L, because the marks of positions that do not count are
overwritten before the length is taken; the loss is the sum of the hinges of all pairs and minus the score of the best
(``official`` in ``rrhf_bench.training.rrhf``). One prompt a step is all that the script can do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import IGNORE, Group, padded_rows


def released_loss(logits_KLV: Tensor, label_KL: Tensor, reward_K: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss, (K,) scores) of a prompt's K rows. ``label_KL[i, t]`` is what position t predicts, or IGNORE.

    The log-softmax is in float32, as under the autocast of the script's launchers, whatever the model computes in.
    """
    logp_KLV = torch.log_softmax(logits_KLV, dim=-1, dtype=torch.promote_types(logits_KLV.dtype, torch.float32))
    scored_KL = label_KL != IGNORE
    label_KL = label_KL.masked_fill(~scored_KL, 0)  # the marks are gone: every position counts as length from here on
    # The script gathers from a copy, meant to keep the log-probs as they are, which nothing changes.
    logp_KL = logp_KLV.clone().gather(-1, label_KL[..., None]).squeeze(-1) * scored_KL
    score_K = logp_KL.sum(-1) / label_KL.shape[1]
    difference_KK = score_K[None, :] - score_K[:, None]  # [i, j]: score j less score i
    better_KK = reward_K[None, :] > reward_K[:, None]
    rank = -difference_KK[better_KK & (difference_KK < 0)].sum()
    best = logp_KL[reward_K.argmax()].mean()
    return rank - best, score_K


def released(model: Any) -> Callable[[Group], tuple[Tensor, Tensor]]:
    """Return the forward pass of a step: a function from a group to its loss and scores."""

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        ids_KL, attention_KL, label_KL = padded_rows(group, model.device)
        logits_KLV = model(input_ids=ids_KL, attention_mask=attention_KL, use_cache=False).logits
        return released_loss(logits_KLV, label_KL, torch.tensor(group.rewards, device=model.device))

    return forward
