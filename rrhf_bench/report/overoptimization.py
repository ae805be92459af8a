"""Reward-model over-optimisation (2210.10760): gold and proxy against distance, for best-of-n and along training.

Letters: B prompts, N samples a prompt, M points. d is sqrt(KL) to the initial policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from rrhf_bench.errors import DataError
from rrhf_bench.evaluation.overoptimization import Form, Overoptimization, Parameter, fit_overoptimization
from rrhf_bench.evaluation.statistics import Floats, best_of_n_kl, expected_best_of_n
from rrhf_bench.records import PoolScored
from rrhf_bench.report.drawing import FREE_COLOURS, GREY, Drawn, Made, colours, legend_key, new_panels
from rrhf_bench.report.section import Part, Section, Sentence
from rrhf_bench.report.table import Cell, Column, Missing, Table
from rrhf_bench.report.view import View
from rrhf_bench.seeding import generator

OWN_PROXY = "the run's reward model"
LEAST_KL_NATS = 0.01  # a nearer point is the initial policy, and its distance is noise


@dataclass(frozen=True)
class _Path:
    """Points on the way from the initial policy, by repetition: distances d and the gains in both rewards."""

    name: str
    form: Form
    points: Mapping[int, tuple[Floats, Floats, Floats]]  # d (M,), gold gain (M,), proxy gain (M,)

    def fit(self) -> Overoptimization | Missing:
        try:
            gold = [(d_M, gold_M) for d_M, gold_M, _ in self.points.values()]
            return fit_overoptimization(self.form, gold, rng=generator("over-optimisation", self.name))
        except DataError as error:
            return Missing(str(error))


def _best_of_n(view: View) -> Iterator[_Path]:
    """Yield the path of best-of-n under each proxy: the run's own, then each of [reward_models]."""
    pools: dict[str, dict[int, Sequence[PoolScored]]] = {OWN_PROXY: dict(view.records.pools)}
    for reward in view.records.reward_models:
        pools.setdefault(reward.name, {})[reward.seed] = reward.pool
    for name, of_number in pools.items():
        if all(scored.golds is not None for pool in of_number.values() for scored in pool):
            points = {number: _best_of_n_points(pool) for number, pool in of_number.items()}
            yield _Path(f"best of n by {name}", "quadratic", points)


def _best_of_n_points(pool: Sequence[PoolScored]) -> tuple[Floats, Floats, Floats]:
    """Return d, gold gain and proxy gain of the best of 2, 4, 8, ... samples; n is at most half of the samples."""
    proxy_BN = np.array([scored.rewards for scored in pool])
    gold_BN = np.array([scored.golds for scored in pool], dtype=np.float64)
    ns = [2**k for k in range(1, int(math.log2(proxy_BN.shape[1])))]
    gold_M = [expected_best_of_n(proxy_BN, n, value_BN=gold_BN).mean() - gold_BN.mean() for n in ns]
    proxy_M = [expected_best_of_n(proxy_BN, n).mean() - proxy_BN.mean() for n in ns]
    return np.sqrt([best_of_n_kl(n) for n in ns]), np.array(gold_M), np.array(proxy_M)


def _trained(view: View) -> Iterator[_Path]:
    """Yield the path of each row whose distance was measured while it trained."""
    for row in view.trained:
        points = {}
        for number in view.experiment.repetitions:
            curve = [p for p in view.records.curves if (p.method, p.seed, p.decoding) == (row, number, "sample")]
            start = next((point for point in curve if point.step == 0), None)
            if start is None or start.golds is None:
                continue
            found = [
                (math.sqrt(np.mean(point.kls)), np.mean(point.golds) - np.mean(start.golds),
                 np.mean(point.rewards) - np.mean(start.rewards))
                for point in curve
                if point.kls is not None and point.golds is not None and np.mean(point.kls) > LEAST_KL_NATS
            ]  # fmt: skip
            if found:
                d_M, gold_M, proxy_M = np.array(found, dtype=np.float64).T
                points[number] = (d_M, gold_M, proxy_M)
        if points:
            yield _Path(row, "logarithmic", points)


