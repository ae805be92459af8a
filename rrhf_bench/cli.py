"""The command line. Exit codes: 0 done, 1 a fault of this program, 2 input that cannot be used, 130 interrupted.

Nothing here imports torch before it is needed: `plan` answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rrhf_bench.data.dialogue import TemplateKind
from rrhf_bench.errors import BenchError, ConfigError, StoreError
from rrhf_bench.pipeline.stage_graph import Plan, make_plan
from rrhf_bench.pipeline.store import Store, disk_errors
from rrhf_bench.records import STOP_STRINGS
from rrhf_bench.registry import METHODS
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.methods import Strategy
from rrhf_bench.settings.reading import load_experiment, parse_method
from rrhf_bench.terminal import Screen, TerminalReporter, inert

if TYPE_CHECKING:
    from rrhf_bench.pipeline.cache import Cache, Item
    from rrhf_bench.pipeline.file_commands import PlainSteps
    from rrhf_bench.pipeline.services import ModelRef
    from rrhf_bench.sampling.sampler import SamplingSpec

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which alignment method gives how much reward, at what cost, and is the difference real?",
    epilog="Exit codes: 0 done, 1 a fault of this program, 2 input that cannot be used, 130 interrupted.",
)

ExperimentFile = Annotated[Path, typer.Argument(help="an experiment file, such as experiments/hh_compare.toml")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the file")]
Runs = Annotated[Path, typer.Option(envvar="RRHF_BENCH_RUNS", help="where runs and the store of artifacts are")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object for machines, on standard output")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where models run")]
Backend = Annotated[Literal["vllm", "transformers"], typer.Option(help="what samples; vllm falls back if absent")]
# None is an option that was not given: the folder of an artifact then decides, else the default that --help shows.
TemplateName = Annotated[
    Literal["hh", "chat"] | None, typer.Option(help="how the policy wants a dialogue", show_default="hh")
]
DtypeName = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="of the policy's weights", show_default="float32"),
]
PadToken = Annotated[
    str | None, typer.Option(help="for a policy whose tokenizer has no pad token: which of its tokens pads")
]
RewardTemplate = Annotated[
    Literal["hh", "chat"] | None,
    typer.Option(
        "--reward-template",
        help="how the reward model wants a dialogue; its own contract goes first",
        show_default="hh",
    ),
]
RewardDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--reward-dtype", help="of the reward model's weights", show_default="float32"),
]
RewardPadToken = Annotated[
    str | None,
    typer.Option(
        "--reward-pad-token", help="for a reward model whose tokenizer has no pad token: which of its tokens pads"
    ),
]
Seed = Annotated[int, typer.Option(help="names the random draws")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="length cap of a reply")]
RewardSource = Annotated[str, typer.Option("--reward-model", help="hub id or folder of a reward model")]
Layout = Annotated[
    Literal["classifier", "value-head"] | None, typer.Option(help="of the reward model", show_default="classifier")
]
Label = Annotated[str | None, typer.Option(help="of a classifier of several labels: its probability is the reward")]
Out = Annotated[Path, typer.Option(help="what to write")]
FaultyRowsOption = Annotated[
    Literal["error", "drop"],
    typer.Option("--faulty-rows", help="rows that cannot be used: stop at the first, or leave them out and count them"),
]
Cut = Annotated[bool, typer.Option("--cut/--no-cut", help="cut replies at a fake turn")]


def main() -> None:
    """Run the command line; a BenchError becomes one line a fault and exit code 2."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported
    try:
        code = app(standalone_mode=False)  # what typer ends itself it returns: 0 after --help, 130 for an interrupt
    except BenchError as error:
        for line in str(error).splitlines():
            _errors().print(Text(f"error: {inert(line)}"), soft_wrap=True)
        sys.exit(2)
    except (typer.Abort, Exception) as error:
        # typer's own usage errors know how to show themselves; anything else is a fault of this program.
        if hasattr(error, "show"):
            error.show()
            sys.exit(2)
        raise
    if code == 130:
        _errors().print("interrupted; what is complete stays, and the same command goes on from there")
    sys.exit(code)


