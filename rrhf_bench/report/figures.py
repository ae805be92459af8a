"""The figures of a report, each from the records alone, as PNG and SVG.

Decodings and kinds of points differ in shape or filling as well as in colour. SVG files carry no date and no random
ids. Where a run has many rows, a figure shows those that differ in more than hyper-parameters (``View.main_rows``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from rrhf_bench.errors import visible
from rrhf_bench.evaluation.grid import Block, Grid, Missing, in_both
from rrhf_bench.evaluation.statistics import Estimate, Floats, best_of_n_kl, expected_best_of_n, rank_correlation
from rrhf_bench.records import CurvePoint, Decoding
from rrhf_bench.report.drawing import (
    DPI,
    GREY,
    HUES,
    WIDTH,
    Drawn,
    Made,
    colours,
    kl_axis,
    legend_above,
    legend_key,
    markers,
    new_panels,
    short,
    styled,
    thousands,
)
from rrhf_bench.report.forest import gains, test_reward
from rrhf_bench.report.frontier import frontiers
from rrhf_bench.report.table import DECODING_WORDS
from rrhf_bench.report.view import BASE, MEASURE_WORDS, Measure, View
from rrhf_bench.seeding import generator

FEW = 5  # points below which a correlation and its interval say nothing
_PANELS = 8  # of the training curves
MANY = 6  # curves in one panel beyond which only their means are drawn
MOST_CURVES = 12  # in one panel; the caption names the rows beyond it


def write_figures(made: Iterable[Made], folder: Path) -> list[Drawn]:
    """Save figures, each as PNG and SVG, and return what their captions say."""
    drawn = []
    with styled():
        for text, figure in made:
            _save(figure, folder / text.name)
            drawn.append(text)
    return drawn


def _save(figure: Figure, path: Path) -> None:
    """As PNG and SVG; the PNG with a palette of 256 colours, a third of the size: published reports hold many."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # once: Figure.savefig would draw everything a first time to find its size
    flat = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(path.with_suffix(".png"), dpi=(DPI, DPI), optimize=True)
    figure.set_layout_engine("none")  # it stays as laid out for the PNG, and is not worked out twice
    FigureCanvasSVG(figure).print_svg(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def own_figures(view: View) -> Iterator[Made]:
    """Yield the figures that the run has records for."""
    yield from test_reward(view)
    yield from gains(view)
    for initial in view.policies:
        yield from reward_curves(view, initial)
    yield from training_curves(view)
    yield from sampling_quality(view)
    yield from best_of_n_curve(view)
    yield from frontiers(view)


# --- reward curves --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """One row's rewards on the dev prompts at the F fractions that all its seeds have; x by axis name."""

    x_SF: Mapping[str, Floats]
    y_SF: Floats

    def draw(self, ax: Axes, axis: str, colour: str, *, band: bool = True, **line: Any) -> tuple[Floats, Floats]:
        """Draw the mean over seeds and, if ``band``, the least and the most of them; return the points of the mean."""
        x_F, y_F = self.x_SF[axis].mean(axis=0), self.y_SF.mean(axis=0)
        if len(self.y_SF) > 1 and band:
            ends = self.y_SF.min(axis=0), self.y_SF.max(axis=0)
            ax.fill_between(x_F, *ends, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x_F, y_F, color=colour, **line)
        return x_F, y_F


_AXES = {"step": "optimiser steps", "sampled_tokens": "sampled tokens", "seconds": "seconds"}


def reward_curves(view: View, initial: str) -> Iterator[Made]:
    """Yield the dev reward of the rows from one initial policy, over steps, sampled tokens and seconds."""
    rows = [row for row in view.main_rows if view.initial(row) == initial and row in view.trained][:MOST_CURVES]
    panels = [
        (decoding, measure, curves)
        for decoding in view.decodings
        for measure in view.measures
        if (curves := {row: c for row in rows if (c := _curve(view, row, decoding, measure)) is not None})
    ]
    if not panels:
        return
    shown_axes = [axis for axis in _AXES if any(axis in c.x_SF for _, _, curves in panels for c in curves.values())]
    height = 1.55 * len(panels) + 0.6
    figure, axes = new_panels(len(panels), len(shown_axes), height=height, sharex="col", sharey="row")
    colour = colours(view)
    for line, (decoding, measure, curves) in zip(axes, panels, strict=True):
        for ax, axis in zip(line, shown_axes, strict=True):
            for row, curve in curves.items():
                if axis in curve.x_SF:
                    _draw_curve(ax, curve, axis, colour[row], seeds=len(curves) <= MANY)
            ax.set_xlim(left=0)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=axis != "seconds"))
            ax.xaxis.set_major_formatter(FuncFormatter(thousands))
        line[0].set_ylabel(f"{MEASURE_WORDS[measure]}\n({DECODING_WORDS[decoding]})")
    for ax, axis in zip(axes[-1], shown_axes, strict=True):
        ax.set_xlabel(_AXES[axis])
    shown = [row for row in rows if any(row in curves for _, _, curves in panels)]
    spent = Line2D([], [], color=GREY, linewidth=1, linestyle=(0, (1, 1.5)), label="candidates, before step 0")
    legend_above(figure, [*(legend_key(row, colour[row]) for row in shown), spent])
    seeds = f"mean over {view.repetition}s"
    seeds += f"; thin: each {view.repetition}; band: least to most" if len(shown) <= MANY else ""
    caption = (
        f"Rows that start from {initial}. Mean reward of the current policy on the same dev prompts (no KL term), at "
        f"fixed fractions of each budget. Bold: {seeds}. Sampling and scoring the candidates counts before step 0, so "
        "these curves start to the right of 0 in tokens and seconds; the optimiser steps of a row with several rounds "
        "are those of its last round. Seconds are of the machine named under Cost."
        + _left_out(view, [row for row in view.rows_from(initial) if row in view.trained], shown)
    )
    name = "reward_curves" if initial == BASE else f"reward_curves_{1 + view.policies.index(initial)}"
    labels = dict.fromkeys(view.method(row).label for row in shown)
    yield Drawn(name, f"Reward while training, from {initial}: {', '.join(labels)}", caption), figure


