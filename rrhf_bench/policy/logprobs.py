"""Log-probabilities of responses, their length norms, and KL estimators: each formula once.

Letters: B responses (or prompts), G candidates of a prompt, T response tokens, V vocabulary. Masks are bool, True at
real response tokens. All log-probabilities are natural logarithms in float32 (float64 for a float64 model), whatever
less the model computes in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LengthNorm = Literal["response", "none", "padded"]


def gather_logprobs(logits_NV: Tensor, token_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at the given tokens, in float32 or better: (N,).

    ``logits_NV[i]`` is the prediction *of* ``token_N[i]`` (the shift has been done). The temperature belongs here, not
    in the sampler only: a ratio of probabilities at two temperatures is no importance weight (2403.17031, detail 7).
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    return logits_NV.gather(-1, token_N[:, None]).squeeze(-1) - logits_NV.logsumexp(-1)


def outside_top_p(logits_NV: Tensor, top_p: float) -> Tensor:
    """Return (N, V), True at tokens outside the smallest set of likeliest tokens that has probability ``top_p``."""
    sorted_NV, order_NV = logits_NV.sort(descending=True)
    before_NV = sorted_NV.softmax(-1).cumsum(-1) - sorted_NV.softmax(-1)
    return torch.zeros_like(logits_NV, dtype=torch.bool).scatter(1, order_NV, before_NV >= top_p)


def sequence_score(logp_BT: Tensor, mask_BT: Tensor, *, length_norm: LengthNorm = "response") -> Tensor:
    """Return one score for each response from its token log-probs: (B,).

    ``"response"``: the mean over response tokens, p_i of RRHF (2304.05302 Eq. 1); ``"none"``: the sum, log pi(y | x);
    ``"padded"``: the sum over the width T of the batch, which depends on what else is in the batch.
    Raises ValueError for a response without tokens where a mean over its own tokens is asked for.
    """
    sum_B = logp_BT.masked_fill(~mask_BT, 0.0).sum(-1)
    if length_norm == "none":
        return sum_B
    if length_norm == "padded":
        return sum_B / mask_BT.shape[-1]
    if length_norm != "response":
        raise ValueError(f"length_norm: found {length_norm!r}; expected 'response', 'none' or 'padded'")
    length_B = mask_BT.sum(-1)
    if (length_B == 0).any():
        raise ValueError("a response has no tokens, so no mean log-prob; drop empty responses before scoring them")
    return sum_B / length_B


def masked_mean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the True positions of the mask, all rows pooled: a scalar."""
    return value_BT.masked_fill(~mask_BT, 0.0).sum() / mask_BT.sum()


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token log-ratio on the policy's own samples: unbiased for KL(policy || reference), may be negative."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token half squared log-ratio: biased for that KL, but its gradient on own samples is the KL's."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token exp(-d) - 1 + d with d = logp - ref_logp: unbiased for the same KL, never negative, less variance."""
    difference = ref_logp - logp
    return torch.expm1(difference) - difference
