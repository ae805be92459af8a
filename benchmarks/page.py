"""How a benchmark's record is shown: a table on the terminal, a Markdown page, figures. Records in, files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Spread, write_json
from rrhf_bench.errors import StoreError
from rrhf_bench.report.drawing import LIGHT, STYLE, legend_above, legend_key, new_panels
from rrhf_bench.report.table import markdown


def spread_words(spread: Spread, digits: int) -> str:
    """A median with its quartiles."""
    return f"{spread.median:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


def make_console() -> Console:
    """The terminal; wide enough for a table where the output is a file."""
    return Console() if Console().is_terminal else Console(width=140)


def rich_table(columns: Sequence[str], cells: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """For the terminal; a rule where the first cell changes."""
    table = Table(*columns, title=title)
    for number, row in enumerate(cells):
        last = number + 1 == len(cells) or cells[number + 1][0] != row[0]
        table.add_row(*row, end_section=last)
    return table


@dataclass(frozen=True)
class Series:
    """One side in one panel. A point without a value is left out; ``x`` is used by lines only."""

    name: str
    colour: str
    values: Sequence[Spread | None]
    x: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One quantity of several sides, on a logarithmic axis."""

    label: str  # of the values
    series: Sequence[Series]
    x_label: str = ""


def dots_figure(rows: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """A row for each name, a panel for each quantity, a dot with its quartiles for each side."""
    series = max((panel.series for panel in panels), key=len)
    with matplotlib.style.context(["default", dict(STYLE)]):
        height = 0.7 + len(rows) * (0.2 + 0.13 * len(series))
        figure, axes = new_panels(1, len(panels), height=height, sharey=True)
        for ax, panel in zip(axes[0], panels, strict=True):
            for place, side in enumerate(panel.series):
                offset = (place - (len(panel.series) - 1) / 2) * 0.8 / len(panel.series)
                for row, value in enumerate(side.values):
                    if value is not None:
                        ax.plot([value.low, value.high], [row + offset] * 2, color=side.colour, linewidth=1.2)
                        ax.plot(value.median, row + offset, "o", color=side.colour)
            _log_ticks(ax, "x")
            ax.axvline(1.0, color=LIGHT, zorder=0)
            ax.set_xlabel(panel.label)
            ax.grid(axis="y", visible=False)
        axes[0][0].set_yticks(range(len(rows)), rows)
        axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
        legend_above(figure, [legend_key(side.name, side.colour, "o") for side in series])
        return figure


def lines_figure(panels: Sequence[Panel]) -> Figure:
    """A panel beside the other, a line with the band of its quartiles for each side."""
    with matplotlib.style.context(["default", dict(STYLE)]):
        figure, axes = new_panels(1, len(panels), height=2.9)
        for ax, panel in zip(axes[0], panels, strict=True):
            for side in panel.series:
                points = [(x, value) for x, value in zip(side.x, side.values, strict=True) if value is not None]
                x, low, middle, high = np.array([(x, v.low, v.median, v.high) for x, v in points]).T
                ax.fill_between(x, low, high, color=side.colour, alpha=0.2, linewidth=0)
                ax.plot(x, middle, marker="o", color=side.colour)
            _log_ticks(ax, "x", at=sorted({x for side in panel.series for x in side.x}))
            _log_ticks(ax, "y")
            ax.set_xlabel(panel.x_label)
            ax.set_ylabel(panel.label)
        named = {side.name: side for panel in panels for side in panel.series}
        legend_above(figure, [legend_key(name, side.colour) for name, side in named.items()])
        return figure


def _log_ticks(ax: Axes, axis: str, at: Sequence[float] | None = None) -> None:
    """Put ticks at powers of 2, or at the values given."""
    getattr(ax, f"set_{axis}scale")("log", base=2)
    getattr(ax, f"{axis}axis").set_major_formatter("{x:,.10g}")
    if at is not None:
        getattr(ax, f"set_{axis}ticks")(at)


def write_page(
    folder: Path,
    name: str,
    *,
    title: str,
    lead: str,
    record: Mapping[str, Any],
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
    figures: Mapping[str, tuple[Figure, str]],
) -> Path:
    """NAME.md, NAME.json (the record) and figures/*.png and *.svg in a folder that may hold the pages of other
    benchmarks. Raises StoreError where it cannot be written."""
    command = " ".join(record["command"])
    lines = [f"# {title}", "", lead, "", "```sh", command, "```", ""]
    for columns, cells in tables:
        lines += [_row(columns), _row(["---"] * len(columns)), *(_row(map(markdown, row)) for row in cells), ""]
    for figure_name, (_, words) in figures.items():
        lines += [f"![{words}](figures/{figure_name}.png)", "", f"*{words}*", ""]
    lines += [*(f"- {markdown(note)}" for note in notes), "", "| machine | |", "| --- | --- |"]
    lines += [_row([key.replace("_", " "), markdown(str(value))]) for key, value in record["machine"].items()]
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for figure_name, (figure, _) in figures.items():
            _save(figure, folder / "figures" / figure_name)
        page = folder / f"{name}.md"
        page.write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    write_json(folder / f"{name}.json", record)
    return page


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.style.context(["default", dict(STYLE)]):
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
