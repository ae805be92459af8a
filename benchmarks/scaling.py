"""Measure how the cost of a training step grows with the number k of responses, the length of the prompt and the
vocabulary. `python -m benchmarks.scaling --help`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.measure import device_of, main, ratios, read_json, spread, write_json
from benchmarks.page import Panel, Series, lines_figure, make_console, rich_table, spread_words, write_page
from benchmarks.sides import COLOURS, RELEASED
from benchmarks.step import begin, chosen, measure, notes
from benchmarks.workloads import Workload

NAME = "scaling"
SCANS: Mapping[str, tuple[str, Mapping[int, Workload]]] = {
    "k": (
        "responses, k",
        {k: Workload(f"k {k}", f"15M, k = {k}, prompt of 128 tokens", "15M", k, (128,)) for k in (2, 4, 8, 16, 32)},
    ),
    "query": (
        "tokens of the prompt, k = 6",
        {
            n: Workload(f"query {n}", f"15M, k = 6, prompt of {n} tokens", "15M", 6, (n,))
            for n in (32, 64, 128, 256, 512, 1024)
        },
    ),
    "vocabulary": (
        "vocabulary, k = 6",
        {
            v: Workload(f"vocabulary {v}", f"15M, k = 6, vocabulary of {v}", "15M", 6, (128,), vocabulary=v)
            for v in (8000, 16000, 32000, 64000)
        },
    ),
}


def columns(scan: str) -> tuple[str, ...]:
    return (SCANS[scan][0], "side", "seconds", "x released", "extra MB")


def cells(record: Mapping[str, Any], scan: str) -> list[list[str]]:
    """Return the rows of the table of a scan as words."""
    found = []
    for row in rows_of(record, scan):
        for name, seconds in row["seconds"].items():
            memory = row["extra_memory"].get(name)
            speed = spread_words(ratios(row["seconds"][RELEASED], seconds), 2)
            megabytes = "—" if memory is None else f"{memory / 1e6:.1f}"
            found.append([str(row["x"]), name, spread_words(spread(seconds), 3), speed, megabytes])
    return found


def rows_of(record: Mapping[str, Any], scan: str) -> list[Mapping[str, Any]]:
    return [row for row in record["rows"] if row["scan"] == scan]


def measured(record: Mapping[str, Any]) -> list[str]:
    return [scan for scan in SCANS if rows_of(record, scan)]


def draw(record: Mapping[str, Any], folder: Path) -> None:
    """Write the page, its figure and the record itself, from the record alone."""
    panels = []
    for scan in measured(record):
        rows = rows_of(record, scan)
        lines = [
            Series(name, COLOURS[name], [spread(row["seconds"][name]) for row in rows], [row["x"] for row in rows])
            for name in rows[0]["seconds"]
        ]
        panels.append(Panel("seconds of a step", lines, SCANS[scan][0]))
    write_page(
        folder,
        NAME,
        title="How the training step scales",
        lead="A Llama of 15M in float32, responses of 32 to 128 tokens.",
        record=record,
        tables=[(columns(scan), cells(record, scan)) for scan in measured(record)],
        notes=notes(record),
        figures={NAME: (lines_figure(panels), "Seconds of a step of one prompt, medians with quartiles over rounds.")},
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def scaling(
    rows: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SCANS)}; all otherwise")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds, after one that warms up")] = 5,
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
        scans = chosen(rows, {scan: (scan, workloads) for scan, (_, workloads) in SCANS.items()})
        torch.set_num_threads(threads or torch.get_num_threads())
        record = begin(NAME, device_of(device), rounds=rounds, seed=seed, quick=quick)
        for scan, workloads in scans:
            for x, workload in workloads.items():
                row = measure(workload, record, memory=memory and scan == "k", console=console)
                record["rows"].append({"scan": scan, "x": x, **row})
                if out is not None:  # row by row: a long run that ends early loses nothing
                    write_json(out, record)
    for scan in measured(record):
        console.print(rich_table(columns(scan), cells(record, scan)))
    for note in notes(record):
        console.print(note, highlight=False)
    if report is not None:
        draw(record, report)


if __name__ == "__main__":
    main(app)
