"""Prompts fed once: equal to every response fed by itself, per architecture and budget; and what is built on it."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrhf_bench.errors import DataError, StageError
from rrhf_bench.policy import attention
from rrhf_bench.policy.batching import ResponseBatch, pack, within
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.policy.policy import Computation, TransformersPolicy
from rrhf_bench.settings.methods import LoraSettings, OptimiserSettings
from rrhf_bench.training.optimiser import AdamW
from rrhf_bench.training.rrhf import rrhf_loss
from tests.architectures import GROUPED, PACKED, PADDED, VOCABULARY, made, tokenization

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


# One of each way to write an attention; the others repeat it with other norms and biases.
@pytest.mark.parametrize(
    "name",
    [name if name in ("llama", "gpt2", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in PACKED],
)
def test_packs_are_what_rows_by_themselves_are(name: str) -> None:
    """Losses, scores and gradients, in one pack and in packs of 60 tokens, for both norms of the length."""
    # float64: what the attention leaves; gradients and float32: transformers' RMSNorm is computed in float32 whatever
    # the model is in.
    for dtype, exact, rounded in ((torch.float64, 1e-12, 1e-6), (torch.float32, 1e-5, 1e-5)):
        plain = made(PACKED[name], dtype)
        plain.set_attn_implementation("sdpa")
        computed = [(2048, "off"), (60, "off")] + [(60, "on")] * (dtype == torch.float32)
        # Each policy has a model of its own: it takes over parts of it.
        policies = [
            policy_of(made(PACKED[name], dtype), pass_tokens=tokens, onednn=onednn) for tokens, onednn in computed
        ]
        for seed, length_norm in enumerate(("response", "none")):
            batch = ragged(seed)
            expected, expected_p = losses(defined(plain, batch), batch, length_norm)
            expected.backward()
            expected_gradient = gradient(plain)
            for policy in policies:
                assert policy.layout == "packed", policy.layout_reason
                found, p = losses(policy.token_logprobs(batch), batch, length_norm)
                found.backward()
                assert relative(found, expected) < exact
                assert relative(p, expected_p) < exact
                assert relative(gradient(policy.model), expected_gradient) < rounded
                with torch.no_grad():  # in packs of that many tokens
                    assert relative(losses(policy.token_logprobs(batch), batch, length_norm)[1], expected_p) < exact


def test_with_gradients_a_prompt_is_fed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ResponseBatch((tuple(range(20)),), tuple(tuple(range(i, i + 9)) for i in range(6)), (0,) * 6)
    fed: list[int] = []
    for checkpoint in (False, True):
        policy = policy_of(made(PACKED["llama"]), pass_tokens=40, checkpoint_activations=checkpoint)
        body = policy.model.base_model
        body.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
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


def test_the_three_forms_of_attention_are_one() -> None:
    prefixes = pack(ragged(3), 4096)[0].prefixes
    length = prefixes.length
    rng = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, heads, length, 16, dtype=torch.float64, generator=rng) for heads in (4, 2, 2)]
    expected = attention.dense_attention(*qkv, prefixes, 0.2)
    merged = attention.SharedPrefixAttention.apply(*qkv, prefixes, 0.2)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-14)
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled, as it is on a GPU
        flexible = attention.flex_attention(*qkv, prefixes, 0.2)
    torch.testing.assert_close(flexible, expected, rtol=0, atol=1e-14)


@pytest.mark.slow
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
        monkeypatch.setattr(attention, "MAX_COMPILATIONS", counter.frame_count)
        torch._dynamo.config.recompile_limit = counter.frame_count
        with pytest.raises(FailOnRecompileLimitHit):  # and not the form that holds all scores
            attend(20, 8, 16, grad=False)
        torch._dynamo.reset()


def test_the_trial_at_load_can_train_and_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's backward kernel may not compile for a head size: then rows are padded, with the reason."""
    for name in ("llama", "gpt2", "opt"):
        for computation in (Computation(), Computation(checkpoint_activations=True)):
            policy = TransformersPolicy(made(PACKED[name]), tokenization(), computation)
            assert policy.layout == "packed", policy.layout_reason
            assert all(parameter.grad is None for parameter in policy.parameters())
    frozen = made(PACKED["llama"]).requires_grad_(False)
    assert TransformersPolicy(frozen, tokenization()).layout == "packed"

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no kernel of this size")

    monkeypatch.setattr(attention, "_backward", fail)
    policy = TransformersPolicy(made(PACKED["llama"]), tokenization())
    assert (policy.layout, policy.layout_reason) == ("padded", "no kernel of this size")


