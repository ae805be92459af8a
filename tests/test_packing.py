"""Prompts fed once: equal to every response fed by itself, per architecture and budget; and what is built on it."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines.sft import sft_loss
from rrhf_bench.errors import DataError
from rrhf_bench.policy import attention, onednn
from rrhf_bench.policy import policy as policy_module
from rrhf_bench.policy.batching import ResponseBatch, pack, within
from rrhf_bench.policy.head import chunk_rows, token_logprobs
from rrhf_bench.policy.logprobs import gather_logprobs, sequence_score
from rrhf_bench.policy.policy import Computation, TransformersPolicy
from rrhf_bench.settings.methods import LoraSettings, OptimiserSettings
from rrhf_bench.training.optimiser import AdamW
from rrhf_bench.training.rrhf import rrhf_loss
from tests.architectures import PACKED, PADDED, VOCABULARY, made, tokenization

TOKENIZATION = tokenization()


def policy_of(model: Any, **computation: Any) -> TransformersPolicy:
    return TransformersPolicy(model, TOKENIZATION, Computation(**{"onednn": "off", **computation}))


def ragged(seed: int) -> ResponseBatch:
    """Five prompts of 1 to 40 tokens with 1 to 7 responses of 1 to 60, one-token ones and a repeated one among them."""
    rng = np.random.default_rng(seed)

    def ids(lengths: list[int]) -> tuple[int, ...]:
        return tuple(rng.integers(VOCABULARY, size=rng.choice(lengths)).tolist())

    prompts = tuple(ids([1, 2, 7, 40]) for _ in range(5))
    rows = [(p, ids([1, 1, 2, 5, 33, 60])) for p in range(5) for _ in range(rng.choice([1, 2, 6]))]
    rows += [(0, ids([1])), (0, ids([1])), (3, ids([7])), rows[0]]
    order = rng.permutation(len(rows))
    return ResponseBatch(prompts, tuple(rows[i][1] for i in order), tuple(rows[i][0] for i in order), 0.7)


def defined(model: Any, batch: ResponseBatch) -> Tensor:
    """(B, T) log-probs by the definition: a row at a time, nothing padded, the whole vocabulary everywhere, sdpa."""
    rows = []
    for prompt, response in zip(batch.prompt_of, batch.response_ids, strict=True):
        ids = torch.tensor([batch.prompt_ids[prompt] + response])
        logits_TV = model(input_ids=ids, use_cache=False).logits[0] / batch.temperature
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        logp_TV = logits_TV.to(wide).log_softmax(-1)
        start = len(batch.prompt_ids[prompt])
        rows.append(logp_TV[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def losses(logp_BT: Tensor, batch: ResponseBatch, length_norm: Any) -> tuple[Tensor, Tensor]:
    """(RRHF's loss of each prompt under made-up rewards, summed; p of all responses)."""
    score_B = sequence_score(logp_BT, batch.mask_BT, length_norm=length_norm)
    reward_B = torch.as_tensor(np.random.default_rng(7).normal(size=len(score_B)))
    total = logp_BT.new_zeros(())
    for prompt in range(len(batch.prompt_ids)):
        rows = [row for row, p in enumerate(batch.prompt_of) if p == prompt]
        made = rrhf_loss(
            logp_BT[rows][None],
            batch.mask_BT[rows][None],
            reward_B[rows][None].to(logp_BT.dtype),
            variant="paper" if length_norm == "response" else "official",
            padded_length_B=torch.tensor([50]),
        )
        total = total + made.total
    return total, score_B


def gradient(model: Any) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tokens", [2048, 60])
@pytest.mark.parametrize("length_norm", ["response", "none"])
@pytest.mark.parametrize("name", PACKED)
def test_packs_are_what_rows_by_themselves_are(name: str, length_norm: Any, tokens: int) -> None:
    # float64: what the attention leaves; gradients and float32: transformers' RMSNorm is computed in float32 whatever
    # the model is in.
    computed = [(torch.float64, "off", 1e-12, 1e-6), (torch.float32, "off", 1e-5, 1e-5)]
    computed += [(torch.float32, "on", 1e-5, 1e-5)] if length_norm == "response" and tokens == 60 else []
    for dtype, steered, exact, rounded in computed:
        model = made(PACKED[name], dtype)
        plain = copy.deepcopy(model)  # a policy takes over parts of its model
        plain.set_attn_implementation("sdpa")
        policy = policy_of(model, pass_tokens=tokens, onednn=steered)
        assert policy.layout == "packed", policy.layout_reason
        for seed in range(2):
            batch = ragged(seed)
            expected, expected_p = losses(defined(plain, batch), batch, length_norm)
            expected.backward()
            expected_gradient = gradient(plain)
            found, p = losses(policy.token_logprobs(batch), batch, length_norm)
            found.backward()
            assert relative(found, expected) < exact
            assert relative(p, expected_p) < exact
            assert relative(gradient(model), expected_gradient) < rounded
            with torch.no_grad():  # in packs of that many tokens
                assert relative(losses(policy.token_logprobs(batch), batch, length_norm)[1], expected_p) < exact


def test_with_gradients_a_prompt_is_fed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ResponseBatch((tuple(range(20)),), tuple(tuple(range(i, i + 9)) for i in range(6)), (0,) * 6)
    fed: list[int] = []
    for checkpoint in (False, True):
        policy = policy_of(made(PACKED["llama"]), pass_tokens=40, checkpoint_activations=checkpoint)
        body = policy.model.base_model
        body.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        policy.token_logprobs(batch)
        with torch.no_grad():
            policy.token_logprobs(batch)
    # One pack keeps less than three do; a checkpointed one is computed again whole, and that pass_tokens bounds.
    assert fed == [20 + 6 * 8, *(3 * [20 + 2 * 8]), *(6 * [20 + 2 * 8])]


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_does_not_pack_says_why_and_trains_padded(name: str) -> None:
    make, reason = PADDED[name]
    model = made(make)
    policy = policy_of(model)
    assert policy.layout == "padded"
    assert policy.layout_reason is not None
    assert reason in policy.layout_reason
    batch = ragged(0)
    with torch.no_grad():
        torch.testing.assert_close(policy.token_logprobs(batch), defined(model, batch), rtol=0, atol=2e-5)


def test_beyond_its_window_a_model_is_fed_padded_rows() -> None:
    make = PACKED["mistral"]
    model = made(make)
    model.config.sliding_window = 32
    policy = policy_of(model)
    assert policy.layout == "packed"
    long, short = ragged(0), ResponseBatch(((1, 2, 3),), ((4, 5), (6, 7, 8)), (0, 0))
    assert long.longest > 32 > short.longest
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = [defined(model, batch) for batch in (long, short)]
        model.set_attn_implementation(attention.NAME)
        for batch, logp_BT in zip((long, short), expected, strict=True):
            torch.testing.assert_close(policy.token_logprobs(batch), logp_BT, rtol=0, atol=2e-5)


def test_attention_to_a_neighbour_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at load fails where a response sees the one before it."""
    honest = attention.Prefixes

    def leaking(segments: Any, shared: Any) -> Any:
        return honest(((0, segments[-1][1]),), ())

    monkeypatch.setattr("rrhf_bench.policy.batching.Prefixes", leaking)
    policy = policy_of(made(PACKED["llama"]))
    assert policy.layout == "padded"
    assert policy.layout_reason is not None
    assert "log-probs differ" in policy.layout_reason


def test_a_prompt_is_fed_once_and_equal_responses_are_too() -> None:
    batch = ResponseBatch(((1,) * 10,), ((2, 3, 4), (5,), (2, 3, 4), (6, 7)), (0, 0, 0, 0))
    (part,) = pack(batch, 100)
    assert part.ids_L.tolist() == [1] * 10 + [2, 3] + [6]  # last tokens and the second (2, 3, 4) are not fed
    assert part.position_L.tolist() == [*range(10), 10, 11, 10]
    assert part.predict_N.tolist() == [9, 10, 11, 9, 9, 12]
    assert batch.fed(packed=True) == 13
    assert batch.fed(packed=False) == 12 + 10 + 11
    model = made(PACKED["llama"])
    logp_BT = policy_of(model).token_logprobs(batch)
    assert torch.equal(logp_BT[0], logp_BT[2])


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_runs_keep_order_and_budget(sizes: list[int], tokens: int) -> None:
    runs = within(sizes, tokens)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert all(len(run) == 1 or sum(sizes[i] for i in run) <= tokens for run in runs)
    starts = [sum(sizes[i] for i in a) + sizes[b[0]] for a, b in pairwise(runs)]
    assert all(full > tokens for full in starts)  # no run could have taken the next


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 30, 200, 4096]))
def test_a_pack_lets_a_token_see_its_prompt_and_itself_only(seed: int, tokens: int) -> None:
    batch = ragged(seed)
    parts = pack(batch, tokens)
    fed = {row for part in parts for row in part.rows}
    assert fed == set(batch.first_of)
    for part in parts:
        mask_LL = part.prefixes.mask_LL
        assert mask_LL.shape == (len(part.ids_L),) * 2
        position_M, index_N = part.asked
        assert torch.equal(position_M[index_N], part.predict_N)
        assert torch.equal(part.last.mask_LL[position_M], mask_LL[position_M])
        start = 0
        for row in part.rows:
            predict = part.predict_N[start : start + batch.lengths[row]]
            start += batch.lengths[row]
            context = batch.prompt_ids[batch.prompt_of[row]] + batch.response_ids[row]
            for step, position in enumerate(predict.tolist()):
                seen = mask_LL[position].nonzero().squeeze(-1)
                seen = seen[part.position_L[seen].argsort()]
                known = context[: len(context) - batch.lengths[row] + step]
                assert tuple(part.ids_L[seen].tolist()) == known
                assert part.position_L[seen].tolist() == list(range(len(known)))


@pytest.mark.parametrize("long", [10, 256])  # with segments in halves, and whole
def test_the_three_forms_of_attention_are_one(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrhf_bench.policy.batching.LONG", long)
    prefixes = pack(ragged(3), 4096)[0].prefixes
    length = max(end for _, end in prefixes.segments)
    rng = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, heads, length, 16, dtype=torch.float64, generator=rng) for heads in (4, 2, 2)]
    expected = attention.dense_attention(*qkv, prefixes, 0.2)
    merged = attention.SharedPrefixAttention.apply(*qkv, prefixes, 0.2)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-14)
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled, as it is on a GPU
        flexible = attention.flex_attention(*qkv, prefixes, 0.2)
    torch.testing.assert_close(flexible, expected, rtol=0, atol=1e-14)


def test_flex_attention_is_compiled_twice_a_model_whatever_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU, with the traced graph run as it is: equal to the definition, and few compilations."""
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention import flex_attention

    # On a CPU it refuses gradients, which its compiled kernels there do not have; the graph has them.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    with torch._dynamo.config.patch(recompile_limit=2):  # as if another library had set it
        torch._dynamo.reset()
        counter = CompileCounter()
        rng = torch.Generator().manual_seed(0)

        def attend(length: int, heads: int, size: int, *, grad: bool) -> None:
            pairs = [((1, 2, 3), (4,) * (length - 6)), ((1, 2, 3), (5,) * 5)]  # the last tokens are not fed
            (part,) = pack(ResponseBatch.of_pairs(pairs), 1 << 12)
            assert len(part.ids_L) == length
            shapes = [(1, length, n, size) for n in (heads, 2, 2)]
            leaves = [torch.randn(shape, generator=rng).transpose(1, 2).requires_grad_(grad) for shape in shapes]
            expected = attention.dense_attention(*leaves, part.prefixes, 0.2)
            found = attention.flex_attention(*leaves, part.prefixes, 0.2, backend=counter)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            if grad:
                d_out = torch.randn(found.shape, generator=rng)
                gradients = (torch.autograd.grad(out, leaves, d_out) for out in (found, expected))
                for own, wanted in zip(*gradients, strict=True):
                    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)

        for model, (heads, size) in enumerate([(4, 16), (6, 16)]):
            for length in (20, 385, 600):
                for grad in (False, True):
                    attend(length, heads, size, grad=grad)
            assert counter.frame_count == 2 * (model + 1)
        monkeypatch.setattr(attention, "COMPILATIONS", counter.frame_count)
        torch._dynamo.config.recompile_limit = counter.frame_count
        with pytest.raises(FailOnRecompileLimitHit):  # and not the form that holds all scores
            attend(20, 8, 16, grad=False)
        torch._dynamo.reset()


