"""On a CUDA GPU: vLLM against the trainer in float32 and bfloat16, before and after a sync, and a cut of hh_compare_gpu
from the command line to its report, on models that the test makes. `make gpu-check` runs them. Without vLLM only the
cut runs; scripts/gpu_check.py checks what needs none.

RRHF_BENCH_TEST_DEVICE=cpu runs the same tests on a CPU (`pytest -m gpu`), to check the tests themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer

from rrhf_bench.data.dialogue import Template
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import SamplingSpec

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]

# Of one token's log-prob, sampler against trainer: largest and mean. On a CPU 3e-6 and 5e-7 are seen in float32, where
# two kernels sum in two orders, and 0.04 and 0.008 in bfloat16, whose 8 bits round a logit of 4 in steps of 1/32; a
# GPU's fused kernels are given some times that. Other weights are 4 and 1 apart, a stale cache 3.7 and 0.7: both show.
LIMIT = {"float32": 1e-4, "bfloat16": 0.15}
MEAN_LIMIT = {"float32": 1e-5, "bfloat16": 0.02}

# Longer than a cache block on any device: a stale prefix shows on such prompts only.
LONG = "\n\nHuman: " + "How do I bake bread when the flour is old and the oven is slow? " * 6 + "\n\nAssistant:"
PROMPTS = [Prompt(LONG), Prompt("\n\nHuman: What is a glacier?\n\nAssistant:"), Prompt(LONG.replace("bread", "cake"))]
SPEC = SamplingSpec(n=4, temperature=1.0, max_new_tokens=32, seed=7, purpose="test", logprobs=True)


@pytest.fixture(scope="module")
def device() -> str:
    wanted = os.environ.get("RRHF_BENCH_TEST_DEVICE", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    return wanted


@pytest.fixture(params=["float32", "bfloat16"], scope="module")
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def load(device, dtype, llama_folder):
    """The random Llama of a seed, on the device and in the dtype under test."""

    def load(seed: int) -> TransformersPolicy:
        kind = getattr(torch, dtype)
        return TransformersPolicy.load(llama_folder(seed), template=Template(), device=device, dtype=kind)

    return load


@pytest.fixture(scope="module")
def engine(load, device, dtype, llama_folder):
    if choose_backend("vllm", device=device).name != "vllm":
        pytest.skip("no vLLM for this device here")
    from rrhf_bench.sampling.vllm import VLLMSampler

    return VLLMSampler(
        llama_folder(0),
        load(0).tokenization,
        max_model_len=512,
        device=device,
        dtype=dtype,
        kv_cache_mib=32,
        gpu_memory=0.1,
    )


def differences(sampler, policy: TransformersPolicy, temperature: float, seed: int = 7) -> torch.Tensor:
    """|log-prob of the sampler - log-prob of the trainer| of every sampled token."""
    found = []
    for row in sampler.sample(PROMPTS, replace(SPEC, temperature=temperature, seed=seed)):
        pairs = [(policy.tokenization.prompt_ids(row.prompt), reply.token_ids) for reply in row.responses]
        with torch.no_grad():
            logp_BT = policy.token_logprobs(ResponseBatch.of_pairs(pairs, temperature)).cpu()
        for reply, logp_T in zip(row.responses, logp_BT, strict=True):
            found.append((torch.tensor(reply.logprobs) - logp_T[: len(reply.logprobs)]).abs())
    return torch.cat(found)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_the_trainers_before_and_after_a_sync(engine, load, dtype, temperature):
    for seed in (0, 1):
        policy = load(seed)
        engine.sync(policy)
        found = differences(engine, policy, temperature)
        assert found.max() < LIMIT[dtype]
        assert found.mean() < MEAN_LIMIT[dtype]


def test_the_canary_sees_a_missed_sync(engine, load, dtype):
    engine.sync(load(0))
    assert differences(engine, load(1), 1.0).max() > 2 * LIMIT[dtype]


def test_the_canary_sees_a_missed_cache_reset(engine, load, dtype):
    engine.sync(load(0))
    differences(engine, load(0), 1.0)  # fills the prefix cache with this policy's states
    other = load(1)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": other.state()})
    stale = differences(engine, other, 1.0)
    engine.sync(other)
    fresh = differences(engine, other, 1.0)
    assert stale.mean() > 3 * fresh.mean()
    assert fresh.max() < LIMIT[dtype] < stale.max()


def test_the_canary_sees_a_temperature_that_was_not_applied(engine, load, dtype):
    policy = load(0)
    engine.sync(policy)
    rows = engine.sample(PROMPTS, SPEC)
    pairs = [(policy.tokenization.prompt_ids(row.prompt), reply.token_ids) for row in rows for reply in row.responses]
    replies = [reply for row in rows for reply in row.responses]
    with torch.no_grad():
        logp_BT = policy.token_logprobs(ResponseBatch.of_pairs(pairs, temperature=0.7)).cpu()
    found = [torch.tensor(r.logprobs) - logp_T[: len(r.logprobs)] for r, logp_T in zip(replies, logp_BT, strict=True)]
    assert torch.cat(found).abs().mean() > 3 * MEAN_LIMIT[dtype]


def test_seeds_belong_to_requests(engine, load):
    """The same prompts give the same samples again, and the samples of one prompt differ."""
    engine.sync(load(0))
    first, again = (engine.sample(PROMPTS, SPEC) for _ in range(2))
    assert [[r.token_ids for r in row.responses] for row in first] == [
        [r.token_ids for r in row.responses] for row in again
    ]
    assert len({reply.token_ids for reply in first[0].responses}) == SPEC.n


def test_a_cut_of_hh_compare_gpu(device, tmp_path):
    """Policy, reward model and judge of fluency are folders made here; the way to the report is the user's own."""
    write_dialogues(tmp_path / "pairs.jsonl")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    write_causal(tmp_path / "policy", tokenizer, seed=0)
    write_causal(tmp_path / "judge", tokenizer, seed=1)
    write_classifier(tmp_path / "reward", tokenizer)
    (tmp_path / "cut.toml").write_text(
        f'extends = "{ROOT / "experiments" / "hh_compare_gpu.toml"}"\n'
        + cut(tmp_path, "bfloat16" if device == "cuda" else "float32", device)
    )
    command = [sys.executable, "-m", "rrhf_bench.cli", "run", "cut.toml", "--runs", "runs", "--json"]
    path = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    page = (tmp_path / said["report"]).read_text()
    trained = ("sft", "rrhf", "rrhf_official", "rrhf_samples_only", "rrhf_permuted", "ppo")
    for row in ("base", "best_of_n", *trained, "base_cooler", "chosen", "rejected"):
        assert f"| {row} |" in page
    lines = [json.loads(line) for line in (tmp_path / said["run"] / "metrics.jsonl").read_text().splitlines()]
    ppo = [line for line in lines if line["method"] == "ppo"]
    limit = LIMIT["bfloat16" if device == "cuda" else "float32"]
    # Before a rollout's first update the ratio is 1, and the engine's log-probs are the trainer's.
    assert max(line["val/ratio_deviation"] for line in ppo) < limit
    assert max(line["sampling/sampling_logp_difference/mean"] for line in ppo) < limit / 5


