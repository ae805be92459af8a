"""[tune]: equal numbers of trials, a stage that picks among them on the dev prompts, and seeds that follow the pick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from rrhf_bench.errors import ConfigError
from rrhf_bench.jsonl import write_jsonl
from rrhf_bench.pipeline import stages
from rrhf_bench.pipeline.results import TUNED
from rrhf_bench.pipeline.scheduler import _is_lost
from rrhf_bench.pipeline.services import ModelRef
from rrhf_bench.pipeline.stage_context import Job
from rrhf_bench.pipeline.stage_graph import Plan, make_plan
from rrhf_bench.records import CurvePoint
from rrhf_bench.settings.reading import load_experiment

SMOKE = Path(__file__).parents[1] / "experiments" / "smoke.toml"
TUNE = ("tune.rrhf.lr=[0.001,0.01]", "tune.rrhf.rank_weight=[0.5,1.0]", "seeds=[0,1]")


def plan(*overrides: str) -> Plan:
    return make_plan(load_experiment(SMOKE, overrides))


def test_a_trial_is_the_row_with_other_settings_and_later_seeds_wait_for_the_pick() -> None:
    tuned = {stage.name: stage for stage in plan(*TUNE).stages}
    plain = {stage.name: stage for stage in plan("methods.rrhf.lr=0.01", "methods.rrhf.rank_weight=0.5").stages}
    assert tuned["train rrhf, trial 3, seed 0"].key == plain["train rrhf, seed 0"].key
    pick = tuned["tune rrhf, seed 0"]
    assert list(pick.inputs) == ["trial 1", "trial 2", "trial 3", "trial 4"]
    assert tuned["evaluate rrhf, seed 0"].inputs["trained"].key == pick.key
    later = tuned["evaluate rrhf, seed 1"].inputs["trained"]
    assert (later.kind, later.inputs["tuned"].key) == ("train", pick.key)
    assert "train rrhf, seed 0" not in tuned


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("tune.rrhff.lr=[0.1]", "tune.rrhff"),
        ("tune.best_of_n.n=[2,4]", "tune.best_of_n"),
        ("tune.rrhf.learning_rate=[0.1]", "tune.rrhf.learning_rate"),
        ("tune.rrhf.lr=[0.1,-1.0]", "tune.rrhf"),
        ("tune={rrhf={lr=[0.1,0.2]},sft={lr=[0.1]}}", "tune"),
        ("tune.rrhf.lr=[]", "tune.rrhf.lr"),
        ("tune.rrhf={}", "tune.rrhf"),
    ],
)
def test_each_fault_names_its_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(SMOKE, (override,))
    assert f": {key}: " in str(error.value)


def test_several_rounds_are_not_tuned() -> None:
    with pytest.raises(ConfigError, match=r"tune\.rrhf"):
        load_experiment(SMOKE, ("tune.rrhf.lr=[0.1,0.2]", 'methods.rrhf.candidates={recipe="IP-2"}'))


def trial(folder: Path, last: float, greedy: float = 9.0) -> Path:
    """Write what a train stage leaves: its sampled rewards end at ``last``, whatever they were before."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text(str(last))
    ModelRef("model", max_length=77).write(folder)
    points = [
        CurvePoint("rrhf", 0, decoding, fraction, 1, 0, (reward, reward), None)
        for fraction, ending in ((0.0, 5.0), (1.0, last))
        for decoding, reward in (("sample", ending), ("greedy", greedy))
    ]
    write_jsonl(folder / "curve.jsonl", points)
    return folder


def pick(folder: Path, rewards: dict[str, float]) -> dict[str, Any]:
    inputs = {role: trial(folder / role, reward) for role, reward in rewards.items()}
    out = folder / "out"
    out.mkdir()
    settings = {"trials": [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}], "decoding": "sample"}
    stages.tune(Job("tune", settings, inputs, out, cast(Any, None), "transformers", lambda done, total: None))
    return {**json.loads((out / TUNED).read_text()), "out": out}


def test_the_trial_with_the_highest_last_reward_is_the_row(tmp_path: Path) -> None:
    found = pick(tmp_path, {"trial 1": 0.2, "trial 2": 0.4, "trial 3": 0.4})
    assert (found["role"], found["picked"], found["rewards"]) == ("trial 2", {"lr": 0.2}, [0.2, 0.4, 0.4])
    assert (found["out"] / "model" / "weights").read_text() == "0.4"
    ref = ModelRef.read(found["out"])
    assert (ref.source, ref.max_length) == (str(found["out"] / "model"), 77)


def test_a_trial_that_failed_leaves_the_others(tmp_path: Path) -> None:
    found = pick(tmp_path, {"trial 1": 0.2, "trial 3": 0.1})
    assert (found["role"], found["rewards"]) == ("trial 1", [0.2, None, 0.1])
    stage = next(stage for stage in plan(*TUNE).stages if stage.kind == "tune")
    keys = [needed.key for needed in stage.inputs.values()]
    assert not _is_lost(stage, keys[:3])
    assert _is_lost(stage, keys)
    assert _is_lost(stage.inputs["trial 1"], {next(iter(stage.inputs["trial 1"].inputs.values())).key})
