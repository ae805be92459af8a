"""Test the cost of a row (each stage that its trained policy needs, once) and the peak memory of each stage alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines.dpo_settings import DPOSettings
from baselines.ppo_settings import PPOSettings
from baselines.sft_settings import SFTSettings
from baselines.vcb_settings import VCBSettings
from rrhf_bench.jsonl import write_jsonl
from rrhf_bench.pipeline import memory, run_folder, scheduler, stages
from rrhf_bench.pipeline.costs import StageCost
from rrhf_bench.pipeline.results import STAGE_PEAK, Cost, Row
from rrhf_bench.pipeline.stage_context import Job
from rrhf_bench.pipeline.stage_graph import Plan, Stage, make_plan
from rrhf_bench.pipeline.store import TIMING, Store, with_checksum
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.methods import MethodSettings
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.training.method import TrainInputs, TrainResult
from rrhf_bench.training.rrhf_settings import RRHFSettings

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MIB = 2**20

EXPERIMENT = """
extends = "{world}"
worlds = []
seeds = [0, 1]

[policies.raw]
source = "toy-raw"

[policies.chosen_sft]
source = "methods.sft"

[judge]
source = "toy"

[sampling]
backend = "transformers"

[sources.teacher]
model = "ppo"
strategy = "sample"
n = 2
temperature = 1.0

[sources.raw]
model = "raw"
strategy = "sample"
n = 1
temperature = 1.0

[sources.given_sft]
model = "chosen_sft"
strategy = "sample"
n = 1
temperature = 1.0

[methods.sft]

[methods.ppo]

[methods.dp]
kind = "rrhf"
candidates = { recipe = "DP" }

[methods.ip3]
kind = "rrhf"
candidates = { recipe = "IP-3" }

[methods.sft_p]
kind = "rrhf"
initial = "chosen_sft"
candidates = { recipe = "P" }

[methods.two]
kind = "rrhf"
candidates = { sources = ["given_sft", "raw"] }

[methods.wombat]
kind = "rrhf"
candidates = { recipe = "SP", n = 1, sources = ["teacher", "chosen", "raw", "model"], scored_by = "judge" }