def cut(folder: Path, dtype: str, device: str) -> str:
    """What differs from hh_compare_gpu: models, data and sizes."""
    return f"""
name = "cut"
seeds = [0]
data = {{ source = "files", path = "{folder / "pairs.jsonl"}", train_prompts = 64 }}
policy = {{ source = "{folder / "policy"}", dtype = "{dtype}", max_length = 256 }}
reward_model = {{ source = "{folder / "reward"}" }}
perplexity_model = {{ source = "{folder / "judge"}", pad_token = "<pad>" }}
sampling = {{ max_new_tokens = 24 }}
candidates = {{ n = 2 }}
runtime = {{ device = "{device}", gpu_memory = 0.1 }}

[methods]
sft = {{ epochs = 1 }}
rrhf = {{ epochs = 1 }}
rrhf_official = {{ epochs = 1 }}
rrhf_samples_only = {{ epochs = 1 }}
rrhf_permuted = {{ epochs = 1 }}
ppo = {{ iterations = 3, rollouts = 32, minibatch = 16, update_epochs = 2 }}

[evaluation]
prompts = 32
pairs = 48
dev_prompts = 16
curve_points = 2
max_new_tokens = 24
pool_prompts = 8
pool_samples = 8
"""


def write_dialogues(path: Path) -> None:
    """160 pairs of distinct prompts."""
    things = ("bread", "soup", "tea", "a kite", "a chair", "a fire", "a poem", "a garden")
    rows = []
    for i in range(160):
        prompt = f"\n\nHuman: How do I make {things[i % 8]}, step {i}?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} First, mix {i} cups of flour.", "rejected": f"{prompt} I do not know."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_causal(folder: Path, tokenizer, seed: int) -> None:
    make_llama(tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_classifier(folder: Path, tokenizer) -> None:
    """A random body with one random label: its scores differ from reply to reply, which is all that is asked of it."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
