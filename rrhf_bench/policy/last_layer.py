"""The last layer over a pack on a CPU. Nobody looks at a prompt behind it but at the position that predicts the first
token of the responses: of the others it computes keys and values only.

Letters: L tokens of a pack, M positions that predict a token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rrhf_bench.policy.activations import ROUNDING, before
from rrhf_bench.policy.batching import Prefixes

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}

# How far states may be apart, of the largest, whatever the dtype: norms round to float32, and a product follows them.
BOUND = 1e-5


class Asked(NamedTuple):
    """What the last layer is asked for."""

    position_M: Tensor
    prefixes: Prefixes


class LastLayer(torch.nn.Module):
    """Put before a model's own class of layer, which does what is not a pass over a pack."""

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, *others: Any, asked: Asked | None = None, **named: Any) -> Any:
        if asked is None:
            return super().forward(hidden_states, *others, **named)
        named["prefixes"] = asked.prefixes
        attended_1LD, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        x_1MD, attended_1MD = (x_1LD.index_select(1, asked.position_M) for x_1LD in (hidden_states, attended_1LD))
        x_1MD = x_1MD + attended_1MD
        return x_1MD + self.mlp(self.post_attention_layernorm(x_1MD))


def find(model: Any) -> torch.nn.Module | None:
    """A model's last layer, if it has the parts of one of Llama's."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    layers = [module for module in model.modules() if {name for name, _ in module.named_children()} == PARTS]
    return layers[-1] if len(layers) == count else None


def take_over(layer: torch.nn.Module | None, states: Callable[[], Tensor]) -> bool:
    """Put this before the class of a layer, in place, where it leaves ``states()`` as they are; whether it did."""
    if layer is None or isinstance(layer, LastLayer):
        return False
    kind = type(layer)
    with torch.no_grad():
        expected = states()
        layer.__class__ = before(LastLayer, cast(Any, kind))
        try:
            found = states()
            bound = max(BOUND, ROUNDING[found.dtype])
            same = bool((found - expected).abs().max() <= bound * expected.abs().max())
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):  # it is called otherwise
            same = False
    if not same:
        layer.__class__ = kind
    return same
