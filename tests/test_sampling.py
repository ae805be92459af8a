"""Both samplers against the trainer: same log-probs, per-request seeds, and no stale weight, cache or temperature."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError, StageError
from rrhf_bench.pipeline.services import DistinctTexts, ModelRef, Services, engine_key
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Prompt
from rrhf_bench.sampling import backend
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.cached import cache_bytes
from rrhf_bench.sampling.sampler import SamplingSpec, to_response
from rrhf_bench.sampling.transformers import TransformersSampler, _Request
from rrhf_bench.settings.experiment import RuntimeSettings

# Longer than one cache block (32 tokens): a stale prefix shows on such prompts only.
LONG = "\n\nHuman: " + "How do I bake bread when the flour is old and the oven is slow? " * 4 + "\n\nAssistant:"
PROMPTS = [Prompt(LONG), Prompt("\n\nHuman: What is a glacier?\n\nAssistant:"), Prompt(LONG.replace("bread", "cake"))]
SPEC = SamplingSpec(n=3, temperature=1.0, max_new_tokens=24, seed=7, purpose="test", logprobs=True)

needs_vllm = pytest.mark.skipif(choose_backend("vllm", device="cpu").name != "vllm", reason="no vLLM for CPUs here")


@pytest.fixture(scope="module")
def engine(llama_folder):
    from rrhf_bench.sampling.vllm import VLLMSampler

    policy = TransformersPolicy.load(llama_folder(0), template=Template())
    return VLLMSampler(llama_folder(0), policy.tokenization, max_model_len=256, kv_cache_mib=32)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=needs_vllm)])
def sampler(request, policy):
    """A sampler that holds the policy's weights, whatever an earlier test left in the engine."""
    if request.param == "transformers":
        return TransformersSampler(policy, max_model_len=256)
    sampler = request.getfixturevalue("engine")
    sampler.sync(policy)
    return sampler


def disagreement(sampler, policy, temperature: float, prompts=PROMPTS) -> float:
    """Return the largest difference between the log-probs of the sampler and of the trainer over sampled tokens."""
    worst = 0.0
    for row in sampler.sample(prompts, replace(SPEC, temperature=temperature)):
        pairs = [(policy.tokenization.prompt_ids(row.prompt), reply.token_ids) for reply in row.responses]
        with torch.no_grad():
            logp_BT = policy.token_logprobs(ResponseBatch.of_pairs(pairs, temperature))
        for reply, logp_T in zip(row.responses, logp_BT, strict=True):
            theirs = torch.tensor(reply.logprobs)
            worst = max(worst, (theirs - logp_T[: len(theirs)]).abs().max().item())
    return worst


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_the_trainers_before_and_after_a_sync(onednn, sampler, policy, llama_folder, temperature):
    assert disagreement(sampler, policy, temperature) < 1e-5
    other = TransformersPolicy.load(llama_folder(1), template=Template())
    sampler.sync(other)
    assert disagreement(sampler, other, temperature) < 1e-5


def test_samples_depend_on_no_other_prompt_order_or_global_state(sampler):
    first = sampler.sample(PROMPTS, SPEC)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    again = sampler.sample(PROMPTS[::-1], SPEC)[::-1]
    alone = sampler.sample([PROMPTS[1]], replace(SPEC, n=1))
    ids = [[reply.token_ids for reply in row.responses] for row in first]
    assert ids == [[reply.token_ids for reply in row.responses] for row in again]
    assert alone[0].responses[0].token_ids == first[1].responses[0].token_ids
    assert len({reply.token_ids for reply in first[0].responses}) == 3  # samples of one prompt differ
    other = sampler.sample(PROMPTS, replace(SPEC, purpose="other"))
    assert ids != [[reply.token_ids for reply in row.responses] for row in other]


def test_sampling_leaves_the_callers_random_state_alone(sampler):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    sampler.sample(PROMPTS, SPEC)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_greedy_takes_the_most_likely_token(sampler, policy):
    row = sampler.sample(PROMPTS[1:2], replace(SPEC, n=1, temperature=0.0))[0]
    prompt_ids = policy.tokenization.prompt_ids(row.prompt)
    ids = list(prompt_ids)
    for token in row.responses[0].token_ids:
        with torch.no_grad():
            assert token == policy.model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)


