"""Rank many methods against each other: the ranked table, the matrix of win rates, reward against KL and each cost.

The comparisons of this file are a family of their own: all pairs of trained rows under one decoding and reward.
Letters: S seeds, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rrhf_bench.evaluation.grid import Grid, Missing, pair
from rrhf_bench.evaluation.statistics import Estimate, Floats, paired_difference
from rrhf_bench.records import Decoding
from rrhf_bench.report.budgets import labelled_prompts, mean_cost, spent
from rrhf_bench.report.comparisons import Comparison, adjusted
from rrhf_bench.report.drawing import (
    Drawn,
    Made,
    colours,
    kl_axis,
    markers,
    names_beside,
    new_panels,
    short,
    thousands,
)
from rrhf_bench.report.section import Part, Sentence
from rrhf_bench.report.table import DECODING_WORDS, Cell, Column, Table, number
from rrhf_bench.report.view import BASE, MEASURE_WORDS, Found, Measure, View

LEAST_KINDS = 5  # of trained methods from one initial policy, from which the report ranks them


@dataclass(frozen=True)
class Place:
    """The rank of a row among ``of`` rows: ``first`` counts from those that are better with a verdict, ``last`` from
    those that are worse with one. Rows whose ranges overlap are tied as far as this run can tell."""

    first: int
    last: int

    @property
    def words(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


def ranked_rows(view: View) -> list[str]:
    """Return the rows that are ranked, [policy] among them: none if too few kinds of methods start from it."""
    rows = view.rows_from(BASE)
    kinds = {view.kind(row) for row in rows if row in view.trained}
    return [BASE, *rows] if len(kinds) >= LEAST_KINDS else []


def ranking_parts(view: View) -> Iterator[Part]:
    """Yield the parts of the page's section on ranks, in order; none if the run ranks nothing."""
    rows = ranked_rows(view)
    if not rows:
        return
    measure = view.measures[-1]  # gold if there is one
    words = [_best_words(view, rows, decoding, m) for decoding in view.decodings for m in view.measures]
    yield from (Sentence(text) for text in words if text)
    yield ranking_table(view, rows)
    yield win_rates_figure(view, rows, measure)
    if view.kl_missing is None and "sample" in view.decodings:
        yield distance_figure(view, rows)
    yield cost_figure(view, rows, measure)


def win_rates_tables(view: View) -> list[Table]:
    """Return the win rates of all rows over each other, a table for each decoding; none if the run ranks nothing."""
    rows = ranked_rows(view)
    return [win_rates_table(view, rows, decoding, view.measures[-1]) for decoding in view.decodings if rows]


def places(view: View, rows: Sequence[str], decoding: Decoding, measure: Measure) -> dict[str, Place]:
    """Return the place of each row that has the measure.

    Two rows differ if their comparison has a verdict; all pairs of rows are one family. One training seed gives none.
    """
    return view.once(("places", *rows, decoding, measure), lambda: _places(view, rows, decoding, measure))


def _places(view: View, rows: Sequence[str], decoding: Decoding, measure: Measure) -> dict[str, Place]:
    known = [row for row in rows if not isinstance(view.mean(row, decoding, measure), Missing)]
    family = [
        Comparison(a, b, decoding, measure, view.difference(a, b, decoding, measure)) for a, b in combinations(known, 2)
    ]
    better: dict[str, int] = dict.fromkeys(known, 0)
    worse: dict[str, int] = dict.fromkeys(known, 0)
    for c in adjusted(family):
        if c.verdict in ("higher", "lower"):
            winner, loser = (c.a, c.b) if c.verdict == "higher" else (c.b, c.a)
            worse[winner] += 1
            better[loser] += 1
    return {row: Place(1 + better[row], len(known) - worse[row]) for row in known}


def _means(view: View, rows: Sequence[str], decoding: Decoding, measure: Measure) -> dict[str, Estimate]:
    """Return the means of the rows that have one, the highest first."""
    means = {row: view.mean(row, decoding, measure) for row in rows}
    known = {row: mean for row, mean in means.items() if isinstance(mean, Estimate)}
    return dict(sorted(known.items(), key=lambda item: -item[1].value))


