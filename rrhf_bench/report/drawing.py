"""Draw the parts that all figures of a report share: style, colours, panels, legends.

A method has one colour in all figures.

The registry gives the colour of a method. Further colours are Okabe and Ito's, then Tol's, which people with any of the
common colour-blindnesses can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter
from scipy.optimize import isotonic_regression

from rrhf_bench.errors import visible
from rrhf_bench.registry import METHODS
from rrhf_bench.report.view import GIVEN, View

DPI = 200
GREY = "#6b6b6b"
LIGHT = "#d9d9d9"
# Rows that are not the first of their kind take these colours in turn.
FREE_COLOURS = tuple(dict.fromkeys((
    "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#661100", "#DDCC77", "#202020",
    *(method.colour for method in METHODS.values()),
)))  # fmt: skip
HUES = tuple(dict.fromkeys(("#0072B2", "#D55E00", "#009E73", "#CC79A7", *FREE_COLOURS)))  # of what is no row
_FURTHER_MARKERS = "svX*<>hp"
STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.parse_math": False,  # a method's name may hold a dollar sign
    "savefig.dpi": DPI,
    "svg.hashsalt": "rrhf-bench",
}
WIDTH = 7.2  # inches: the text width of a two-column paper


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure's file name without a suffix, and what its caption says."""

    name: str
    title: str
    caption: str


Made: TypeAlias = tuple[Drawn, Figure]


def styled() -> AbstractContextManager[None]:
    """Return the context in which figures are made and saved."""
    return matplotlib.style.context(["default", dict(STYLE)])


def colours(view: View) -> dict[str, str]:
    """Return the colour of every row.

    Among the rows of one initial policy the first of a kind has the colour that the registry gives the kind. Further
    rows, and a kind whose colour is taken, have the free ones in turn, the rows that most figures show first.
    """
    found = {**dict.fromkeys(view.policies, GREY), **dict.fromkeys(GIVEN, "#a0a0a0")}
    for initial in view.policies:
        rows = sorted(view.rows_from(initial), key=lambda row: row not in view.main_rows)  # stable
        first: dict[str, str] = {}
        for kind in dict.fromkeys(map(view.kind, rows)):
            row = view.rows_from(initial, kind)[0]
            if view.method(row).colour not in first.values():
                first[row] = view.method(row).colour
        free = [colour for colour in FREE_COLOURS if colour not in first.values()] or list(FREE_COLOURS)
        others = [row for row in rows if row not in first]
        found |= first | {row: free[i % len(free)] for i, row in enumerate(others)}
    return found


def markers(view: View) -> dict[str, str]:
    """Return the marker of every row: that of its method or, for a row whose colour and marker another row from the
    same initial policy has, a further one. Of such rows the one that most figures show first keeps its marker."""
    colour, found = colours(view), dict.fromkeys(view.policies, "P")
    for initial in view.policies:
        taken: set[tuple[str, str]] = set()
        for row in sorted(view.rows_from(initial), key=lambda row: row not in view.main_rows):  # stable
            own = view.method(row).marker
            found[row] = next((m for m in (own, *_FURTHER_MARKERS) if (colour[row], m) not in taken), own)
            taken.add((colour[row], found[row]))
    return found


def new_panels(rows: int, columns: int, *, height: float, width: float = WIDTH, **share: Any) -> tuple[Figure, Any]:
    """A figure of that size in inches and its (rows, columns) array of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def legend_above(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Above the panels, where it covers nothing, in as many columns as the figure is wide."""
    widths = [0.45 + 0.06 * len(str(handle.get_label())) for handle in handles]  # inches, on the safe side

    def total(columns: int) -> float:  # matplotlib fills column by column, the first ones deeper
        return sum(float(column.max()) for column in np.array_split(widths, columns))

    columns = max((k for k in range(1, len(handles) + 1) if total(k) <= figure.get_figwidth()), default=1)
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns)


def names_beside(ax: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write the names of points (name, x, y, colour) in a column right of the panel, joined to their points by lines.

    The names stand in the order of y, each as near to the height of its point as leaves room for the others.
    """
    points = sorted(points, key=lambda point: point[2])
    low, high = ax.get_ylim()
    wanted = np.array([(y - low) / (high - low) for _, _, y, _ in points])
    gap = min(0.045, 1 / max(len(points) - 1, 1))  # of the panel's height
    shift = gap * np.arange(len(points))
    heights = np.clip(isotonic_regression(wanted - shift).x, 0, 1 - shift[-1]) + shift
    for (name, x, y, colour), height in zip(points, heights, strict=True):
        line = {
            "arrowstyle": "-", "linewidth": 0.4, "color": colour, "alpha": 0.5, "shrinkA": 0, "shrinkB": 2,
            "relpos": (0, 0.5),
        }  # fmt: skip
        ax.annotate(
            name, (x, y), (1.03, height), textcoords="axes fraction", arrowprops=line, fontsize=5, color="#303030",
            va="center", annotation_clip=False,
        )  # fmt: skip


def legend_key(words: str, colour: str = GREY, marker: str = "", filled: bool = True) -> Line2D:
    """An entry of a legend: a line, or a marker where one is given."""
    face = colour if filled else "white"
    line = "" if marker else "-"
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle=line, label=short(words))


def short(text: str) -> str:
    """A name as a figure shows it; matplotlib would leave one that begins with an underscore out of a legend."""
    text = visible(text)
    text = text if len(text) <= 22 else text[:21] + "…"
    return f" {text}" if text.startswith("_") else text


def thousands(value: float, _position: object = None) -> str:
    """A number on an axis."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def kl_axis(ax: Axes) -> None:
    """KL from 0 on a square-root axis, on which the rewards that it buys lie nearly on a line at first (2210.10760)."""
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set_xlim(left=0)
    limit = ax.get_xlim()[1]
    step = next((step for step in (0.5, 1.0, 2.0, 4.0) if limit <= (8 * step) ** 2), 8.0)
    ticks = [(k * step) ** 2 for k in range(int(limit**0.5 / step) + 1)]  # at even distances
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("KL to the initial policy (nats, square-root axis)")