def _left_out(view: View, rows: Sequence[str], shown: Sequence[str]) -> str:
    """Return the end of a caption for the rows that a figure does not show."""
    left = [row for row in rows if row not in shown]
    alike = [row for row in left if row not in view.main_rows]
    rest = [row for row in left if row in view.main_rows] if len(shown) >= MOST_CURVES else []
    words = [f"because they differ from a row here in hyper-parameters alone: {', '.join(alike)}"] if alike else []
    words += [f"for want of room: {', '.join(rest)}"] if rest else []
    return f" Not shown, {'; '.join(words)}." if words else ""


def _curve(view: View, row: str, decoding: Decoding, measure: Measure) -> _Curve | None:
    seeds: dict[int, dict[float, tuple[CurvePoint, float]]] = defaultdict(dict)
    for point in view.records.curves:
        rewards = point.rewards if measure == "reward" else point.golds
        if (point.method, point.decoding) == (row, decoding) and rewards:
            seeds[point.seed][round(point.fraction, 6)] = point, float(np.mean(rewards))
    fractions = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
    if not fractions:
        return None
    found_SF = [[seeds[seed][fraction] for fraction in fractions] for seed in sorted(seeds)]
    x_SF = {
        axis: np.array([[getattr(point, axis) for point, _ in found] for found in found_SF], dtype=np.float64)
        for axis in ("step", "sampled_tokens")
    }
    clocks = [
        {round(fraction, 6): seconds for fraction, seconds in view.records.curve_seconds.get((row, seed), ())}
        for seed in sorted(seeds)
    ]
    if all(fraction in clock for clock in clocks for fraction in fractions):
        x_SF["seconds"] = np.array([[clock[fraction] for fraction in fractions] for clock in clocks])
    return _Curve(x_SF, np.array([[reward for _, reward in found] for found in found_SF]))


def _draw_curve(ax: Axes, curve: _Curve, axis: str, colour: str, *, seeds: bool) -> None:
    if len(curve.y_SF) > 1 and seeds:
        ax.plot(curve.x_SF[axis].T, curve.y_SF.T, color=colour, linewidth=0.5, alpha=0.6)
    x_F, y_F = curve.draw(ax, axis, colour, band=seeds, marker="o", markersize=2.5)
    if x_F[0] > 0:
        ax.plot([0, x_F[0]], [y_F[0]] * 2, color=colour, linewidth=1, linestyle=(0, (1, 1.5)))


