"""The frontier: reward against distance from the initial policy, for rows that differ in hyper-parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from rrhf_bench.evaluation.statistics import best_of_n_kl
from rrhf_bench.registry import find
from rrhf_bench.report.drawing import GREY, WIDTH, Drawn, Made, kl_axis, legend_above, new_panels
from rrhf_bench.report.table import Missing
from rrhf_bench.report.view import BASE, MEASURE_WORDS, Measure, View, changed

LEAST = 3  # rows of one method that make a frontier
MOST_SEARCHES = 6  # in one figure
_MARKERS = "os^Dv*X"  # by the value of the hyper-parameter that varies beside the learning rate
_FILLS: Sequence[Any] = ("full", "none", "left", "top")  # of the markers, one for each search of a method


@dataclass(frozen=True)
class _Search:
    """The rows of one kind and initial policy that differ in numbers alone, or its plain row.

    ``varies`` is the number that differs, beside the learning rate, in the rows with the fewest settings of their own.
    """

    label: str
    kind: str
    fill: Any  # matplotlib's fillstyle of the markers
    rows: tuple[str, ...]
    varies: str | None
    shade: Mapping[float | None, str]  # by learning rate, darker for a higher one

    def colour(self, view: View, row: str) -> str:
        return self.shade[_number(view, row, "lr")]

    def value(self, view: View, row: str) -> float:
        """Return the value of the hyper-parameter that varies, 0 if none does."""
        return _number(view, row, self.varies) or 0.0 if self.varies else 0.0


def frontiers(view: View) -> Iterator[Made]:
    """Yield one figure for each initial policy from which enough rows of one trained method start."""
    for initial in view.policies:
        found = _searches(view, initial)
        if found:
            yield _draw(view, initial, found)


def no_frontier(view: View) -> Missing | None:
    """Return why the figure is left out of a run that has rows for one, or None if the run has none or the figure."""
    if view.kl_missing is None or not any(_searches(view, initial, "reward") for initial in view.policies):
        return None
    return Missing(f"No figure of reward against KL: {view.kl_missing.reason}.")


def _searches(view: View, initial: str, *measures: Measure) -> list[_Search]:
    """Return the searches from one initial policy; none if no method has enough rows.

    Those with enough rows come first, and of either kind those of online methods. The rows have the measures, by
    default reward and KL.
    """
    measured = [
        row
        for row in view.rows_from(initial)
        if row in view.trained
        and not any(isinstance(view.values(row, "sample", m), Missing) for m in measures or ("kl", "reward"))
    ]
    kinds = sorted(dict.fromkeys(map(view.kind, measured)), key=lambda kind: find(kind).family != "online")
    found = []
    for kind in kinds:
        groups: dict[str, list[str]] = defaultdict(list)
        for row in measured:
            if view.kind(row) == kind:
                groups[repr((view.same_way(row)[0], _words_of(view, row)))].append(row)
        large = [group for group in groups.values() if len(group) >= LEAST]
        plain = view.plain_row(row for group in groups.values() for row in group)
        assert plain is not None
        labels = _labels(view, kind, large) if len(large) > 1 else [find(kind).label]
        for rows, fill, label in zip(large or [[plain]], _FILLS, labels, strict=False):
            found.append(_search(view, kind, rows, label, fill))
    found.sort(key=lambda search: len(search.rows) < LEAST)  # stable
    return found if found and len(found[0].rows) >= LEAST else []


def _labels(view: View, kind: str, groups: Sequence[Sequence[str]]) -> list[str]:
    """Return what each of several searches of one method is called: by the settings and recipes that they differ in."""
    first = [rows[0] for rows in groups]
    keys = list(dict.fromkeys(key for row in first for key in _words_of(view, row)))
    parts = [[str(getattr(view.methods[row], key)) for row in first] for key in keys]
    parts.append([view.sampling_policy(row) or row for row in first])
    differing = [part for part in parts if len(set(part)) > 1] or [first]
    return [", ".join((find(kind).label, *words)) for words in zip(*differing, strict=True)]


def _words_of(view: View, row: str) -> dict[str, object]:
    """Return the settings of a row that are no numbers and differ from their defaults."""
    return {key: value for key, value in changed(view.methods[row]).items() if _as_number(value) is None}


def _as_number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _search(view: View, kind: str, rows: Sequence[str], label: str, fill: Any) -> _Search:
    fields = [key for row in rows for key in changed(view.methods[row]) if key != "lr"]
    varying = [key for key in dict.fromkeys(fields) if len({_number(view, row, key) for row in rows}) > 1]
    varies = max(varying, key=fields.count, default=None)
    rates = sorted({_number(view, row, "lr") for row in rows}, key=lambda lr: lr or 0.0)
    shade = dict(zip(rates, _shades(find(kind).colour, len(rates)), strict=True))
    return _Search(label, kind, fill, tuple(rows), varies, shade)


def _number(view: View, row: str, key: str) -> float | None:
    return _as_number(getattr(view.methods[row], key, None))


def _draw(view: View, initial: str, found: Sequence[_Search]) -> Made:
    measures, searches, left = view.measures, found[:MOST_SEARCHES], found[MOST_SEARCHES:]
    figure, axes = new_panels(1, len(measures), height=3.6, width=WIDTH if len(measures) > 1 else 4.4)
    reranked = [row for row in view.rows_from(initial) if view.reranked(row) and view.block(row, "sample") is not None]
    shapes = _shapes(view, searches)
    for ax, measure in zip(axes[0], measures, strict=True):
        for search in searches:
            if find(search.kind).family == "online":
                _draw_lines(ax, view, search, measure)
            else:
                for row in search.rows:
                    _points(ax, view, row, measure, search.colour(view, row), _marker(view, row, shapes), search.fill)
        for row in reranked:
            reward = view.mean(row, "sample", measure)
            if not isinstance(reward, Missing):
                method = view.method(row)
                ax.plot([best_of_n_kl(view.reranked(row) or 1)], [reward.value], method.marker, color=method.colour)
        start = view.mean(initial, "sample", measure)
        if not isinstance(start, Missing):
            ax.plot([0], [start.value], "P", color="black", markersize=6, zorder=3)
        kl_axis(ax)
        ax.set_ylabel(f"{MEASURE_WORDS[measure]} (sampled)")
    legend_above(figure, _keys(view, searches, shapes, reranked))
    caption = (
        f"Rows that start from {initial}, sampled replies to the test prompts: mean reward against mean KL to "
        f"it. Large: mean over {view.repetition}s; faint: each {view.repetition}. Darker: a higher learning rate. "
        + "".join(_words(search, shapes) for search in searches if search.varies or len(search.rows) >= LEAST)
        + ("Best-of-n stands at its KL bound log n - (n - 1) / n. " if reranked else "")
        + "Every row is one that the experiment file names; none was picked by what is shown here."
        + (f" Not shown, for want of room: {', '.join(search.label for search in left)}." if left else "")
    )
    name = "frontier" if initial == BASE else f"frontier_{1 + view.policies.index(initial)}"
    return Drawn(name, "Reward against distance from the initial policy", caption), figure


_Shapes = Mapping[str, tuple[str, list[float]]]


def _shapes(view: View, searches: Sequence[_Search]) -> _Shapes:
    """Return by offline method the hyper-parameter that its markers stand for, and its values over all its searches."""
    found: dict[str, tuple[str, list[float]]] = {}
    for search in searches:
        if search.varies and find(search.kind).family != "online" and search.kind not in found:
            rows = [row for other in searches if other.kind == search.kind for row in other.rows]
            found[search.kind] = search.varies, sorted({_number(view, row, search.varies) or 0.0 for row in rows})
    return found


def _marker(view: View, row: str, shapes: _Shapes) -> str:
    if view.kind(row) not in shapes:
        return _MARKERS[0]
    name, values = shapes[view.kind(row)]
    return _MARKERS[values.index(_number(view, row, name) or 0.0) % len(_MARKERS)]


def _words(search: _Search, shapes: _Shapes) -> str:
    """Return what the caption says of the rows of one search."""
    if search.varies and find(search.kind).family == "online":
        return (
            f"{search.label}: rows are joined in the order of {search.varies}, which stands beside each, one line a "
            "learning rate. "
        )
    shape = f"shape by {shapes[search.kind][0]}; " if search.varies else ""
    return f"{search.label}: {shape}rows: {', '.join(search.rows)}. "


def _draw_lines(ax: Axes, view: View, search: _Search, measure: Measure) -> None:
    """Draw the rows of an online method, joined in the order of the hyper-parameter that varies."""
    for place, colour in enumerate(search.shade.values()):
        rows = [row for row in search.rows if search.colour(view, row) == colour]
        rows.sort(key=lambda row: search.value(view, row))
        means = [_points(ax, view, row, measure, colour, find(search.kind).marker, search.fill) for row in rows]
        known = [mean for mean in means if mean is not None]
        if known:
            ax.plot(*np.array(known).T, color=colour, linewidth=0.9, zorder=2)
        for row, mean in zip(rows, means, strict=True):
            if mean is not None and search.varies:
                below = -9 if place % 2 else 4  # points; lines lie close to each other
                words, offset = f"{search.value(view, row):g}", (4, below)
                ax.annotate(words, mean, offset, textcoords="offset points", fontsize=6, color="#303030", zorder=5)


def _points(
    ax: Axes, view: View, row: str, measure: Measure, colour: str, marker: str, fill: Any
) -> tuple[float, float] | None:
    """Draw a row: each seed or world, and their mean, which is returned."""
    kl, reward = view.values(row, "sample", "kl"), view.values(row, "sample", measure)
    if isinstance(kl, Missing) or isinstance(reward, Missing):
        return None
    x_S, y_S = kl.mean_S, reward.mean_S
    style: dict[str, Any] = {"color": colour, "marker": marker, "fillstyle": fill, "linestyle": ""}
    if len(x_S) > 1:
        width = 0.0 if fill == "full" else 0.5
        ax.plot(x_S, y_S, **style, markersize=2.8, alpha=0.35, markeredgewidth=width, zorder=1)
    edge = "white" if fill == "full" else colour
    ax.plot([x_S.mean()], [y_S.mean()], **style, markersize=5.5, markeredgecolor=edge, zorder=3)
    return float(x_S.mean()), float(y_S.mean())


def _shades(colour: str, count: int) -> list[str]:
    """Return so many shades of a colour, from light to dark; the colour itself for a single one."""
    rgb = np.array(to_rgb(colour))
    whites = [0.0] if count == 1 else np.linspace(0.5, -0.45, count).tolist()  # of black, below 0
    mixed = [rgb + (1 - rgb) * w if w > 0 else rgb * (1 + w) for w in whites]
    return ["#" + "".join(f"{round(255 * c):02x}" for c in m.tolist()) for m in mixed]


def _keys(view: View, searches: Sequence[_Search], shapes: _Shapes, reranked: Sequence[str]) -> list[Line2D]:
    def key(words: str, colour: str, marker: str, line: str = "", fill: Any = "full") -> Line2D:
        return Line2D([], [], color=colour, marker=marker, linestyle=line, fillstyle=fill, label=words)

    keys = []
    for search in searches:
        method = find(search.kind)
        line = "-" if method.family == "online" else ""
        for lr, colour in search.shade.items():
            words = search.label if lr is None else f"{search.label}, lr {lr:g}"
            keys.append(key(words, colour, method.marker, line, search.fill))
    for name, values in shapes.values():
        keys += [key(f"{name} {value:g}", GREY, marker) for value, marker in zip(values, cycle(_MARKERS), strict=False)]
    for row in reranked:
        keys.append(key(f"best of {view.reranked(row)}", view.method(row).colour, view.method(row).marker))
    return [*keys, key("initial policy", "black", "P")]