@needs_vllm
def test_both_samplers_draw_from_the_same_truncated_distribution(engine, policy):
    """Top-k 5 and top-p 0.6 of the first token: only tokens of the nucleus appear, in both."""
    engine.sync(policy)
    with torch.no_grad():
        logits = policy.model(torch.tensor([policy.tokenization.prompt_ids(PROMPTS[0])])).logits[0, -1]
    probability, order = (
        torch.where(logits >= logits.topk(5).values[-1], logits, -torch.inf).softmax(-1).sort(descending=True)
    )
    nucleus = set(order[: int((probability.cumsum(-1) < 0.6).sum()) + 1].tolist())
    spec = replace(SPEC, n=64, max_new_tokens=1, top_k=5, top_p=0.6)
    for sampler in (engine, TransformersSampler(policy, max_model_len=256)):
        drawn = {reply.token_ids[0] for reply in sampler.sample(PROMPTS[:1], spec)[0].responses}
        assert drawn == nucleus, sampler.identity


def test_a_prompt_beyond_the_context_is_named(sampler):
    prompt = Prompt(LONG * 8)
    with pytest.raises(DataError, match=f"prompt {prompt.id}: .* exceed the context of 256"):
        sampler.sample([PROMPTS[0], prompt], SPEC)


def test_a_reply_records_how_it_ended(policy):
    """eos: ended by the policy; stop: cut at a stop string, ids kept; length: neither."""
    tokenization = policy.tokenization
    spec = replace(SPEC, stop=("Human:", "Assistant:"))
    words = tuple(tokenization.tokenizer(" Mix it.")["input_ids"])
    fake = tuple(tokenization.tokenizer(" Mix it.\n\nHuman: Thanks")["input_ids"])
    assert to_response(tokenization, spec, (*words, tokenization.eos_id), None).finish == "eos"
    assert to_response(tokenization, spec, words, None).finish == "length"
    cut = to_response(tokenization, spec, fake, None)
    assert (cut.text, cut.finish, cut.token_ids) == (" Mix it.", "stop", fake)
    kept = to_response(tokenization, SPEC, (*fake, tokenization.eos_id), None)
    assert (kept.text, kept.finish) == (" Mix it.\n\nHuman: Thanks", "eos")


def test_a_stop_string_ends_generation(sampler, policy):
    """The stop string is what a reply says in its second and third token: nothing is generated after it."""
    spec = replace(SPEC, n=64, max_new_tokens=12)
    replies = sampler.sample(PROMPTS[1:2], spec)[0].responses
    texts = [policy.tokenization.decode(reply.token_ids[:3]) for reply in replies]
    index = next(i for i, text in enumerate(texts) if len(text) >= 3 and text.isascii() and text.isprintable())
    stop = policy.tokenization.decode(replies[index].token_ids[1:3])
    cut = sampler.sample(PROMPTS[1:2], replace(spec, stop=(stop,)))[0].responses[index]
    assert cut.finish == "stop"
    assert stop not in cut.text
    assert cut.token_ids == replies[index].token_ids[:3]


def test_a_long_stop_string_ends_generation(policy):
    """As soon as it is there, however many tokens it has."""
    tokenization = policy.tokenization
    stop = "### Instruction: ####"
    ids = list(tokenization.response_ids(f" Mix it. {stop}", ended=False))
    assert len(tokenization.response_ids(stop, ended=False)) > 12
    sampler = TransformersSampler(policy, max_model_len=256)
    spec = replace(SPEC, max_new_tokens=99, stop=("\n\nHuman:", stop))
    ends = [sampler._ended(_Request((), np.random.default_rng(), ids[:n]), spec) for n in range(1, len(ids) + 1)]
    assert ends == [False] * (len(ids) - 1) + [True]


def test_no_prompts_have_no_replies(sampler):
    assert sampler.sample([], SPEC) == []


def altered(source: Path, folder: Path, **config: object) -> Path:
    """Copy a model's folder with other values in its config.json."""
    shutil.copytree(source, folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**said, **config}), encoding="utf-8")
    return folder


@needs_vllm
def test_one_engine_serves_every_policy_that_computes_alike(engine, policy, llama_folder, tmp_path):
    """Another folder, another note in the config, another template, another length, a trained model saved again: the
    same engine, each time with the weights, the words and the limit of the policy that is asked for. Engines that were
    there before go on."""
    services = Services(RuntimeSettings(device="cpu", kv_cache_mib=32))
    noted = {"initializer_range": 0.5, "transformers_version": "4.28.1", "dtype": "bfloat16", "use_cache": False}
    other = altered(llama_folder(1), tmp_path / "other", **noted)
    TransformersPolicy.load(other, template=Template()).save(tmp_path / "trained")
    first = ModelRef(str(llama_folder(0)), max_length=128)
    refs = [first, ModelRef(str(other), max_length=96, template="raw"), ModelRef(str(tmp_path / "trained"))]
    engines = []
    for ref in [*refs, first]:
        policy = services.policy(ref)
        sampler = services.sampler(policy, ref, "vllm")
        engines.append(id(sampler.engine.llm))
        limit = ref.max_length or 512
        assert (sampler.tokenization, sampler.engine.max_model_len) == (policy.tokenization, limit)
        assert disagreement(sampler, policy, 0.7, PROMPTS[1:2]) < 1e-5
        with pytest.raises(DataError, match=f"exceed the context of {limit}"):
            sampler.sample([Prompt("\n\nHuman: " + "Why? " * 300 + "\n\nAssistant:")], SPEC)
    # 512 tokens do not fit an engine of 128: a longer one takes its place, for good.
    assert engines == [engines[0], engines[0], engines[2], engines[2]]
    engine.sync(policy)
    assert disagreement(engine, policy, 0.7) < 1e-5


