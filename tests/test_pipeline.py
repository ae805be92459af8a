"""Experiments from file to report have the same numbers in any process, in any order and by single steps."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file

from rrhf_bench import cli, terminal
from rrhf_bench.data.rrhf_files import load_candidates
from rrhf_bench.jsonl import read_jsonl
from rrhf_bench.pipeline import scheduler
from rrhf_bench.pipeline.memory import reset_peak
from rrhf_bench.pipeline.run_folder import load_run
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.pipeline.stage_graph import Stage
from rrhf_bench.pipeline.store import TIMING, Store
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.records import Candidates, Evaluated, Preference
from rrhf_bench.replication.departures import departures_table
from rrhf_bench.report.view import View
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.reading import load_experiment
from tests.test_events import read_events

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"

SPLITS = ("train", "dev", "test")

# Every stage of the smoke experiment, on less of everything. vLLM, whose import takes longest, samples in the chain.
TINY = "{vocabulary=400,hidden=32,layers=1,heads=1,ffn=64,epochs=1,raw_epochs=1}"
CUTS = [
    "data.toy={raw_corpus=100,corpus=100,perplexity_corpus=60,preferences=60}",
    "data.train_prompts=24",
    f"policy.scratch={TINY}",
    f"perplexity_model.scratch={TINY}",
    "reward_model.training.epochs=1",
    "reward_model.training.pairs=20",
    "sampling.backend=transformers",
    "sampling.max_new_tokens=16",
    "methods.ppo.iterations=2",
    "methods.ppo.rollouts=16",
    "methods.ppo.minibatch=8",
    "evaluation.prompts=16",
    "evaluation.pairs=40",
    "evaluation.dev_prompts=6",
    "evaluation.curve_points=2",
    "evaluation.curve_kl=true",
    "evaluation.max_new_tokens=16",
    "evaluation.pool_prompts=6",
    "evaluation.pool_samples=6",
]

# Neither cold run writes a report, which takes longer than all its stages; `reported` writes it from the records.
PLAIN = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from rrhf_bench import cli
cli._write_report = lambda records, folder: folder
cli.main()
"""


def overrides(*changes: str) -> list[str]:
    """Return the words of the command line that override keys."""
    return [word for change in changes for word in ("--set", change)]


def smoke_words(runs: Path, workers: int) -> list[str]:
    return ["run", str(SMOKE), "--runs", str(runs), "--json", *overrides(*CUTS, f"runtime.workers={workers}")]