def test_the_trial_at_load_can_train_and_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose backward kernel may not build for a head size: then rows are padded, with the reason."""
    monkeypatch.setattr(policy_module, "TRIAL_TRAINS", ("cpu",))
    for name in ("llama", "gpt2", "opt"):
        for computation in (Computation(), Computation(checkpoint_activations=True)):
            policy = TransformersPolicy(made(PACKED[name]), tokenization(), computation)
            assert policy.layout == "packed", policy.layout_reason
            assert all(parameter.grad is None for parameter in policy.parameters())
    frozen = made(PACKED["llama"]).requires_grad_(False)
    assert TransformersPolicy(frozen, tokenization()).layout == "packed"

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no kernel of this size")

    monkeypatch.setattr(attention, "attend_backward", fail)
    policy = TransformersPolicy(made(PACKED["llama"]), tokenization())
    assert (policy.layout, policy.layout_reason) == ("padded", "no kernel of this size")


@pytest.mark.parametrize("long", [10, 256])
def test_queries_without_a_gradient_change_nothing(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrhf_bench.policy.batching.LONG", long)
    # Some of one length behind one another, which are one call to the kernel, and some too short for one of their own.
    prompt, replies = tuple(range(40)), [tuple(range(i, i + n)) for i, n in enumerate((34, 50, 50, 50, 3, 36, 2))]
    prefixes = pack(ResponseBatch((prompt,), tuple(replies), (0,) * 7), 4096)[0].prefixes
    length = max(end for _, end in prefixes.segments)
    rng = torch.Generator().manual_seed(0)
    qkv = (torch.randn(1, heads, length, 16, dtype=torch.float64, generator=rng) for heads in (4, 2, 2))
    leaves = [x.requires_grad_() for x in qkv]
    expected = attention.dense_attention(*leaves, prefixes, 0.2)
    found = attention.SharedPrefixAttention.apply(*leaves, prefixes, 0.2)
    for silent in ([0], [1], [3], [0, 1, 2], [2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]):  # of the segments, the prompt first
        grad = torch.randn(1, 4, length, 16, dtype=torch.float64, generator=rng)
        for segment in silent:
            grad[:, :, slice(*prefixes.segments[segment])] = 0.0
        wanted = torch.autograd.grad(expected, leaves, grad, retain_graph=True)
        gotten = torch.autograd.grad(found, leaves, grad, retain_graph=True)
        for a, b in zip(gotten, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("long", [10, 256])
def test_where_only_some_positions_ask_they_get_the_same(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrhf_bench.policy.batching.LONG", long)
    (part,) = pack(ragged(3), 4096)
    position_M, _ = part.asked
    assert not part.last.whole
    rng = torch.Generator().manual_seed(0)
    qkv = (torch.randn(1, heads, len(part.ids_L), 16, dtype=torch.float64, generator=rng) for heads in (4, 2, 2))
    leaves = [x.requires_grad_() for x in qkv]
    expected = attention.dense_attention(*leaves, part.prefixes, 0.2)
    found = attention.SharedPrefixAttention.apply(*leaves, part.last, 0.2)
    torch.testing.assert_close(found[:, :, position_M], expected[:, :, position_M], rtol=0, atol=1e-14)
    for asking in (position_M, position_M[::2], position_M[: len(position_M) // 3]):
        grad = torch.zeros_like(found)
        grad[:, :, asking] = torch.randn(1, 4, len(asking), 16, dtype=torch.float64, generator=rng)
        wanted = torch.autograd.grad(expected, leaves, grad, retain_graph=True)
        gotten = torch.autograd.grad(found, leaves, grad, retain_graph=True)
        for a, b in zip(gotten, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("keep", [0, 8 * 11 * 8, 1 << 30])  # nothing, a chunk and a bit, everything
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_the_chunked_head_is_the_definition(keep: int, bias: bool, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrhf_bench.policy.head.chunk_rows", lambda vocabulary, way: 5)
    monkeypatch.setattr("rrhf_bench.policy.head.LONGEST_CHUNK", {"cpu": 5, "cuda": 5})
    monkeypatch.setattr("rrhf_bench.policy.head.BLOCK", 2 * 11)
    rng = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 11, bias=bias).double()
    hidden = torch.randn(23, 6, dtype=torch.float64, generator=rng, requires_grad=True)
    token = torch.randint(11, (23,), generator=rng)
    weight = torch.randn(23, dtype=torch.float64, generator=rng)
    weight[[0, 3, 6, 7]] = 0.0
    weight[10:15] = 0.0  # a whole chunk without gradient
    expected = gather_logprobs(head(hidden), token, 0.7)
    found = token_logprobs(head, hidden, token, 0.7, keep, way)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    leaves = [hidden, *head.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for _ in range(2):  # what was kept is used up the first time
        gotten = torch.autograd.grad((found * weight).sum(), leaves, retain_graph=True)
        for a, b in zip(gotten, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    none = torch.autograd.grad((found * 0.0).sum(), leaves)
    assert all((x == 0).all() for x in none)


def test_the_head_adds_to_a_gradient_that_is_there_only_when_it_is_asked_to() -> None:
    rng = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 11).double()
    hidden = torch.randn(9, 6, dtype=torch.float64, generator=rng)
    token = torch.randint(11, (9,), generator=rng)

    def loss() -> Tensor:
        return token_logprobs(head, hidden, token, 1.0, 1 << 30).sum()

    (once,) = torch.autograd.grad(gather_logprobs(head(hidden), token).sum(), head.weight)
    loss().backward()
    assert head.weight.grad is not None
    first = head.weight.grad
    loss().backward()
    assert head.weight.grad is first  # in place
    torch.testing.assert_close(first, 2 * once, rtol=0, atol=1e-13)
    (asked,) = torch.autograd.grad(loss(), head.weight)
    torch.testing.assert_close(asked, once, rtol=0, atol=1e-13)
    torch.testing.assert_close(first, 2 * once, rtol=0, atol=1e-13)
    told: list[Tensor] = []
    head.weight.register_post_accumulate_grad_hook(lambda parameter: told.append(parameter.grad.clone()))
    loss().backward()
    torch.testing.assert_close(told[0], 3 * once, rtol=0, atol=1e-13)


def test_a_token_too_unlikely_for_a_probability_keeps_its_log_prob() -> None:
    head = torch.nn.Linear(4, 7, bias=False)
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.no_grad():
        head.weight.copy_(torch.randn(7, 4, generator=torch.Generator().manual_seed(2)) * 300)
    token = torch.tensor([0, 1, 2, 3, 4, 5])
    expected, found = gather_logprobs(head(hidden), token), token_logprobs(head, hidden, token, 1.0, 1 << 20)
    assert expected.min() < -200  # exp(-200) is 0 in float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    wanted, gotten = (torch.autograd.grad(logp.sum(), hidden)[0] for logp in (expected, found))
    torch.testing.assert_close(gotten, wanted, rtol=1e-5, atol=1e-3)  # of gradients of some 300


@pytest.mark.parametrize("keep", [0, 1 << 30])
@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_a_likely_token_keeps_its_gradient_in_half_precision(keep: int, way: Any) -> None:
    """The gradient is p - 1. Where p exceeds 0.99, bfloat16 has steps of 0.004; the usual log-softmax is 1% off."""
    rng = torch.Generator().manual_seed(0)
    token = torch.randint(0, 500, (64,), generator=rng)
    weight = torch.randn(500, 64, generator=rng) / 8
    hidden = torch.randn(64, 64, generator=rng) + 12 * weight[token] / weight[token].norm(dim=-1, keepdim=True)
    half, head = hidden.bfloat16().requires_grad_(), torch.nn.Linear(64, 500, bias=False, dtype=torch.bfloat16)
    head.weight = torch.nn.Parameter(weight.bfloat16())
    exact = half.detach().double().requires_grad_()
    logp = gather_logprobs(exact @ head.weight.double().t(), token)
    likely = logp.exp() > 0.99
    assert likely.sum() > 20
    (wanted,) = torch.autograd.grad(logp.sum(), exact)
    (found,) = torch.autograd.grad(token_logprobs(head, half, token, 1.0, keep, way).sum(), half)
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error[likely].median() < 0.03


def test_chunks_are_bounded_by_bytes_and_by_rows() -> None:
    assert [chunk_rows(v) for v in (100, 32000, 152_000, 10**6)] == [512, 262, 64, 64]
    assert [chunk_rows(v, "cuda") for v in (100, 32000, 152_000, 10**7)] == [4096, 4096, 883, 64]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_checkpointed_layers_give_the_same_gradient_and_still_sample_with_a_cache(name: str, onednn: str) -> None:
    batches = ragged(0), ragged(1)
    found = []
    for checkpointed in (False, True):
        model = made(PACKED[name])
        policy = policy_of(model, checkpoint_activations=checkpointed, onednn=onednn)
        assert policy.layout == "packed", policy.layout_reason
        # The second forward comes before the first backward: each layer is computed again with its own pack.
        first, second = (policy.token_logprobs(batch) for batch in batches)
        (first.sum() - second.mean()).backward()
        ids = torch.arange(5)[None]
        steps = model(input_ids=ids, use_cache=True).past_key_values
        after = model(input_ids=ids[:, :1], past_key_values=steps, use_cache=True)
        assert after.past_key_values.get_seq_length() == 6
        found.append((first.detach(), gradient(model), after.logits))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    assert relative(found[1][1], found[0][1]) < 1e-6


def test_checkpoints_hold_less() -> None:
    held = []
    for checkpointed in (False, True):
        policy = policy_of(made(PACKED["llama"]), checkpoint_activations=checkpointed)
        kept: list[int] = []

        def packed(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
            policy.token_logprobs(ragged(0))
        held.append(sum(kept))
    assert held[1] < 0.35 * held[0]  # three small layers; the embedding and the last norm remain


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_start_as_nothing_and_alone_are_trained(name: str, onednn: str) -> None:
    batch = ragged(0)
    model = made(PACKED[name])
    policy = policy_of(model, onednn=onednn)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = policy.token_logprobs(batch)
    policy.adapt(LoraSettings(rank=3, alpha=6.0), seed=0)
    reference = policy.before_adapting()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert torch.equal(policy.token_logprobs(batch), plain)

    optimiser = AdamW(policy.parameters(), OptimiserSettings(kind="rrhf"))
    for _ in range(3):
        policy.token_logprobs(batch).mean().backward()
        optimiser.clip()
        optimiser.step(0.05)
    optimiser.close()
    trained = policy.token_logprobs(batch)
    assert not torch.allclose(trained, plain, atol=0.1)
    assert torch.equal(reference.token_logprobs(batch), plain)
    assert not reference.token_logprobs(batch).requires_grad

    merged = dict(policy.state())
    assert {*merged} == {*before}
    assert {*dict(reference.state())} == {*before}
    assert all(torch.equal(value, before[name]) for name, value in reference.state())
    copied = policy.frozen_copy()
    assert {*copied.model.state_dict()} == {*before}
    assert all(torch.equal(value, merged[name]) for name, value in copied.model.state_dict().items())
    whole = made(PACKED[name])
    whole.load_state_dict(merged)
    with torch.no_grad():
        found = policy_of(whole, onednn=onednn).token_logprobs(batch)
        torch.testing.assert_close(found, trained.detach(), rtol=0, atol=2e-4)


def test_adapters_are_drawn_from_their_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)
        policy = policy_of(made(PACKED["llama"]))
        policy.adapt(LoraSettings(targets=("q_proj", "v_proj")), seed)
        states.append({name: p.detach() for name, p in policy.model.named_parameters() if "lora_" in name})
    assert len(states[0]) == 3 * 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))


def test_a_layer_that_is_not_there_has_no_adapter() -> None:
    with pytest.raises(DataError, match=r"^lora\.targets: .*nonsense"):
        policy_of(made(PACKED["llama"])).adapt(LoraSettings(targets=("nonsense",)), 0)


def test_a_saved_policy_has_its_adapters_in_its_weights(tmp_path: Any, onednn: str) -> None:
    from transformers import AutoModelForCausalLM

    policy = policy_of(made(PACKED["llama"]), onednn=onednn)
    policy.adapt(LoraSettings(), 0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
        expected = policy.token_logprobs(ragged(0))
        policy.save(tmp_path)
        loaded = policy_of(AutoModelForCausalLM.from_pretrained(tmp_path), onednn=onednn)
        torch.testing.assert_close(loaded.token_logprobs(ragged(0)), expected, rtol=0, atol=2e-4)


def test_half_precision_is_trained_through_float32() -> None:
    """A step of 1e-4 on a weight of 1 is a fortieth of what bfloat16 resolves; a hundred of them are 0.01."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(weight - 1e-4, weight)
    optimiser = AdamW([weight], OptimiserSettings(kind="rrhf", grad_clip=100.0))
    for _ in range(100):
        for _ in range(3):
            (weight.sum() / 3).backward()
        assert weight.grad is None  # added up in float32
        assert optimiser.clip() == pytest.approx(2.0, rel=0.01)  # four gradients of 1
        optimiser.step(1e-4)
    assert weight.detach().float().mean().item() == pytest.approx(0.99, abs=2**-8)
    saved = copy.deepcopy(optimiser.state())
    again = AdamW([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], OptimiserSettings(kind="rrhf"))
    again.load(saved)
    assert torch.equal(saved["weights"][0], again.state()["weights"][0])