def test_policies_that_compute_otherwise_have_engines_of_their_own(llama_folder, tmp_path):
    def key(folder: Path, **ref: object) -> str:
        policy = TransformersPolicy.load(folder, template=Template())
        return engine_key(policy, ModelRef(str(folder), **ref), "vllm")

    own = key(llama_folder(0))
    assert own == key(llama_folder(1), max_length=64)
    ropes = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    assert own != key(altered(llama_folder(0), tmp_path / "ropes", **ropes))
    assert own != key(altered(llama_folder(0), tmp_path / "norm", rms_norm_eps=1e-5))
    assert own != key(llama_folder(0), dtype="bfloat16")
    ending = altered(llama_folder(0), tmp_path / "ending")
    said = json.loads((ending / "tokenizer_config.json").read_text(encoding="utf-8"))
    (ending / "tokenizer_config.json").write_text(json.dumps({**said, "eos_token": "<pad>"}), encoding="utf-8")
    assert own == key(ending)  # a base model and its chat model share an engine: a request says what ends its reply


@needs_vllm
def test_an_engine_is_as_long_as_its_requests_need(engine, policy, llama_folder, tmp_path):
    """32 MiB hold one sequence of the whole context. Samples are those of an engine of another length, and an engine
    that did not start leaves the others as they are."""
    folder = altered(llama_folder(0), tmp_path / "long", max_position_embeddings=32768)
    ref = ModelRef(str(folder))
    services = Services(RuntimeSettings(device="cpu", kv_cache_mib=8))
    long = services.policy(ref)
    with pytest.raises(StageError) as caught:
        services.sampler(long, ref, "vllm")
    assert all(key in str(caught.value) for key in ("32768", "policy.max_length", "runtime.kv_cache_mib"))
    sampler = services.sampler_for(long, ref, "vllm", PROMPTS, SPEC.max_new_tokens)
    assert sampler.engine.max_model_len == 256
    engine.sync(policy)
    assert sampler.sample(PROMPTS, SPEC) == engine.sample(PROMPTS, SPEC)
    other = Services(RuntimeSettings(device="cpu", kv_cache_mib=1))
    whole = other.sampler_for(long, ref, "vllm", PROMPTS, 32000)  # with a cache beyond the setting
    assert whole.engine.max_model_len > 32000
    assert whole.sample(PROMPTS, SPEC) == engine.sample(PROMPTS, SPEC)


