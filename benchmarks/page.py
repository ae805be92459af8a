"""Show a benchmark's record: a table on the terminal, a Markdown page with a figure. Records in, files out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.measure import Spread, write_json, writing
from benchmarks.sides import COLOURS
from rrhf_bench.report.drawing import LIGHT, legend_above, legend_key, new_panels, styled
from rrhf_bench.report.table import markdown


class Table(NamedTuple):
    """Words in rows and columns."""

    columns: Sequence[str]
    cells: Sequence[Sequence[str]]


class Panel(NamedTuple):
    """One quantity, on a logarithmic axis, of several sides: for each, its values over numbers or over names."""

    label: str
    sides: Mapping[str, Mapping[Any, Spread]]
    x_label: str


def spread_words(spread: Sequence[float] | None, digits: int) -> str:
    """Return a median with its quartiles in words, or a dash."""
    if spread is None:
        return "—"
    median, low, high = spread
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def show(table: Table, title: str | None = None) -> None:
    """Print a table with a rule where the first cell changes; wide enough if the output is a file."""
    shown = RichTable(*table.columns, title=title)
    for row, after in zip(table.cells, [*table.cells[1:], [""]], strict=True):
        shown.add_row(*row, end_section=row[0] != after[0])
    (Console() if Console().is_terminal else Console(width=140)).print(shown)


def figure_of(panels: Sequence[Panel]) -> Figure:
    """Return panels beside one another with median and quartiles of each side: lines over numbers, dots over names."""
    with styled():
        figure, axes = new_panels(1, len(panels), height=2.9)
        for ax, panel in zip(axes[0], panels, strict=True):
            places = list(dict.fromkeys(x for found in panel.sides.values() for x in found))
            named = isinstance(places[0], str)
            for number, (side, found) in enumerate(panel.sides.items()):
                offset = 0.8 * ((number + 0.5) / len(panel.sides) - 0.5)
                at = [places.index(x) + offset if named else x for x in found]
                middle, low, high = np.array(list(found.values())).T
                bars = {"linewidth": 1.2, "marker": "o", "linestyle": "" if named else "-"}
                ax.errorbar(at, middle, (middle - low, high - middle), color=COLOURS[side], **bars)
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter("{x:,.10g}")
            if named:
                ax.axhline(1.0, color=LIGHT, zorder=0)
                ax.set_xticks(range(len(places)), places, rotation=40, ha="right")
            else:
                ax.set_xscale("log", base=2)
                ax.set_xticks(sorted(places))
                ax.xaxis.set_major_formatter("{x:,.10g}")
                ax.set_xlabel(panel.x_label)
            ax.set_ylabel(panel.label)
        names = dict.fromkeys(side for panel in panels for side in panel.sides)
        legend_above(figure, [legend_key(name, COLOURS[name], "o") for name in names])
        return figure


def write_page(
    folder: Path,
    *,
    title: str,
    lead: str,
    record: Mapping[str, Any],
    tables: Sequence[Table],
    notes: Sequence[str],
    figure: Figure,
    caption: str,
) -> None:
    """Write NAME.md, NAME.json (the record) and figures/NAME.png and .svg, NAME being that of the record's benchmark.

    The folder may hold the pages of other benchmarks. Raises StoreError if it cannot be written.
    """
    name = record["benchmark"]
    lines = [f"# {title}", "", lead, "", "```sh", " ".join(record["command"]), "```", ""]
    for columns, cells in tables:
        lines += [*_rows([columns, ["---"] * len(columns), *(map(markdown, row) for row in cells)]), ""]
    lines += [f"![{caption}](figures/{name}.png)", "", f"*{caption}*", "", *(f"- {markdown(note)}" for note in notes)]
    machine = ([key.replace("_", " "), markdown(str(value))] for key, value in record["machine"].items())
    lines += ["", "| machine | |", "| --- | --- |", *_rows(machine), ""]
    figures = folder / "figures"
    with writing(figures / name), styled():
        figure.savefig(figures / f"{name}.png", metadata={"Software": None})
        figure.savefig(figures / f"{name}.svg", metadata={"Date": None, "Creator": None})
        (folder / f"{name}.md").write_text("\n".join(lines), encoding="utf-8", newline="\n")
    write_json(folder / f"{name}.json", record)


def _rows(cells: Iterable[Iterable[str]]) -> list[str]:
    """Return rows of cells as the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in cells]
