"""Measure one training step of RRHF, one prompt with its k candidates, in several ways.

``python -m benchmarks.step --help``. Before anything is timed the sides must agree: same loss, same scores p, same
gradients from the same weights. A step is forward, loss and backward, added to gradients that are there, without an
optimiser. Each speed is measured twice: with the allocator as it comes, and with one that keeps freed memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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
    PACKED,
    RELEASED,
    STEERED,
    Stepper,
    Steps,
    check_equal,
    extra_memory,
    reference,
    sides_for,
    time_steps,
)
from benchmarks.workloads import Workload
from rrhf_bench.errors import ConfigError, StoreError, nearest
from rrhf_bench.policy import onednn

Record = Mapping[str, Any]


class Scan(NamedTuple):
    """Workloads that differ in one thing: its name, which heads a table, and the workload at each of its values."""

    label: str
    workloads: Mapping[Any, Workload]
    memory: bool = True  # whether the peak memory is worth a process for each side


@dataclass(frozen=True)
class StepBenchmark:
    """A benchmark of training steps: its command line, its measurements and its page.

    Scans of one label share a table. The page has a panel for each label and each quantity of the summaries.
    """

    name: str
    help: str
    title: str
    lead: str
    caption: str
    scans: Mapping[str, Scan]  # by the names that --rows takes
    quantities: Mapping[str, str]  # of the summaries, with their labels
    rounds: int

    def app(self) -> typer.Typer:
        """Return the command line."""
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

        @app.command(help=f"{self.help}\n\nRows: {', '.join(self.scans)}.")
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
                if not all(row.get("scan") in self.scans for row in record.get("rows", [{}])):
                    raise StoreError(f"{read}: holds rows of another version of this benchmark; measure them anew")
            else:
                for name in rows or ():
                    if name not in self.scans:
                        raise ConfigError(
                            f"--rows: found {name!r}; allowed are {', '.join(self.scans)}, one for each --rows"
                            f"{nearest(name, self.scans)}"
                        )
                where = device_of(device)
                record = begin(self.name, where, threads)
                record |= {"device": str(where), "rounds": rounds, "seed": seed, "quick": quick, "rows": []}
                record["shipped"] = STEERED if where.type == "cpu" and onednn.worth_it() else PACKED
                for name in rows or self.scans:
                    scan = self.scans[name]
                    for x, workload in scan.workloads.items():
                        found = measure(workload, record, memory=memory and scan.memory)
                        record["rows"].append({"scan": name, "x": x, **found})
                        if out is not None:  # row by row: a long run that ends early loses nothing
                            write_json(out, record)
            self._show(record, report)

        return app

    def _show(self, record: Record, report: Path | None) -> None:
        """Print the tables of a record, and write its page if ``report`` is given."""
        by_label: dict[str, list[Record]] = {}
        for row in record["rows"]:
            by_label.setdefault(self.scans[row["scan"]].label, []).append(row)
        tables = [table_of(rows, label) for label, rows in by_label.items()]
        for table in tables:
            show(table)
        words = notes(record)
        print(*words, sep="\n")
        if report is None:
            return
        panels = (
            panel(rows, quantity, y_label, label)
            for label, rows in by_label.items()
            for quantity, y_label in self.quantities.items()
        )
        write_page(
            report,
            title=self.title,
            lead=self.lead,
            record=record,
            tables=tables,
            notes=words,
            figure=figure_of([panel for panel in panels if panel.sides]),
            caption=self.caption,
        )


def measure(workload: Workload, record: Record, *, memory: bool) -> dict[str, Any]:
    """Return one row of the record: equality first, then rounds under two allocators, then the memory of each side.

    Raises StageError if a side computes something else.
    """
    device, rounds = torch.device(record["device"]), record["rounds"]
    workload = workload.quick() if record["quick"] else workload
    steps = Steps(workload, record["seed"], device, torch.get_num_threads())
    names = sides_for(workload.dtype, device)
    say(f"{workload.name}: equality")
    found = {name: Stepper(name, steps).results() for name in names}
    expected, bound = reference(steps, found)
    errors = check_equal(found, expected, bound, workload.name)
    del found, expected
    seconds = in_own_process(time_steps, names, steps, rounds, environment={})
    kept: dict[str, list[float]] = {}
    if device.type == "cpu" and sys.platform == "linux":
        kept = in_own_process(time_steps, names, steps, rounds, environment=KEEPING_ENVIRONMENT)
    used: dict[str, int | None] = {}
    for name in names if memory else ():
        say(f"{workload.name}: memory of {name}")
        used[name] = in_own_process(extra_memory, name, steps)
    say()
    groups = workload.groups(record["seed"])
    row = {
        "name": workload.name,
        "words": workload.words,
        "k": workload.k,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "queries": [len(group.query) for group in groups],
        "responses": [[len(response) for response in group.responses] for group in groups],
        "padded_tokens": sum(group.padded_length * len(group.responses) for group in groups),
        "packed_tokens": sum(group.batch.fed(packed=True) for group in groups),
        "errors": {name: error._asdict() for name, error in errors.items()},
        "bound": bound._asdict(),
        "seconds": seconds,
        "seconds_keeping": kept,
        "extra_memory": used,
    }
    return {**row, "summary": summary(row)}


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
        for name in seconds
    }


def table_of(rows: Iterable[Record], label: str) -> Table:
    """Return the table of some rows, whose first column is what they differ in."""
    columns = (label, "side", "seconds", "x released", "x released, memory kept", "extra MB", "of released")
    cells = [
        [
            str(row["x"]),
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


def panel(rows: Sequence[Record], quantity: str, y_label: str, x_label: str) -> Panel:
    """Return a quantity of the summaries of some rows over what the rows differ in."""
    sides: dict[str, dict[Any, Spread]] = {}
    for row in rows:
        for name, of in row["summary"].items():
            if (value := of[quantity]) is not None:
                spread_of = Spread(value, value, value) if isinstance(value, float) else Spread(*value)
                sides.setdefault(name, {})[row["x"]] = spread_of
    return Panel(y_label, sides, x_label)


def notes(record: Record) -> list[str]:
    """Return what a reader of the numbers needs to know."""
    rows = record["rows"]
    worst = (f"{row['name']} {max(max(error.values()) for error in row['errors'].values()):.1g}" for row in rows)
    tokens = (
        f"{row['name']} {row['padded_tokens']} against {row['packed_tokens']} "
        f"({row['padded_tokens'] / row['packed_tokens']:.2f})"
        for row in rows
    )
    smoke = "A smoke run of tiny models: the numbers say that everything runs, and nothing about speed."
    return [
        *([smoke] if record["quick"] else []),
        *(f"{row['name']}: {row['words']}." for row in rows),
        "Speeds are medians of the ratios of each round, with the quartiles over rounds in brackets; higher is faster.",
        "Memory kept: the same step with an allocator that keeps freed memory, so that no fresh pages are mapped.",
        "A timed step adds to gradients that are there.",
        "Extra memory is what a step takes above weights and gradients at its peak, each side in a process of its own.",
        f"Tokens fed to the model in padded rows and in packs: {', '.join(tokens)}.",
        f"Largest relative error of loss, scores and gradients, measured before the timing: {', '.join(worst)}.",
        f"The package as shipped takes {record['shipped']!r} on this machine for float32.",
    ]


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
app = StepBenchmark(
    name="step",
    help=__doc__ or "",
    title="The training step",
    lead="One prompt with k candidates: forward, loss and backward of RRHF.",
    caption="Speed and extra memory of the sides, medians and quartiles over rounds.",
    scans={name: Scan("workload", {name: workload}) for name, workload in WORKLOADS.items()},
    quantities={
        "times_released": "times as fast as released",
        "times_released_keeping": "the same, freed memory kept",
        "memory_share": "extra memory, share of released",
    },
    rounds=9,
).app()

if __name__ == "__main__":
    main(app)
