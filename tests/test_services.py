"""A process holds the models of its present stage and a few of the stages before it, however many stages it makes."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf_bench.pipeline import services
from rrhf_bench.pipeline.scheduler import run_plan
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.pipeline.stage_graph import Plan, Stage, make_plan
from rrhf_bench.pipeline.store import Store
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Prompt
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.sync_check import LIMITS
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.reading import load_experiment

WORLD = Path(__file__).parents[1] / "experiments" / "world.toml"
EXPERIMENT = f"""
name = "rounds"
extends = {json.dumps(str(WORLD))}
worlds = []
seeds = [0]
[data]
train_prompts = 8
toy = {{ raw_corpus = 40, corpus = 40, perplexity_corpus = 40, preferences = 60 }}
[policy.scratch]
vocabulary = 300
hidden = 32
layers = 1
heads = 1
ffn = 16
raw_epochs = 1
[perplexity_model.scratch]
vocabulary = 300
hidden = 32
layers = 1
heads = 1
ffn = 16
epochs = 1
[reward_model.training]
epochs = 1
[sampling]
backend = "transformers"
max_new_tokens = 4
[candidates]
recipe = "SP"
n = 2
[methods.row]
kind = "rrhf"
candidates = {{ rounds = 10 }}
epochs = 1
[evaluation]
prompts = 4
pairs = 4
dev_prompts = 4
decoding = ["greedy"]
curve_points = 1
max_new_tokens = 4
pool_prompts = 4
pool_samples = 2
[runtime]
device = "cpu"
workers = 1
"""


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[TransformersPolicy]:
    """Return the policies that exist, the perplexity model and the copies that samplers hold among them."""
    found: weakref.WeakSet[TransformersPolicy] = weakref.WeakSet()
    made = TransformersPolicy.__init__

    def register(self: TransformersPolicy, *arguments: Any) -> None:
        found.add(self)
        made(self, *arguments)

    monkeypatch.setattr(TransformersPolicy, "__init__", register)
    return found


class Counting:
    """A Reporter that notes how many policies exist when a round has been trained."""

    def __init__(self, living: weakref.WeakSet[TransformersPolicy]) -> None:
        self.living = living
        self.counts: list[int] = []

    def reused(self, stage: Stage) -> None: ...

    def started(self, stage: Stage) -> None: ...

    def progress(self, name: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def finished(self, stage: Stage, seconds: float | None) -> None:
        if stage.kind == "train":
            self.counts.append(len(self.living))


@pytest.mark.parametrize(("device", "rounds"), [("cpu", 5), ("cuda", 3)])
def test_rounds_of_sampling_and_training_hold_no_more_models(
    tmp_path: Path,
    living: weakref.WeakSet[TransformersPolicy],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    rounds: int,
) -> None:
    """Each round samples from the policy of the round before it, which is then of no more use."""
    idle = services.IDLE_MODELS[device]
    monkeypatch.setitem(services.IDLE_MODELS, "cpu", idle)
    file = tmp_path / "rounds.toml"
    file.write_text(EXPERIMENT)
    plan = make_plan(load_experiment(file, [f"methods.row.candidates.rounds={rounds}"]))
    (wanted,) = [stage for stage in plan.wanted if stage.name.startswith("evaluate row")]
    reporter = Counting(living)
    run_plan(Plan(plan.experiment, plan.backend, (wanted,)), Store(tmp_path / "store"), reporter)
    assert len(reporter.counts) == rounds
    assert max(reporter.counts) <= 1 + idle, reporter.counts  # the sampler's copy is in use
    assert len({*reporter.counts[2:]}) == 1, reporter.counts


def test_a_stage_keeps_what_it_uses_and_drops_the_least_recently_used(
    llama_folder: Callable[[int], Path], living: weakref.WeakSet[TransformersPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(services.IDLE_MODELS, "cpu", 1)
    models, refs = Services(RuntimeSettings(device="cpu")), [ModelRef(str(llama_folder(seed))) for seed in range(3)]
    first, second, third = map(weakref.ref, map(models.fixed_policy, refs))
    assert [policy() for policy in (first, second, third)] == [models.fixed_policy(ref) for ref in refs]
    models.begin_stage()
    models.fixed_policy(refs[0])
    trained = models.policy(refs[1])  # third is the one that may stay
    assert [policy() is not None for policy in (first, second, third)] == [True, False, True]
    assert models.fixed_policy(refs[2]) is third()
    models.sampler(trained, refs[1], "transformers")
    models.begin_stage()
    models.make_room()
    assert [policy() is not None for policy in (first, third)] == [False, False]
    del trained
    assert len(living) == 1  # the sampler's copy


def test_a_policy_with_a_cue_finds_it_behind_every_prompt(llama_folder, tmp_path):
    prompt = Prompt("\n\nHuman: Hi\n\nAssistant:")
    ModelRef(str(llama_folder(0)), cue=" Well:").write(tmp_path)
    services, ref = Services(RuntimeSettings(device="cpu")), ModelRef.read(tmp_path)
    policy, plain = services.policy(ref), services.policy(ModelRef(str(llama_folder(0))))
    ids = policy.tokenization.prompt_ids(prompt)
    assert ids == plain.tokenization.prompt_ids(Prompt(prompt.text + " Well:"))
    assert ids == plain.with_cue(" Well:").tokenization.prompt_ids(prompt) != plain.tokenization.prompt_ids(prompt)
    assert policy.tokenization.end_ids == plain.with_cue(" Well:").tokenization.end_ids == plain.tokenization.end_ids
    rows = services.sampler(policy, ref, "transformers").sample([prompt], SamplingSpec(1, 0.0, 8, seed=0, purpose="x"))
    marked = services.sampler(plain, ref, "transformers").sample(
        [Prompt(prompt.text + " Well:")], SamplingSpec(1, 0.0, 8, seed=0, purpose="x")
    )
    assert rows[0].prompt == prompt
    assert rows[0].responses == marked[0].responses


def test_under_autocast_a_sampler_is_held_to_bfloat16(llama_folder):
    services = Services(RuntimeSettings(device="cpu", autocast="bfloat16"))
    ref = ModelRef(str(llama_folder(0)))
    policy = services.policy(ref)
    assert policy.model.dtype == torch.float32
    found = []
    sampler = services.sampler(policy, ref, "transformers", note=found.append)
    (row,) = sampler.sample([Prompt("\n\nHuman: Hi\n\nAssistant:")], SamplingSpec(2, 1.0, 8, seed=0, purpose="test"))
    assert len(row.responses) == 2
    assert found[0]["limit"] == asdict(LIMITS["bfloat16"])
    assert LIMITS["float32"].mean < found[0]["mean"] < LIMITS["bfloat16"].mean