def _best_words(view: View, rows: Sequence[str], decoding: Decoding, measure: Measure) -> str | None:
    """Return the sentence of the row with the highest mean and of those that are tied with it."""
    found = places(view, rows, decoding, measure)
    means = _means(view, rows, decoding, measure)
    if not means:
        return None
    first, *others = means
    kind = f"{MEASURE_WORDS[measure]}, {DECODING_WORDS[decoding]}"
    words = f"Highest {kind}: {first}, {number(means[first].value, 2)}"
    if len(view.experiment.repetitions) == 1:
        return (
            f"{words}. One training seed does not show how far another training run would differ, so no row gets a "
            "verdict over another, and each rank reaches from the first place to the last."
        )
    tied = [row for row in others if found[row].first == 1]
    below = len(others) - len(tied)
    if not tied:
        return f"{words}, above each of the {below} other rows."
    named = ", ".join(tied[:MOST_NAMED]) + (f" and {len(tied) - MOST_NAMED} more" if len(tied) > MOST_NAMED else "")
    return f"{words}; tied with it as far as this run can tell: {named}. {below} rows are below some other row."


MOST_NAMED = 6  # of the rows that are tied at the top


def ranking_table(view: View, rows: Sequence[str]) -> Table:
    """Return the rows by decoding and reward, the highest mean first, with the range of each one's rank."""
    columns = (
        Column("decoding"),
        Column("rank"),
        Column("row"),
        Column("method"),
        Column("family"),
        *(Column(MEASURE_WORDS[measure], 2, interval=True) for measure in reversed(view.measures)),
        Column("KL", 2),
        Column("length", 1),
        Column("sampled replies", 0),
        Column("reward calls", 0),
        Column("labelled prompts", 0),
        Column("models", 0),
    )
    lines = []
    measure = view.measures[-1]
    for decoding in view.decodings:
        found = places(view, rows, decoding, measure)
        ordered = [*_means(view, rows, decoding, measure)]
        for row in [*ordered, *(row for row in rows if row not in ordered)]:
            rank = Cell(found[row].words) if row in found else Cell.of(view.mean(row, decoding, measure))
            settings = view.methods.get(row)
            lines.append(
                (
                    Cell(DECODING_WORDS[decoding]),
                    rank,
                    Cell(row),
                    Cell(view.method(row).label if settings else "initial policy"),
                    Cell(settings.family if settings else "none"),
                    *(Cell.of(view.mean(row, decoding, m)) for m in reversed(view.measures)),
                    Cell.of(view.mean(row, "sample", "kl")),
                    Cell.of(view.mean(row, decoding, "tokens")),
                    *(spent(view, row, name) for name in ("sampled_replies", "reward_calls")),
                    Cell(labelled_prompts(view, row)),
                    Cell(len(settings.models_in_memory()) if settings else 1),
                )
            )
    test = f"its test covers {view.random_units}."
    if len(view.experiment.repetitions) == 1:
        test = "no difference of one training seed has such a p, because another seed can change the order."
    notes = (
        f"Rank by {MEASURE_WORDS[measure]}: from 1 + the number of rows that are higher, to the number of rows less "
        "those that are lower. Two rows differ if their paired difference has a p below 0.05 after Holm's adjustment "
        f"over all pairs of rows of the decoding; {test} Rows with overlapping ranges are tied.",
        "KL: to the initial policy, nats a sampled reply. Sampled replies, reward calls: for training, mean over "
        f"{view.repetition}s, tuning trials apart. Labelled prompts: of the data set, whose replies the row trains on. "
        "Models: resident while the method trains, by its settings.",
    )
    return Table("ranking", "The methods, ranked", columns, tuple(lines), notes, view.records.arena, group=0)


def win_rate(view: View, a: str, b: str, decoding: Decoding, measure: Measure) -> Found:
    """Return the share of prompts whose reply by row ``a`` has the higher reward than that by ``b``; ties are halves.

    ``Estimate.p`` is of the share against one half.
    """
    return view.once(("win rate", a, b, decoding, measure), lambda: _win_rate(view, a, b, decoding, measure))


