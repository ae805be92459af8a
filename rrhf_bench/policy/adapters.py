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

    Raises DataError if the model has no layer of a name asked for, and if a layer asked for shares its weight with
    another: an adapter that is merged into it would change both.
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
    layers = _adapted(model)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    if len({end.weight for end in ends}) == 1 and (tied := [name for name, layer in layers.items() if layer in ends]):
        raise DataError(
            f"lora.targets: found {', '.join(tied)}, but {type(model).__name__} has one weight for its head and its "
            "input embeddings, so an adapter cannot be merged into one of them; leave it out"
        )
    for layer in layers.values():
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
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merge(model: Any) -> None:
    """Add the adapters to the weights and take them off, in place."""
    for name, layer in _adapted(model).items():
        layer.base_layer.weight += layer.get_delta_weight("default").to(layer.base_layer.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)


def merged_state(model: Any, device: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over the weights under the names that they have without adapters.

    Each adapted weight is merged when it is reached, so that one merged matrix exists at a time if the caller keeps
    none. Adapters that are off when this function is called stay out, however late the iterator is used. Merged
    matrices are moved to ``device`` if it is given; the other weights are the model's own tensors.
    """
    layers = _adapted(model)
    active = {f"{name}.base_layer.weight": layer for name, layer in layers.items() if not layer.disable_adapters}

    @torch.no_grad()
    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, value in model.state_dict().items():
            if name in active:
                value = value + active[name].get_delta_weight("default").to(value.dtype)
                value = value.contiguous().to(device or value.device)
            if ".lora_" not in name:
                yield name.replace(".base_layer.", ".") if layers else name, value

    return weights()