@needs_vllm
def test_a_model_without_a_context_is_sampled(tokenizer, tmp_path):
    """BLOOM: no configured length, and an LM head that its files hold under one name only. vLLM computes its GELU by
    another formula, so the log-probs are further apart than those of other models."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=2, initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BloomForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    services, ref = Services(RuntimeSettings(device="cpu", kv_cache_mib=8)), ModelRef(str(tmp_path))
    policy = services.policy(ref)
    sampler = services.sampler_for(policy, ref, "vllm", PROMPTS, SPEC.max_new_tokens)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    assert disagreement(sampler.engine, policy, 1.0) > 0.1
    sampler.sync(policy)
    assert disagreement(sampler.engine, policy, 1.0) < 2e-3


def test_a_cache_is_as_large_as_the_models_keys_and_values(policy, llama_folder, tmp_path):
    """2 layers, keys and values, 2 heads of 32 numbers in float32; half of it with one head for both."""
    assert cache_bytes(policy.model, 100) == 100 * 2 * 2 * 2 * 32 * 4
    from transformers import LlamaForCausalLM

    config = policy.model.config.__class__(**{**policy.model.config.to_dict(), "num_key_value_heads": 1})
    assert cache_bytes(LlamaForCausalLM(config), 100) == 100 * 2 * 2 * 32 * 4


def test_a_policy_in_the_place_of_a_reward_model_is_named(llama_folder):
    services, ref = Services(RuntimeSettings(device="cpu")), ModelRef(str(llama_folder(0)))
    policy = services.fixed_policy(ref)
    with pytest.raises(DataError, match=r"holds no trained score\.weight"):
        services.reward(ref)
    assert services.fixed_policy(ref) is policy


def test_no_text_of_a_call_is_scored_twice():
    """Best-of-n, PPO and the curves hand over what was sampled, repetitions and all."""
    asked = []

    class Lengths:
        identity = "lengths"

        def score(self, prompts, responses):
            asked.extend(responses)
            return np.array([float(len(p.text) + len(r)) for p, r in zip(prompts, responses, strict=True)])

    one, other = Prompt("one"), Prompt("other")
    scores = DistinctTexts(Lengths()).score([one, one, other, one], ["a", "a", "a", "bcd"])
    assert scores.tolist() == [4.0, 4.0, 6.0, 6.0]
    assert asked == ["a", "a", "bcd"]
    assert DistinctTexts(Lengths()).score([], []).shape == (0,)
    done = []
    texts = [str(i % 2500) for i in range(3000)]
    DistinctTexts(Lengths()).score([one] * 3000, texts, lambda *counts: done.append(counts))
    assert done == [(2048, 2500), (2500, 2500)]


@needs_vllm
def test_the_benchmark_times_equal_tokens_only(engine, policy):
    """Tokens and records of both sides agree in the run that is timed; a sampler that draws otherwise is refused."""
    from benchmarks.sampling import measure

    engine.sync(policy)
    how = {"n": 2, "max_new_tokens": 8, "rounds": 2}
    row = measure(engine, PROMPTS, logprobs=True, **how)
    assert row["replies"] == 6
    assert row["tokens"]["raw"] == row["tokens"]["ours"]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in row["rounds"].values())

    class Otherwise:
        llm, tokenization = engine.llm, engine.tokenization

        def sample(self, prompts, spec):
            return engine.sample(prompts, replace(spec, seed=spec.seed + 1))

    with pytest.raises(StageError, match=r"n=2: . of 6 replies are not those of raw vLLM"):
        measure(Otherwise(), PROMPTS, **how)


def test_a_vllm_for_gpus_does_not_serve_a_run_on_the_cpu(tmp_path, monkeypatch):
    """The build is read from the installed distribution, as `plan` reads it, without an import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backend, "installed", backend.installed.__wrapped__)  # which remembers nothing
    for version, on_a_cpu in (("0.32.0", "transformers"), ("0.32.0+cpu", "vllm")):
        folder = tmp_path / "vllm-0.32.0.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        importlib.invalidate_caches()
        assert choose_backend("vllm", device="auto").identity == f"vllm {version}"
        assert choose_backend("vllm", device="cuda").identity == f"vllm {version}"
        chosen = choose_backend("vllm", device="cpu")
        assert chosen.name == on_a_cpu
        assert (chosen.note is None) == (on_a_cpu == "vllm")


@needs_vllm
def test_an_engine_computes_where_the_policy_is_or_not_at_all(llama_folder, policy):
    from rrhf_bench.sampling.vllm import VLLMSampler

    with pytest.raises(StageError, match=r"computes on cpu, and the policy is on cuda"):
        VLLMSampler(llama_folder(0), policy.tokenization, max_model_len=256, device="cuda")


@pytest.mark.parametrize(
    ("how", "one_by_one"),
    [({}, list(range(1, 17))), ({"strategy": "diverse-beam", "beams": 4, "groups": 4}, [4, 8, 12, 16])],
)
def test_a_batch_is_bounded_by_its_cache(policy, monkeypatch, how, one_by_one):
    """Long prompts are sampled in smaller batches, and the same replies come out."""
    long, short, other = PROMPTS
    prompts = [short, long, other, short]
    spec = replace(SPEC, **{"n": 4, "max_new_tokens": 8, "logprobs": False, **how})
    done: list[int] = []
    sampler = TransformersSampler(policy, max_model_len=512, progress=lambda rows, _: done.append(rows))
    whole = sampler.sample(prompts, spec)
    assert done == [16]
    longest = max(len(policy.tokenization.prompt_ids(prompt)) for prompt in prompts) + 8
    # Eight rows of the longest prompts, or of the shortest, fit; nine of the longest do not.
    for tokens, batches in (8 * longest, [8, 16]), (1, one_by_one):
        done.clear()
        monkeypatch.setattr("rrhf_bench.sampling.transformers.CACHE_BYTES", tokens * cache_bytes(policy.model, 1))
        assert sampler.sample(prompts, spec) == whole
        assert done == batches


@needs_vllm
def test_a_folder_whose_configuration_names_no_architecture_is_sampled(llama_folder, tmp_path):
    shutil.copytree(llama_folder(0), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["architectures"]
    path.write_text(json.dumps(config), encoding="utf-8")
    services, ref = Services(RuntimeSettings(device="cpu", kv_cache_mib=16)), ModelRef(str(tmp_path / "model"))
    sampler = services.sampler(services.fixed_policy(ref), ref, "vllm")
    assert len(sampler.sample(PROMPTS[:1], replace(SPEC, n=1))[0].responses) == 1