def _out() -> Console:
    return Screen()


def _errors() -> Console:
    return Screen(stderr=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")  # ASCII: it may end on a terminal


@app.command()
def run(file: ExperimentFile, override: Overrides = None, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Run an experiment to its report; what the store already holds is reused."""
    experiment = load_experiment(file, override or [])
    plan = make_plan(experiment)
    console = _errors() if as_json else _out()
    from rrhf_bench.pipeline.run_folder import load_run, open_run, run_lock, write_metrics
    from rrhf_bench.pipeline.scheduler import run_plan

    started = time.monotonic()
    command = shlex.join(["rrhf-bench", "run", str(file), *(w for o in override or [] for w in ("--set", o))])
    with run_lock(runs / experiment.name):
        folder = open_run(plan, runs, command)
        store = Store(runs / "store")
        if plan.backend.note:
            console.print(f"note: {plan.backend.note}")
        with TerminalReporter(console) as reporter:
            made = run_plan(plan, store, reporter)
        records = load_run(folder, store)
        write_metrics(records)
        report_page = _write_report(records, folder)
        missing = sum(not store.has(stage.key) for stage in plan.stages)
    if as_json:
        _print_json(
            {
                "run": str(folder),
                "report": str(report_page),
                "arena": records.arena,
                "made": made,
                "reused": len(plan.stages) - made - missing,
                "missing": missing,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    else:
        words = f"{made} stages made, {len(plan.stages) - made - missing} reused"
        console.print(f"{words}, {time.monotonic() - started:.0f} s in all")
        console.print(f"report: {report_page}", soft_wrap=True, highlight=False)
    if missing:
        raise BenchError(
            f"{missing} stages are missing, because a method failed (see above); the report shows its rows as failed"
        )


def _write_report(records: Any, folder: Path) -> Path:
    from rrhf_bench.report.page import write_report

    with disk_errors(folder):
        return write_report(records, folder / "report")


@app.command()
def plan(file: ExperimentFile, override: Overrides = None, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Say what a run would do: stages, what the store holds, batch arithmetic, models in memory. Imports no torch."""
    made = make_plan(load_experiment(file, override or []))
    store = Store(runs / "store")
    if as_json:
        _print_json(_plan_json(made, store))
        return
    console = _out()
    table = Table("stage", "state", "size", box=None, pad_edge=False)
    done = 0
    for stage in made.stages:
        complete = store.has(stage.key)
        done += complete
        table.add_row(inert(stage.name), "done" if complete else "to do", inert(stage.size))
    console.print(table)
    console.print()
    memory = Table("method", "trains on", "models in memory", box=None, pad_edge=False)
    for name, method in made.experiment.methods.items():
        models = method.models_in_memory()
        budget = method.budget(made.experiment.data.train_prompts, made.experiment.responses(method))
        memory.add_row(name, budget, f"{len(models)}: {', '.join(models)}")
    console.print(memory)
    console.print()
    console.print(f"sampler: {made.backend.identity}" + (f" ({made.backend.note})" if made.backend.note else ""))
    console.print(f"{len(made.stages)} stages: {done} done, {len(made.stages) - done} to do, store {store.root}")


def _plan_json(plan: Plan, store: Store) -> dict[str, Any]:
    stages = [
        {
            "name": stage.name,
            "kind": stage.kind,
            "row": stage.row,
            "seed": stage.seed,
            "key": stage.key,
            "done": store.has(stage.key),
            "size": stage.size,
        }
        for stage in plan.stages
    ]
    prompts = plan.experiment.data.train_prompts
    methods = {
        name: {
            "budget": method.budget(prompts, plan.experiment.responses(method)),
            "models_in_memory": list(method.models_in_memory()),
        }
        for name, method in plan.experiment.methods.items()
    }
    return {"experiment": plan.experiment.name, "sampler": plan.backend.identity, "stages": stages, "methods": methods}


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="the folder of a run, such as runs/hh_compare")],
    publish: Annotated[bool, typer.Option("--publish", help="also copy the report into --reports")] = False,
    reports: Annotated[Path, typer.Option(help="where published reports are, each under its run's name")] = Path(
        "reports"
    ),
    as_json: Json = False,
) -> None:
    """Write a run's report again from its records; no model is loaded."""
    from rrhf_bench.pipeline.run_folder import load_run, read_run, run_lock

    read_run(folder)  # before anything is written where no run is
    with run_lock(folder):
        page = _write_report(load_run(folder), folder)
    published = None
    if publish:
        import shutil

        from rrhf_bench.pipeline.store import replace_path

        published = reports / folder.resolve().name
        with replace_path(published, over=(published / "report.md").is_file()) as copy:  # an earlier report of this run
            # The page shows the PNGs; SVG and LaTeX are for a paper's author, who has the run.
            shutil.copytree(page.parent, copy, ignore=shutil.ignore_patterns("*.svg", "*.tex"))
    if as_json:
        _print_json({"report": str(page), "published": None if published is None else str(published)})
        return
    for path in (page, published):
        if path is not None:
            _out().print(str(path), soft_wrap=True, highlight=False)


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
    if as_json:
        _print_json(comparison_json(*runs, compared))
        return
    found = comparison_table(*runs, compared)
    table = Table(*(column.name for column in found.columns), box=None, pad_edge=False)
    for row in printed(found, inert):
        table.add_row(*row)
    _out().print(table)
    for note in notes(found):
        _out().print(note, soft_wrap=True)


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
        who = holder(run_lock_path(folder))
        found.append(
            {
                "run": folder.name,
                "stages": len(stages),
                "complete": len(complete),
                "unfinished": [stages[key]["name"] for key in begun],
                "held": None if who is None else str(who),
                "report": str(page) if page.is_file() else None,
            }
        )
    if as_json:
        _print_json(found)
        return
    if not found:
        _out().print(f"no runs in {runs}; start one with: rrhf-bench run experiments/hh_compare.toml", soft_wrap=True)
        return
    table = Table("run", "stages complete", "begun", "at work", "report", box=None, pad_edge=False)
    for row in found:
        words = (", ".join(row["unfinished"]) or "-", row["held"] or "-", row["report"] or "-")
        progress = f"{row['complete']} of {row['stages']}"
        table.add_row(*(Text(inert(word)) for word in (row["run"], progress, *words)))
    _out().print(table)


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
    unused = found.unused
    removed = store.prune(runs) if yes else ()
    if as_json:
        _print_json(
            {
                "kinds": {kind: {"items": n, "bytes": size} for kind, (n, size) in found.sizes().items()},
                "runs": {
                    run: {"items": n, "bytes": size, "bytes_of_its_own": own}
                    for run, (n, size, own) in found.by_run().items()
                },
                "journals": {"bytes": found.journals},
                "unused": [_item_json(item) for item in unused],
                "removed": [_item_json(item) for item in removed],
                "damaged": dict(damaged),
            }
        )
    else:
        _print_cache(found)
        for item in removed if yes else unused if prune else ():
            words = f"{'removed' if yes else 'unused'}: {item.what} {item.name} ({_size(item.bytes)}, {item.path.name})"
            _out().print(Text(inert(words)), soft_wrap=True)
        total = f"{len(unused)} folders, {_size(sum(item.bytes for item in unused))}"
        if yes:
            _out().print(f"removed {len(removed)} folders, {_size(sum(item.bytes for item in removed))}")
        elif unused:
            _out().print(f"no run refers to {total}; remove them with: rrhf-bench cache --prune --yes", soft_wrap=True)
        for name, damage in damaged.items():
            _out().print(Text(inert(f"damaged: {name}: {damage}")), soft_wrap=True)
    if damaged:
        raise StoreError(f"{len(damaged)} artifacts are damaged; `run` of an experiment makes its own again")


