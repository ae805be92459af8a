"""The command line. Exit codes: 0 done, 1 a fault of this program, 2 input that cannot be used, 130 interrupted.

Nothing here imports torch before it is needed: `plan` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.text import Text

from rrhf_bench import cli_files
from rrhf_bench.cli_options import (
    Backend,
    Device,
    ExperimentFile,
    Json,
    Overrides,
    PolicyOptions,
    RewardOptions,
    Runs,
    refuse_unread,
    with_option_groups,
)
from rrhf_bench.errors import BenchError, ConfigError, StoreError, visible
from rrhf_bench.pipeline.stage_graph import make_plan
from rrhf_bench.pipeline.store import FULL, Store, disk_errors
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.terminal import Screen, TerminalReporter, answer, inert, table_of

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which alignment method gives how much reward, at what cost, and is the difference real?",
    epilog="Exit codes: 0 done, 1 a fault of this program, 2 input that cannot be used, 130 interrupted.",
)


def main() -> None:
    """Run the command line; a BenchError becomes one line a fault and exit code 2."""
    # Both are read when torch is first imported. By default the threads of OpenMP keep their cores busy while they wait
    # for each other: beside another program that uses all cores, a step of two threads then takes ten times as long.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.stdout is None:  # closed: nothing is printed, and no file that is opened later takes its descriptor
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    try:
        code = app(standalone_mode=False)  # what typer ends itself it returns: 0 after --help, 130 for an interrupt
    except BenchError as error:
        for line in str(error).splitlines():
            Screen(stderr=True).print(Text(f"error: {inert(line)}"), soft_wrap=True)
        sys.exit(2)
    except (typer.Abort, Exception) as error:
        # typer's own usage errors know how to show themselves; anything else is a fault of this program.
        if hasattr(error, "show"):
            error.show()
            sys.exit(2)
        # Answer a full standard output, the only thing written that has no name and is not under `disk_errors`.
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what it still holds
            words = f"error: standard output: cannot be written ({error.strerror}); make room or send it elsewhere"
            Screen(stderr=True).print(words, soft_wrap=True)
            sys.exit(2)
        raise
    if code == 130:
        Screen(stderr=True).print("interrupted; what is complete stays, and the same command goes on from there")
    sys.exit(code)


@app.command()
def run(file: ExperimentFile, override: Overrides = None, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Run an experiment to its report; what the store already holds is reused."""
    experiment = load_experiment(file, override or [])
    if experiment.runtime.vector_instructions == "avx2" and _has_avx512():
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")  # read when torch is first imported, here and in workers
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    plan = make_plan(experiment)
    console = Screen(stderr=True) if as_json else Screen()
    from rrhf_bench.pipeline.run_folder import load_run, open_run, run_lock, write_metrics
    from rrhf_bench.pipeline.scheduler import run_plan

    started = time.monotonic()
    words = ["rrhf-bench", "run", str(file), *(w for o in override or [] for w in ("--set", o))]
    command = visible(shlex.join(words))
    with run_lock(runs / experiment.name):
        folder = open_run(plan, runs, command)
        store = Store(runs / "store")
        if plan.backend.note:
            console.print(f"note: {plan.backend.note}")
        with TerminalReporter(console) as reporter:
            made = run_plan(plan, store, reporter, folder / "tensorboard")
        records = load_run(folder, store)
        write_metrics(records)
        report_page = _write_report(records, folder)
        missing = sum(not store.has(stage.key) for stage in plan.stages)
    seconds, reused = time.monotonic() - started, len(plan.stages) - made - missing
    about = {"run": str(folder), "report": str(report_page), "arena": records.arena, "made": made}
    value = {**about, "reused": reused, "missing": missing, "seconds": round(seconds, 1)}
    summary = f"{made} stages made, {reused} reused, {seconds:.0f} s in all"
    answer(as_json, value, summary, f"report: {report_page}")
    if missing:
        raise BenchError(
            f"{missing} stages are missing, because a method failed (see above); the report shows its rows as failed"
        )


def _has_avx512() -> bool:
    """Return True if the processor has AVX-512. PyTorch crashes if it is told to use AVX2 where there is none."""
    with suppress(OSError):
        return "avx512f" in Path("/proc/cpuinfo").read_text()
    return False


def _write_report(records: Any, folder: Path, instead: str = "choose another --runs DIR") -> Path:
    from rrhf_bench.replication.sections import SECTIONS
    from rrhf_bench.report import overoptimization, preference_models
    from rrhf_bench.report.page import write_report

    own = (preference_models.SECTION, overoptimization.SECTION)
    with disk_errors(folder, instead):
        return write_report(records, folder / "report", (*own, *SECTIONS))


