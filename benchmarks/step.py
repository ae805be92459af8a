"""Measure one training step of RRHF, one prompt with its k candidates, in several ways.

``python -m benchmarks.step --help``. Before anything is timed the sides must agree: same loss, same scores p, same
gradients from the same weights. A step is forward, loss and backward, added to gradients that are there, without an
optimiser. Each speed is measured twice: with the allocator as it comes, and with one that keeps freed memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer
from rich.console import Console

from benchmarks.measure import (
    KEEPING_ENVIRONMENT,
    Spread,
    device_of,
    in_own_process,
    machine,
    main,
    ratios,
    read_json,
    spread,
    write_json,
)
from benchmarks.page import Panel, Series, dots_figure, make_console, rich_table, spread_words, write_page
from benchmarks.sides import (
    COLOURS,
    FLOAT32,
    PACKED,
    RELEASED,
    SIDES,
    STEERED,
    Errors,
    Results,
    Stepper,
    bfloat16_bound,
    check_equal,
    extra_memory,
    sides_for,
    time_steps,
)
from benchmarks.workloads import Group, Workload, make_model, total_tokens
from rrhf_bench.errors import ConfigError, nearest
from rrhf_bench.policy import onednn

T = TypeVar("T")
NAME = "step"
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "15M-cut",
            "15M, k = 6, one prompt of 64 tokens and one of 128, cut to 192 in all",
            "15M",
            6,
            (64, 128),
            cut=192,
        ),
        Workload("60M", "60M, k = 6, prompt of 128 tokens", "60M", 6, (128,)),
        Workload("60M-bf16", "60M, k = 6, prompt of 128 tokens, bfloat16", "60M", 6, (128,), dtype=torch.bfloat16),
        Workload("15M-k32", "15M, k = 32, prompt of 128 tokens", "15M", 32, (128,)),
        Workload("15M-512", "15M, k = 6, prompt of 512 tokens", "15M", 6, (512,)),
    )
}

# --- measuring ------------------------------------------------------------------------------------------------


def measure(workload: Workload, record: Mapping[str, Any], *, memory: bool, console: Console) -> dict[str, Any]:
    """Return one row of the record: equality first, then rounds under two allocators, then the memory of each side.

    Raises StageError if a side computes something else.
    """
    seed, device, rounds = record["seed"], torch.device(record["device"]), record["rounds"]
    workload = workload.quick() if record["quick"] else workload
    groups = workload.groups(seed)
    names = sides_for(workload.dtype, device)
    steps = (workload.shape, groups, seed, workload.dtype, device, torch.get_num_threads())
    with console.status(f"{workload.name}: equality") as status:
        found = {
            name: Stepper.make(name, workload.shape, seed=seed, dtype=workload.dtype, device=device).results(groups)
            for name in names
        }
        expected, bound = reference(workload, found, groups, seed=seed, device=device)
        errors = check_equal(found, expected, bound, workload.name)
        del found, expected
        status.update(f"{workload.name}: {rounds} rounds")
        seconds = in_own_process(time_steps, names, steps, rounds, environment={})
        kept: dict[str, list[float]] = {}
        if device.type == "cpu" and sys.platform == "linux":
            status.update(f"{workload.name}: {rounds} rounds with an allocator that keeps freed memory")
            kept = in_own_process(time_steps, names, steps, rounds, environment=KEEPING_ENVIRONMENT)
        used: dict[str, int | None] = {}
        for name in names if memory else ():
            status.update(f"{workload.name}: memory of {name}")
            used[name] = in_own_process(extra_memory, name, steps)
    row = {
        "name": workload.name,
        "words": workload.words,
        "k": workload.k,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "queries": [len(group.query) for group in groups],
        "responses": [[len(response) for response in group.responses] for group in groups],
        **total_tokens(groups),
        "errors": {name: error._asdict() for name, error in errors.items()},
        "bound": bound._asdict(),
        "seconds": seconds,
        "seconds_keeping": kept,
        "extra_memory": used,
    }
    return {**row, "summary": summary(row)}


def reference(
    workload: Workload, found: Mapping[str, Results], groups: Sequence[Group], *, seed: int, device: torch.device
) -> tuple[Results, Errors]:
    """Return the results that all sides must agree with, the released computation in float32, and the bound."""
    if workload.dtype == torch.float32:
        return found[RELEASED], FLOAT32
    model = make_model(workload.shape, seed=seed, dtype=workload.dtype, device=device).float()
    return Stepper(model, SIDES[RELEASED](model)).results(groups), bfloat16_bound(workload.shape.layers)


# --- reading --------------------------------------------------------------------------------------------------


def summary(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each side of a row: seconds, speed over the released computation under both allocators, and memory.

    Spreads are (median, lower quartile, upper quartile) over rounds.
    """
    seconds, kept, memory = row["seconds"], row["seconds_keeping"], row["extra_memory"]
    return {
        name: {
            "seconds": spread(seconds[name]),
            "times_released": ratios(seconds[RELEASED], seconds[name]),
            "times_released_keeping": ratios(kept[RELEASED], kept[name]) if kept else None,
            "memory": memory.get(name),
            "memory_share": memory[name] / memory[RELEASED] if memory.get(name) is not None else None,
        }
        for name in SIDES
        if name in seconds
    }