def _item_json(item: Item) -> dict[str, Any]:
    return {"id": item.id, "what": item.what, "name": item.name, "bytes": item.bytes}


def _print_cache(found: Cache) -> None:
    kinds = Table("kind of stage", "artifacts", "size", box=None, pad_edge=False)
    for kind, (number, size) in found.sizes().items():
        kinds.add_row(Text(inert(kind)), str(number), _size(size))
    if found.journals:
        kinds.add_row("journals of judges", "-", _size(found.journals))
    used = Table("run", "artifacts", "size", "of its own", box=None, pad_edge=False)
    for run, (number, size, own) in found.by_run().items():
        used.add_row(Text(inert(run)), str(number), _size(size), _size(own))
    for table in (kinds, used):
        _out().print(table)
        _out().print()


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="a policy to check; none: a small one made on the spot")] = None,
    reward_model: Annotated[str | None, typer.Option(help="a reward model to check")] = None,
    template: TemplateName = None,
    dtype: DtypeName = None,
    pad_token: PadToken = None,
    layout: Layout = None,
    label: Label = None,
    reward_template: RewardTemplate = None,
    reward_dtype: RewardDtype = None,
    reward_pad_token: RewardPadToken = None,
    backend: Backend = "vllm",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what is installed, and check that sampler, trainer and reward model agree on this machine."""
    from rrhf_bench.pipeline.doctor import examine
    from rrhf_bench.pipeline.file_commands import model_ref
    from rrhf_bench.pipeline.scheduler import quiet

    options: dict[str, Any] = {"template": template, "dtype": dtype, "pad_token": pad_token}
    _refuse_unread(model, "--model", options)
    policy = None if model is None else model_ref(model, **options)
    judge = _reward_ref(reward_model, layout, label, reward_template, reward_dtype, reward_pad_token)
    with quiet():
        findings = examine(policy, judge, backend, RuntimeSettings(device=device))
    if as_json:
        _print_json([finding.__dict__ for finding in findings])
    else:
        table = Table("check", "", "found", box=None, pad_edge=False)
        for finding in findings:
            mark = {True: "ok", False: "FAILED", None: ""}[finding.ok]
            table.add_row(finding.check, mark, inert(finding.found))
        _out().print(table)
    if any(finding.ok is False for finding in findings):
        raise BenchError("a check failed; see the lines marked FAILED")


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="hub id or folder of the policy")],
    prompts: Annotated[Path, typer.Option(help='JSONL of {"prompt"} or of preferences')],
    out: Out,
    strategy: Annotated[Strategy, typer.Option(help="draw samples, or search with beams")] = "sample",
    beams: Annotated[int, typer.Option(min=1, help="of a beam search, all of which it returns, best first")] = 4,
    groups: Annotated[int, typer.Option(min=1, help="of diverse-beam: groups of equal size")] = 4,
    diversity_penalty: Annotated[
        float, typer.Option(min=0.0, help="of diverse-beam: for a token that a beam of an earlier group has just taken")
    ] = 1.0,
    n: Annotated[int, typer.Option(min=1, help="samples a prompt")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="above 0; 1 is off")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off")] = 0,
    max_new_tokens: MaxNewTokens = 64,
    sources: Annotated[str, typer.Option(help="what a group holds, in order: model,chosen,rejected")] = "model",
    cut: Annotated[
        bool | None, typer.Option("--cut/--no-cut", help="cut replies at a fake turn", show_default="cut, unless raw")
    ] = None,
    seed: Seed = 0,
    template: Annotated[
        TemplateKind | None,
        typer.Option(
            help="how the model wants a dialogue; raw: the prompt is fed as tokenizer(prompt), the reply is kept as "
            "generated",
            show_default="hh; raw for beams",
        ),
    ] = None,
    dtype: DtypeName = None,
    pad_token: PadToken = None,
    backend: Backend = "vllm",
    device: Device = "auto",
    faulty_rows: FaultyRowsOption = "error",
    as_json: Json = False,
) -> None:
    """Sample responses to prompts, or search for them with beams, and write them as {"query", "responses"}.

    With each response come its token_ids as generated, the end-of-text token included.
    """
    from rrhf_bench.pipeline.file_commands import model_ref
    from rrhf_bench.pipeline.stages import CANDIDATES

    names = tuple(sources.split(","))
    unknown = sorted(set(names) - {"model", "chosen", "rejected"})
    if unknown:
        raise ConfigError(f"--sources: found {unknown[0]!r}; allowed are model, chosen, rejected")
    if top_p == 0.0:
        raise ConfigError("--top-p: found 0, which leaves no token to sample; expected more than 0 and at most 1 (off)")
    default_template: TemplateKind = "hh" if strategy == "sample" else "raw"
    ref = model_ref(model, default_template=default_template, template=template, dtype=dtype, pad_token=pad_token)
    if cut is None:
        cut = ref.template != "raw"
    spec = _spec(n, temperature, max_new_tokens, seed, CANDIDATES, cut, top_p, top_k)
    if strategy == "sample":
        if temperature == 0.0 and n > 1:
            raise ConfigError(f"--temperature 0 gives {n} equal samples; raise it or use --n 1")
    else:
        groups = groups if strategy == "diverse-beam" else 1
        if beams % groups:
            raise ConfigError(f"--groups {groups}: {beams} beams do not divide into groups of equal size")
        if (n, temperature, top_p, top_k) != (4, 1.0, 1.0, 0):
            _errors().print("note: beams are not drawn: --n, --temperature, --top-p and --top-k have no effect on them")
        penalty = diversity_penalty
        spec = replace(spec, strategy=strategy, n=beams, beams=beams, groups=groups, diversity_penalty=penalty)
    with _steps(device, backend, "sampling", as_json, faulty_rows, strategy) as steps:
        counts = steps.sample(ref, prompts, out, spec, names)
    _done(as_json, f"{spec.n} samples a prompt ({_words(counts)}): {out}", {"counts": counts, "out": str(out)})


@app.command()
def score(
    reward_model: RewardSource,
    candidates: Annotated[Path, typer.Option(help='JSONL of {"query", "responses"}')],
    out: Out,
    layout: Layout = None,
    label: Label = None,
    template: Annotated[
        Literal["hh", "chat"] | None,
        typer.Option(
            "--template",
            "--reward-template",
            help="how the reward model wants a dialogue; its own contract goes first",
            show_default="hh",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", "--reward-dtype", help="of the reward model's weights", show_default="float32"),
    ] = None,
    pad_token: Annotated[
        str | None,
        typer.Option(
            "--pad-token", "--reward-pad-token", help="for a tokenizer without a pad token: which of its tokens pads"
        ),
    ] = None,
    device: Device = "auto",
    faulty_rows: FaultyRowsOption = "error",
    as_json: Json = False,
) -> None:
    """Score responses with a reward model and write them as {"query", "responses", "scores"}."""
    from rrhf_bench.pipeline.file_commands import model_ref

    ref = model_ref(reward_model, template=template, dtype=dtype, pad_token=pad_token, layout=layout, label=label)
    with _steps(device, "transformers", "scoring", as_json, faulty_rows) as steps:
        counts = steps.score(ref, candidates, out)
    _done(as_json, f"{_words(counts)}: {out}", {"counts": counts, "out": str(out)})


@app.command()
def train(
    method: Annotated[str, typer.Option(help=f"one of {', '.join(METHODS)}")],
    model: Annotated[str, typer.Option(help="hub id or folder of the initial policy")],
    data: Annotated[Path, typer.Option(help="scored candidates (rrhf), pairs (sft) or prompts (ppo), as JSONL")],
    out: Annotated[Path, typer.Option(help="the folder to write the trained policy to")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting of the method, such as lr=1e-5")
    ] = None,
    reward_model: Annotated[str | None, typer.Option(help="for ppo: hub id or folder of a reward model")] = None,
    max_new_tokens: MaxNewTokens = 64,
    cut: Cut = True,
    seed: Seed = 0,
    template: TemplateName = None,
    dtype: DtypeName = None,
    pad_token: PadToken = None,
    layout: Layout = None,
    label: Label = None,
    reward_template: RewardTemplate = None,
    reward_dtype: RewardDtype = None,
    reward_pad_token: RewardPadToken = None,
    backend: Backend = "vllm",
    device: Device = "auto",
    faulty_rows: FaultyRowsOption = "error",
    as_json: Json = False,
) -> None:
    """Train a policy by one method and write it as a transformers folder."""
    settings = parse_method(method, override or [])
    if settings.family == "inference":
        raise ConfigError(f"--method {method}: trains nothing; use `sample` and `score`")
    from rrhf_bench.pipeline.file_commands import model_ref

    ref = model_ref(model, template=template, dtype=dtype, pad_token=pad_token)
    reward = _reward_ref(reward_model, layout, label, reward_template, reward_dtype, reward_pad_token)
    with _steps(device, backend, f"training {method}", as_json, faulty_rows) as steps:
        result = steps.train(
            settings,
            ref,
            data,
            out,
            seed=seed,
            reward=reward,
            max_new_tokens=max_new_tokens,
            stop=STOP_STRINGS if cut else (),
        )
    summary = {"steps": result.steps, "counts": dict(result.counts), "out": str(out)}
    _done(as_json, f"{result.steps} optimiser steps ({_words(result.counts)}): {out}", summary)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="hub id or folder of the policy")],
    reward_model: RewardSource,
    prompts: Annotated[Path, typer.Option(help='JSONL of {"prompt"} or of preferences')],
    out: Out,
    name: Annotated[str, typer.Option(help="the row's name in the records")] = "policy",
    initial: Annotated[
        str | None,
        typer.Option(help="the initial policy, for the KL to it; template, dtype and pad token are the policy's"),
    ] = None,
    perplexity_model: Annotated[str | None, typer.Option(help="a fixed language model, for perplexity")] = None,
    gold: Annotated[bool, typer.Option("--gold", help="the embedded world's gold reward, on its prompts")] = False,
    decoding: Annotated[str, typer.Option(help="greedy, sample or both")] = "greedy,sample",
    temperature: Annotated[float, typer.Option(min=0.01, help="of sample")] = 1.0,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    template: TemplateName = None,
    dtype: DtypeName = None,
    pad_token: PadToken = None,
    layout: Layout = None,
    label: Label = None,
    reward_template: RewardTemplate = None,
    reward_dtype: RewardDtype = None,
    reward_pad_token: RewardPadToken = None,
    perplexity_pad_token: Annotated[
        str | None, typer.Option(help="the same of --perplexity-model, which reads transcripts (hh) in float32")
    ] = None,
    backend: Backend = "vllm",
    device: Device = "auto",
    faulty_rows: FaultyRowsOption = "error",
    as_json: Json = False,
) -> None:
    """Judge a policy on prompts: one record a prompt and decoding."""
    from rrhf_bench.evaluation.metrics import fake_turn_share, mean_kl, mean_length, perplexity
    from rrhf_bench.pipeline.file_commands import model_ref, pad_token_of
    from rrhf_bench.pipeline.stages import decodings

    names = decoding.split(",")
    if not set(names) <= {"greedy", "sample"}:
        raise ConfigError(f"--decoding: found {decoding!r}; allowed are greedy, sample and greedy,sample")
    arena = {
        "decoding": names,
        "temperature": temperature,
        "top_k": 0,
        "max_new_tokens": max_new_tokens,
        "stop": STOP_STRINGS,
    }
    policy, base = (
        None
        if source is None
        else model_ref(
            source, template=template, dtype=dtype, pad_token=pad_token_of(source, (model, initial), pad_token)
        )
        for source in (model, initial)
    )
    judge = _reward_ref(reward_model, layout, label, reward_template, reward_dtype, reward_pad_token)
    fluency = None
    _refuse_unread(perplexity_model, "--perplexity-model", {"perplexity_pad_token": perplexity_pad_token})
    if perplexity_model is not None:
        fluency = model_ref(perplexity_model, pad_token=perplexity_pad_token, prefix="perplexity-")
    assert policy is not None
    assert judge is not None
    with _steps(device, backend, "evaluating", as_json, faulty_rows) as steps:
        records, counts = steps.evaluate(
            policy,
            judge,
            prompts,
            out,
            name=name,
            seed=seed,
            decodings=decodings(arena, seed, "evaluate"),
            initial=base,
            perplexity=fluency,
            gold=gold,
        )
    rows = []
    for way in dict.fromkeys(record.decoding for record in records):
        chosen = [record for record in records if record.decoding == way]
        ppl, kl = perplexity(chosen), mean_kl(chosen)
        rows.append(
            {
                "decoding": way,
                "n": len(chosen),
                "reward/mean": sum(record.reward for record in chosen) / len(chosen),
                "gold/mean": sum(record.gold or 0.0 for record in chosen) / len(chosen) if gold else None,
                "perplexity": None if ppl is None else ppl.pooled,
                "objective/kl": kl,
                "completions/mean_length": mean_length(chosen),
                "completions/fake_turn_share": fake_turn_share(chosen),
            }
        )
    if as_json:
        _print_json({"out": str(out), "counts": counts, "results": rows})
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    _out().print(table)
    _done(False, f"{_words(counts)}: {out}", {})


def _reward_ref(
    source: str | None, layout: Any, label: str | None, template: Any, dtype: Any, pad_token: str | None
) -> ModelRef | None:
    """Return the reference of --reward-model, or None.

    The options of template, dtype and pad token begin with --reward-. Raises ConfigError if an option is given and the
    model is not.
    """
    from rrhf_bench.pipeline.file_commands import model_ref

    own: dict[str, Any] = {"template": template, "dtype": dtype, "pad_token": pad_token}
    named = {f"reward_{name}": value for name, value in own.items()}
    _refuse_unread(source, "--reward-model", {"layout": layout, "label": label, **named})
    return None if source is None else model_ref(source, layout=layout, label=label, prefix="reward-", **own)


def _refuse_unread(source: str | None, model: str, options: Mapping[str, object]) -> None:
    """Raise ConfigError if an option of a model is given and the model is not: the option would have no effect."""
    for name, value in options.items():
        if source is None and value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: found {value!r}, which is read with {model} only; name that model, or "
                "leave the option out"
            )


def _words(counts: Mapping[str, int]) -> str:
    """What there was any of."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)