def test_log_probs_of_half_precision_are_float32_and_near_the_definition() -> None:
    model = made(PACKED["llama"], torch.bfloat16)
    batch = ragged(0)
    policy = policy_of(model)
    assert policy.layout == "packed", policy.layout_reason
    logp_BT = policy.token_logprobs(batch)
    assert logp_BT.dtype == torch.float32
    exact_BT = defined(made(PACKED["llama"]), batch)
    model.set_attn_implementation("sdpa")
    rounded_BT = defined(model, batch)
    # No further from float32 than padded bfloat16 is, give or take half.
    ours, theirs = ((x - exact_BT).abs().sum().item() for x in (logp_BT, rounded_BT))
    assert ours < 1.5 * theirs


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
    # The second factor of an adapter is zero at first. Its layer's input then has a gradient of zeros throughout, all
    # rows are left out of the products, and the products have empty operands.
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


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "taken"),
    [
        ("AuthenticAMD", 26, "fpu avx512f", True),
        ("AuthenticAMD", 25, "fpu avx512f", False),  # AVX-512 in two halves
        ("AuthenticAMD", 26, "fpu avx2", False),
        ("GenuineIntel", 26, "fpu avx512f", False),
    ],
)
def test_the_processor_decides_who_multiplies(vendor: str, family: int, flags: str, taken: bool, tmp_path: Any) -> None:
    said = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text(f"{said}\n{said}\n")
    assert onednn.worth_it(tmp_path / "cpuinfo") is taken
    assert onednn.worth_it(tmp_path / "nothing") is False
