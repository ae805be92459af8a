"""What a careful trainer on padded rows does, as TRL's do: the head on labelled positions only, their log-probs as the
label's logit less the log-sum-exp. Prompts are still repeated and rows still padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import IGNORE, Group, padded_rows
from rrhf_bench.training.rrhf import rrhf_loss


def labelled_logprobs(hidden_KLD: Tensor, label_KL: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """(K, L) log-probs of the labels in float32 or better, 0 where a position is not scored."""
    scored_KL = label_KL != IGNORE
    logits_NV = head(hidden_KLD[scored_KL])
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logp_N = logits_NV.gather(-1, label_KL[scored_KL][:, None]).squeeze(-1) - logits_NV.logsumexp(-1)
    return logp_N.new_zeros(label_KL.shape).masked_scatter(scored_KL, logp_N)


def labelled(model: Any) -> Callable[[Group], tuple[Tensor, Tensor]]:
    """The forward pass of a step: (loss, scores) of a group."""

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        ids_KL, attention_KL, label_KL = padded_rows(group, model.device)
        hidden_KLD = model.base_model(input_ids=ids_KL, attention_mask=attention_KL, use_cache=False).last_hidden_state
        logp_KL = labelled_logprobs(hidden_KLD, label_KL, model.get_output_embeddings())
        losses = rrhf_loss(
            logp_KL[None],
            (label_KL != IGNORE)[None],
            torch.tensor([group.rewards], device=model.device),
            variant="official",
            padded_length_B=torch.tensor([group.padded_length], device=model.device),
        )
        return losses.total, losses.score_BG[0]

    return forward
