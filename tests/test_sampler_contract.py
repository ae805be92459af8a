"""The sampler's contract with the real vLLM: each planted fault is caught, after the very first sync."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import StageError
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.sync_check import LIMITS, PROMPT_TOKENS, Agreement, CheckedSampler, Limit, canaries
from rrhf_bench.sampling.transformers import TransformersSampler
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.methods import LoraSettings

CONTEXT = 256
PROMPTS = [
    Prompt(f"\n\nHuman: {question}\n\nAssistant:") for question in ("What is ice?", "How?", "Why bake bread?", "Hm?")
]
SPEC = SamplingSpec(n=2, temperature=0.7, max_new_tokens=8, seed=3, purpose="test")
FAULT = r"log-probs are .* from the trainer's on average"

needs_vllm = pytest.mark.skipif(choose_backend("vllm", device="cpu").name != "vllm", reason="no vLLM for CPUs here")


@pytest.fixture(scope="module")
def engine(llama_folder):
    from rrhf_bench.sampling.vllm import VLLMSampler

    policy = TransformersPolicy.load(llama_folder(0), template=Template())
    return VLLMSampler(llama_folder(0), policy.tokenization, max_model_len=CONTEXT, kv_cache_mib=32)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=needs_vllm)])
def sampler(request, policy):
    """An engine that holds the policy's weights, whatever an earlier test left in it."""
    if request.param == "transformers":
        return TransformersSampler(policy, max_model_len=CONTEXT)
    engine = request.getfixturevalue("engine")
    engine.sync(policy)
    return engine


@pytest.fixture
def trained(llama_folder):
    """The policy after one small step: what a missed sync would miss."""
    policy = TransformersPolicy.load(llama_folder(0), template=Template())
    policy.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    ids = torch.tensor([policy.tokenization.prompt_ids(PROMPTS[0])])
    policy.model(ids, labels=ids).loss.backward()
    optimiser.step()
    return policy


def reload_only(engine):
    """A sync that leaves the prefix cache as it is."""

    def sync(policy) -> None:
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.state()})

    return sync


def test_what_is_found_is_noted_once_a_sync_and_temperature(sampler, policy, trained):
    found = []
    checked = CheckedSampler(sampler, "float32", CONTEXT, note=found.append)
    for synced in (policy, trained):
        checked.sync(synced)
        assert checked.sample(PROMPTS, SPEC) == sampler.sample(PROMPTS, SPEC)  # and nothing else changes
        checked.sample(PROMPTS, replace(SPEC, temperature=1.0))
        checked.sample(PROMPTS, replace(SPEC, temperature=0.0))  # greedy: weights and cache, as at 1
        checked.sample(PROMPTS, SPEC)
    assert [line["temperature"] for line in found] == [0.7, 1.0, 0.7, 1.0]
    for line in found:
        assert 0 <= line["mean"] <= line["p99"] <= line["max"] < 1e-5
        assert line["tokens"] == 16
        assert line["limit"] == {"mean": 1e-4, "max": 1e-3}


@needs_vllm
def test_a_missed_sync_is_caught(engine, policy, trained, monkeypatch):
    engine.sync(policy)
    monkeypatch.setattr(engine, "sync", lambda policy: None)
    checked = CheckedSampler(engine, "float32", CONTEXT)
    checked.sync(policy)
    checked.sample(PROMPTS, SPEC)  # as it should be, so far
    checked.sync(trained)
    with pytest.raises(StageError, match=FAULT):
        checked.sample(PROMPTS, SPEC)