def _spec(
    n: int, temperature: float, max_new_tokens: int, seed: int, purpose: str, cut: bool, top_p: float, top_k: int
) -> SamplingSpec:
    from rrhf_bench.sampling.sampler import SamplingSpec

    return SamplingSpec(
        n=n,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        purpose=purpose,
        top_p=top_p,
        top_k=top_k,
        stop=STOP_STRINGS if cut else (),
    )


@contextmanager
def _steps(
    device: Any,
    backend: BackendName,
    words: str,
    as_json: bool,
    faulty_rows: Literal["error", "drop"],
    strategy: Strategy = "sample",
) -> Iterator[PlainSteps]:
    """The plain-file steps with a progress bar on standard error."""
    from rrhf_bench.pipeline.file_commands import PlainSteps
    from rrhf_bench.pipeline.memory import WITHOUT_A_FILE, out_of_memory_named
    from rrhf_bench.pipeline.scheduler import quiet
    from rrhf_bench.sampling.backend import choose_backend

    chosen = choose_backend(backend, strategy, device)
    if chosen.note:
        _errors().print(f"note: {chosen.note}")
    with TerminalReporter(_errors()) as reporter, quiet():
        reporter.begin(words)
        runtime = RuntimeSettings(device=device)
        steps = PlainSteps(
            runtime, chosen.name, lambda i, n: reporter.progress(words, i, n), faulty_rows, reporter.note
        )
        with out_of_memory_named(steps.services, WITHOUT_A_FILE):
            yield steps


def _done(as_json: bool, words: str, value: dict[str, Any]) -> None:
    if as_json:
        _print_json(value)
    else:
        _out().print(words, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