@app.command()
def plan(file: ExperimentFile, override: Overrides = None, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Say what a run would do: stages, what the store holds, batch arithmetic, models in memory. Imports no torch."""
    made = make_plan(load_experiment(file, override or []))
    store = Store(runs / "store")
    experiment, backend = made.experiment, made.backend
    shown = ("name", "kind", "row", "seed", "key", "size", *(("world",) if experiment.several_worlds else ()))
    stages = [{key: getattr(s, key) for key in shown} | {"done": store.has(s.key)} for s in made.stages]
    methods: dict[str, dict[str, Any]] = {
        name: {
            "budget": method.budget(experiment.data.train_prompts, experiment.responses(method)),
            "models_in_memory": list(method.models_in_memory()),
        }
        for name, method in experiment.methods.items()
    }
    done = sum(stage["done"] for stage in stages)
    states = ((stage["name"], "done" if stage["done"] else "to do", stage["size"]) for stage in stages)
    models = {name: method["models_in_memory"] for name, method in methods.items()}
    rows = ((name, m["budget"], f"{len(models[name])}: {', '.join(models[name])}") for name, m in methods.items())
    words = (
        table_of("stage", "state", "size", rows=states),
        "",
        table_of("method", "trains on", "models in memory", rows=rows),
        "",
        f"sampler: {backend.identity}" + (f" ({backend.note})" if backend.note else ""),
        f"{len(stages)} stages: {done} done, {len(stages) - done} to do, store {store.root}",
    )
    value = {"experiment": experiment.name, "sampler": backend.identity, "stages": stages, "methods": methods}
    answer(as_json, value, *words)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="the folder of a run, such as runs/hh_compare")],
    publish: Annotated[bool, typer.Option("--publish", help="also copy the report into --reports")] = False,
    reports: Annotated[Path, typer.Option(help="where published reports are, by run")] = Path("reports"),
    as_json: Json = False,
) -> None:
    """Write a run's report again from its records; no model is loaded."""
    from rrhf_bench.pipeline.run_folder import load_run, read_run, run_lock

    read_run(folder)  # before anything is written where no run is
    instead = "copy it and the store beside it to a place that can be written"
    with run_lock(folder, instead):
        page = _write_report(load_run(folder), folder, instead)
    published = None
    if publish:
        import shutil

        from rrhf_bench.pipeline.store import replace_path

        published = reports / folder.resolve().name
        with replace_path(published, over=(published / "report.md").is_file()) as copy:  # an earlier report of this run
            # The page shows the PNGs; SVG and LaTeX are for a paper's author, who has the run.
            shutil.copytree(page.parent, copy, ignore=shutil.ignore_patterns("*.svg", "*.tex"))
    value = {"report": str(page), "published": None if published is None else str(published)}
    answer(as_json, value, *(str(path) for path in (page, published) if path is not None))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="the folder of a run")],
    b: Annotated[Path, typer.Argument(help="the folder of another, or the same")],
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="a row of A and one of B", show_default="the rows of equal names"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two runs of one arena, paired by prompt and seed: A minus B, from their records; no model is loaded."""
    from rrhf_bench.pipeline.run_folder import load_run
    from rrhf_bench.report.compare_runs import compare_runs, comparison_json, comparison_table
    from rrhf_bench.report.table import notes, printed

    runs = load_run(a), load_run(b)
    compared = compare_runs(*runs, rows or [])
    found = comparison_table(*runs, compared)
    table = table_of(*(column.name for column in found.columns), rows=printed(found, inert))
    answer(as_json, comparison_json(*runs, compared), table, *notes(found))


@app.command()
def ls(runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """List the runs: how much of each is complete, what is half trained, which process is at work."""
    from rrhf_bench.pipeline.locks import holder
    from rrhf_bench.pipeline.run_folder import read_run, run_lock_path

    store = Store(runs / "store")
    found: list[dict[str, Any]] = []
    for path in sorted(runs.glob("*/run.json")):
        folder = path.parent
        stages = read_run(folder)["stages"]
        page = folder / "report" / "report.md"
        complete = [key for key in stages if store.has(key)]
        begun = (key for key in stages if key not in complete and store.scratch(key).is_dir())
        found.append(
            {
                "run": folder.name,
                "stages": len(stages),
                "complete": len(complete),
                "unfinished": [stages[key]["name"] for key in begun],
                "held": holder(run_lock_path(folder)),
                "report": str(page) if page.is_file() else None,
            }
        )
    rows = (
        (
            row["run"],
            f"{row['complete']} of {row['stages']}",
            ", ".join(row["unfinished"]) or "-",
            row["held"] or "-",
            row["report"] or "-",
        )
        for row in found
    )
    table = table_of("run", "stages complete", "begun", "at work", "report", rows=rows)
    none = f"no runs in {runs}; start one with: rrhf-bench run experiments/hh_compare.toml"
    answer(as_json, found, table if found else none)


@app.command()
def cache(
    prune: Annotated[bool, typer.Option("--prune", help="what no run refers to: say what it is")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="with --prune: remove it")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read every byte and compare checksums")] = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show what the store holds and for which runs; remove what no run folder refers to."""
    from rrhf_bench.pipeline import cache as store

    if yes and not prune:
        raise ConfigError("--yes: says that --prune may remove; add --prune")
    damaged = store.damages(runs) if verify else {}
    found = store.list_store(runs)
    unused, removed = found.unused, store.prune(runs) if yes else ()
    sizes, by_run = found.sizes(), found.by_run()

    def items(listed: Iterable[store.Item]) -> list[dict[str, Any]]:
        return [{"id": item.id, "what": item.what, "name": item.name, "bytes": item.bytes} for item in listed]

    value = {
        "kinds": {kind: {"items": n, "bytes": size} for kind, (n, size) in sizes.items()},
        "runs": {r: {"items": n, "bytes": size, "bytes_of_its_own": own} for r, (n, size, own) in by_run.items()},
        "journals": {"bytes": found.journals},
        "unused": items(unused),
        "removed": items(removed),
        "damaged": dict(damaged),
    }
    kinds: list[tuple[object, ...]] = [(kind, n, decimal(size)) for kind, (n, size) in sizes.items()]
    kinds += [("journals of judges", "-", decimal(found.journals))] if found.journals else []
    users = ((run, n, decimal(size), decimal(own)) for run, (n, size, own) in by_run.items())
    words = [
        f"{'removed' if yes else 'unused'}: {item.what} {item.name} ({decimal(item.bytes)}, {item.path.name})"
        for item in (removed if yes else unused if prune else ())
    ]
    shown = removed if yes else unused
    total = f"{len(shown)} folders, {decimal(sum(item.bytes for item in shown))}"
    if yes:
        words.append(f"removed {total}")
    elif unused:
        words.append(f"no run refers to {total}; remove them with: rrhf-bench cache --prune --yes")
    words += [f"damaged: {name}: {damage}" for name, damage in damaged.items()]
    of_kinds = table_of("kind of stage", "artifacts", "size", rows=kinds)
    of_runs = table_of("run", "artifacts", "size", "of its own", rows=users)
    answer(as_json, value, of_kinds, "", of_runs, "", *words)
    if damaged:
        raise StoreError(f"{len(damaged)} artifacts are damaged; `run` of an experiment makes its own again")