# --- test reward against sampling quality ---------------------------------------------------------------------


def sampling_quality(view: View) -> Iterator[Made]:
    """Yield the test reward against the mean and the maximum of the training candidates."""
    points = {decoding: list(_quality_points(view, decoding)) for decoding in view.decodings}
    points = {decoding: found for decoding, found in points.items() if found}
    if not points:
        return
    rows = list(dict.fromkeys(row for found in points.values() for row, *_ in found))
    many = len(rows) > MANY
    colour = _policy_colours(view) if many else colours(view)
    width = 3.1 if many else 2.4  # of a panel; names stand beside many points
    figure, axes = new_panels(1, len(points), height=3.5, width=max(width * len(points), 3.6))
    for ax, (decoding, found) in zip(axes[0], points.items(), strict=True):
        quality_panel(
            ax, f"this run, {DECODING_WORDS[decoding]}", [(*point[1:], colour[point[0]]) for point in found], decoding
        )
        if many:
            _name_points(ax, view, found, colour)
    axes[0][0].set_ylabel("test reward (proxy)")
    starts = list(dict.fromkeys(view.initial(row) for row in rows))
    handles = [
        legend_key(f"from {row}" if many else row, colour[row], marker="s") for row in (starts if many else rows)
    ]
    handles += [legend_key("mean of candidates", marker="o", filled=False), legend_key("their maximum", marker="^")]
    legend_above(figure, handles)
    candidates = [row for row in view.methods if row in view.rewarded]
    words = quality_words(view.repetition)
    caption = f"{words} Points of one method are not independent.{_left_out(view, candidates, rows)}"
    yield Drawn("sampling_quality", "Test reward against sampling quality", caption), figure


def quality_words(of: str) -> str:
    """Return what a caption says of points of test reward against candidates, a pair of which is of one ``of``."""
    return (
        "Test reward against the quality of the training candidates: open circles at the candidates' mean reward, "
        f"triangles at the mean over prompts of their maximum, a line joining the two of one {of}. On the line y = x "
        "the test reward equals the candidates'. Spearman's correlation with a 95% bootstrap over points."
    )


