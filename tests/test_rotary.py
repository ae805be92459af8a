"""The attention layer as one function: what the model's own computes over a pack, to the bit, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rrhf_bench.policy import attention, linear, rotary
from rrhf_bench.policy.batching import Prefixes
from rrhf_bench.policy.policy import TransformersPolicy
from tests.architectures import PACKED, made
from tests.test_packing import policy_of, ragged, relative

TAKEN = ("llama", "mistral", "qwen2", "gemma")  # qwen3 has norms of queries and keys between, the others other layers


def twins(
    name: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float64, **computation: Any
) -> tuple[TransformersPolicy, ...]:
    """Policies of the same weights: with the model's own attention layers, and with these."""
    models = made(PACKED[name], dtype), made(PACKED[name], dtype)
    for model in models:
        rng = torch.Generator().manual_seed(3)
        for key, weight in model.named_parameters():
            if key.endswith("bias"):  # they are made of zeros, which may be added anywhere
                weight.data.copy_(torch.randn(weight.shape, generator=rng))
    with monkeypatch.context() as patch:
        patch.setattr(rotary, "take_over", lambda model: 0)
        own = policy_of(models[0], **computation)
    return own, policy_of(models[1], **computation)


def layers(policy: TransformersPolicy) -> list[torch.nn.Module]:
    return [module for module in policy.model.modules() if isinstance(module, rotary.RotaryAttention)]


def logprobs_with_gradients(policy: TransformersPolicy, weight_B: Tensor) -> Tensor:
    logp_BT = policy.token_logprobs(ragged(4))
    (logp_BT.sum(-1) * weight_B).sum().backward()
    return logp_BT.detach()


@pytest.mark.parametrize("name", PACKED)
def test_layers_of_this_kind_are_taken_over(name: str) -> None:
    policy = policy_of(made(PACKED[name]))
    assert policy.layout == "packed"
    assert len(layers(policy)) == (policy.model.config.num_hidden_layers if name in TAKEN else 0)
    assert rotary.take_over(policy.model) == 0  # once is enough
    copied = policy.frozen_copy()
    assert copied.layout == "packed", copied.layout_reason
    with torch.no_grad():
        assert torch.equal(copied.token_logprobs(ragged(0)), policy.token_logprobs(ragged(0)))


@pytest.mark.parametrize("silent", [0, 0.5, 0.95])
@pytest.mark.parametrize(
    ("dtype", "onednn", "bound"),  # oneDNN multiplies in float32 only
    [(torch.float64, "off", 1e-6), (torch.float32, "off", 1e-5), (torch.float32, "on", 1e-5)],
)
@pytest.mark.parametrize("name", TAKEN)
def test_a_layer_that_was_taken_over_is_the_layer(
    name: str, dtype: torch.dtype, onednn: str, bound: float, silent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, taken = twins(name, monkeypatch, dtype, onednn=onednn)
    assert not layers(own)
    assert layers(taken)
    rng = torch.Generator().manual_seed(2)
    rows = len(ragged(4).response_ids)
    weight_B = torch.randn(rows, generator=rng).masked_fill(torch.rand(rows, generator=rng) < silent, 0.0)
    for _ in range(2):  # the second time gradients are added to those of the first
        expected, found = (logprobs_with_gradients(policy, weight_B) for policy in (own, taken))
        assert torch.equal(found, expected)
        for (key, a), b in zip(taken.model.named_parameters(), own.parameters(), strict=True):
            # Norms and tables of angles are float32 here too: a sum in another order shows more than in float64.
            assert relative(a.grad, b.grad) < bound if b.grad.any() else not a.grad.any(), key
    with torch.no_grad():
        assert torch.equal(taken.token_logprobs(ragged(4)), found)


@pytest.mark.parametrize("frozen", ["q_proj", "k_proj", "v_proj", "o_proj", "bias", "layers.0"])
def test_frozen_weights_get_nothing_and_take_nothing_from_the_others(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, taken = twins("qwen2", monkeypatch)
    for policy in (own, taken):
        for key, weight in policy.model.named_parameters():
            weight.requires_grad_(frozen not in key and "embed" not in key)
        logprobs_with_gradients(policy, torch.ones(len(ragged(4).response_ids)))
    for (key, a), b in zip(taken.model.named_parameters(), own.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (frozen in key or "embed" in key), key
        if a.grad is not None and b.grad is not None:
            assert relative(a.grad, b.grad) < 1e-6, key


def with_angles(change: Callable[[Any, Any], Any]) -> type[torch.nn.Module]:
    """A class of attention that is Llama's on angles that ``change(layer, angles)`` has been at."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Changed(LlamaAttention):
        def forward(
            self,
            hidden_states: Tensor,
            position_embeddings: Any,
            attention_mask: Any = None,
            past_key_values: Any = None,
            **named: Any,
        ) -> Any:
            angles = change(self, position_embeddings)
            return super().forward(hidden_states, angles, attention_mask, past_key_values, **named)

    return Changed


def test_what_only_looks_alike_is_left_alone() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Unturned(LlamaAttention):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **named: Any) -> Any:
            still = torch.ones(1, *hidden_states.shape[1:2], self.head_dim)
            return super().forward(hidden_states, (still, 0 * still), attention_mask, **named)

    backwards = with_angles(lambda _, angles: (angles[0], -angles[1]))
    particular = with_angles(lambda _, angles: angles.real)  # of a tensor, not of two
    for kind in (backwards, Unturned, particular):
        model = made(PACKED["llama"])
        model.set_attn_implementation(attention.register())
        linear.take_over(model)
        for layer in model.model.layers:
            layer.self_attn.__class__ = kind
        assert rotary.take_over(model) == 0
        assert all(type(layer.self_attn) is kind for layer in model.model.layers)


def test_a_head_that_turns_in_part_is_left_to_the_model() -> None:
    def whole(layer: Any, angles: Any) -> Any:
        cos, sin = angles
        still = layer.head_dim - cos.shape[-1]
        return torch.nn.functional.pad(cos, (0, still), value=1.0), torch.nn.functional.pad(sin, (0, still))

    model = made(PACKED["llama"])
    model.set_attn_implementation(attention.register())
    linear.take_over(model)
    layer = model.model.layers[0].self_attn
    layer.__class__ = with_angles(whole)
    x_1LD = torch.randn(1, 5, layer.q_proj.in_features, generator=torch.Generator().manual_seed(1))
    half_1LE = torch.linspace(-1.0, 2.0, 5 * (layer.head_dim // 2)).view(1, 5, -1)
    pack = {"prefixes": Prefixes(((0, 5),), ())}
    with torch.no_grad():
        expected, _ = layer(x_1LD, (half_1LE.cos(), half_1LE.sin()), None, **pack)
        assert rotary.take_over(model)  # heads that turn whole look the same
        found, _ = layer(x_1LD, (half_1LE.cos(), half_1LE.sin()), None, **pack)
    assert torch.equal(found, expected)
