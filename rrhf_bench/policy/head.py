"""Log-probs of given tokens from hidden states; the logits of a whole batch are never in memory.

Letters: N predicted tokens, C of them in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy import onednn
from rrhf_bench.policy.logprobs import gather_logprobs

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of the logits of one chunk, in float32
MIN_CHUNK_ROWS = 64  # fewer rows would make each product with the head slow


def token_logprobs(head: Any, hidden_ND: Tensor, token_N: Tensor, temperature: float) -> Tensor:
    """Return log softmax(head(hidden) / temperature) at the given tokens: (N,) float32 (float64 of a float64 model).

    The head is a linear layer whose output is the logits. It is applied to one chunk of rows at a time. Of each row
    only the log-sum-exp is kept: the backward pass computes the softmax again, for the rows that have a gradient.
    Equal to ``gather_logprobs(head(hidden), ...)``, the definition, which computes every other kind of head.
    """
    if not isinstance(head, torch.nn.Linear):
        return gather_logprobs(head(hidden_ND), token_N, temperature)
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    multiply = onednn.product_of(head, hidden_ND)
    rows = chunk_rows(len(head.weight), device)
    parts = (hidden_ND, head.weight, head.bias, token_N, temperature, multiply, dtype, rows)
    return cast(Tensor, _ChunkedLogprobs.apply(*parts))


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return the rows of a chunk: as many as CHUNK_BYTES of logits hold, but at least MIN_CHUNK_ROWS."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES[device] // (4 * vocabulary))


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        temperature: float,
        multiply: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        ctx.temperature, ctx.multiply, ctx.dtype, ctx.rows = temperature, multiply, dtype, rows
        weight = weight_VD.to(dtype)
        logp, lse = [], []
        for hidden_CD, token_C in zip(hidden_ND.split(rows), token_N.split(rows), strict=True):
            logits_CV = _logits(ctx, hidden_CD.to(dtype), weight, bias_V)
            lse.append(logits_CV.logsumexp(-1))
            logp.append(logits_CV.gather(-1, token_C[:, None]).squeeze(-1) - lse[-1])
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N, torch.cat(lse))
        return torch.cat(logp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, token_N, lse_N = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        d_hidden_ND = torch.zeros_like(hidden_ND) if want_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD) if want_weight else None
        d_bias_V = torch.zeros_like(bias_V) if want_bias else None
        weight = weight_VD.to(ctx.dtype)
        # The gradient of the logits is factor x (p - 1 at the token). The factor goes to the small side of a product.
        factor_N1 = (-grads[0] / ctx.temperature)[:, None]
        for row_C in grads[0].nonzero().squeeze(-1).split(ctx.rows):
            hidden_CD, factor_C1 = hidden_ND[row_C].to(ctx.dtype), factor_N1[row_C].to(ctx.dtype)
            p_CV = _logits(ctx, hidden_CD, weight, bias_V).sub_(lse_N[row_C, None]).exp_()
            # p - 1 in float32, then rounded: half precision has no number between 0.996 and 1.
            p_CV.scatter_add_(-1, token_N[row_C, None], p_CV.new_full((len(row_C), 1), -1.0))
            p_CV = p_CV.to(ctx.dtype)
            if d_hidden_ND is not None:
                d_hidden_ND[row_C] = ctx.multiply(p_CV, weight).mul_(factor_C1).to(d_hidden_ND.dtype)
            if d_weight_VD is not None and ctx.multiply is torch.mm and d_weight_VD.dtype == ctx.dtype:
                d_weight_VD.addmm_(p_CV.t(), hidden_CD * factor_C1)
            elif d_weight_VD is not None:
                d_weight_VD += ctx.multiply(p_CV.t(), hidden_CD * factor_C1)
            if d_bias_V is not None:
                d_bias_V += torch.mv(p_CV.t(), factor_C1.squeeze(-1))
        return d_hidden_ND, d_weight_VD, d_bias_V, *(None,) * 5


def _logits(ctx: Any, hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return the (C, V) logits divided by the temperature, in float32 or better."""
    logits_CV = ctx.multiply(hidden_CD, weight_VD.t())
    if bias_V is not None:
        logits_CV.add_(bias_V)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV if ctx.temperature == 1.0 else logits_CV.div_(ctx.temperature)