def test_gradients_of_merged_attention_are_the_definitions() -> None:
    prompt, replies = tuple(range(40)), [tuple(range(i, i + n)) for i, n in enumerate((34, 50, 50, 50, 3, 36, 2, 190))]
    prefixes = pack(ResponseBatch((prompt,), tuple(replies), (0,) * 8), 4096)[0].prefixes
    assert [index_ST.shape for index_ST, _ in prefixes.batches] == [(1, 189), (4, 49), (2, 35), (2, 2)]
    rng = torch.Generator().manual_seed(0)
    qkv = (torch.randn(1, heads, prefixes.length, 16, dtype=torch.float64, generator=rng) for heads in (4, 2, 2))
    leaves = [x.requires_grad_() for x in qkv]
    expected = attention.dense_attention(*leaves, prefixes, 0.2)
    found = attention.SharedPrefixAttention.apply(*leaves, prefixes, 0.2)
    grad = torch.randn(1, 4, prefixes.length, 16, dtype=torch.float64, generator=rng)
    grad[:, :, slice(*prefixes.segments[3])] = 0.0  # a response that the loss leaves alone
    wanted = torch.autograd.grad(expected, leaves, grad)
    for own, definition in zip(torch.autograd.grad(found, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(own, definition, rtol=0, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 7, 40, 300]))
def test_the_block_mask_of_a_pack_is_its_mask(seed: int, scale: int) -> None:
    """Blocks that FlexAttention computes without looking at single tokens are all visible, and none is left out."""
    rng = np.random.default_rng(seed)
    pairs = [((prompt,) * (1 + prompt * scale), (9,) * int(rng.integers(1, 3 * scale + 2)))
             for prompt in range(int(rng.integers(1, 4))) for _ in range(int(rng.integers(1, 4)))]  # fmt: skip
    (part,) = pack(ResponseBatch.of_pairs(pairs), 1 << 20)
    length = part.prefixes.length
    blocks = max(attention.MIN_BLOCKS, -(-length // attention.FLEX_BLOCK))
    mask = attention.block_mask(part.prefixes, blocks * attention.FLEX_BLOCK, torch.device("cpu"))
    at = torch.arange(blocks * attention.FLEX_BLOCK)
    visible_LL = mask.mask_mod(torch.tensor(0), torch.tensor(0), at[:, None], at[None])
    assert torch.equal(visible_LL[:length, :length], part.prefixes.mask_LL)
    assert not visible_LL[:length, length:].any()
    by_block = visible_LL.unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1)).transpose(1, 2).flatten(2)
    some, full = torch.zeros(2, blocks, blocks, dtype=torch.bool)
    parts = ((mask.kv_num_blocks, mask.kv_indices, some), (mask.full_kv_num_blocks, mask.full_kv_indices, full))
    for count, order, found in parts:
        for query in range(blocks):
            found[query, order[0, 0, query, : count[0, 0, query]].long()] = True
    assert torch.equal(some | full, by_block.any(-1))
    assert not (some & full).any()
    assert by_block[full].all()


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


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_weight_that_head_and_embeddings_share_is_refused(target: str) -> None:
    """It would be merged into both."""
    for tied in (False, True):
        policy = policy_of(
            made(lambda tied=tied: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=tied)))
        )
        if not tied:
            policy.adapt(LoraSettings(targets=("q_proj", target)), 0)
            continue
        with pytest.raises(DataError, match=rf"^lora\.targets: found .*{target}, but LlamaForCausalLM has one weight"):
            policy.adapt(LoraSettings(targets=("q_proj", target)), 0)


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


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_under_autocast_products_are_rounded_as_pytorch_rounds_them(layout: Any) -> None:
    batch, sides = ragged(0), {}
    for side in ("exact", "autocast", "policy"):
        model = made(PACKED["llama"])
        if side == "policy":
            policy = policy_of(model, autocast="bfloat16", onednn="on")
            assert (policy.layout, policy.dtype) == ("packed", torch.bfloat16), policy.layout_reason
            policy.layout = layout
            logp_BT = policy.token_logprobs(batch)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=side == "autocast"):
                logp_BT = defined(model, batch)
        assert logp_BT.dtype == torch.float32
        logp_BT.sum().backward()
        sides[side] = logp_BT.detach(), gradient(model)
        assert sides[side][1].dtype == torch.float32
    for own, rounded, exact in zip(sides["policy"], sides["autocast"], sides["exact"], strict=True):
        assert 0.1 < relative(own, exact) / relative(rounded, exact) < 1.5
    assert policy_of(made(PACKED["llama"], torch.float64), autocast="bfloat16").dtype == torch.float64


def test_kernels_that_are_not_there_are_refused() -> None:
    with pytest.raises(StageError, match=r"^runtime\.kernels: "):
        policy_of(made(PACKED["llama"]), kernels="liger")
