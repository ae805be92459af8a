"""Norms and gated layers that keep less: transformers' own, output and gradients, and only where they are that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rrhf_bench.policy import activations, linear, onednn
from rrhf_bench.policy.adapters import add_adapters
from rrhf_bench.settings.methods import LoraSettings
from tests.architectures import PACKED, made
from tests.test_packing import defined, gradient, policy_of, ragged, relative

TAKEN = {"llama": 3 + 7, "mistral": 3 + 7, "qwen2": 3 + 7, "qwen3": 3 + 7 + 6}  # gated layers, norms


def twins(name: str, dtype: torch.dtype = torch.float64, product: Any = torch.mm) -> tuple[Any, Any]:
    """A model as it comes, and one that was taken over, with the same weights."""
    plain, taken = made(PACKED[name], dtype), made(PACKED[name], dtype)
    for model in (plain, taken):
        rng = torch.Generator().manual_seed(3)
        for key, weight in model.named_parameters():
            if "norm" in key:  # they are made of ones, which many a wrong formula leaves alone
                weight.data.copy_(torch.rand(weight.shape, generator=rng) + 0.5)
    linear.take_over(taken, product)
    assert activations.take_over(taken) == TAKEN.get(name, 0)
    return plain, taken


def states(model: Any, silent: int) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states of two rows, and gradients of all weights where the first ``silent`` positions have none."""
    ids = torch.arange(2 * 60).view(2, 60) % 97
    states_BLD = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    grad = torch.randn(states_BLD.shape, generator=torch.Generator().manual_seed(1)).to(states_BLD.dtype)
    grad[:, :silent] = 0.0
    states_BLD.backward(grad)
    return states_BLD.detach(), [p.grad for p in model.base_model.parameters()]


@pytest.mark.parametrize("silent", [0, 45, 60])
@pytest.mark.parametrize("name", TAKEN)
def test_a_model_that_was_taken_over_is_the_model(name: str, silent: int) -> None:
    plain, taken = twins(name)
    # The norm divides in float32 in either: forward with the same roundings, backward with others.
    for _ in range(2):  # the second time gradients are added to those of the first
        expected, wanted = states(plain, silent)
        found, gotten = states(taken, silent)
        # Equal to the bit where this was written; room for a BLAS that adds up otherwise, in float64 states of size 1.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for a, b in zip(gotten, wanted, strict=True):
            assert relative(a, b) < 1e-6 if b.any() else not a.any()


@pytest.mark.parametrize("product", [torch.mm, onednn.product])
def test_in_float32_too_by_either_product(product: Any) -> None:
    plain, taken = twins("llama", torch.float32, product)
    (expected, wanted), (found, gotten) = states(plain, 45), states(taken, 45)
    assert relative(found, expected) < 2e-6
    assert all(relative(a, b) < 1e-5 for a, b in zip(gotten, wanted, strict=True))


def test_half_precision_is_no_further_from_the_truth_than_it_was() -> None:
    truth, _ = twins("qwen3", torch.float32)
    plain, taken = twins("qwen3", torch.bfloat16)
    for model in (plain, taken):
        truth.load_state_dict(model.state_dict())
    expected, wanted = states(truth, 0)
    error = {}
    for name, model in (("plain", plain), ("taken", taken)):
        found, gotten = states(model, 0)
        each = [relative(a.float(), b) for a, b in zip(gotten, wanted, strict=True)]
        error[name] = relative(found.float(), expected), sum(each) / len(each)
    assert error["taken"][0] == error["plain"][0]
    assert error["taken"][1] < 1.1 * error["plain"][1]  # 0.023 of a gradient's norm in both: roundings fall otherwise


def test_what_only_looks_alike_is_left_alone() -> None:
    class OffsetRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (1.0 + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    class GatedRMSNorm(OffsetRMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    class Swapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12)
            self.down_proj, self.act_fn = torch.nn.Linear(12, 8), torch.nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    model = torch.nn.ModuleList([OffsetRMSNorm(), GatedRMSNorm(), Swapped()])
    was = [type(module) for module in model]
    assert activations.take_over(model) == 0
    assert [type(module) for module in model] == was
    assert activations.take_over(made(PACKED["gemma"])) == 0


@pytest.mark.parametrize(
    # oneDNN multiplies in float32 only. The adapters here are a tenth of the weights; their gradients showed 1e-5.
    ("dtype", "steered", "exact", "rounded"),
    [(torch.float64, "off", 1e-12, 1e-6), (torch.float32, "off", 1e-5, 4e-5), (torch.float32, "on", 1e-5, 4e-5)],
)
def test_adapters_train_through_layers_that_were_taken_over(
    dtype: torch.dtype, steered: str, exact: float, rounded: float
) -> None:
    model = made(PACKED["llama"], dtype)
    plain = copy.deepcopy(model)
    policy = policy_of(model, onednn=steered)
    policy.adapt(LoraSettings(rank=4), seed=0)
    add_adapters(plain, LoraSettings(rank=4), seed=0)
    rng = torch.Generator().manual_seed(5)
    values = {name: torch.randn(p.shape, generator=rng).double() for name, p in model.named_parameters()}
    for adapted in (model, plain):
        for name, p in adapted.named_parameters():
            if p.requires_grad:  # their product is zero as they are made
                p.data.copy_(0.1 * values[name])
    batch = ragged(0)
    expected, found = defined(plain, batch), policy.token_logprobs(batch)
    assert relative(found, expected) < exact
    for logp_BT in (expected, found):
        logp_BT.sum().backward()
    assert relative(gradient(model), gradient(plain)) < rounded
