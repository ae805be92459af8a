"""Forest plots: every row's mean reward, and in several worlds what it adds to the reward of its initial policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rrhf_bench.evaluation.grid import Grid, Missing, pair
from rrhf_bench.evaluation.statistics import Estimate, Floats
from rrhf_bench.records import Decoding
from rrhf_bench.report.drawing import (
    GREY,
    LIGHT,
    WIDTH,
    Drawn,
    Made,
    colours,
    legend_above,
    legend_key,
    new_panels,
    short,
)
from rrhf_bench.report.table import DECODING_WORDS
from rrhf_bench.report.view import BEST, GIVEN, MEASURE_WORDS, Measure, View

MANY = 12  # rows beyond which a row has less height
# The estimate of a row under a decoding and measure, and its values by repetition; None if it has none.
Point = Callable[[str, Decoding, Measure], tuple[Estimate, Floats] | None]


def test_reward(view: View) -> Iterator[Made]:
    """Draw every row's mean reward with its interval and its repetitions, both decodings, proxy and gold."""
    by_policy = [row for initial in view.policies for row in (initial, *view.rows_from(initial))]
    data_set = [row for row in view.given if row != BEST]  # the best replies are a line
    rows = [row for row in (*by_policy, *data_set) if any((row, d) in view.blocks for d in view.all_decodings)]
    if not rows:
        return

    def point(row: str, decoding: Decoding, measure: Measure) -> tuple[Estimate, Floats] | None:
        found, values = view.mean(row, decoding, measure), view.values(row, decoding, measure)
        return None if isinstance(found, Missing) or isinstance(values, Missing) else (found, values.mean_S)

    figure, axes = _panels(view, rows, point, lambda measure: f"mean {MEASURE_WORDS[measure]} on the test prompts")
    for ax, measure in zip(axes, view.measures, strict=True):
        for y, row in enumerate(rows):  # a rule above each initial policy but the first
            if y and row in (*view.policies, GIVEN[0]) and len(view.policies) > 1:
                ax.axhline(y - 0.5, color=LIGHT, linewidth=0.8, zorder=1)
        if isinstance(best := view.mean(BEST, "given", measure), Estimate):
            ax.axvline(best.value, color=GREY, linewidth=1.0, linestyle=":", zorder=1)
    handles = _decoding_keys(view)
    if BEST in view.given:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="best reply the world can write"))
    if any(row in GIVEN for row in rows):
        handles.append(legend_key("data set's reply", marker="D", filled=True))
    if any(len(block.seeds) > 1 for block in view.blocks.values()):
        handles.append(legend_key(f"one {view.repetition}", marker="|", filled=True))
    legend_above(figure, handles)
    caption = (
        f"Mean reward on the held-out prompts, 95% intervals over {view.random_units}; ticks are single "
        f"{view.repetition}s. Proxy is the reward model that methods optimise"
        + ("; gold is the world's true reward, on a scale of its own." if "gold" in view.measures else ".")
    )
    if len(view.policies) > 1:
        caption += " Rows stand below the initial policy that they started from."
    yield Drawn("test_reward", "Test reward", caption), figure


def gains(view: View) -> Iterator[Made]:
    """Draw each row's difference from its initial policy, if the run has several worlds.

    Worlds differ in the level of their rewards, which means of rewards show and paired differences do not.
    """
    rows = [row for row in view.methods if any((row, d) in view.blocks for d in view.decodings)]
    if not view.experiment.several_worlds or not rows:
        return

    def point(row: str, decoding: Decoding, measure: Measure) -> tuple[Estimate, Floats] | None:
        found = view.difference(row, view.initial(row), decoding, measure)
        sides = (view.values(name, decoding, measure) for name in (row, view.initial(row)))
        grids = [side for side in sides if isinstance(side, Grid)]
        if isinstance(found, Missing) or len(grids) < 2 or isinstance(paired := pair(*grids), Missing):
            return None
        return found, (paired.a_SP - paired.b_SP).mean(axis=1)

    figure, axes = _panels(view, rows, point, lambda measure: f"{MEASURE_WORDS[measure]} over the initial policy")
    for ax in axes:
        ax.axvline(0.0, color=LIGHT, linewidth=0.8, zorder=1)
    legend_above(figure, [*_decoding_keys(view), legend_key("one world", marker="|", filled=True)])
    caption = (
        "Mean reward on the held-out prompts less that of the initial policy under the same decoding, paired within "
        "each world; 95% intervals of Student's t over worlds, ticks are single worlds."
    )
    yield Drawn("gains", "Gain over the initial policy", caption), figure


def _panels(
    view: View, rows: Sequence[str], point: Point, words: Callable[[Measure], str]
) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with a panel for each measure, in which each row has a line and each decoding a point."""
    measures, colour = view.measures, colours(view)
    height = (0.34 if len(rows) <= MANY else 0.24) * len(rows) + 0.95
    figure, axes = new_panels(1, len(measures), height=height, width=WIDTH if len(measures) > 1 else 4.6)
    for ax, measure in zip(axes[0], measures, strict=True):
        for y, row in enumerate(rows):
            for decoding in view.all_decodings:
                if (found := point(row, decoding, measure)) is not None:
                    _draw_point(ax, *found, decoding, y + _offset(view, decoding), colour[row])
        ax.set_yticks(range(len(rows)), [short(row) for row in rows])
        ax.set_ylim(len(rows) - 0.45, -0.55)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(words(measure))
    for ax in axes[0][1:]:
        ax.set_yticklabels([])
    return figure, axes[0]


def _offset(view: View, decoding: Decoding) -> float:
    return {"greedy": -0.18, "sample": 0.18}.get(decoding, 0.0) if len(view.decodings) > 1 else 0.0


def _draw_point(ax: Axes, found: Estimate, value_S: Floats, decoding: Decoding, y: float, colour: str) -> None:
    """Draw an interval, the values of single repetitions and the mean."""
    ax.plot([found.low, found.high], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt", zorder=2)
    if len(value_S) > 1:
        ax.plot(value_S, [y] * len(value_S), "|", color=colour, markersize=7, markeredgewidth=0.8, zorder=2)
    face = "white" if decoding == "sample" else colour
    marker = "D" if decoding == "given" else "o"
    ax.plot([found.value], [y], marker, color=colour, markerfacecolor=face, markersize=4.5, zorder=3)


def _decoding_keys(view: View) -> list[Any]:
    return [legend_key(DECODING_WORDS[d], marker="o", filled=d == "greedy") for d in view.decodings]
