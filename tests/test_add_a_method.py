"""The methods of docs/add_a_method.md work as a package of their own."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Cli

from rrhf_bench.errors import ConfigError
from rrhf_bench.registry import METHODS
from rrhf_bench.settings.reading import load_experiment

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(?:python|toml)\n# (?P<name>\S+\.(?:py|toml))\n(?P<text>.*?)```", re.S)
SMALL = """
[data]
train_prompts = 12
toy = { raw_corpus = 40, corpus = 60, perplexity_corpus = 40, preferences = 80 }
[evaluation]
prompts = 8
pairs = 12
dev_prompts = 4
curve_points = 1
max_new_tokens = 16
pool_prompts = 2
pool_samples = 4
[sampling]
max_new_tokens = 16
backend = "transformers"
[runtime]
workers = 1
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page's files, and an experiment with the page's rows in a world that takes seconds."""
    folder = tmp_path_factory.mktemp("author")
    blocks = {m["name"]: m["text"] for m in BLOCK.finditer((ROOT / "docs" / "add_a_method.md").read_text("utf-8"))}
    for name, text in blocks.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    rows = blocks["my_experiment.toml"][blocks["my_experiment.toml"].index("[methods") :]
    rows = rows.replace("epochs = 1", "epochs = 1\nbatch_prompts = 4")  # several steps
    (folder / "small.toml").write_text(SMALL + rows, encoding="utf-8")
    return folder


@pytest.fixture
def folder(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the page's folder as the working directory, from which Python imports."""
    monkeypatch.chdir(written)
    monkeypatch.syspath_prepend(written)
    return written


def test_the_methods_of_the_page_run_to_their_report(folder: Path, cli: Cli) -> None:
    done = cli("run", "small.toml")
    assert done.code == 0, done.err
    made = folder / "runs" / "small"
    table = (made / "report" / "tables" / "main.md").read_text(encoding="utf-8")
    assert all(f"| {row} |" in table for row in ("base", "my_dpo", "my_reinforce"))
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = {name: [line for line in lines if line["method"] == name] for name in ("my_dpo", "my_reinforce")}
    assert logged["my_dpo"][0]["loss"] == pytest.approx(0.693147, abs=1e-4)  # log 2: the policy is the reference
    assert logged["my_dpo"][-1]["loss"] != logged["my_dpo"][0]["loss"]
    assert len(logged["my_reinforce"]) == 3
    assert logged["my_reinforce"][0]["val/ratio_deviation"] < 1e-5
    figures = "".join(path.read_text(encoding="utf-8") for path in (made / "report" / "figures").glob("*.svg"))
    assert "#e69f00" in figures.lower()
    assert "#56b4e9" in figures.lower()


def test_the_method_of_the_page_conforms_and_a_broken_one_does_not(folder: Path) -> None:
    broken = folder / "broken_methods"
    broken.mkdir()
    for path in (folder / "my_methods").glob("*.py"):
        text = path.read_text(encoding="utf-8").replace("my_methods", "broken_methods")
        text = text.replace("(chosen_B - ref_chosen_B)", "(ref_chosen_B - chosen_B)")
        (broken / path.name).write_text(text, encoding="utf-8")
    importlib.import_module("my_methods.test_dpo").test_it_conforms()
    with pytest.raises(AssertionError, match="fails prefers_the_better_reply"):
        importlib.import_module("broken_methods.test_dpo").test_it_conforms()


def test_the_experiment_of_the_page_plans(folder: Path, cli: Cli) -> None:
    (folder / "experiments").symlink_to(ROOT / "experiments")
    stages = [stage["name"] for stage in cli("plan", "my_experiment.toml", "--json").json["stages"]]
    assert {"train my_dpo, seed 0", "train my_reinforce, seed 0"} <= set(stages)
    assert "log-probs of the training pairs under policy" in stages


BROKEN = replace(METHODS["sft"], settings="nowhere:Settings")  # a method whose settings are not where it says


@pytest.mark.parametrize(
    "kind",
    ["nowhere:DPO", "rrhf_bench.registry:NOTHING", "rrhf_bench.registry:METHODS", "tests.test_add_a_method:BROKEN"],
)
def test_an_address_without_a_method_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(f'[methods.mine]\nkind = "{kind}"\n')
    with pytest.raises(ConfigError, match=r"methods\.mine\.kind: found '" + kind):
        load_experiment(path, [])