COLUMNS = ("workload", "side", "seconds", "x released", "x released, memory kept", "extra MB", "of released")


def cells(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table as words."""
    return [
        [
            row["name"],
            name,
            spread_words(of["seconds"], 3),
            spread_words(of["times_released"], 2),
            "—" if of["times_released_keeping"] is None else spread_words(of["times_released_keeping"], 2),
            "—" if of["memory"] is None else f"{of['memory'] / 1e6:.1f}",
            "—" if of["memory_share"] is None else f"{of['memory_share']:.1%}",
        ]
        for row in record["rows"]
        for name, of in summary(row).items()
    ]


def notes(record: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the numbers needs to know."""
    worst = {row["name"]: max(max(error.values()) for error in row["errors"].values()) for row in record["rows"]}
    tokens = [
        f"{row['name']} {row['padded_tokens']} against {row['packed_tokens']} "
        f"({row['padded_tokens'] / row['packed_tokens']:.2f})"
        for row in record["rows"]
    ]
    said = [
        "Speeds are medians of the ratios of each round, with the quartiles over rounds in brackets; higher is faster.",
        "Memory kept: the same step with an allocator that keeps freed memory, so that no fresh pages are mapped.",
        "A timed step adds to gradients that are there.",
        "Extra memory is what a step takes above weights and gradients at its peak, each side in a process of its own.",
        "Tokens fed to the model in padded rows and in packs: " + ", ".join(tokens) + ".",
        "Largest relative error of loss, scores and gradients, measured before the timing: "
        + ", ".join(f"{name} {error:.1g}" for name, error in worst.items())
        + ".",
        f"The package as shipped takes {record['shipped']!r} on this machine for float32.",
    ]
    if record["quick"]:
        said.insert(0, "A smoke run of tiny models: the numbers say that everything runs, and nothing about speed.")
    return said


def draw(record: Mapping[str, Any], folder: Path) -> None:
    """Write the page, its figure and the record itself, from the record alone."""
    rows = [(row["name"], summary(row)) for row in record["rows"]]
    names = [name for name in SIDES if any(name in found for _, found in rows)]

    def values(name: str, key: str) -> list[Spread | None]:
        found = [of[name][key] if name in of else None for _, of in rows]
        return [Spread(value, value, value) if isinstance(value, float) else value for value in found]

    panels = [
        Panel(label, [Series(name, COLOURS[name], values(name, key)) for name in names])
        for label, key in (
            ("times as fast as the released computation", "times_released"),
            ("the same, freed memory kept", "times_released_keeping"),
            ("extra memory, share of the released one's", "memory_share"),
        )
    ]
    figure = dots_figure([name for name, _ in rows], panels)
    write_page(
        folder,
        NAME,
        title="The training step",
        lead="One prompt with k candidates: forward, loss and backward of RRHF.",
        record=record,
        tables=[(COLUMNS, cells(record))],
        notes=[*(f"{row['name']}: {row['words']}." for row in record["rows"]), *notes(record)],
        figures={NAME: (figure, "Speed and extra memory of the sides, medians and quartiles over rounds.")},
    )


# --- the command line -----------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def step(
    rows: Annotated[list[str] | None, typer.Option(help=f"workloads: {', '.join(WORKLOADS)}")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds, after one that warms up")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's own number otherwise")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where the models run")] = "auto",
    seed: Annotated[int, typer.Option(help="names weights, tokens and lengths")] = 0,
    memory: Annotated[bool, typer.Option(help="measure the peak memory of each side too")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="tiny models: does everything run?")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the record, as JSON")] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="write a page with figures")] = None,
    read: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="measure nothing: show the record in this file")
    ] = None,
) -> None:
    console = make_console()
    if read is not None:
        record = read_json(read, NAME)
    else:
        torch.set_num_threads(threads or torch.get_num_threads())
        record = begin(NAME, device_of(device), rounds=rounds, seed=seed, quick=quick)
        for workload in chosen(rows, WORKLOADS):
            record["rows"].append(measure(workload, record, memory=memory, console=console))
            if out is not None:  # row by row: a long run that ends early loses nothing
                write_json(out, record)
    console.print(rich_table(COLUMNS, cells(record)))
    for note in notes(record):
        console.print(note, highlight=False)
    if report is not None:
        draw(record, report)


def begin(benchmark: str, device: torch.device, *, rounds: int, seed: int, quick: bool) -> dict[str, Any]:
    """Return a record without rows."""
    return {
        "benchmark": benchmark,
        "command": ["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]],
        "machine": machine(device),
        "device": str(device),
        "rounds": rounds,
        "seed": seed,
        "quick": quick,
        "shipped": STEERED if device.type == "cpu" and onednn.worth_it() else PACKED,
        "rows": [],
    }


def chosen(names: Sequence[str] | None, known: Mapping[str, T]) -> list[T]:
    """Return the rows of these names, all if there are none. Raises ConfigError for an unknown name."""
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"--rows: found {name!r}; allowed are {', '.join(known)}, one for each --rows{nearest(name, known)}"
            )
    return [known[name] for name in names or known]


if __name__ == "__main__":
    main(app)
