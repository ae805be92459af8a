"""The last layer of a pack: what the model's own gives, for the positions that predict a token, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rrhf_bench.policy import last_layer
from rrhf_bench.policy.batching import ResponseBatch, pack
from rrhf_bench.policy.policy import TransformersPolicy
from tests.architectures import PACKED, made
from tests.test_packing import defined, policy_of, ragged, relative

TAKEN = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # the layers of the others have other parts


def taken_over(policy: TransformersPolicy) -> list[bool]:
    """Of each layer whether it is one of these."""
    return [isinstance(layer, last_layer.LastLayer) for layer in policy.model.model.layers]


@pytest.mark.parametrize("name", PACKED)
def test_the_last_layer_and_no_other_is_taken_over(name: str) -> None:
    policy = policy_of(made(PACKED[name]))
    assert policy.layout == "packed"
    found = [module for module in policy.model.modules() if isinstance(module, last_layer.LastLayer)]
    if name not in TAKEN:
        assert not found
        return
    assert taken_over(policy) == [False, False, True]
    copied = policy.frozen_copy()
    assert taken_over(copied) == [False, False, True]
    with torch.no_grad():
        assert torch.equal(copied.token_logprobs(ragged(0)), policy.token_logprobs(ragged(0)))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("dtype", "onednn", "bound"),  # oneDNN multiplies in float32 only
    [(torch.float64, "off", 1e-6), (torch.float32, "on", 1e-5)],
)
@pytest.mark.parametrize("name", TAKEN)
def test_it_gives_what_the_layer_gives(
    name: str, dtype: torch.dtype, onednn: str, bound: float, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = made(PACKED[name], dtype), made(PACKED[name], dtype)
    with monkeypatch.context() as patch:
        patch.setattr(last_layer, "take_over", lambda layer, states: False)
        own = policy_of(models[0], checkpoint_activations=checkpoint, onednn=onednn)
    taken = policy_of(models[1], checkpoint_activations=checkpoint, onednn=onednn)
    assert not any(taken_over(own))
    assert any(taken_over(taken))
    batch = ragged(4)
    rng = torch.Generator().manual_seed(2)
    for share in (0.0, 0.7):  # of the responses, without a gradient
        rows = len(batch.response_ids)
        weight_B = torch.randn(rows, generator=rng).masked_fill(torch.rand(rows, generator=rng) < share, 0.0)
        states = []
        for policy in (own, taken):
            found = policy.response_states(batch)
            (found.logp_BT.sum(-1) * weight_B + found.hidden_BTD.sum((1, 2)) * weight_B).sum().backward()
            states.append(found)
        # Norms are float32 here too, and what goes into them may differ in float64's last digit.
        assert relative(states[1].logp_BT, states[0].logp_BT) < bound
        assert relative(states[1].hidden_BTD, states[0].hidden_BTD) < bound
        for (key, a), b in zip(taken.model.named_parameters(), own.parameters(), strict=True):
            assert relative(a.grad, b.grad) < bound, key
    with torch.no_grad():
        assert torch.equal(taken.token_logprobs(batch), states[1].logp_BT)


def test_a_prompt_that_several_share_goes_no_further_than_its_keys_and_values() -> None:
    policy = policy_of(made(PACKED["llama"]))
    fed: list[int] = []
    for layer in policy.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    batch = ResponseBatch((tuple(range(40)),), ((1, 2, 3), (4,), (5, 6)), (0, 0, 0))
    with torch.no_grad():
        policy.token_logprobs(batch)
    # 40 of the prompt, 2 and 1 of the responses; then the prompt's last and those 3.
    assert fed == [43, 43, 4]


def test_a_layer_of_another_formula_is_left_alone() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

    class Parallel(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
            seen = self.input_layernorm(hidden_states)
            attended, _ = self.self_attn(hidden_states=seen, **named)
            return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))

    class Weighed(LlamaAttention):
        def forward(self, hidden_states: Tensor, *, share: float, **named: Any) -> Any:
            attended, weights = super().forward(hidden_states, **named)
            return share * attended, weights

    class Weighing(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
            return super().forward(hidden_states, share=0.5, **named)

    for kind in (Parallel, Weighing):
        model = made(PACKED["llama"], torch.float64)
        layer = model.model.layers[-1]
        layer.__class__ = kind
        if kind is Weighing:
            layer.self_attn.__class__ = Weighed
        with torch.no_grad():
            expected = defined(model, ragged(1))
            policy = policy_of(model)
            assert policy.layout == "packed"
            assert type(layer) is kind
            assert relative(policy.token_logprobs(ragged(1)), expected) < 1e-12


def test_layers_that_are_not_all_alike_are_left_alone() -> None:
    model = made(PACKED["llama"])
    model.model.layers[0].add_module("more", torch.nn.Identity())
    assert last_layer.find(model) is None
    model = made(PACKED["llama"])
    del model.config.num_hidden_layers
    assert last_layer.find(model) is None
    model = made(PACKED["llama"])
    model.model.layers.append(made(PACKED["llama"]).model.layers[0])  # the model runs the first three only
    assert last_layer.find(model) is None


def test_one_response_keeps_one_call() -> None:
    (part,) = pack(ResponseBatch((tuple(range(40)),), ((1, 2, 3),), (0,)), 100)
    assert part.last == part.prefixes
    assert part.last.whole