def start_smoke(runs: Path, workers: int) -> subprocess.Popen[str]:
    """Start the smaller smoke experiment in a process of its own, on two cores."""
    return subprocess.Popen(
        [sys.executable, "-c", PLAIN, *smoke_words(runs, workers)],
        cwd=ROOT,
        # Sums of floats depend on how many threads share them: one, as each of two workers has on two cores.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a process, assert that it succeeded, and return what it printed with --json."""
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


def run_disturbed(runs: Path) -> dict[str, Any]:
    """Run the smaller smoke experiment in this process, and return what it prints with --json.

    Python's, numpy's and torch's global generators are reseeded before every stage and drawn from at every sign of
    life.
    """

    def disturb() -> None:
        _ = random.random(), np.random.rand(3), torch.rand(7)

    def make(stage: Stage, *rest: Any, made: Any = scheduler.make) -> Any:
        random.seed(stage.name)
        np.random.seed(len(stage.name))
        torch.manual_seed(len(stage.name))
        disturb()
        return made(stage, *rest)

    def progress(self: Any, *rest: Any, reported: Any = terminal.TerminalReporter.progress) -> None:
        disturb()
        reported(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "make", make)
        patch.setattr(terminal.TerminalReporter, "progress", progress)
        patch.setattr(cli, "_write_report", lambda records, folder: folder)
        return call(*smoke_words(runs, workers=1))


def call(*words: str) -> dict[str, Any]:
    """Run the command line in this process, and return what it prints with --json."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rrhf-bench", *words])
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return json.loads(printed.getvalue())


@dataclass(frozen=True)
class Smoke:
    runs: Path
    printed: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.runs / "smoke"

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def store(self) -> Store:
        return Store(self.runs / "store")


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Smoke, Smoke]:
    """Run once by two workers, and once in one process whose global random state is disturbed throughout."""
    one, other = tmp_path_factory.mktemp("workers"), tmp_path_factory.mktemp("disturbed")
    process = start_smoke(one, workers=2)
    disturbed = Smoke(other, run_disturbed(other))
    return Smoke(one, end(process)), disturbed


@pytest.fixture
def smoke(cold: tuple[Smoke, Smoke]) -> Smoke:
    return cold[0]


@pytest.fixture
def disturbed(cold: tuple[Smoke, Smoke]) -> Smoke:
    return cold[1]


@pytest.fixture(scope="module")
def reported(cold: tuple[Smoke, Smoke], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write the report from the records and publish it; return what the command prints."""
    folder = tmp_path_factory.mktemp("reports")
    return call("report", str(cold[0].folder), "--publish", "--reports", str(folder), "--json")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The embedded experiment


def test_two_cold_runs_make_the_same_artifacts_to_the_byte(smoke: Smoke, disturbed: Smoke) -> None:
    assert smoke.printed["made"] == disturbed.printed["made"] == len(smoke.json["stages"])
    assert smoke.json["stages"] == disturbed.json["stages"]
    for key, stage in smoke.json["stages"].items():
        one, other = files(smoke.store.folder(key)), files(disturbed.store.folder(key))
        del one[TIMING], other[TIMING]
        assert one == other, stage["name"]


def test_a_complete_run_is_not_made_again(smoke: Smoke, run_cli: RunCli, no_report: None) -> None:
    events = files(smoke.folder / "tensorboard")
    again = run_cli("run", SMOKE, "--runs", smoke.runs, *overrides(*CUTS, "runtime.workers=2"))
    assert (again["made"], again["reused"]) == (0, len(smoke.json["stages"]))
    assert again["arena"] == smoke.printed["arena"]
    assert files(smoke.folder / "tensorboard") == events


def test_a_report_is_written_from_the_records_alone_and_published(smoke: Smoke, reported: dict[str, Any]) -> None:
    report = smoke.folder / "report"
    assert {"main.csv", "main.md", "main.tex", "differences.csv", "candidates.csv"} <= set(files(report / "tables"))
    assert reported["report"] == str(report / "report.md")
    # The page shows the PNGs; SVG and LaTeX stay in the run.
    expected = {name: data for name, data in files(report).items() if not name.endswith((".svg", ".tex"))}
    assert files(Path(reported["published"])) == expected


def test_tensorboard_holds_the_log_of_a_training(smoke: Smoke) -> None:
    records = load_run(smoke.folder)
    assert {f"{row}-seed{seed}" for row, seed in records.training} == {
        path.name for path in (smoke.folder / "tensorboard").iterdir()
    }
    for (row, seed), log in records.training.items():
        shown = read_events(smoke.folder / "tensorboard" / f"{row}-seed{seed}")
        logged: dict[str, list[tuple[int, float]]] = {}
        for line in log:
            for name in line.keys() - {"step"}:
                logged.setdefault(name, []).append((int(line["step"]), pytest.approx(line[name], rel=1e-6)))
        for point in (point for point in records.curves if (point.method, point.seed) == (row, seed)):
            mean = pytest.approx(sum(point.rewards) / len(point.rewards), rel=1e-6)
            logged.setdefault(f"dev/reward/{point.decoding}", []).append((point.step, mean))
        assert {tag: values for tag, values in shown.items() if not tag.startswith("dev/gold")} == logged


def test_the_run_folder_records_the_run(smoke: Smoke) -> None:
    experiment = load_experiment(SMOKE, [*CUTS, "runtime.workers=2"])
    assert load_experiment(smoke.folder / "config.toml") == experiment
    environment = json.loads((smoke.folder / "environment.json").read_text())
    assert {"python", "torch", "transformers", "vector instructions"} <= set(environment)
    assert smoke.json["command"].startswith(f"rrhf-bench run {SMOKE} --set ")
    logged = [json.loads(line) for line in (smoke.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [name for name, method in experiment.methods.items() if method.family != "inference"]
    assert list(dict.fromkeys(line["method"] for line in logged)) == trained
    with (smoke.folder / "timing.csv").open() as file:
        timings = list(csv.DictReader(file))
    assert len(timings) == len(smoke.json["stages"])
    assert all(float(row["seconds"]) > 0 for row in timings)
    measured = reset_peak(torch.device("cpu"))  # elsewhere the field is empty
    assert all(float(row["peak_mib"]) > 0 if measured else row["peak_mib"] == "" for row in timings)


def test_no_policy_is_aligned_or_tuned_on_a_held_out_topic(smoke: Smoke) -> None:
    (key,) = (key for key, stage in smoke.json["stages"].items() if stage["kind"] == "prompts")
    folder = smoke.store.folder(key)
    about = json.loads((folder / "about.json").read_text())
    held_out = set(about["held_out_topics"])
    assert len(held_out) == 16
    assert about["counts"]["train_held_out_topic"] > 0
    topics = {split: [p.cluster for p in read_jsonl(folder / f"{split}.jsonl", Preference)] for split in SPLITS}
    assert held_out.isdisjoint([*topics["train"], *topics["dev"]])
    assert [topic in held_out for topic in topics["test"]] == [i % 4 == 3 for i in range(len(topics["test"]))]


@pytest.mark.usefixtures("reported")
def test_a_row_costs_all_stages_that_it_needs(smoke: Smoke) -> None:
    """rrhf needs a sample, its scores, and the scores of the data set's pairs; rrhf_samples_only no pairs."""
    found = {stage["name"]: (key, stage) for key, stage in smoke.json["stages"].items()}
    _, train = found["train rrhf, seed 0"]
    candidates = train["inputs"]["scores model"]
    drawn = smoke.json["stages"][candidates]["inputs"]["candidates"]

    def timing(key: str) -> dict[str, Any]:
        return json.loads((smoke.store.folder(key) / TIMING).read_text())

    def trained(row: str) -> float:
        return timing(found[f"train {row}, seed 0"][0])["train"]

    shared = timing(drawn)["seconds"] + timing(candidates)["seconds"]
    pairs = timing(train["inputs"]["pair scores"])["seconds"]
    with (smoke.folder / "report" / "cost.csv").open() as file:
        costs = {row["method"]: row for row in csv.DictReader(file)}
    seconds = {
        "sft": trained("sft"),
        "ppo": trained("ppo"),
        "rrhf": trained("rrhf") + shared + pairs,
        "rrhf_samples_only": trained("rrhf_samples_only") + shared,
        "rrhf_pair_only": trained("rrhf_pair_only") + pairs,
        "rrhf_permuted": trained("rrhf_permuted") + shared + pairs,
    }
    assert {row: float(costs[row]["seconds"]) for row in seconds} == pytest.approx(seconds, rel=1e-12)
    assert float(costs["rrhf"]["of these shared"]) == pytest.approx(shared + pairs, rel=1e-12)
    assert float(costs["ppo"]["of these shared"]) == 0
    groups = read_jsonl(smoke.store.folder(drawn) / "candidates.jsonl", Candidates)
    tokens = sum(len(response.token_ids or ()) for group in groups for response in group.responses)
    assert float(costs["rrhf"]["sampled tokens"]) == tokens > 0
    assert costs["best_of_n"]["seconds"] == ""
    assert "its cost is at inference" in costs["best_of_n"]["missing"]
    # The curve of a row ends where its cost does.
    records = load_run(smoke.folder)
    last = [point for point in records.curves if point.method == "ppo" and point.fraction == 1.0]
    assert {(point.sampled_tokens, point.step) for point in last} == {
        (records.costs["ppo", 0].sampled_tokens, records.costs["ppo", 0].steps)
    }


def test_the_reward_model_is_trained_on_the_pairs_of_its_settings(smoke: Smoke) -> None:
    keys = {stage["name"]: key for key, stage in smoke.json["stages"].items()}
    counts = json.loads((smoke.store.folder(keys["reward model"]) / "counts.json").read_text())
    labelled = read_jsonl(smoke.store.folder(keys["data"]) / "train.jsonl", Preference)
    assert counts["pairs"] == 20 < len(labelled)


def test_a_curve_holds_the_kl_of_its_sampled_replies(smoke: Smoke) -> None:
    points = load_run(smoke.folder).curves
    assert {point.decoding for point in points} == {"greedy", "sample"}
    for point in points:
        if point.decoding == "greedy":
            assert point.kls is None
        else:
            assert point.kls is not None
            assert len(point.kls) == len(point.rewards) == 6
            if point.step == 0:
                assert point.kls == pytest.approx([0.0] * 6, abs=1e-4)  # still the initial policy
    (end,) = (p for p in points if (p.method, p.decoding, p.fraction) == ("ppo", "sample", 1.0))
    assert max(map(abs, end.kls or ())) > 1e-3


@pytest.mark.usefixtures("reported")
def test_every_number_of_a_row_follows_from_its_records(smoke: Smoke) -> None:
    (stage,) = (stage for stage in smoke.json["wanted"] if stage["name"] == "evaluate rrhf, seed 0")
    lines = (smoke.store.folder(stage["key"]) / "evaluated.jsonl").read_text().splitlines()
    replies = [reply for reply in map(json.loads, lines) if reply["decoding"] == "sample"]
    lines = (smoke.store.folder(stage["key"]) / "pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    assert (len(replies), len(pairs)) == (16, 40)

    def mean(values: Any) -> float:
        values = list(values)
        return sum(values) / len(values)

    bigrams = [pair for reply in replies for pair in pairwise(reply["response"].split())]
    expected = {
        "proxy reward": mean(reply["reward"] for reply in replies),
        "gold reward": mean(reply["gold"] for reply in replies),
        "PPL": math.exp(sum(reply["nll"] for reply in replies) / sum(reply["nll_tokens"] for reply in replies)),
        "PPL per text": mean(math.exp(reply["nll"] / reply["nll_tokens"]) for reply in replies),
        "NLL per token": mean(reply["nll"] / reply["nll_tokens"] for reply in replies),
        "KL": mean(reply["kl"] for reply in replies),
        "entropy": mean(reply["entropy"] for reply in replies),
        "length": mean(reply["tokens"] for reply in replies),
        "distinct-2": len(set(bigrams)) / len(bigrams),
        "fake turn": mean(reply["finish"] == "stop" for reply in replies),
        "at cap": mean(reply["finish"] == "length" for reply in replies),
        "p_i accuracy": mean(
            (pair["chosen"] > pair["rejected"]) + (pair["chosen"] == pair["rejected"]) / 2 for pair in pairs
        ),
        "models": 1,
        "prompts": 16,
        "seeds": 1,
    }
    with (smoke.folder / "report" / "tables" / "main.csv").open() as file:
        (row,) = (r for r in csv.DictReader(file) if (r["method"], r["decoding"]) == ("rrhf", "sampled"))
    values = {name: float(row[name]) for name in expected}
    assert values == pytest.approx(expected, rel=1e-12)
    parts = (" low", " high", " n", " seeds")
    assert {name for name in row if not name.endswith(parts)} == {*expected, "method", "decoding", "missing", "arena"}
    for name in expected:
        if f"{name} low" in row:
            assert float(row[f"{name} low"]) <= values[name] <= float(row[f"{name} high"])
        if f"{name} n" in row:
            assert int(row[f"{name} n"]) == (40 if name == "p_i accuracy" else 16)
    assert (row["missing"], row["arena"]) == ("", smoke.printed["arena"])


# The single steps


RunCli = Callable[..., Any]


@pytest.fixture
def run_cli(cli: Cli, one_thread: None) -> RunCli:
    """Run the command line in this process on one thread, and return what it prints with --json."""

    def run(*words: object) -> Any:
        found = cli(*words, "--json")
        assert found.code == 0, found.err
        return json.loads(found.out)

    return run


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report of a run, which takes longer than all stages of a small one."""
    monkeypatch.setattr("rrhf_bench.cli._write_report", lambda records, folder: folder)


CHAIN = """
name = "chain"
seeds = [3]
[data]
source = "files"
path = "{path}"
train_prompts = 24
faulty_rows = "drop"
[policy]
source = "scratch"
scratch = {{ vocabulary = 400, hidden = 32, layers = 1, heads = 1, ffn = 64, epochs = 1, lr = 0.01 }}
[reward_model]
source = "scratch"
training = {{ epochs = 1 }}
[perplexity_model]
source = "scratch"
scratch = {{ vocabulary = 400, hidden = 32, layers = 1, heads = 1, ffn = 64, epochs = 1 }}
[sampling]
backend = "{backend}"
max_new_tokens = 12
[candidates]
n = 2
temperature = 0.8
[methods.rrhf]
epochs = 2
batch_prompts = 8
[evaluation]
prompts = 8
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


def unscored(groups: Iterable[Candidates]) -> list[Candidates]:
    return [replace(group, responses=tuple(replace(r, score=None) for r in group.responses)) for group in groups]


def write_pairs(path: Path) -> Path:
    """Write 60 transcripts with replies of several lengths, one of them with a question before."""
    before = "\n\nHuman: Hello\n\nAssistant: Hello. How can I help?"
    with path.open("w") as file:
        for i in range(60):
            asked = f"{before if i % 3 == 0 else ''}\n\nHuman: question {i}: what is {'an old ' * (i % 4)}glacier?"
            asked += "\n\nAssistant:"
            replies = {"chosen": f"{asked} Ice{', and ice' * (i % 5)}.", "rejected": f"{asked} A river of {i}."}
            file.write(json.dumps(replies) + "\n")
    return path


def test_single_steps_equal_a_run_and_a_run_continues_from_complete_stages(
    tmp_path: Path, run_cli: RunCli, no_report: None
) -> None:
    backend = choose_backend("vllm").name
    path = write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "chain.toml").write_text(CHAIN.format(path=path, backend=backend))
    words = ["run", tmp_path / "chain.toml", "--runs", tmp_path / "runs"]
    first = run_cli(*words)
    run = json.loads((tmp_path / "runs" / "chain" / "run.json").read_text())
    store = Store(tmp_path / "runs" / "store")
    keys = {stage["name"]: key for key, stage in run["stages"].items()}
    made = {name: store.folder(key) for name, key in keys.items()}
    records = load_run(tmp_path / "runs" / "chain")

    policy, reward = made["policy"], made["reward model"]
    same = ["--backend", backend, "--device", "cpu", "--seed", 3]
    run_cli(
        "sample", "--model", policy, "--prompts", made["prompts"] / "train.jsonl", "--out", tmp_path / "drawn.jsonl",
        "--sources", "model,chosen,rejected", "--n", 2, "--temperature", 0.8, "--max-new-tokens", 12, *same,
    )  # fmt: skip
    run_cli(
        "score", "--reward-model", reward, "--candidates", tmp_path / "drawn.jsonl", "--out", tmp_path / "scored.jsonl",
        "--device", "cpu",
    )  # fmt: skip
    scored = load_candidates(tmp_path / "scored.jsonl").candidates
    expected = records.candidates["rrhf", 3]
    assert len(expected) == 24
    assert {len(group.responses) for group in expected} == {4}
    assert unscored(scored) == unscored(expected)
    # Float32 sums of a text depend in the last place on what it shares a batch with, and a run scores pairs apart.
    for group, theirs in zip(scored, expected, strict=True):
        assert group.scores == pytest.approx(theirs.scores, abs=1e-6)

    run_cli(
        "train", "--method", "rrhf", "--model", policy, "--data", tmp_path / "scored.jsonl",
        "--out", tmp_path / "trained", "--set", "epochs=2", "--set", "batch_prompts=8", *same,
    )  # fmt: skip
    weights = load_file(tmp_path / "trained" / "model.safetensors")
    of_run = load_file(made["train rrhf, seed 3"] / "model" / "model.safetensors")
    before = load_file(policy / "model" / "model.safetensors")
    assert weights.keys() == of_run.keys()
    assert all(torch.equal(weights[name], of_run[name]) for name in weights)
    assert not all(torch.equal(weights[name], before[name]) for name in weights)

    prompts = (made["prompts"] / "test.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "prompts.jsonl").write_text("".join(prompts))
    run_cli(
        "evaluate", "--model", tmp_path / "trained", "--reward-model", reward, "--prompts", tmp_path / "prompts.jsonl",
        "--initial", policy, "--perplexity-model", made["perplexity model"], "--name", "rrhf",
        "--max-new-tokens", 12, "--out", tmp_path / "judged.jsonl", *same,
    )  # fmt: skip
    judged = read_jsonl(tmp_path / "judged.jsonl", Evaluated)
    assert len(judged) == 16
    assert judged == read_jsonl(made["evaluate rrhf, seed 3"] / "evaluated.jsonl", Evaluated)

    again = ("train rrhf, seed 3", "evaluate rrhf, seed 3")
    written = {name: files(made[name]) for name in again}
    for name in again:
        (made[name] / "manifest.json").unlink()  # as where the power went
    second = run_cli(*words)
    assert (second["made"], second["reused"]) == (2, first["made"] - 2)
    for name in again:
        assert files(made[name]) | {TIMING: b""} == written[name] | {TIMING: b""}
    assert run_cli(*words, "--set", "methods.rrhf.epochs=3")["made"] == 2  # training and evaluation of that row


def test_rows_of_the_sampling_policies_share_their_candidates(tmp_path: Path, run_cli: RunCli, no_report: None) -> None:
    text = CHAIN.format(path=write_pairs(tmp_path / "pairs.jsonl"), backend="transformers")
    text = text.replace("n = 2\n", "", 1).replace("temperature = 0.8\n", "").replace("epochs = 2", "epochs = 1")
    sizes = {"BP": 6, "DP": 6, "SP": 6, "P": 2, "D": 4}
    rows = "".join(
        f'[methods.{name}]\nkind = "rrhf"\nbatch_prompts = 8\ncandidates = {{ recipe = "{name}" }}\n' for name in sizes
    )
    (tmp_path / "policies.toml").write_text(text.replace("[methods.rrhf]\nepochs = 1\nbatch_prompts = 8\n", rows))
    run_cli("run", tmp_path / "policies.toml", "--runs", tmp_path / "runs", "--set", "name=policies")
    folder = tmp_path / "runs" / "policies"
    stages = json.loads((folder / "run.json").read_text())["stages"].values()
    # Beams, diverse beams and samples, each of the training and the test prompts; and the best-of-n pool.
    assert sum(stage["kind"] == "sample" for stage in stages) == 7
    records = load_run(folder)
    for name, k in sizes.items():
        assert {len(group.responses) for group in records.candidates[name, 3]} == {k}
    table = departures_table(View(records))
    options = [column.name for column in table.columns]
    rows_found = [dict(zip(options, (cell.value for cell in row), strict=True)) for row in table.rows]
    found = [(row["this run"], row["rows"]) for row in rows_found if row["option"] == "rrhf: candidates"]
    assert found == [("beam search, 4 beams", "BP"), ("sampling, temperature 0.8, top-p 1", "SP")]  # DP is the paper's
    assert [g.responses[:4] for g in records.candidates["DP", 3]] == [g.responses for g in records.candidates["D", 3]]
    assert [g.responses[4:] for g in records.candidates["DP", 3]] == [g.responses for g in records.candidates["P", 3]]

    # Best first: by the policy's own log-probability of a token, which is what plain beams are ranked by.
    made = {stage["name"]: key for key, stage in json.loads((folder / "run.json").read_text())["stages"].items()}
    services = Services(RuntimeSettings(device="cpu"))
    ref = ModelRef.read(Store(tmp_path / "runs" / "store").folder(made["policy"]))
    policy = services.fixed_policy(ref)
    for group in records.candidates["BP", 3][:6]:
        prompt_ids = policy.tokenization.prompt_ids(group.prompt)
        replies = [reply.token_ids or () for reply in group.responses[:4]]
        batch = ResponseBatch.of_pairs([(prompt_ids, ids) for ids in replies])
        means = (policy.token_logprobs(batch).sum(-1) / torch.tensor([len(ids) for ids in replies])).tolist()
        assert all(better >= worse - 1e-5 for better, worse in pairwise(means))