def _win_rate(view: View, a: str, b: str, decoding: Decoding, measure: Measure) -> Found:
    found = [view.values(row, decoding, measure) for row in (a, b)]
    if missing := [grid for grid in found if isinstance(grid, Missing)]:
        return missing[0]
    paired = pair(*(grid for grid in found if isinstance(grid, Grid)))
    if isinstance(paired, Missing):
        return paired
    wins_SP = np.sign(paired.a_SP - paired.b_SP) / 2
    excess = paired_difference(
        wins_SP, np.zeros_like(wins_SP), clusters_P=view.clusters(paired.prompts), worlds_S=paired.worlds
    )
    low, high = max(0.0, 0.5 + excess.low), min(1.0, 0.5 + excess.high)
    return Estimate(
        0.5 + excess.value, low, high, excess.n, excess.seeds, excess.p, excess.method, clusters=excess.clusters
    )


def win_rates_table(view: View, rows: Sequence[str], decoding: Decoding, measure: Measure) -> Table:
    """Return the win rate of each row over each other row, with its interval."""
    ordered = [*_means(view, rows, decoding, measure)]
    columns = (Column("row"), *(Column(f"over {row}", 2, interval=True) for row in ordered))
    lines = [
        (Cell(a), *(Cell(0.5) if a == b else Cell.of(win_rate(view, a, b, decoding, measure)) for b in ordered))
        for a in ordered
    ]
    notes = (
        f"Share of prompts whose reply by the row has the higher {MEASURE_WORDS[measure]}, ties as halves, "
        f"{DECODING_WORDS[decoding]} replies. Brackets: 95% intervals of Student's t over {view.random_units}.",
    )
    name = f"win_rates_{decoding}"
    return Table(
        name,
        f"Win rates, {DECODING_WORDS[decoding]}",
        columns,
        tuple(lines),
        notes,
        view.records.arena,
    )


def win_rates_figure(view: View, rows: Sequence[str], measure: Measure) -> Made:
    """Return the matrix of win rates under each decoding; bold: the interval leaves out one half."""
    side = 0.9 + 0.27 * len(rows)
    figure, axes = new_panels(1, len(view.decodings), height=side + 0.9, width=max(7.2, 2 * side + 1.8))
    for ax, decoding in zip(axes[0], view.decodings, strict=True):
        ordered = [*_means(view, rows, decoding, measure)]
        rates = np.full((len(ordered), len(ordered)), np.nan)
        for i, a in enumerate(ordered):
            for j, b in enumerate(ordered):
                found = win_rate(view, a, b, decoding, measure) if i != j else None
                if isinstance(found, Estimate):
                    rates[i, j] = found.value
                    sure = not found.low <= 0.5 <= found.high
                    ax.text(
                        j, i, f"{100 * found.value:.0f}", ha="center", va="center", fontsize=5.5,
                        color="black" if sure else "#707070", fontweight="bold" if sure else "normal", in_layout=False,
                    )  # fmt: skip
        ax.imshow(rates, cmap="PuOr_r", vmin=0.0, vmax=1.0, aspect="auto")
        ax.set_xticks(range(len(ordered)), [short(row) for row in ordered], rotation=90)
        ax.set_yticks(range(len(ordered)), [short(row) for row in ordered])
        ax.grid(visible=False)
        ax.set_title(DECODING_WORDS[decoding])
    caption = (
        f"Percent of prompts on which the row's reply has the higher {MEASURE_WORDS[measure]} than the column's, ties "
        "as halves. Rows in the order of the mean. Black and bold: the 95% interval leaves out 50."
    )
    return Drawn("win_rates", "Win rates", caption), figure


def distance_figure(view: View, rows: Sequence[str]) -> Made:
    """Return reward against KL to the initial policy of every row, sampled replies."""
    figure, axes = new_panels(1, len(view.measures), height=3.8)
    for ax, measure in zip(axes[0], view.measures, strict=True):
        points = {}
        for row in rows:
            reward, kl = view.mean(row, "sample", measure), view.mean(row, "sample", "kl")
            if isinstance(reward, Estimate) and isinstance(kl, Estimate):
                points[row] = (max(kl.value, 0.0), reward)
        _scatter(ax, view, points)
        kl_axis(ax)
        ax.set_ylabel(f"{MEASURE_WORDS[measure]} (sampled)")
    caption = "Mean reward of sampled replies against mean KL to the initial policy; bars: 95% intervals of the reward."
    return Drawn("ranking_distance", "Reward against KL", caption), figure


