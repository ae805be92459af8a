"""Measure one training step of RRHF, one prompt with its k candidates, in several ways.

``python -m benchmarks.step --help``. Before anything is timed the sides must agree: same loss, same scores p, same
gradients from the same weights. A step is forward, loss and backward, added to gradients that are there, without an
optimiser. Each speed is measured twice: with the allocator as it comes, and with one that keeps freed memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import typer

from benchmarks.measure import (
    KEEPING_ENVIRONMENT,
    Spread,
    begin,
    device_of,
    in_own_process,
    main,
    ratios,
    read_json,
    say,
    spread,
    write_json,
)
from benchmarks.page import Panel, Table, figure_of, show, spread_words, write_page
from benchmarks.sides import (
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
Record = Mapping[str, Any]

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "15M-cut", "15M, k = 6, prompts of 64 and 128 tokens, cut to 192 in all", "15M", 6, (64, 128), cut=192
        ),
        Workload("60M", "60M, k = 6, prompt of 128 tokens", "60M", 6, (128,)),
        Workload("60M-bf16", "60M, k = 6, prompt of 128 tokens, bfloat16", "60M", 6, (128,), dtype=torch.bfloat16),
        Workload("15M-k32", "15M, k = 32, prompt of 128 tokens", "15M", 32, (128,)),
        Workload("15M-512", "15M, k = 6, prompt of 512 tokens", "15M", 6, (512,)),
    )
}


@dataclass(frozen=True)
class StepBenchmark(Generic[T]):
    """A benchmark of training steps: its command line, its measurements and its page."""

    name: str
    help: str
    title: str
    lead: str
    caption: str
    known: Mapping[str, T]  # what --rows can name
    rounds: int
    rows: Callable[[T, Record, bool], Iterable[dict[str, Any]]]  # (of known, record, with memory)
    tables: Callable[[Record], Sequence[Table]]
    panels: Callable[[Record], Sequence[Panel]]

    def app(self) -> typer.Typer:
        """Return the command line."""
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

        @app.command(help=f"{self.help}\n\nRows: {', '.join(self.known)}.")
        def command(
            rows: Annotated[list[str] | None, typer.Option(help="of those named above; all otherwise")] = None,
            rounds: Annotated[int, typer.Option(min=1, help="measured, after one that warms up")] = self.rounds,
            threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's number otherwise")] = None,
            device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where the models run")] = "auto",
            seed: Annotated[int, typer.Option(help="names weights, tokens and lengths")] = 0,
            memory: Annotated[bool, typer.Option(help="measure the peak memory of each side too")] = True,
            quick: Annotated[bool, typer.Option("--quick", help="tiny models: does everything run?")] = False,
            out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the record, as JSON")] = None,
            report: Annotated[Path | None, typer.Option(metavar="DIR", help="write a page with figures")] = None,
            read: Annotated[
                Path | None,
                typer.Option("--from", metavar="FILE", help="measure nothing: show the record in this file"),
            ] = None,
        ) -> None:
            if read is not None:
                record = read_json(read, self.name)
            else:
                for name in rows or ():
                    if name not in self.known:
                        raise ConfigError(
                            f"--rows: found {name!r}; allowed are {', '.join(self.known)}, one for each --rows"
                            f"{nearest(name, self.known)}"
                        )
                where = device_of(device)
                record = begin(self.name, where, threads)
                record |= {"device": str(where), "rounds": rounds, "seed": seed, "quick": quick, "rows": []}
                record["shipped"] = STEERED if where.type == "cpu" and onednn.worth_it() else PACKED
                for name in rows or self.known:
                    for row in self.rows(self.known[name], record, memory):
                        record["rows"].append(row)
                        if out is not None:  # row by row: a long run that ends early loses nothing
                            write_json(out, record)
            tables = self.tables(record)
            for table in tables:
                show(table)
            print(*notes(record), sep="\n")
            if report is not None:
                write_page(
                    report,
                    title=self.title,
                    lead=self.lead,
                    record=record,
                    tables=tables,
                    notes=notes(record),
                    figure=figure_of(self.panels(record)),
                    caption=self.caption,
                )

        return app


def measure(workload: Workload, record: Record, *, memory: bool) -> dict[str, Any]:
    """Return one row of the record: equality first, then rounds under two allocators, then the memory of each side.

    Raises StageError if a side computes something else.
    """
    seed, device, rounds = record["seed"], torch.device(record["device"]), record["rounds"]
    workload = workload.quick() if record["quick"] else workload
    groups = workload.groups(seed)
    names = sides_for(workload.dtype, device)
    steps = (workload.shape, groups, seed, workload.dtype, device, torch.get_num_threads())
    say(f"{workload.name}: equality")
    found = {
        name: Stepper.make(name, workload.shape, seed=seed, dtype=workload.dtype, device=device).results(groups)
        for name in names
    }
    expected, bound = reference(workload, found, groups, seed=seed, device=device)
    errors = check_equal(found, expected, bound, workload.name)
    del found, expected
    say(f"{workload.name}: {rounds} rounds")
    seconds = in_own_process(time_steps, names, steps, rounds, environment={})
    kept: dict[str, list[float]] = {}
    if device.type == "cpu" and sys.platform == "linux":
        say(f"{workload.name}: {rounds} rounds with an allocator that keeps freed memory")
        kept = in_own_process(time_steps, names, steps, rounds, environment=KEEPING_ENVIRONMENT)
    used: dict[str, int | None] = {}
    for name in names if memory else ():
        say(f"{workload.name}: memory of {name}")
        used[name] = in_own_process(extra_memory, name, steps)
    say()
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


def table_of(rows: Iterable[Record], first: str, key: str) -> Table:
    """Return the table of some rows, whose first column ``first`` is what they have under ``key``."""
    columns = (first, "side", "seconds", "x released", "x released, memory kept", "extra MB", "of released")
    cells = [
        [
            str(row[key]),
            name,
            spread_words(of["seconds"], 3),
            spread_words(of["times_released"], 2),
            spread_words(of["times_released_keeping"], 2),
            "—" if of["memory"] is None else f"{of['memory'] / 1e6:.1f}",
            "—" if of["memory_share"] is None else f"{of['memory_share']:.1%}",
        ]
        for row in rows
        for name, of in row["summary"].items()
    ]
    return Table(columns, cells)


def panel(rows: Sequence[Record], quantity: str, label: str, key: str, x_label: str = "") -> Panel:
    """Return a quantity of the summaries of some rows, over what the rows have under ``key``."""

    def values(name: str) -> Iterator[tuple[Any, Spread]]:
        for row in rows:
            value = row["summary"].get(name, {}).get(quantity)
            if value is not None:
                yield row[key], Spread(*([value] * 3 if isinstance(value, float) else value))

    return Panel(label, {name: found for name in SIDES if (found := dict(values(name)))}, x_label)


def notes(record: Record) -> list[str]:
    """Return what a reader of the numbers needs to know."""
    worst = {row["name"]: max(max(error.values()) for error in row["errors"].values()) for row in record["rows"]}
    tokens = [
        f"{row['name']} {row['padded_tokens']} against {row['packed_tokens']} "
        f"({row['padded_tokens'] / row['packed_tokens']:.2f})"
        for row in record["rows"]
    ]
    smoke = "A smoke run of tiny models: the numbers say that everything runs, and nothing about speed."
    return [
        *([smoke] if record["quick"] else []),
        *(f"{row['name']}: {row['words']}." for row in record["rows"]),
        "Speeds are medians of the ratios of each round, with the quartiles over rounds in brackets; higher is faster.",
        "Memory kept: the same step with an allocator that keeps freed memory, so that no fresh pages are mapped.",
        "A timed step adds to gradients that are there.",
        "Extra memory is what a step takes above weights and gradients at its peak, each side in a process of its own.",
        f"Tokens fed to the model in padded rows and in packs: {', '.join(tokens)}.",
        "Largest relative error of loss, scores and gradients, measured before the timing: "
        + ", ".join(f"{name} {error:.1g}" for name, error in worst.items())
        + ".",
        f"The package as shipped takes {record['shipped']!r} on this machine for float32.",
    ]


def panels(record: Record) -> list[Panel]:
    """Return the panels of the page."""
    quantities = {
        "times_released": "times as fast as released",
        "times_released_keeping": "the same, freed memory kept",
        "memory_share": "extra memory, share of released",
    }
    found = (panel(record["rows"], quantity, label, "name") for quantity, label in quantities.items())
    return [of for of in found if of.sides]


STEP = StepBenchmark(
    name="step",
    help=__doc__ or "",
    title="The training step",
    lead="One prompt with k candidates: forward, loss and backward of RRHF.",
    caption="Speed and extra memory of the sides, medians and quartiles over rounds.",
    known=WORKLOADS,
    rounds=9,
    rows=lambda workload, record, memory: [measure(workload, record, memory=memory)],
    tables=lambda record: [table_of(record["rows"], "workload", "name")],
    panels=panels,
)
app = STEP.app()

if __name__ == "__main__":
    main(app)
