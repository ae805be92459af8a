"""Linear layers and embeddings of a policy on a CPU: what PyTorch's own give, with what nobody asks for left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rrhf_bench.policy import embedding, linear, onednn
from rrhf_bench.policy.head import Rooms, token_logprobs
from rrhf_bench.policy.policy import Computation, TransformersPolicy
from tests.architectures import PACKED, made, tokenization
from tests.test_packing import defined, gradient, ragged, relative

EXACT = {"rtol": 0.0, "atol": 1e-12}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twins(bias: bool, product: Any = torch.mm) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """A layer of PyTorch's and one that was taken over, with the same weights, in float64."""
    plain = torch.nn.Linear(5, 7, bias=bias).double()
    taken = torch.nn.Linear(5, 7, bias=bias).double()
    taken.load_state_dict(plain.state_dict())
    assert linear.take_over(taken, product) == 1
    return plain, taken


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silent", [0, 10, 60, 90])  # of 90 rows: none, too few to leave out, most, all
def test_a_layer_is_pytorchs_whatever_rows_have_no_gradient(silent: int, bias: bool) -> None:
    plain, taken = twins(bias)
    x = torch.randn(3, 30, 5, dtype=torch.float64, generator=rng(), requires_grad=True)
    grad = torch.randn(3, 30, 7, dtype=torch.float64, generator=rng(1))
    grad.view(90, 7)[torch.randperm(90, generator=rng(2))[:silent]] = 0.0
    expected, found = plain(x), taken(x)
    assert torch.equal(found, expected)
    wanted = torch.autograd.grad(expected, [x, *plain.parameters()], grad)
    gotten = torch.autograd.grad(found, [x, *taken.parameters()], grad)
    for a, b in zip(gotten, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_rows_are_left_out_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = torch.zeros(100, 3)
    grad[20:70, 1] = -1e-30  # small is not zero
    found = linear.with_gradient(grad)
    assert found is not None
    assert found.tolist() == list(range(20, 70))
    grad[:50] = 1.0
    assert len(linear.with_gradient(grad)) == 70  # type: ignore[arg-type]
    grad[:90] = 1.0
    assert linear.with_gradient(grad) is None  # most of them
    assert linear.with_gradient(torch.zeros(8, 3)) is None  # not worth a look


def test_frozen_weights_get_no_gradient_and_no_work() -> None:
    _, taken = twins(bias=False)
    taken.weight.requires_grad_(False)
    x = torch.randn(70, 5, dtype=torch.float64, generator=rng(), requires_grad=True)
    taken(x)[:40].sum().backward()
    assert taken.weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:40], taken.weight.sum(0).expand(40, -1), **EXACT)
    assert (x.grad[40:] == 0).all()


def test_a_gradient_that_is_there_is_added_to() -> None:
    plain, taken = twins(bias=True)
    x = torch.randn(70, 5, dtype=torch.float64, generator=rng())
    for layer in (plain, taken):
        layer(x).square().sum().backward()
    assert taken.weight.grad is not None
    first = taken.weight.grad
    for layer in (plain, taken):
        layer(2 * x).square().sum().backward()
    assert taken.weight.grad is first
    torch.testing.assert_close(first, plain.weight.grad, **EXACT)
    torch.testing.assert_close(taken.bias.grad, plain.bias.grad, **EXACT)


def test_another_product_is_used_in_float32_alone() -> None:
    used: list[torch.dtype] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        used.append(a.dtype)
        return onednn.product(a, b)

    plain, taken = twins(bias=True, product=counted)
    x = torch.randn(70, 5, generator=rng())
    assert torch.equal(taken(x.double()), plain(x.double()))
    assert not used
    torch.testing.assert_close(taken.float()(x), plain.float()(x), rtol=0, atol=1e-6)
    taken(x).sum().backward()
    assert used == [torch.float32] * 3  # twice forward, once for the weight's gradient: x needs none


@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_is_pytorchs(padding: int | None) -> None:
    table = torch.nn.Embedding(9, 4, padding_idx=padding).double()
    ids = torch.tensor([3, 2, 3, 8, 0, 2])
    weight = torch.randn(6, 4, dtype=torch.float64, generator=rng())
    assert embedding.is_plain(table)
    assert torch.equal(embedding.embed(table, ids), table(ids))
    (wanted,) = torch.autograd.grad((table(ids) * weight).sum(), table.weight)
    (embedding.embed(table, ids) * weight).sum().backward()
    assert table.weight.grad is not None
    first = table.weight.grad
    torch.testing.assert_close(first, wanted, **EXACT)
    (embedding.embed(table, ids) * weight).sum().backward()
    assert table.weight.grad is first
    torch.testing.assert_close(first, 2 * wanted, **EXACT)


def test_a_table_that_does_more_is_left_to_itself() -> None:
    class Scaled(torch.nn.Embedding):
        pass

    assert not embedding.is_plain(Scaled(3, 2))
    assert not embedding.is_plain(torch.nn.Embedding(3, 2, max_norm=1.0))
    assert not embedding.is_plain(torch.nn.Embedding(3, 2, sparse=True))


@pytest.mark.parametrize(
    ("dtype", "steered", "bound"),  # oneDNN multiplies in float32 only
    [(torch.float64, "off", 1e-6), (torch.float32, "on", 1e-5)],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_policys_gradient_is_right_where_the_loss_leaves_responses_alone(
    name: str, dtype: torch.dtype, steered: Any, bound: float
) -> None:
    batch = ragged(0)
    assert len(batch.lengths) > 6
    asked = torch.tensor([row % 3 == 0 for row in range(len(batch.lengths))])[:, None]
    model = made(PACKED[name], dtype)
    model.set_attn_implementation("sdpa")
    for _ in range(2):
        (defined(model, batch) * asked).sum().backward()
    expected = gradient(model)
    policy = TransformersPolicy(model, tokenization(), Computation(onednn=steered))
    for _ in range(2):  # the second adds to what is there
        (policy.token_logprobs(batch) * asked).sum().backward()
    assert relative(gradient(model), expected) < bound


def test_a_room_is_lent_to_one_pass_at_a_time() -> None:
    rooms, like = Rooms(), torch.zeros(1)
    first = rooms.take(10, like)
    second = rooms.take(10, like)
    assert first.data_ptr() != second.data_ptr()
    rooms.give_back(first)
    assert rooms.take(8, like) is first
    rooms.give_back(second)
    rooms.give_back(first[:4])  # smaller: not the one that waits
    assert rooms.take(11, like).data_ptr() != second.data_ptr()
    rooms.give_back(second)
    assert rooms.take(10, like.double()).dtype == torch.float64
    rooms.give_back(second)
    rooms.clear()
    assert rooms.take(10, like) is not second


def test_two_passes_before_the_first_backward_keep_apart() -> None:
    head = torch.nn.Linear(6, 11).double()
    hidden = [torch.randn(n, 6, dtype=torch.float64, generator=rng(n), requires_grad=True) for n in (9, 13)]
    token = [torch.randint(11, (n,), generator=rng(n)) for n in (9, 13)]
    found = [token_logprobs(head, h, t, 1.0, 1 << 30) for h, t in zip(hidden, token, strict=True)]
    for h, t, logp in zip(hidden, token, found, strict=True):
        (wanted,) = torch.autograd.grad(head(h).log_softmax(-1).gather(-1, t[:, None]).sum(), h)
        (gotten,) = torch.autograd.grad(logp.sum(), h)
        torch.testing.assert_close(gotten, wanted, **EXACT)