@app.command()
@with_option_groups
def doctor(
    *,
    model: Annotated[str | None, typer.Option(help="a policy to check; none: a small one made on the spot")] = None,
    reward_model: Annotated[str | None, typer.Option(help="a reward model to check")] = None,
    own: PolicyOptions,
    reward: RewardOptions,
    backend: Backend = "vllm",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what is installed, and check that sampler, trainer and reward model agree on this machine."""
    from rrhf_bench.pipeline.doctor import examine
    from rrhf_bench.pipeline.file_commands import model_ref
    from rrhf_bench.pipeline.scheduler import quiet

    refuse_unread(model, "--model", asdict(own))
    policy = None if model is None else model_ref(model, **asdict(own))
    judge = reward.ref(reward_model)
    with quiet():
        findings = examine(policy, judge, backend, RuntimeSettings(device=device))
    mark = {True: "ok", False: "FAILED", None: ""}
    table = table_of("check", "", "found", rows=((f.check, mark[f.ok], f.found) for f in findings))
    answer(as_json, [asdict(finding) for finding in findings], table)
    if any(finding.ok is False for finding in findings):
        raise BenchError("a check failed; see the lines marked FAILED")


for command in (cli_files.sample, cli_files.score, cli_files.score_pairs, cli_files.train, cli_files.evaluate):
    app.command()(with_option_groups(command))


if __name__ == "__main__":
    main()
