"""The table of rewards on topics that a method was aligned on and on topics that it was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rrhf_bench.evaluation.grid import Grid, Missing
from rrhf_bench.evaluation.statistics import SeedVariance
from rrhf_bench.records import Decoding
from rrhf_bench.report.table import DECODING_WORDS, Field, Table, build_table
from rrhf_bench.report.view import MEASURE_WORDS, Found, Measure, View, difference_of, pool_grids

Line = tuple[str, Decoding, Measure]
GROUPS = {"seen": False, "held-out": True}  # of the topics

_NOTES = (
    "Held-out topics: the initial policy, the reward model and the perplexity model know them, but no training prompt "
    "of a method and no dev prompt asks about one. A gain on them is what a method learned on other topics and carried "
    "over.",
    "Against initial: mean difference to the initial policy that the row started from, on the same prompts. Intervals "
    "at 95% as in the table of differences, without a verdict: all of these are exploratory.",
)


def topics_table(view: View) -> Table | None:
    """Return the mean rewards on seen and on held-out topics, and the gains over the initial policy on both; None for
    a run without held-out topics."""
    if not view.records.held_out:
        return None

    def mean(group: str) -> Callable[[Line], Found]:
        def value(line: Line) -> Found:
            row, decoding, measure = line
            pooled = _pooled(view, decoding, measure, group) if row in view.trained else None
            return view.mean_of(_grid(view, *line, group), "topics", group, *line, pooled=pooled)

        return value

    def gain(group: str) -> Callable[[Line], Found]:
        def value(line: Line) -> Found:
            row, decoding, measure = line
            if row not in view.trained:
                return Missing("it is not trained")
            own, initial = (_grid(view, of, decoding, measure, group) for of in (row, view.initial(row)))
            return difference_of(own, initial, view.clusters, _pooled(view, decoding, measure, group))

        return value

    fields: Sequence[Field[Line]] = (
        Field("method", lambda line: line[0]),
        Field("decoding", lambda line: DECODING_WORDS[line[1]]),
        Field("reward", lambda line: MEASURE_WORDS[line[2]].split()[0]),
        *(Field(f"{group} topics", mean(group), 2, interval=True) for group in GROUPS),
        *(Field(f"{group}, against initial", gain(group), 2, interval=True) for group in GROUPS),
        *(Field(f"{group} prompts", _prompts(view, group), 0) for group in GROUPS),
    )
    lines = [(*line, measure) for measure in view.measures for line in view.blocks_in_order]
    return build_table("topics", "Seen and held-out topics", fields, lines, _NOTES, view.records.arena, group=1)


def _prompts(view: View, group: str) -> Callable[[Line], int | Missing]:
    def value(line: Line) -> int | Missing:
        grid = _grid(view, *line, group)
        return grid if isinstance(grid, Missing) else len(grid.prompts)

    return value


def _grid(view: View, row: str, decoding: Decoding, measure: Measure, group: str) -> Grid | Missing:
    """Return the values of a row on the prompts of one group of topics."""
    grid = view.values(row, decoding, measure)
    if isinstance(grid, Missing):
        return grid
    return grid.only(grid.seeds, [p for p in grid.prompts if (p in view.records.held_out) == GROUPS[group]])


def _pooled(view: View, decoding: Decoding, measure: Measure, group: str) -> SeedVariance | None:
    """Return the variance between seeds over the trained rows on one group of topics."""
    return pool_grids(_grid(view, row, decoding, measure, group) for row in view.pooled_rows)
