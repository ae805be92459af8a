"""Float32 products by oneDNN: what PyTorch's default computes, in a layer and in a policy."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from baselines.sft import sft_loss
from rrhf_bench.policy import onednn
from rrhf_bench.policy.adapters import add_adapters
from rrhf_bench.settings.methods import LoraSettings
from tests.architectures import PACKED, made
from tests.test_packing import defined, gradient, policy_of, ragged, relative


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_pytorchs(bias: bool) -> None:
    plain, steered = torch.nn.Linear(5, 7, bias=bias), torch.nn.Linear(5, 7, bias=bias)
    steered.load_state_dict(plain.state_dict())
    assert onednn.apply(steered) == onednn.apply(steered) == 1
    x = torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad = torch.randn(3, 30, 7, generator=torch.Generator().manual_seed(1))
    expected, found = plain(x), steered(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(expected, [x, *plain.parameters()], grad)
    gotten = torch.autograd.grad(found, [x, *steered.parameters()], grad)
    for a, b in zip(gotten, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # sums over 90 rows
    assert steered(x[:0]).shape == (0, 30, 7)
    for dtype in (torch.float64, torch.bfloat16):  # which oneDNN does not multiply here
        assert torch.equal(steered.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))


def test_onednn_multiplies_as_the_default_does() -> None:
    batch = ragged(0)
    found = []
    for steered in ("off", "on"):
        model = made(PACKED["llama"])
        policy = policy_of(model, onednn=steered)
        assert policy.onednn_layers == (0 if steered == "off" else 3 * 7 + 1)
        logp_BT = policy.token_logprobs(batch)
        sft_loss(logp_BT, batch.mask_BT).backward()
        found.append((logp_BT.detach(), gradient(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=2e-5)
    assert relative(found[1][1], found[0][1]) < 1e-5
    assert onednn.gain() > 0


@pytest.mark.parametrize(("m", "k", "n"), [(4, 0, 8), (0, 5, 3), (3, 5, 0)])
def test_a_product_of_empty_operands_is_zeros(m: int, k: int, n: int) -> None:
    a_MK, b_KN = torch.ones(m, k), torch.ones(k, n)
    assert torch.equal(onednn.product(a_MK, b_KN), torch.zeros(m, n))
    assert torch.equal(onednn.product(a_MK.t().contiguous().t(), b_KN.t().contiguous().t()), torch.zeros(m, n))


def test_adapters_train_under_onednn() -> None:
    batch = ragged(0)
    found = []
    for steered in ("off", "on"):
        policy = policy_of(made(PACKED["llama"]), onednn=steered)
        policy.adapt(LoraSettings(rank=16), seed=0)
        parameters = list(policy.parameters())
        optimiser = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            sft_loss(policy.token_logprobs(batch), batch.mask_BT).backward()
            optimiser.step()
        found.append([parameter.detach() for parameter in parameters])
    assert policy.onednn_layers > 0
    for steered_parameter, plain_parameter in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(steered_parameter, plain_parameter, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steered", ["off", "on"])
def test_adapters_get_the_gradients_of_the_definition(steered: str) -> None:
    model = made(PACKED["llama"])
    plain = copy.deepcopy(model)
    policy = policy_of(model, onednn=steered)
    policy.adapt(LoraSettings(rank=4), seed=0)
    add_adapters(plain, LoraSettings(rank=4), seed=0)
    rng = torch.Generator().manual_seed(5)
    values = {name: torch.randn(p.shape, generator=rng) for name, p in model.named_parameters()}
    for adapted in (model, plain):
        for name, p in adapted.named_parameters():
            if p.requires_grad:  # their product is zero as they are made
                p.data.copy_(0.1 * values[name])
    batch = ragged(0)
    expected, found = defined(plain, batch), policy.token_logprobs(batch)
    assert relative(found, expected) < 1e-5
    for logp_BT in (expected, found):
        logp_BT.sum().backward()
    assert relative(gradient(model), gradient(plain)) < 4e-5  # adapters are a tenth of the weights


GROWTH = """
import psutil, torch
from rrhf_bench.policy import onednn
torch.set_num_threads(1)
layer = torch.nn.Linear(128, 64)
onednn.apply(layer)
before = psutil.Process().memory_info().rss
with torch.no_grad():
    for rows in range(1, 801):
        layer(torch.ones(rows, 128))
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def test_the_kernels_of_many_shapes_are_not_kept() -> None:
    """In MiB: 54 were found, and 470 with the sizes of the libraries. A process of its own, which reads them once."""
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    said = subprocess.run([sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, check=True)
    assert int(said.stdout) < 100


@pytest.mark.parametrize(
    ("vendor", "family", "capability", "taken"),
    [
        ("AuthenticAMD", 26, "AVX512", True),
        ("AuthenticAMD", 25, "AVX512", False),  # AVX-512 in two halves
        ("AuthenticAMD", 26, "AVX2", False),  # or kept to it by ATEN_CPU_CAPABILITY
        ("GenuineIntel", 26, "AVX512", False),
    ],
)
def test_the_processor_decides_who_multiplies(
    vendor: str, family: int, capability: str, taken: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    said = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\n"
    (tmp_path / "cpuinfo").write_text(f"{said}\n{said}\n")
    assert onednn.worth_it(tmp_path / "cpuinfo") is taken
    assert onednn.worth_it(tmp_path / "nothing") is False
