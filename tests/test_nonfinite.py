"""Rewards and weights that are not finite: one row fails, the other rows of the experiment go on.

The reward models here are real. The embeddings of some characters are infinite, so a reply that holds one of these
characters gets a score that is not finite.
"""

from __future__ import annotations

import copy
import json
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS, Cli

from baselines.best_of_n import BestOfN
from baselines.best_of_n_settings import BestOfNSettings
from baselines.ppo_settings import PPOSettings
from baselines.sft_settings import SFTSettings
from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError, Diverged
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.run_folder import load_run
from rrhf_bench.pipeline.services import DistinctTexts
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.rewards.checks import PROBES, check_pairs
from rrhf_bench.rewards.hub import ClassifierReward
from rrhf_bench.rewards.reward import RewardModel
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.sync_check import CheckedSampler
from rrhf_bench.sampling.transformers import TransformersSampler
from rrhf_bench.testing import FunctionReward
from rrhf_bench.training.method import TrainContext, TrainInputs

PROMPTS = [Prompt(f"\n\nHuman: question {i}\n\nAssistant:") for i in range(8)]
PAIRS = [Preference(prompt, " Yes, it is.", " No.") for prompt in PROMPTS]
SPEC = SamplingSpec(2, 1.0, 8, 0, "test")
CONTEXT = 128

# Characters that neither the data nor the texts of a reward model's own checks hold.
TOLD = [*TEXTS, *(p.prompt.text + p.response for p in PROBES), *(p.prompt.text + p.chosen for p in PAIRS)]
OVERFLOWING = sorted(set(string.printable) - set("".join(TOLD)) - set(string.whitespace))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reward_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for character in OVERFLOWING:
            (token,) = tokenizer(character, add_special_tokens=False)["input_ids"]
            model.get_input_embeddings().weight[token] = math.inf
    folder = tmp_path_factory.mktemp("reward")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reward(reward_folder: Path) -> ClassifierReward:
    return ClassifierReward.load(reward_folder)


def context(policy: TransformersPolicy, reward: RewardModel | None = None, **changes: Any) -> TrainContext:
    given: dict[str, Any] = {
        "seed": 0,
        "sampler": CheckedSampler(TransformersSampler(policy, max_model_len=CONTEXT), "float32", CONTEXT),
        "reward": reward,
        "reference": policy.frozen_copy(),
        "watch": lambda progress, policy: None,
        "log": lambda line: None,
        "max_new_tokens": 12,
        "stop": (),
    }
    return TrainContext(**{**given, **changes})


def test_a_reward_model_returns_what_it_computes(reward: ClassifierReward) -> None:
    scores = reward.score(PROMPTS[:3], [" Yes.", f" {OVERFLOWING[0]}", " No."])
    assert np.isfinite(scores).tolist() == [True, False, True]


def test_what_one_row_is_judged_by_diverges_and_what_rows_share_is_a_data_error(
    policy: TransformersPolicy, reward: ClassifierReward
) -> None:
    sampler = TransformersSampler(policy, max_model_len=CONTEXT)
    hot = {"sample": SamplingSpec(1, 5.0, 16, 0, "test")}
    with pytest.raises(Diverged, match=r"ppo, sample replies: .* of 8 rewards are not finite"):
        stage_helpers.evaluate("ppo", 0, sampler, PROMPTS, stage_helpers.Judges(reward), hot, policy, None)
    best = BestOfN(BestOfNSettings(n=4)).wrap(sampler, reward)
    with pytest.raises(Diverged, match=r"best_of_n: .* of 32 rewards are not finite"):
        best.sample(PROMPTS, hot["sample"])
    shared = [Candidates(PROMPTS[0], (Response(" Yes.", "model"), Response(f" {OVERFLOWING[0]}", "model")))]
    with pytest.raises(DataError, match=f"folder: 1 of 2 rewards are not finite, .*{PROMPTS[0].id}"):
        stage_helpers.score_shared_candidates(DistinctTexts(reward), shared, "folder")
    with pytest.raises(DataError, match="1 of 2 rewards are not finite"):
        check_pairs(reward, [Preference(PROMPTS[0], " Yes.", f" {OVERFLOWING[0]}")])


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_weights_that_are_not_finite_are_named_with_their_step(llama_folder: Callable[[int], Path], kind: str) -> None:
    """A step beyond float16, from a finite gradient. The loss of the next step would show it, but there may be none."""
    policy = TransformersPolicy.load(llama_folder(0), template=Template(), dtype=torch.float16)
    sampler = TransformersSampler(policy, max_model_len=CONTEXT)
    inputs, given = TrainInputs(preferences=PAIRS), context(policy, FunctionReward(len), sampler=sampler)
    trainers = {
        "sft": stage_helpers.trainer(SFTSettings(lr=1e6, warmup=0.0, epochs=1), CONTEXT),
        "ppo": stage_helpers.trainer(PPOSettings(lr=1e6, iterations=1, rollouts=8, minibatch=8), CONTEXT),
    }
    with pytest.raises(Diverged, match=r"weights are not finite after step 1 of \d") as caught:
        trainers[kind].fit(policy, inputs, given)
    assert len(caught.value.evidence) == 8


