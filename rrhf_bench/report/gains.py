"""The figure of gains: what each row adds to the reward of its initial policy, paired within each world."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes

from rrhf_bench.evaluation.grid import Grid, Missing, pair
from rrhf_bench.records import Decoding
from rrhf_bench.report.drawing import LIGHT, WIDTH, Drawn, Made, colours, legend_above, legend_key, new_panels, short
from rrhf_bench.report.table import DECODING_WORDS
from rrhf_bench.report.view import MEASURE_WORDS, Measure, View


def gains(view: View) -> Iterator[Made]:
    """Draw each row's difference from its initial policy, if the run has several worlds.

    Worlds differ in the level of their rewards, which means of rewards show and paired differences do not.
    """
    rows = [row for row in view.methods if any((row, d) in view.blocks for d in view.decodings)]
    if not view.experiment.several_worlds or not rows:
        return
    measures = view.measures
    width = WIDTH if len(measures) > 1 else 4.6
    figure, axes = new_panels(1, len(measures), height=0.34 * len(rows) + 0.95, width=width)
    colour = colours(view)
    for ax, measure in zip(axes[0], measures, strict=True):
        ax.axvline(0.0, color=LIGHT, linewidth=0.8, zorder=1)
        for y, row in enumerate(rows):
            for decoding in view.decodings:
                _draw_gain(ax, view, row, decoding, measure, y, colour[row])
        ax.set_yticks(range(len(rows)), [short(row) for row in rows])
        ax.set_ylim(len(rows) - 0.45, -0.55)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{MEASURE_WORDS[measure]} over the initial policy")
    for ax in axes[0][1:]:
        ax.set_yticklabels([])
    handles = [legend_key(DECODING_WORDS[d], marker="o", filled=d == "greedy") for d in view.decodings]
    legend_above(figure, [*handles, legend_key("one world", marker="|", filled=True)])
    caption = (
        "Mean reward on the held-out prompts less that of the initial policy under the same decoding, paired within "
        "each world; 95% intervals of Student's t over worlds, ticks are single worlds."
    )
    yield Drawn("gains", "Gain over the initial policy", caption), figure


def _draw_gain(ax: Axes, view: View, row: str, decoding: Decoding, measure: Measure, y: float, colour: str) -> None:
    """Draw the interval, the mean and each world's value of one row's gain; nothing if it has none."""
    initial = view.initial(row)
    found = view.difference(row, initial, decoding, measure)
    sides = [view.values(name, decoding, measure) for name in (row, initial)]
    grids = [side for side in sides if isinstance(side, Grid)]
    if isinstance(found, Missing) or len(grids) < 2 or isinstance(paired := pair(*grids), Missing):
        return
    y += {"greedy": -0.18, "sample": 0.18}.get(decoding, 0.0) if len(view.decodings) > 1 else 0.0
    ax.plot([found.low, found.high], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt", zorder=2)
    gain_S = (paired.a_SP - paired.b_SP).mean(axis=1)
    ax.plot(gain_S, [y] * len(gain_S), "|", color=colour, markersize=7, markeredgewidth=0.8, zorder=2)
    ax.plot([found.value], [y], "o", color=colour, markerfacecolor="white" if decoding == "sample" else colour,
            markersize=4.5, zorder=3)  # fmt: skip