def quality_panel(ax: Axes, title: str, points: Sequence[tuple[float, float, float, str]], name: str) -> None:
    """Draw points of (candidates' mean, their maximum, test reward, colour) and their correlations.

    ``name`` names the draws of the bootstrap.
    """
    for mean, maximum, test, colour in points:
        ax.plot([mean, maximum], [test, test], color=colour, linewidth=0.5, alpha=0.5)
        ax.plot([mean], [test], "o", color=colour, markerfacecolor="white", markersize=4.5)
        ax.plot([maximum], [test], "^", color=colour, markersize=4.5)
    mean_N, maximum_N, test_N = (np.array([point[i] for point in points]) for i in (0, 1, 2))
    low, high = min(mean_N.min(), test_N.min()), max(maximum_N.max(), test_N.max())
    pad = 0.08 * (high - low or 1.0)
    ends = (low - pad, high + pad)
    ax.plot(ends, ends, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set(xlim=ends, ylim=ends, aspect="equal", xlabel="reward of training candidates")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    lines = [f"(n = {len(test_N)}: too few to correlate)"]
    if len(test_N) >= FEW:
        correlations = (
            f"{words}: {_correlation(x_N, test_N, name, words)}"
            for words, x_N in (("mean", mean_N), ("max", maximum_N))
        )
        lines = [f"Spearman (n = {len(test_N)})", *correlations]
    ax.set_title("\n".join([title, *lines]), loc="left", fontsize=7.5)


def _name_points(
    ax: Axes, view: View, found: Sequence[tuple[str, float, float, float]], colour: Mapping[str, str]
) -> None:
    """Name each row's maximum, a mean over seeds or worlds, right of the panel, evenly spaced where rows lie close."""
    own: dict[str, list[tuple[float, float]]] = {}
    for row, _, maximum, test in found:
        own.setdefault(row, []).append((maximum, test))
    at = sorted(((row, *np.mean(points, axis=0).tolist()) for row, points in own.items()), key=lambda point: point[2])
    low, high = ax.get_ylim()
    gap = min(0.052, 1 / len(at))  # of the panel's height
    heights = [(y - low) / (high - low) for _, _, y in at]
    for i in range(1, len(at)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = max(heights[-1] - 1, 0.0)
    for i in reversed(range(len(at))):  # back into the panel
        heights[i] = min(heights[i], 1 - gap * (len(at) - 1 - i)) if over else heights[i]
    for (row, x, y), height in zip(at, heights, strict=True):
        line = {"arrowstyle": "-", "color": colour[row], "linewidth": 0.4, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        style: dict[str, Any] = {"fontsize": 6, "va": "center", "color": colour[row], "arrowprops": line}
        words = short(view.sampling_policy(row) or row)
        ax.annotate(words, (x, y), (1.06, height), textcoords="axes fraction", **style)


def _policy_colours(view: View) -> dict[str, str]:
    """Every row in the colour of its initial policy."""
    return {row: HUES[view.policies.index(view.initial(row)) % len(HUES)] for row in view.rows}


def _quality_points(view: View, decoding: Decoding) -> Iterator[tuple[str, float, float, float]]:
    """(row, mean, maximum, test reward) of each seed."""
    for row, block in view.rewarded.items():
        rewards = view.values(row, decoding, "reward")
        if row not in view.main_rows or isinstance(rewards, Missing):
            continue
        tests = dict(zip(rewards.seeds, rewards.mean_S.tolist(), strict=True))
        mean_S = block.grid(lambda c: float(np.mean(c.scores))).mean_S.tolist()
        maximum_S = block.grid(lambda c: max(c.scores)).mean_S.tolist()
        for seed, mean, maximum in zip(block.seeds, mean_S, maximum_S, strict=True):
            if seed in tests:
                yield row, mean, maximum, tests[seed]


def _correlation(x_N: Floats, y_N: Floats, *name: str) -> str:
    if 0 in (np.ptp(x_N), np.ptp(y_N)):
        return "undefined"
    found = rank_correlation(x_N, y_N, rng=generator("report", "sampling quality", *name))
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


# --- best-of-n ------------------------------------------------------------------------------------------------


def best_of_n_curve(view: View) -> Iterator[Made]:
    """Yield the reward of the best of n against its KL, from one pool, with each trained method at its measured KL.

    If the run's replies estimate no KL, no trained method is drawn and the caption gives the reason.
    """
    pool = view.pool
    if pool is None:
        return
    samples = min(len(item.rewards) for item in pool.items)
    ns = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024) if n <= samples]
    if len(ns) < 2:
        return
    rows = [row for row in view.main_rows if view.initial(row) == BASE]  # whose KL is to the model of the pool
    golds = all(item.golds for item in pool.items) and "gold" in view.measures
    measures: list[Measure] = ["reward", "gold"] if golds else ["reward"]
    figure, axes = new_panels(1, len(measures), height=3.0, width=WIDTH if golds else 4.2)
    for ax, measure in zip(axes[0], measures, strict=True):
        _draw_best_of_n(ax, view, pool, measure, ns, samples)
        shown = [row for row in rows if _method_point(ax, view, row, measure, pool)]
        kl_axis(ax)
        ax.set_ylabel(f"{MEASURE_WORDS[measure]} (sampled)")
    colour, marker = colours(view), markers(view)
    handles = [Line2D([], [], color="black", label="best of n (n at the points)")]
    handles += [Line2D([], [], color="black", linestyle=(0, (2, 1.5)), label=f"n > {samples}/4: high variance")]
    handles += [legend_key(row, colour[row], marker=marker[row]) for row in shown]
    legend_above(figure, handles)
    caption = (
        "Best of n samples of the initial policy by proxy reward, estimated without bias from a pool of "
        f"{samples} samples on each of {len(pool.prompts)} prompts, against its KL log n - (n - 1) / n (an upper bound "
        f"where scores tie); bands: 95% intervals over {view.random_units}. "
        + _points_words(view)
        + _left_out(view, view.rows_from(BASE), rows)
    )
    yield Drawn("best_of_n_curve", "Best-of-n and the trained methods", caption), figure


def _points_words(view: View) -> str:
    """Return what the caption says about the points of methods beside the best-of-n curve."""
    diamond = "a diamond is best-of-n as the run sampled it, at its KL bound"
    if view.kl_missing is not None:
        return f"No trained method has a point, because {view.kl_missing.reason}; {diamond}."
    return (
        "Points: each method on the same prompts, sampled, at its measured KL to the initial policy, with 95% "
        f"intervals; {diamond}. Training spends KL otherwise than best-of-n does, so equal KL is no equal footing: "
        "read the points as a map, not a race."
    )


def _draw_best_of_n(ax: Axes, view: View, pool: Block[Any], measure: Measure, ns: Sequence[int], samples: int) -> None:
    found: list[Estimate] = []
    scores_SP = [np.array([item.rewards[:samples] for item in items_P]) for items_P in pool.items_SP]
    values_SP = scores_SP
    if measure == "gold":
        values_SP = [np.array([item.golds[:samples] for item in items_P]) for items_P in pool.items_SP]
    for n in ns:
        best_SP = [expected_best_of_n(s, n, value_BN=v) for s, v in zip(scores_SP, values_SP, strict=True)]
        best = Grid(pool.seeds, pool.prompts, np.array(best_SP), worlds=pool.worlds)
        estimate = view.mean_of(best, "best of n", measure, str(n))
        if isinstance(estimate, Missing):
            return
        found.append(estimate)
    kl = np.array([best_of_n_kl(n) for n in ns])
    sure = sum(n <= samples / 4 for n in ns)
    value = np.array([estimate.value for estimate in found])
    band = [estimate.low for estimate in found], [estimate.high for estimate in found]
    ax.fill_between(kl, *band, color="black", alpha=0.1, linewidth=0)
    ax.plot(kl[:sure], value[:sure], "o-", color="black", markersize=2.5)
    ax.plot(
        kl[max(sure - 1, 0) :], value[max(sure - 1, 0) :], "o", color="black", markersize=2.5, linestyle=(0, (2, 1.5))
    )
    for n, x, y in zip(ns, kl, value, strict=True):
        if n & (n - 1) == 0:
            ax.annotate(str(n), (x, y), (2, -9), textcoords="offset points", fontsize=6.5, color="#404040")


def _method_point(ax: Axes, view: View, row: str, measure: Measure, pool: Block[Any]) -> bool:
    """Draw a method's point on the pool's prompts, and return False if the records do not hold one."""
    found, kl, n = view.values(row, "sample", measure), view.values(row, "sample", "kl"), view.reranked(row)
    if isinstance(found, Missing) or (n is None and isinstance(kl, Missing)):
        return False
    prompts = in_both(found.prompts, pool.prompts)
    y = view.mean_of(found.only(found.seeds, prompts), "best of n", row, measure)
    x: Estimate | float | Missing
    if n is not None:
        x = best_of_n_kl(n)
    else:
        x = view.mean_of(kl if isinstance(kl, Missing) else kl.only(kl.seeds, prompts), "best of n", row, "kl")
    if isinstance(y, Missing) or isinstance(x, Missing):
        return False
    colour = colours(view)[row]
    centre = x.value if isinstance(x, Estimate) else x
    if isinstance(x, Estimate):
        ax.plot([max(x.low, 0), max(x.high, 0)], [y.value] * 2, color=colour, linewidth=1.2, solid_capstyle="butt")
    ax.plot([max(centre, 0)] * 2, [y.low, y.high], color=colour, linewidth=1.2, solid_capstyle="butt")
    ax.plot([max(centre, 0)], [y.value], markers(view)[row], color=colour, markersize=5, zorder=3)
    return True


# --- loss and reward while training ---------------------------------------------------------------------------


def training_curves(view: View) -> Iterator[Made]:
    """Yield the loss above and the reward on the dev prompts below, of the rows that start from base first."""
    rows = sorted(view.main_rows, key=lambda row: view.initial(row) != BASE)  # stable
    shown = [row for row in rows if _losses(view, row)][:_PANELS]
    if not shown:
        return
    across = min(len(shown), 4)
    bands = -(-len(shown) // across)
    figure, axes = new_panels(2 * bands, across, height=2.9 * bands + 0.4, width=max(WIDTH * across / 4, 3.6))
    pairs = [
        (axes[2 * (i // across), i % across], axes[2 * (i // across) + 1, i % across]) for i in range(bands * across)
    ]
    colour = colours(view)
    for (above, below), row in zip(pairs, shown, strict=False):
        loss_panels(above, below, view, row, colour[row])
    for ax in (ax for pair in pairs[len(shown) :] for ax in pair):
        ax.set_visible(False)
    finish_loss_panels(pairs[: len(shown)], across)
    share_scale([below for _, below in pairs[: len(shown)]])
    legend_above(figure, decoding_keys(view))
    left = [row for row in view.methods if row not in shown and _losses(view, row)]
    caption = loss_words(view) + (f" Not shown: {', '.join(left)}." if left else "")
    yield Drawn("training", "Loss and reward while training", caption), figure


def loss_words(view: View) -> str:
    """Return what a caption says of the panels of losses."""
    each = view.repetition
    return (
        f"Above: each method's own training loss, thin per {each}, bold the mean over {each}s as a running mean; "
        "losses of different methods are on different scales. Below: proxy reward on the dev prompts at fixed "
        f"fractions, mean over {each}s."
    )


_STYLES: Mapping[Decoding, Any] = {"greedy": "-", "sample": (0, (3, 1.5))}


def decoding_keys(view: View) -> list[Line2D]:
    """Return the legend of the lines of each decoding."""
    return [Line2D([], [], color=GREY, linestyle=_STYLES[d], label=DECODING_WORDS[d]) for d in view.decodings]


def loss_panels(above: Axes, below: Axes, view: View, row: str, colour: str) -> None:
    """Draw the loss of a row into the upper panel and its reward on the dev prompts into the lower one."""
    losses = _losses(view, row)
    if losses is not None:
        key, logs = losses
        for x, y in logs:
            above.plot(x, y, color=colour, linewidth=0.6, alpha=0.4 if len(logs) > 1 else 1)
        _mean_loss(above, logs, colour)
        above.set_title(f"{short(row)}\n{visible(key)}")
    for decoding in view.decodings:
        curve = _curve(view, row, decoding, "reward")
        if curve is not None:
            curve.draw(below, "step", colour, linestyle=_STYLES[decoding])


def finish_loss_panels(pairs: Sequence[tuple[Axes, Axes]], across: int) -> None:
    """Label the axes of pairs of panels, ``across`` in a band."""
    for i, (above, below) in enumerate(pairs):
        above.sharex(below)
        above.tick_params(labelbottom=False)
        below.set_xlabel("optimiser steps")
        below.set_xlim(left=0)
        below.xaxis.set_major_formatter(FuncFormatter(thousands))
        for ax in (above, below):
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(4))
        if i % across == 0:
            above.set_ylabel("loss")
            below.set_ylabel("dev reward (proxy)")


def share_scale(panels: Sequence[Axes]) -> None:
    """Give panels one vertical scale, so that methods compare."""
    heights = [ax.get_ylim() for ax in panels]
    for ax in panels:
        ax.set_ylim(min(low for low, _ in heights), max(high for _, high in heights))


_Log = tuple[Floats, Floats]  # steps, values


def _losses(view: View, row: str) -> tuple[str, list[_Log]] | None:
    """The key of a row's loss and its logs by seed."""
    logs = [log for (name, _), log in sorted(view.records.training.items()) if name == row and log]
    if not logs:
        return None
    keys = list(dict.fromkeys(key for line in logs[0] for key in line))  # lines of different events differ
    key = next((k for k in ("loss", "loss/total", "loss/policy_avg", *keys) if k in keys and "loss" in k), None)
    if key is None:
        return None
    found = []
    for log in logs:
        points = [(line.get("step", i), line[key]) for i, line in enumerate(log, 1) if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            found.append((np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)))
    return (key, found) if found else None


def _mean_loss(ax: Axes, logs: Sequence[_Log], colour: str) -> None:
    """The mean over seeds or worlds, smoothed over a twelfth of the run; only where all seeds logged the same steps."""
    steps = logs[0][0]
    if any(not np.array_equal(steps, other) for other, _ in logs):
        return
    mean = np.mean([values for _, values in logs], axis=0)
    width = max(len(mean) // 12, 1)
    sums = np.concatenate([[0.0], np.cumsum(mean)])
    first = np.maximum(np.arange(len(mean)) - width + 1, 0)
    last = np.arange(len(mean)) + 1
    ax.plot(steps, (sums[last] - sums[first]) / (last - first), color=colour)
