"""Gradients of large weights are added in place: the vocabulary's would otherwise be in memory twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gradient_to_add_to(weight: Any, node: Any) -> Tensor | None:
    """The gradient that a parameter has already, if this backward pass is to add to it and no hook waits for what it
    adds; ``node`` is the one behind the parameter."""
    if not weight.is_leaf or weight.grad is None:
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    try:
        return weight.grad if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # its answer in torch.autograd.grad, which adds to nothing
        return None
