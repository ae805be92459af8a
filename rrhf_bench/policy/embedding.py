"""Token embeddings whose gradient is added where it belongs: a batch has few rows of a table of the whole vocabulary.

Letters: L tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rrhf_bench.policy.gradients import gradient_to_add_to


def embed(table: torch.nn.Embedding, id_L: Tensor) -> Tensor:
    """(L, D) = table(id_L)."""
    return cast(Tensor, _Embedding.apply(table.weight, id_L, -1 if table.padding_idx is None else table.padding_idx))


def is_plain(table: Any) -> bool:
    """Whether ``embed`` is all that this module does."""
    if type(table) is not torch.nn.Embedding:
        return False
    return table.max_norm is None and not (table.scale_grad_by_freq or table.sparse)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, id_L: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(weight_VD, id_L)
        ctx.padding = padding
        return weight_VD[id_L]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_VD, id_L = ctx.saved_tensors
        # Sums in the order of the tokens; a GPU's would be in any.
        total_VD = None if weight_VD.is_cuda else gradient_to_add_to(weight_VD, ctx.next_functions[0][0])
        if total_VD is None:
            made = torch.ops.aten.embedding_dense_backward(grads[0], id_L, len(weight_VD), ctx.padding, False)
            return made, None, None
        real_L = id_L != ctx.padding
        total_VD.index_add_(0, id_L[real_L], grads[0][real_L])
        return None, None, None
