"""Log-probs of given tokens from hidden states, without the logits of a whole batch ever being in memory.

Letters: N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy import onednn
from rrhf_bench.policy.logprobs import gather_logprobs

# Bytes of softmax that may be kept for the backward pass, a predicting row; what is beyond them is computed again. A
# row of a vocabulary of 32,000 is 125 KiB in float32; the layers of a model of 60M keep 350 KiB a token.
KEPT = 80 << 10


def token_logprobs(head: Any, hidden_ND: Tensor, token_N: Tensor, temperature: float, keep: int) -> Tensor:
    """log softmax(head(hidden) / temperature) at the given tokens: (N,) float32 (float64 of a float64 model).

    The head is a linear layer whose output is the logits. It runs on chunks of rows; ``keep`` bytes of softmax at most
    are kept for the backward pass, where rows without gradient are left out. Equal to ``gather_logprobs(head(hidden),
    ...)``, the definition, which an unknown kind of head is computed with.
    """
    if not isinstance(head, torch.nn.Linear):
        return gather_logprobs(head(hidden_ND), token_N, temperature)
    steered = isinstance(head, onednn.Linear) and hidden_ND.dtype == torch.float32 and not hidden_ND.is_cuda
    product = onednn.product if steered else torch.mm
    parts = (hidden_ND, head.weight, head.bias, token_N, temperature, keep, product)
    return cast(Tensor, _ChunkedLogprobs.apply(*parts))


def chunk_rows(vocabulary: int) -> int:
    """Rows of one chunk: some 32 MB of float32 logits, 64 to 512 rows."""
    return max(64, min(512, (1 << 23) // vocabulary))


def _spans(kept_from: int, rows: int, chunk: int) -> list[tuple[int, int, bool]]:
    """(start, end, kept) of the chunks: none is kept in part."""
    before = [(start, min(start + chunk, kept_from), False) for start in range(0, kept_from, chunk)]
    return before + [(start, min(start + chunk, rows), True) for start in range(kept_from, rows, chunk)]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        temperature: float,
        keep: int,
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        differentiable = any(ctx.needs_input_grad)
        logp, lse, kept = [], [], []
        # The rows that are kept come last: the logits of the others are gone by then.
        rows = keep // (len(weight_VD) * hidden_ND.element_size()) if differentiable else 0
        ctx.spans = _spans(max(0, len(hidden_ND) - rows), len(hidden_ND), chunk_rows(len(weight_VD)))
        for start, end, keeps in ctx.spans:
            logits_CV = _logits(hidden_ND[start:end], weight_VD, bias_V, temperature, product).to(wide)
            taken_C = logits_CV.gather(-1, token_N[start:end, None]).squeeze(-1)
            largest_C1 = logits_CV.amax(-1, keepdim=True)
            # The softmax, where the logits were: these are the largest tensors of a step.
            sum_C1 = logits_CV.sub_(largest_C1).exp_().sum(-1, keepdim=True)
            lse_C = (largest_C1 + sum_C1.log()).squeeze(-1)
            logp.append(taken_C - lse_C)
            lse.append(lse_C)
            # In the model's own precision: what the gradient is multiplied in.
            kept.append(logits_CV.div_(sum_C1).to(hidden_ND.dtype) if keeps else None)
            del logits_CV
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N, torch.cat(lse))
        ctx.temperature, ctx.product, ctx.kept = temperature, product, kept
        return torch.cat(logp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, token_N, lse_N = ctx.saved_tensors
        grad_N = grads[0] / ctx.temperature
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        d_hidden_ND = torch.zeros_like(hidden_ND) if want_hidden else None
        d_weight_VD: Tensor | None = None
        # Gradients that are added up over passes are added in place: the vocabulary's would be here twice.
        total_VD = _gradient_of(weight_VD, ctx.next_functions[1][0]) if want_weight else None
        d_bias_V = torch.zeros_like(bias_V) if want_bias else None
        kept, ctx.kept = ctx.kept, [None] * len(ctx.kept)  # written over below: a second backward computes them again
        for start, end, _ in reversed(ctx.spans):  # what is kept goes before anything is computed again
            d_logits_CV = kept.pop()
            grad_C = grad_N[start:end]
            live_C = grad_C.nonzero().squeeze(-1)  # the loss of RRHF, for one, leaves many responses alone
            if not len(live_C):
                continue
            some = len(live_C) < len(grad_C)
            at = start + live_C if some else slice(start, end)
            grad_C = grad_C[live_C] if some else grad_C
            hidden_CD, token_C = hidden_ND[at], token_N[at]
            if d_logits_CV is None:
                logits_CV = _logits(hidden_CD, weight_VD, bias_V, ctx.temperature, ctx.product)
                d_logits_CV = logits_CV.to(lse_N.dtype).sub_(lse_N[at][:, None]).exp_()
            elif some:
                d_logits_CV = d_logits_CV[live_C]
            grad_C = grad_C.to(d_logits_CV.dtype)  # two precisions in one product are many times slower
            d_logits_CV = d_logits_CV.mul_(-grad_C[:, None]).to(hidden_ND.dtype)
            d_logits_CV[torch.arange(len(grad_C), device=grad_C.device), token_C] += grad_C.to(hidden_ND.dtype)
            if d_hidden_ND is not None:
                d_hidden_ND[at] = ctx.product(d_logits_CV, weight_VD)
            if total_VD is None and want_weight:
                total_VD = d_weight_VD = ctx.product(d_logits_CV.t(), hidden_CD)
            elif total_VD is not None and ctx.product is torch.mm:
                total_VD.addmm_(d_logits_CV.t(), hidden_CD)
            elif total_VD is not None:
                total_VD += ctx.product(d_logits_CV.t(), hidden_CD)
            if d_bias_V is not None:
                d_bias_V += d_logits_CV.sum(0)
        if want_weight and total_VD is None:
            d_weight_VD = torch.zeros_like(weight_VD)
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None, None, None


def _gradient_of(weight_VD: Any, node: Any) -> Tensor | None:
    """The gradient that a parameter has already, if this backward pass is to add to it and no hook waits for what it
    adds; ``node`` is the one behind the parameter."""
    if not weight_VD.is_leaf or weight_VD.grad is None:
        return None
    if weight_VD._backward_hooks or weight_VD._post_accumulate_grad_hooks:
        return None
    try:
        return weight_VD.grad if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # its answer in torch.autograd.grad, which adds to nothing
        return None


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, product: Callable[..., Tensor]
) -> Tensor:
    logits_CV = product(hidden_CD, weight_VD.t())
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV if temperature == 1.0 else logits_CV / temperature
