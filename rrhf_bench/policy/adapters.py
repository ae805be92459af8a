"""Low-rank adapters (LoRA, 2106.09685) on a transformers model, by peft, put into the model itself.

The model stays what it was to everybody else: its adapters are off for a reference, and added to the weights where
these are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rrhf_bench.errors import DataError
from rrhf_bench.settings.methods import LoraSettings


def add_adapters(model: Any, lora: LoraSettings, seed: int) -> None:
    """Give the model's linear layers adapters, drawn from ``seed``; in place, and only they train then.

    Raises DataError where the model has no layer of a name asked for.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise DataError(f"lora.targets: {str(error).strip().partition(chr(10))[0]}") from error
    for layer in _adapted(model).values():
        # Low-rank steps are small: in float32, whatever precision the layer below them is in.
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()


def _adapted(model: Any) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """In here the model is what it was before it was adapted."""
    layers = _adapted(model).values()
    was = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, was, strict=True):
            layer._disable_adapters = off


@torch.no_grad()
def merge(model: Any) -> None:
    """Add the adapters to the weights and take them off, in place."""
    for name, layer in _adapted(model).items():
        layer.base_layer.weight += layer.get_delta_weight("default").to(layer.base_layer.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)


def merged_state(model: Any, *, device: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over the weights under the names that they have without adapters.

    Each adapted weight is merged when it is reached, so that one merged matrix exists at a time if the caller keeps
    none. Adapters that are off when this function is called stay out, however late the iterator is used. Merged
    matrices are moved to ``device`` if it is given; the other weights are the model's own tensors.
    """
    layers = _adapted(model)
    active = {f"{name}.base_layer.weight": layer for name, layer in layers.items() if not layer.disable_adapters}
    weights = [(name, value) for name, value in model.state_dict().items() if ".lora_" not in name]
    return (
        (name.replace(".base_layer.", ".") if layers else name, _merged(value, active.get(name), device))
        for name, value in weights
    )


@torch.no_grad()
def _merged(value: Tensor, layer: Any | None, device: str | None) -> Tensor:
    """Return a weight with the adapter of its layer added; if there is no layer, the weight itself."""
    if layer is None:
        return value
    return (value + layer.get_delta_weight("default").to(value.dtype)).contiguous().to(device or value.device)
