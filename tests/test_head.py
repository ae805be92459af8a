"""The chunked LM head: log-probs and gradients of the definition, which has all logits in memory."""

from __future__ import annotations

import pytest
import torch

from rrhf_bench.policy import head as head_module
from rrhf_bench.policy import onednn
from rrhf_bench.policy.head import chunk_rows, token_logprobs
from rrhf_bench.policy.logprobs import gather_logprobs


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_head_is_the_definition(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "chunk_rows", lambda vocabulary, device: rows)
    rng = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 11, bias=bias).double()
    hidden = torch.randn(23, 6, dtype=torch.float64, generator=rng, requires_grad=True)
    token = torch.randint(11, (23,), generator=rng)
    weight = torch.randn(23, dtype=torch.float64, generator=rng)
    weight[[0, 3, 6, 7]] = 0.0
    weight[10:15] = 0.0
    expected = gather_logprobs(head(hidden), token, 0.7)
    found = token_logprobs(head, hidden, token, 0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    leaves = [hidden, *head.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for _ in range(2):
        gotten = torch.autograd.grad((found * weight).sum(), leaves, retain_graph=True)
        for a, b in zip(gotten, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    none = torch.autograd.grad((found * 0.0).sum(), leaves)
    assert all((x == 0).all() for x in none)


@pytest.mark.parametrize("frozen", ["head", "states"])
@pytest.mark.parametrize("steered", [False, True])
def test_what_is_frozen_gets_no_gradient(frozen: str, steered: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 11)
    if steered:
        onednn.apply(head)
    hidden = torch.randn(9, 6, generator=rng, requires_grad=frozen == "head")
    head.requires_grad_(frozen == "states")
    token = torch.randint(11, (9,), generator=rng)
    leaves = [hidden] if frozen == "head" else [head.weight, head.bias]
    wanted = torch.autograd.grad(gather_logprobs(head(hidden), token).sum(), leaves)
    token_logprobs(head, hidden, token, 1.0).sum().backward()
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-6)
    assert (head.weight.grad is None) == (frozen == "head")


def test_a_token_too_unlikely_for_a_probability_keeps_its_log_prob() -> None:
    head = torch.nn.Linear(4, 7, bias=False)
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.no_grad():
        head.weight.copy_(torch.randn(7, 4, generator=torch.Generator().manual_seed(2)) * 300)
    token = torch.tensor([0, 1, 2, 3, 4, 5])
    expected, found = gather_logprobs(head(hidden), token), token_logprobs(head, hidden, token, 1.0)
    assert expected.min() < -200  # exp(-200) is 0 in float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    wanted, gotten = (torch.autograd.grad(logp.sum(), hidden)[0] for logp in (expected, found))
    torch.testing.assert_close(gotten, wanted, rtol=1e-5, atol=1e-3)  # of gradients of some 300


@pytest.mark.parametrize("autocast", [False, True])
def test_a_likely_token_keeps_its_gradient_in_half_precision(autocast: bool) -> None:
    """The gradient is p - 1. Where p exceeds 0.99, bfloat16 has steps of 0.004; the usual log-softmax is 1% off."""
    rng = torch.Generator().manual_seed(0)
    token = torch.randint(0, 500, (64,), generator=rng)
    weight = torch.randn(500, 64, generator=rng) / 8
    hidden = torch.randn(64, 64, generator=rng) + 12 * weight[token] / weight[token].norm(dim=-1, keepdim=True)
    dtype = torch.float32 if autocast else torch.bfloat16
    own = hidden.bfloat16().to(dtype).requires_grad_()
    head = torch.nn.Linear(64, 500, bias=False)
    head.weight = torch.nn.Parameter(weight.bfloat16().to(dtype))
    exact = [own.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()]
    logp = gather_logprobs(exact[0] @ exact[1].t(), token)
    likely = logp.exp() > 0.99
    assert likely.sum() > 20
    wanted = torch.autograd.grad(logp.sum(), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp = token_logprobs(head, own, token, 1.0)
    found = torch.autograd.grad(logp.sum(), [own, head.weight])
    assert [x.dtype for x in (logp, *found)] == [torch.float32, dtype, dtype]
    error = (found[0] - wanted[0]).norm(dim=-1) / wanted[0].norm(dim=-1)
    assert error[likely].median() < 0.03
    assert (found[1] - wanted[1]).norm() / wanted[1].norm() < 0.03


def test_chunks_are_bounded_by_bytes() -> None:
    assert [chunk_rows(v, "cpu") for v in (1000, 32_000, 152_000, 10**6)] == [8388, 262, 64, 64]
    assert [chunk_rows(v, "cuda") for v in (32_000, 152_000, 10**7)] == [8388, 1766, 64]