def _fit_table(view: View, paths: Sequence[_Path], fits: Sequence[Overoptimization | Missing]) -> Table:
    """Return the fitted form of the gold gain of each path."""
    columns = (
        Column("path"), Column("form"), Column("alpha", 3, True), Column("beta", 3, True), Column("peak KL", 1),
        Column("peak measured"), Column("farthest KL", 1), Column("error", 3), Column("points", 0),
        Column(f"{view.repetition}s", 0),
    )  # fmt: skip
    rows = []
    for path, fit in zip(paths, fits, strict=True):
        if isinstance(fit, Missing):
            rows.append((Cell.of(path.name), *[Cell.of(fit)] * (len(columns) - 1)))
            continue
        peak: float | Missing = Missing("the fitted gain does not fall again") if fit.peak is None else fit.peak**2
        words = {"quadratic": "d (alpha - beta d)", "logarithmic": "d (alpha - beta log d)"}[fit.form]
        cells = (path.name, words, _cell(fit.alpha), _cell(fit.beta), peak, "yes" if fit.peak_measured else "no",
                 fit.measured[1] ** 2, fit.error, float(fit.points), float(fit.repetitions))  # fmt: skip
        rows.append(tuple(cell if isinstance(cell, Cell) else Cell.of(cell) for cell in cells))
    notes = (
        "Gain of the gold reward over the initial policy, sampled, as a function of d = sqrt(KL): the forms of arXiv "
        "2210.10760, fitted by least squares. Brackets: 95% intervals, Student's t over the fits of each "
        f"{view.repetition}, or with one a bootstrap over its points. Peak KL: where the fitted form is largest, in "
        "nats; unless it was measured it is nearer than the first point or farther than the last one, and an "
        "extrapolation. Error: root mean square of what the fits leave over.",
        "Best of n: KL is log n - (n - 1) / n, an upper bound where scores tie; n up to half of the pool's samples. "
        "Rows: the sampled replies to the dev prompts at the points of the reward curve, KL as the mean log-ratio.",
    )
    return Table("overoptimization", "Over-optimisation", columns, tuple(rows), notes, view.records.arena, group=1)


def _cell(parameter: Parameter) -> Cell:
    low, high = parameter.interval or (None, None)
    return Cell(parameter.value, low, high)


def _figure(view: View, paths: Sequence[_Path], fits: Sequence[Overoptimization | Missing]) -> Made:
    """Draw gold and proxy gains against sqrt(KL), best-of-n on the left and the trained rows on the right."""
    figure, axes = new_panels(2, 2, height=5.0, sharex="col", sharey="row")
    of_row = colours(view)
    # Each side has a legend of its own: a colour may stand for a proxy on the left and for a row on the right.
    keys: tuple[list[Line2D], list[Line2D]] = ([], [])
    for i, (path, fit) in enumerate(zip(paths, fits, strict=True)):
        column = 0 if path.form == "quadratic" else 1
        own = "black" if path.name.endswith(OWN_PROXY) else FREE_COLOURS[i % len(FREE_COLOURS)]
        colour = of_row.get(path.name, own)
        keys[column].append(legend_key(path.name.removeprefix("best of n by "), colour))
        for d_M, gold_M, proxy_M in path.points.values():
            for ax, gain_M in ((axes[0][column], gold_M), (axes[1][column], proxy_M)):
                ax.plot(d_M, gain_M, "o", color=colour, markersize=2.5, alpha=0.6)
        if isinstance(fit, Overoptimization):
            at = np.linspace(fit.measured[0], fit.measured[1], 60)
            axes[0][column].plot(at, fit.gain(at), color=colour)
    for ax, name in ((axes[0][0], "gold gain"), (axes[1][0], "proxy gain")):
        ax.set_ylabel(name)
    for ax, title, handles in zip(axes[0], ("best of n by", "while training"), keys, strict=True):
        ax.set_title(title)
        ax.legend(handles=handles, fontsize=6.5)
    for ax in axes[1]:
        _distance_axis(ax)
    for ax in axes.flat:
        ax.axhline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    caption = (
        f"Gains in gold (above) and proxy reward (below) over the initial policy. A point is one {view.repetition} and "
        "one n, or one point of a training curve; lines are the fitted forms of the gold gain. Each proxy has its own "
        "scale."
    )
    return Drawn("overoptimization", "Gold and proxy reward against distance", caption), figure


def _distance_axis(ax: Axes) -> None:
    ax.set_xlim(left=0)
    ax.set_xlabel("square root of KL to the initial policy (KL in nats)")


def _parts(view: View) -> Sequence[Part]:
    """Return the section of a run that measured KL along training (``evaluation.curve_kl``)."""
    trained = list(_trained(view)) if view.experiment.evaluation.curve_kl else []
    if not trained:
        return []
    paths = [*_best_of_n(view), *trained]
    fits = [path.fit() for path in paths]
    about = Sentence(
        "A proxy is over-optimised if the gold reward falls while the proxy reward rises. Only the run's own reward "
        "model was trained on; the others pick the best of n."
    )
    return [about, _fit_table(view, paths, fits), _figure(view, paths, fits)]


SECTION = Section("Over-optimisation", _parts)