COSTS: Mapping[str, str] = {
    "models": "models in memory",
    "train_peak_mib": "peak memory (MiB)",
    "sampled_tokens": "sampled tokens",
    "reward_calls": "reward calls",
    "seconds": "seconds",
    "tflops": "training TFLOPs (estimate)",
}


def cost_figure(view: View, rows: Sequence[str], measure: Measure) -> Made:
    """Return reward against each cost, with the rows that no other row beats in both."""
    decoding = view.decodings[0]
    figure, axes = new_panels(math.ceil(len(COSTS) / 2), 2, height=2.8 * math.ceil(len(COSTS) / 2))
    for ax in axes.flat[len(COSTS) :]:
        ax.set_axis_off()
    for ax, (cost, words) in zip(axes.flat, COSTS.items(), strict=False):
        points = {}
        for row in rows:
            reward, spent = view.mean(row, decoding, measure), mean_cost(view, row, cost)
            if isinstance(reward, Estimate) and spent is not None:
                points[row] = (spent, reward)
        if cost == "models":
            points = _spread(points)
        _scatter(ax, view, points)
        front = pareto({row: (x, reward.value) for row, (x, reward) in points.items()})
        if len(front) > 1:
            line = np.array([(points[row][0], points[row][1].value) for row in front])
            ax.step(line[:, 0], line[:, 1], where="post", color="#404040", linewidth=0.8, linestyle="--", zorder=1)
        ax.set_xlabel(words)
        ax.set_ylabel(f"{MEASURE_WORDS[measure]} ({DECODING_WORDS[decoding]})")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=cost == "models"))
        ax.xaxis.set_major_formatter(thousands)
    caption = (
        f"Mean reward against what a row costs, candidates included, mean over {view.repetition}s. Dashed: the Pareto "
        "front, the rows that no other row beats in both by its mean; bars are 95% intervals, and the front is as "
        "uncertain as they are. Rows with equally many models in memory stand side by side."
    )
    return Drawn("ranking_costs", "Reward against cost", caption), figure


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names whose (cost, reward) no other point beats: a lower or equal cost and a higher reward."""
    front: list[str] = []
    best = -math.inf
    for name, (_, reward) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if reward > best:
            front.append(name)
            best = reward
    return front


def _spread(points: Mapping[str, tuple[float, Estimate]]) -> dict[str, tuple[float, Estimate]]:
    """Return points of equal x side by side, the highest first, within a quarter of a unit."""
    spread: dict[str, tuple[float, Estimate]] = {}
    for x in {x for x, _ in points.values()}:
        names = sorted((name for name in points if points[name][0] == x), key=lambda name: -points[name][1].value)
        places = np.linspace(-0.25, 0.25, len(names)) if len(names) > 1 else [0.0]
        spread |= {name: (x + float(place), points[name][1]) for name, place in zip(names, places, strict=True)}
    return spread


def _scatter(ax: Axes, view: View, points: Mapping[str, tuple[float, Estimate]]) -> None:
    """Draw a point for each row with the interval of its reward, and its name beside the panel.

    A row far below the others stands at the lower edge with its reward, so that the others can be told apart.
    """
    found, marker = colours(view), markers(view)
    if not points:
        return
    low, high = np.quantile([reward.value for _, reward in points.values()], [0.25, 0.75])
    least = low - FAR * (high - low)
    drawn = []
    for row, (x, reward) in points.items():
        y, words = reward.value, short(row)
        if y < least:
            y, words = least, f"{words}, {number(reward.value, 2)} below the edge"
        else:
            error: Floats = np.array([[reward.value - max(reward.low, least)], [reward.high - reward.value]])
            ax.errorbar([x], [y], error, color=found[row], linewidth=0.5, alpha=0.9)
        ax.plot([x], [y], marker[row], color=found[row], markersize=4)
        drawn.append((words, x, y, found[row]))
    names_beside(ax, drawn)


FAR = 4.0  # interquartile ranges below the lower quartile