@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "its weights are not finite"), (3e38, "its weights are finite, but too large")]
)
def test_a_policy_of_nan_log_probs_is_named_and_leaves_the_engine_as_it_was(
    policy: TransformersPolicy, value: float, words: str
) -> None:
    sampler = CheckedSampler(TransformersSampler(policy, max_model_len=CONTEXT), "float32", CONTEXT)
    sampler.sync(policy)
    before = sampler.sample(PROMPTS, SPEC)
    broken = TransformersPolicy(copy.deepcopy(policy.model), policy.tokenization)
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(value)
    with pytest.raises(Diverged, match=words):
        sampler.sync(broken)
    sampler.sync(policy)
    assert sampler.sample(PROMPTS, SPEC) == before


EXPERIMENT = """
seeds = [3]
[data]
source = "files"
path = "{pairs}"
train_prompts = 16
[policy]
source = "{policy}"
scratch = {{ vocabulary = 300, hidden = 32, layers = 1, heads = 1, ffn = 64, epochs = 8, lr = 0.01 }}
[policies.half]
source = "{half}"
dtype = "float16"
[reward_model]
source = "{reward}"
[perplexity_model]
source = "scratch"
scratch = {{ vocabulary = 300, hidden = 32, layers = 1, heads = 1, ffn = 64, epochs = 1 }}
[sampling]
backend = "transformers"
max_new_tokens = 12
[methods.ppo]
iterations = 1
rollouts = 16
minibatch = 8
temperature = 10.0
[methods.online]
kind = "rrhf"
candidates = {{ recipe = "OP-2", temperature = 10.0 }}
epochs = 1
batch_prompts = 8
[methods.overflows]
kind = "sft"
initial = "half"
lr = 1e6
warmup = 0.0
[methods.sft]
epochs = 1
[evaluation]
temperature = 0.01
prompts = 6
pairs = 12
dev_prompts = 4
curve_points = 1
max_new_tokens = 12
pool_prompts = 2
pool_samples = 2
[runtime]
device = "cpu"
workers = 1
"""


Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(tmp_path: Path, cli: Cli) -> Run:
    """Return a function that runs the experiment and returns the exit code, the error lines and all printed text."""

    def run(**places: object) -> tuple[int, list[str], str]:
        lines = (
            {"prompt": f"\n\nHuman: question {i}\n\nAssistant:", "chosen": " Yes, it is.", "rejected": " No."}
            for i in range(60)
        )
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = tmp_path / "rows.toml"
        file.write_text(EXPERIMENT.format(pairs=pairs, **places))
        found = cli("run", file, "--runs", tmp_path / "runs")
        errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
        return found.code, errors, found.out + found.err

    return run


def test_rows_with_rewards_that_are_not_finite_fail_alone(
    tmp_path: Path, run: Run, reward_folder: Path, llama_folder: Callable[[int], Path]
) -> None:
    code, errors, printed = run(policy="scratch", half=llama_folder(0), reward=reward_folder)
    assert code == 2, printed
    assert len(errors) == 1
    assert "6 stages are missing" in errors[0]  # the training and the evaluation of each row that failed
    assert "Traceback" not in printed
    folder = tmp_path / "runs" / "rows"
    records = load_run(folder)
    assert set(records.failures) == {("ppo", 3), ("online", 3), ("overflows", 3)}
    assert "rewards are not finite" in records.failures["ppo", 3]
    assert "rewards are not finite" in records.failures["online", 3]
    assert "weights are not finite after step 1" in records.failures["overflows", 3]
    assert {"base", "sft"} <= {record.method for record in records.evaluated}
    assert "**ppo failed**" in (folder / "report" / "report.md").read_text()
    assert "ppo failed" in (folder / "report" / "tables" / "main.md").read_text()
    batches = [path.read_text() for path in (tmp_path / "runs" / "store" / "failed").glob("*/batch.jsonl")]
    assert [bool(batch) for batch in batches] == [True] * 3
    assert all(json.loads(line)["prompt"] for batch in batches for line in batch.splitlines())


def test_a_failure_that_all_rows_share_stops_the_run(
    tmp_path: Path, run: Run, llama_folder: Callable[[int], Path], tokenizer: Any, reward_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder(0))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    code, errors, printed = run(policy=tmp_path / "broken", half=llama_folder(0), reward=reward_folder)
    assert code == 2, printed
    assert len(errors) == 1
    assert "log-probs are NaN" in errors[0]
    assert not (tmp_path / "runs" / "rows" / "report").exists()