class Rounded:
    """A policy whose weights have the 10 bits of mantissa of TF32."""

    def __init__(self, policy: TransformersPolicy) -> None:
        self.policy, self.tokenization = policy, policy.tokenization

    def state(self):
        for name, w in self.policy.state():
            yield name, ((w.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(w.dtype)


def test_a_sampler_of_less_than_float32_is_caught(sampler, policy, monkeypatch):
    whole = sampler.sync
    monkeypatch.setattr(sampler, "sync", lambda policy: whole(Rounded(policy)))
    checked = CheckedSampler(sampler, "float32", CONTEXT)
    checked.sync(policy)
    with pytest.raises(StageError, match=FAULT):
        checked.sample(PROMPTS, SPEC)


def test_logits_too_large_for_two_computations_to_agree_are_caught(policy):
    """A constant of 1e5 in every logit changes no probability, but float32 then holds logits in steps of 0.01."""
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[:, 0] = 1.0
        policy.model.model.norm.weight[0] *= 1e5
    checked = CheckedSampler(TransformersSampler(policy, max_model_len=CONTEXT), "float32", CONTEXT)
    checked.sync(policy)
    with pytest.raises(StageError, match=FAULT):
        checked.sample(PROMPTS, SPEC)


@pytest.mark.slow
@pytest.mark.skipif(choose_backend("vllm").name != "vllm", reason="vLLM is not installed here")
def test_vllm_multiplies_float32_as_float32_on_a_gpu():
    """Its attention is compiled for an H100: no TF32 as import_vllm leaves the environment, TF32 without."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_F32_DEFAULT"}
    environment["PYTHONPATH"] = str(root)
    script = str(root / "tests" / "attention_ptx.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] == []
    assert all("tf32" in instruction for instruction in found["without"])
    assert found["without"]


@needs_vllm
def test_weights_that_are_not_taken_over_in_full_are_caught(engine, policy, llama_folder, monkeypatch):
    """All of another model's but one matrix."""
    engine.sync(policy)
    other = TransformersPolicy.load(llama_folder(1), template=Template())
    whole = engine.sync

    class Partial:
        tokenization = other.tokenization

        def state(self):
            return ((name, w) for name, w in other.state() if name != "model.layers.1.mlp.down_proj.weight")

    monkeypatch.setattr(engine, "sync", lambda policy: whole(Partial()))
    checked = CheckedSampler(engine, "float32", CONTEXT)
    checked.sync(other)
    with pytest.raises(StageError, match=FAULT):
        checked.sample(PROMPTS, SPEC)


@needs_vllm
def test_a_missed_cache_reset_is_caught(engine, policy, trained, monkeypatch):
    """Nothing that the check asks about was asked before: it puts the old states into the cache itself."""
    engine.sync(policy)
    checked = CheckedSampler(engine, "float32", CONTEXT)
    monkeypatch.setattr(engine, "sync", reload_only(engine))
    checked.sync(trained)
    with pytest.raises(StageError, match=FAULT):
        checked.sample(PROMPTS, SPEC)


@needs_vllm
def test_a_temperature_that_is_not_applied_is_caught(engine, policy, monkeypatch):
    sample = engine.sample
    monkeypatch.setattr(engine, "sample", lambda prompts, spec: sample(prompts, replace(spec, temperature=1.0)))
    checked = CheckedSampler(engine, "float32", CONTEXT)
    checked.sync(policy)
    checked.sample(PROMPTS, replace(SPEC, temperature=1.0))  # nothing wrong with that
    with pytest.raises(StageError, match=FAULT + r".* at temperature 0\.7"):
        checked.sample(PROMPTS, SPEC)


def test_the_contract_holds_in_bfloat16_and_sees_other_weights(llama_folder):
    policy, other = (
        TransformersPolicy.load(llama_folder(seed), template=Template(), dtype=torch.bfloat16) for seed in (0, 1)
    )
    sampler = TransformersSampler(policy, max_model_len=CONTEXT)
    checked = CheckedSampler(sampler, "bfloat16", CONTEXT)
    checked.sync(policy)
    checked.sample(PROMPTS, SPEC)
    checked._policy = other
    checked._checked = set()
    with pytest.raises(StageError, match=FAULT):
        checked.sample(PROMPTS, SPEC)


def test_a_stage_checks_its_sampler_and_keeps_what_was_found(llama_folder):
    services, found = Services(RuntimeSettings(device="cpu")), []
    ref = ModelRef(str(llama_folder(0)))
    sampler = services.sampler(services.policy(ref), ref, "transformers", note=found.append)
    sampler.sample(PROMPTS, SPEC)
    assert [(line["temperature"], line["tokens"]) for line in found] == [(0.7, 16)]


def test_progress_is_of_what_is_sampled(sampler, policy):
    told = []
    checked = CheckedSampler(sampler, "float32", CONTEXT, progress=lambda done, total: told.append((done, total)))
    checked.sync(policy)
    checked.sample(PROMPTS, SPEC)
    assert told == [(8, 8)]
    assert sampler.progress is None


@needs_vllm
def test_samples_do_not_depend_on_who_else_samples(engine, policy, llama_folder):
    """Two workers with half of the prompts each, their engines of other sizes, in another order: the same replies."""
    from rrhf_bench.sampling.vllm import VLLMSampler

    other = VLLMSampler(llama_folder(1), policy.tokenization, max_model_len=128, kv_cache_mib=16)
    engine.sync(policy)
    other.sync(policy)
    whole = engine.sample(PROMPTS, replace(SPEC, logprobs=True))
    halves = [*other.sample(PROMPTS[:1:-1], SPEC), *engine.sample(PROMPTS[1::-1], SPEC)][::-1]
    assert [[r.token_ids for r in row.responses] for row in whole] == [
        [r.token_ids for r in row.responses] for row in halves
    ]


def test_what_is_asked_is_longer_than_a_block_wherever_there_is_room(policy):
    tokenization = policy.tokenization
    for prompt in canaries(tokenization, CONTEXT):
        assert PROMPT_TOKENS <= len(tokenization.prompt_ids(prompt)) < PROMPT_TOKENS + 10
    assert {len(canaries(tokenization, context)) for context in (64, 40)} == {2}
    for prompt in canaries(tokenization, 64):
        assert 50 < len(tokenization.prompt_ids(prompt)) <= 62
    one, two = canaries(tokenization, CONTEXT)
    assert one.text[:12] != two.text[:12]  # else one would be the other's prefix
    assert canaries(tokenization, 4) == []


def test_a_context_too_short_for_any_of_them_is_checked_on_what_is_sampled(policy):
    found = []
    sampler = TransformersSampler(policy, max_model_len=16)
    checked = CheckedSampler(sampler, "float32", 16, note=found.append)
    assert canaries(policy.tokenization, 16) == []
    checked.sync(policy)
    checked.sample([Prompt("Why?")] * 3, SPEC)
    assert found[0]["tokens"] == 16


def test_an_agreement_is_judged_by_mean_and_maximum_and_no_number_breaks_it():
    gaps = np.array([0.0, 0.1, 0.2, 0.5])
    found = Agreement.of(gaps, 0.7)
    assert (found.tokens, found.mean, found.max) == (4, 0.2, 0.5)
    assert found.p99 == pytest.approx(0.5 - 0.03 * 0.3)  # 0.97 of the way from the third to the fourth
    assert found.within(Limit(mean=0.2, max=0.5))
    assert not found.within(Limit(mean=0.19, max=9.0))
    assert not found.within(Limit(mean=9.0, max=0.49))
    assert not Agreement.of(np.array([0.0, math.nan]), 1.0).within(LIMITS["bfloat16"])


def test_adapters_are_in_the_weights_that_a_sampler_gets(onednn, sampler, llama_folder):
    """Trained adapters sample as the trainer scores; with them off, as the policy was before."""
    policy = TransformersPolicy.load(llama_folder(0), template=Template())
    policy.adapt(LoraSettings(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    texts = []
    for synced in (policy, policy.before_adapting()):
        found = []
        checked = CheckedSampler(sampler, "float32", CONTEXT, note=found.append)
        checked.sync(synced)
        texts.append([reply.token_ids for row in checked.sample(PROMPTS, SPEC) for reply in row.responses])
        assert found[0]["max"] < 1e-4  # the adapters' product is added to the weights, and to the states in the trainer
    assert texts[0] != texts[1]


class CountingMerged:
    """A policy that counts how many of the merged matrices of a sync are alive when the next one is handed out."""

    def __init__(self, policy: TransformersPolicy) -> None:
        self.tokenization = policy.tokenization
        self._policy = policy
        self.alive: list[int] = []

    def state(self):
        own = {weight.data_ptr() for weight in self._policy.model.state_dict().values()}
        merged = []
        for name, value in self._policy.state():
            if value.data_ptr() not in own:
                merged.append(weakref.ref(value))
            self.alive.append(sum(reference() is not None for reference in merged))
            yield name, value


def test_a_sync_of_adapters_holds_few_merged_matrices(sampler, llama_folder):
    """All 14 at once would be a second copy of the model."""
    policy = TransformersPolicy.load(llama_folder(0), template=Template())
    policy.adapt(LoraSettings(rank=4), seed=0)
    counting = CountingMerged(policy)
    sampler.sync(counting)
    # One that is copied and the next; vLLM keeps those of one fused layer (query, key, value) until it has all of them.
    assert 1 <= max(counting.alive) <= (2 if isinstance(sampler, TransformersSampler) else 4)


def test_a_sync_refuses_weights_that_do_not_fit(policy):
    """A copy would spread a narrower tensor over a wider one, and would leave what is missing as it was."""
    sampler = TransformersSampler(policy, max_model_len=256)
    weights = dict(policy.state())
    name = "model.layers.0.mlp.up_proj.weight"
    narrow, missing = {**weights, name: weights[name][:1]}, {key: w for key, w in weights.items() if key != name}
    for wrong in (narrow, missing):
        policy.state = lambda wrong=wrong: iter(wrong.items())
        with pytest.raises(AssertionError, match=name):
            sampler.sync(policy)