[methods.best_of_n]
n = 4
"""
IP2 = """
[methods.ip2]
kind = "rrhf"
candidates = { recipe = "IP-2" }
"""

# (seconds, tokens sampled, optimiser steps) of the train stages by name; seed 1 takes 2 seconds more.
TRAINED = {
    "sft": (30.0, 0, 6),
    "ppo": (70.0, 900, 16),
    "dp": (20.0, 0, 6),
    "round 1 of ip3": (20.0, 0, 6),  # "dp" when that row comes first: one stage, one key
    "round 2 of ip3": (21.0, 0, 6),
    "ip2": (21.0, 0, 6),  # likewise "round 2 of ip3"
    "ip3": (22.0, 0, 6),
    "sft_p": (20.0, 0, 6),
    "two": (10.0, 0, 6),
    "wombat": (15.0, 0, 6),
}
# A sample stage takes 8 seconds and draws 100 tokens, a score stage 4, a judge stage 1, scores of the pairs 2. All
# other stages, and a train stage beside its method, take so long that any sum that holds them shows it.
SECONDS = {"sample": 8.0, "score": 4.0, "judge": 1.0, "score pairs": 2.0}
ELSE, TOKENS, PEAK_MIB = 1e6, 100, 512.0


@dataclass(frozen=True)
class Made:
    """What load_run finds of the costs of a run."""

    costs: dict[Row, Cost]
    before: dict[Row, StageCost]
    trials: dict[str, Cost]

    def seed(self, row: str, seed: int = 0) -> tuple[float, int, int]:
        cost = self.costs[row, seed]
        return cost.seconds, cost.sampled_tokens, cost.steps


def make_run(folder: Path, toml: str) -> Made:
    """Plan an experiment, write artifacts with the costs above, and read them as load_run does."""
    path = folder / "costs.toml"
    path.write_text(toml.replace("{world}", str(ROOT / "experiments" / "world.toml")))
    experiment = load_experiment(path)
    plan, store = make_plan(experiment), Store(folder / "store")
    for stage in plan.stages:
        with store.new_artifact(stage.key, {}) as artifact:
            _write(stage, artifact)
    opened = run_folder._Run(folder, store, run_folder._run_json(plan, "run"))
    return Made(*run_folder._costs(opened, experiment, _trained(plan), {}))


def _write(stage: Stage, artifact: Path) -> None:
    timing = {"seconds": SECONDS.get(stage.kind, ELSE), STAGE_PEAK: PEAK_MIB}
    if stage.kind == "train":
        name = stage.name.removeprefix("train ").rsplit(", seed")[0]
        seconds, tokens, steps = TRAINED[name]
        timing |= {"train": seconds + 2 * (stage.seed or 0), "curve": [[0.0, 0.0], [1.0, seconds]]}
        sampled = {"sampled_tokens": tokens, "sampled_replies": tokens // TOKENS}
        sampled |= {"trained_tokens": 50, "forwarded_tokens": 7, "parameters": 10}
        (artifact / "about.json").write_text(json.dumps({**sampled, "steps": steps, "counts": {}}))
    if stage.kind in ("sample", "score", "score pairs", "judge"):
        reply = Response(" x", "model", token_ids=(1,) * TOKENS)
        write_jsonl(artifact / "candidates.jsonl", [Candidates(Prompt("\n\nHuman: Hi\n\nAssistant:"), (reply,))])
    (artifact / TIMING).write_text(json.dumps(with_checksum(timing)))


def _trained(plan: Plan) -> dict[Row, str]:
    evaluated = [stage for stage in plan.wanted if "trained" in stage.inputs]
    return {(stage.row or "", stage.seed or 0): stage.inputs["trained"].key for stage in evaluated}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("costs"), EXPERIMENT + IP2)


def test_a_method_that_samples_nothing_before_it_trains_costs_its_training(made: Made) -> None:
    assert made.seed("sft") == (30.0, 0, 6)
    assert made.seed("ppo") == (70.0, 900, 16)
    assert made.before["ppo", 0] == StageCost(0.0)


def test_dp_is_charged_for_its_search_and_scores(made: Made) -> None:
    """Search 8, scores 4, scores of the pairs 2, training 20. Both seeds share the search, and each is charged."""
    assert made.seed("dp") == (34.0, 100, 6)
    assert made.seed("dp", 1) == (36.0, 100, 6)
    assert made.before["dp", 0] == StageCost(14.0, 100, 1, 2, 0, 0, 100)


def test_rounds_are_summed(made: Made) -> None:
    """A round after the first adds a sample of 8, its scores of 4, and its training of 21 or 22; the pairs count once.

    ip2: 34 + 33 = 67, ip3: 67 + 34 = 101. In seed 1 each train stage takes 2 seconds more.
    """
    assert made.seed("ip2") == (67.0, 200, 12)
    assert made.seed("ip3") == (101.0, 300, 18)
    assert made.seed("ip3", 1) == (107.0, 300, 18)
    assert made.before["ip3", 0] == StageCost(79.0, 300, 3, 4, 12, 2 * 50, 300 + 2 * 7)


def test_rounds_are_summed_where_no_other_row_holds_them(tmp_path: Path) -> None:
    """The same 101 seconds without the rows dp and ip2, and of these only the scores of the pairs are shared."""
    toml = EXPERIMENT.replace('[methods.dp]\nkind = "rrhf"\ncandidates = { recipe = "DP" }\n', "")
    alone = make_run(tmp_path, toml)
    assert alone.seed("ip3") == (101.0, 300, 18)
    assert alone.costs["ip3", 0].shared_seconds == 2.0


def test_a_row_is_charged_for_the_training_of_its_teacher(made: Made) -> None:
    """PPO's training 70 (900 tokens), three samples of 8 (100 tokens: teacher, raw, own), the judge 1, training 15.

    The judge scores the data set's reply too, so the reward model's scores of the pairs are not charged.
    """
    assert made.seed("wombat") == (110.0, 1200, 22)
    assert made.before["wombat", 0] == StageCost(95.0, 1200, 12, 9, 16, 50, 300 + 7)


def test_an_initial_policy_that_is_a_row_is_given(made: Made) -> None:
    """sft_p starts from sft: scores of the pairs 2, training 20. two samples it: 2 x (8 + 4) and training 10."""
    assert made.seed("sft_p") == (22.0, 0, 6)
    assert made.seed("two") == (34.0, 200, 6)


def test_shared_stages_are_charged_to_each_row_and_marked(made: Made) -> None:
    """dp: all of it is in ip2 and ip3. ip2: its 67 are in ip3. ip3: 67 of its 101. wombat: its teacher's 70, and the
    sample of raw (8), which two draws as well."""
    shared = {row: cost.shared_seconds for (row, seed), cost in made.costs.items() if seed == 0}
    assert shared == {
        "sft": 0.0, "ppo": 70.0, "dp": 34.0, "ip2": 67.0, "ip3": 67.0, "sft_p": 2.0, "two": 8.0, "wombat": 78.0,
    }  # fmt: skip


def test_flops_are_six_a_trained_and_two_a_forwarded_token_and_parameter(made: Made) -> None:
    """A train stage trains on 50 tokens and forwards 7, a sample stage forwards 100; the policy has 10 parameters.

    sft: 10 x (6 x 50 + 2 x 7) = 3140. ip3: three train stages and three searches, 10 x (6 x 150 + 2 x 321) = 15420.
    """
    assert made.costs["sft", 0].flops == 3140.0
    assert made.costs["ip3", 0].flops == 15420.0
    assert made.costs["ip3", 0].tflops == 15420e-12


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (SFTSettings(), 0),
        (DPOSettings(), 6),  # the reference reads the pair
        (RRHFSettings(), 7),  # the reward model reads the candidates
        (RRHFSettings(candidates={"scored_by": "judge"}), 0),
        (VCBSettings(), 14),  # reference and reward model read the candidates
        (RRHFSettings(candidates={"refresh": 2}), 2000),  # the policy writes the samples, the reward model reads them
        (RRHFSettings(candidates={"refresh": 2, "reward_kl": 0.1}), 3000),
        (PPOSettings(), 3000),  # policy, reference, reward model
        (PPOSettings(value="separate"), 4000),
    ],
    ids=["sft", "dpo", "rrhf", "rrhf, judged", "vcb", "op-2", "op-2+kl", "ppo", "ppo with a value model"],
)
def test_tokens_are_forwarded_once_for_each_model_that_reads_them(
    policy: TransformersPolicy, settings: MethodSettings, tokens: int
) -> None:
    """The pair has 3 + 1 tokens and an end of each reply. The candidates have 3 + 3 and one end, for one was cut."""
    prompt = Prompt("\n\nHuman: Hi\n\nAssistant:")
    candidates = Candidates(prompt, (Response(" It is", "chosen"), Response(" bread", "model", "length")))
    inputs = TrainInputs([Preference(prompt, " It is", " H")], [candidates])
    assert stages._forwarded_tokens(settings, inputs, policy, TrainResult(4, sampled_tokens=1000)) == tokens


def test_a_row_that_trains_nothing_has_no_cost(made: Made) -> None:
    assert ("best_of_n", 0) not in made.costs
    assert {cost.train_peak_mib for cost in made.costs.values()} == {PEAK_MIB}


def peak_of(name: str, body: Callable[[Job], None], store: Store, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """Make a stage in this process and return the peak that its timing.json holds."""
    monkeypatch.setitem(stages.BODIES, "data", body)
    stage = Stage(name, "data", {"name": name}, {}, "")
    assert scheduler.make(stage, store, RuntimeSettings(device="cpu"), "transformers", lambda *_: None) is not None
    return json.loads((store.folder(stage.key) / TIMING).read_text())[STAGE_PEAK]


def allocate_300_mib(job: Job) -> None:
    np.ones(300 * MIB, dtype=np.uint8)  # written, so resident; freed when the stage ends


@pytest.mark.skipif(not memory.reset_peak(CPU), reason="this system cannot reset the peak of a process")
def test_a_small_stage_after_a_large_one_has_its_own_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak that is never reset would give both stages the 300 MiB of the first."""
    store = Store(tmp_path)
    large = peak_of("large", allocate_300_mib, store, monkeypatch)
    small = peak_of("small", lambda job: None, store, monkeypatch)
    assert large is not None
    assert small is not None
    assert 250 < large - small < 350
    assert small > 0


def test_a_peak_that_cannot_be_reset_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert not memory.reset_peak(CPU)
    assert peak_of("stage", lambda job: None, Store(tmp_path), monkeypatch) is None


def test_a_status_without_a_peak_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 1024 kB\n")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert not memory.reset_peak(CPU)
