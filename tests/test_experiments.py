"""Every embedded experiment from its file to its report, with everything that takes time made small."""

from __future__ import annotations

from pathlib import Path

import pytest

from rrhf_bench.pipeline.run_folder import load_run, open_run
from rrhf_bench.pipeline.scheduler import run_plan
from rrhf_bench.pipeline.stage_graph import make_plan
from rrhf_bench.pipeline.store import Store
from rrhf_bench.replication.sections import SECTIONS
from rrhf_bench.report.page import write_report
from rrhf_bench.settings.reading import load_experiment

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = (
    "main_table",
    "sampling_quality",
    "rank_ablation",
    "reward_model_accuracy",
    "online_sampling",
    "ppo_frontier",
    "imdb_sentiment",
    "wombat",
    "claims",
)

SMALL = """
worlds = [0, 1]
seeds = [0]
[data]
train_prompts = 32
toy = { raw_corpus = 600, corpus = 600, perplexity_corpus = 600, preferences = 600 }
[policy.scratch]
epochs = 1
raw_epochs = 1
[perplexity_model.scratch]
epochs = 1
[sampling]
max_new_tokens = 24
[defaults.rrhf]
epochs = 1
[defaults.sft]
epochs = 1
[defaults.ppo]
iterations = 2
rollouts = 16
minibatch = 16
update_epochs = 1
[evaluation]
prompts = 20
pairs = 40
dev_prompts = 8
curve_points = 2
max_new_tokens = 24
pool_prompts = 8
pool_samples = 8
"""


class Silent:
    def __getattr__(self, name: str):
        return lambda *_: None


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One store for all: the files share what is equal."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_it_runs_to_its_report(name: str, runs: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    small.write_text(SMALL)
    file = tmp_path / f"{name}.toml"
    file.write_text(f'extends = ["{EXPERIMENTS / name}.toml", "{small}"]')
    experiment = load_experiment(file)
    plan, store = make_plan(experiment), Store(runs / "store")
    run_plan(plan, store, Silent())
    records = load_run(open_run(plan, runs, f"rrhf-bench run {name}.toml"), store)
    page = write_report(records, records.folder / "report", SECTIONS).read_text()
    rows = {record.method for record in records.evaluated}
    assert {"base", *experiment.policies, *experiment.methods} <= rows
    assert "nan" not in page.lower().split()
    if experiment.claims:
        table = (records.folder / "report" / "tables" / "claims.csv").read_text()
        assert all(name in table for name in experiment.claims)
