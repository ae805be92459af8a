"""The frontier: reward against distance from the initial policy, for rows that differ in hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from baselines.best_of_n import best_of_n_kl
from baselines.ppo_settings import PPOSettings
from rrhf_bench.evaluation.statistics import Floats
from rrhf_bench.report.drawing import GREY, KIND_COLOURS, WIDTH, Drawn, kl_axis, legend_above, new_panels
from rrhf_bench.report.table import Missing
from rrhf_bench.report.view import BASE, MEASURE_WORDS, Measure, View, changed
from rrhf_bench.training.rrhf_settings import RRHFSettings

LEAST = 3  # rows of one method that make a frontier
_MARKERS = "os^Dv*X"  # by weight of the ranking term


@dataclass(frozen=True)
class _Frontier:
    """The rows of one initial policy that only their hyper-parameters tell apart."""

    initial: str
    ppo: tuple[str, ...]
    rrhf: tuple[str, ...]
    others: tuple[str, ...]  # best-of-n


def frontiers(view: View) -> Iterator[tuple[Drawn, Figure]]:
    """Yield one figure for each initial policy from which enough rows of PPO or RRHF start."""
    for initial in view.policies:
        found = _frontier(view, initial)
        if found is not None:
            yield _draw(view, found)


def no_frontier(view: View) -> Missing | None:
    """Return why the figure is left out of a run that has rows for one, or None if the run has none or the figure."""
    if view.kl_missing is None or not any(_frontier(view, initial, "reward") for initial in view.policies):
        return None
    return Missing(f"No figure of reward against KL: {view.kl_missing.reason}.")


def _frontier(view: View, initial: str, *measures: Measure) -> _Frontier | None:
    """Return the rows that start from one initial policy and have the measures, by default reward and KL."""
    needed = measures or ("kl", "reward")
    ppo = [row for row in view.rows_from(initial, "ppo") if _measured(view, row, needed)]
    groups = view.alike("lr", "rank_weight")
    own = [[row for row in rows if view.initial(row) == initial and _measured(view, row, needed)] for rows in groups]
    rrhf = max(own, key=len, default=[])
    if len({repr(changed(view.methods[row])) for row in ppo}) < LEAST:
        ppo = ppo if len(rrhf) >= LEAST else []
    if len(rrhf) < LEAST:
        plain = view.plain_row(row for row in view.rows_from(initial, "rrhf") if _measured(view, row, needed))
        rrhf = [plain] if plain is not None and ppo else []
    if max(len(ppo), len(rrhf)) < LEAST:
        return None
    best = [row for row in view.rows_from(initial, "best_of_n") if view.block(row, "sample") is not None]
    return _Frontier(initial, tuple(ppo), tuple(rrhf), tuple(best))


def _measured(view: View, row: str, measures: Sequence[Measure]) -> bool:
    return not any(isinstance(view.values(row, "sample", measure), Missing) for measure in measures)


def _draw(view: View, frontier: _Frontier) -> tuple[Drawn, Figure]:
    measures = view.measures
    figure, axes = new_panels(1, len(measures), height=3.6, width=WIDTH if len(measures) > 1 else 4.4)
    rrhf = {row: _rrhf(view, row) for row in frontier.rrhf}
    ppo = {row: _ppo(view, row) for row in frontier.ppo}
    weights = sorted({s.rank_weight for s in rrhf.values()})
    shades = {
        "rrhf": _shades(KIND_COLOURS["rrhf"], sorted({s.lr for s in rrhf.values()})),
        "ppo": _shades(KIND_COLOURS["ppo"], sorted({s.lr for s in ppo.values()})),
    }
    for ax, measure in zip(axes[0], measures, strict=True):
        for place, (lr, colour) in enumerate(shades["ppo"].items()):
            rows = sorted((row for row in ppo if ppo[row].lr == lr), key=lambda row: ppo[row].kl_coefficient)
            means = [_points(ax, view, row, measure, colour, "o") for row in rows]
            known = [mean for mean in means if mean is not None]
            if known:
                ax.plot(*np.array(known).T, color=colour, linewidth=0.9, zorder=2)
            for row, mean in zip(rows, means, strict=True):
                if mean is not None:
                    words = f"{ppo[row].kl_coefficient:g}"
                    below = -9 if place % 2 else 4  # points; lines lie close to each other
                    style = {"fontsize": 6, "color": "#303030", "zorder": 5}
                    ax.annotate(words, mean, (4, below), textcoords="offset points", **style)
        for row, settings in rrhf.items():
            marker = _MARKERS[weights.index(settings.rank_weight) % len(_MARKERS)]
            _points(ax, view, row, measure, shades["rrhf"][settings.lr], marker)
        for row in frontier.others:
            reward = view.mean(row, "sample", measure)
            if not isinstance(reward, Missing):
                ax.plot(
                    [best_of_n_kl(getattr(view.methods[row], "n", 1))],
                    [reward.value],
                    "D",
                    color=KIND_COLOURS["best_of_n"],
                )
        start = view.mean(frontier.initial, "sample", measure)
        if not isinstance(start, Missing):
            ax.plot([0], [start.value], "P", color="black", markersize=6, zorder=3)
        kl_axis(ax)
        ax.set_ylabel(f"{MEASURE_WORDS[measure]} (sampled)")
    legend_above(figure, _keys(view, frontier, shades, weights))
    caption = (
        f"Rows that start from {frontier.initial}, sampled replies to the test prompts: mean reward against mean KL to "
        "it. Large: mean over seeds; faint: each seed. PPO's rows are joined in the order of their KL coefficient, "
        "which stands beside each, one line a learning rate. "
        + ("RRHF: shape by weight of the ranking term, darker for a higher learning rate. " if len(rrhf) > 1 else "")
        + ("Best-of-n stands at its KL bound log n - (n - 1) / n. " if frontier.others else "")
        + (f"RRHF's rows train on the same candidates: {', '.join(rrhf)}. " if len(rrhf) > 1 else "")
        + "Every row is one that the experiment file names; none was picked by what is shown here."
    )
    name = "frontier" if frontier.initial == BASE else f"frontier_{1 + view.policies.index(frontier.initial)}"
    return Drawn(name, "Reward against distance from the initial policy", caption), figure


def _rrhf(view: View, row: str) -> RRHFSettings:
    settings = view.methods[row]
    assert isinstance(settings, RRHFSettings)
    return settings


def _ppo(view: View, row: str) -> PPOSettings:
    settings = view.methods[row]
    assert isinstance(settings, PPOSettings)
    return settings


def _points(ax: Axes, view: View, row: str, measure: Measure, colour: str, marker: str) -> tuple[float, float] | None:
    """Draw a row: each seed, and their mean, which is returned."""
    kl_SP, reward_SP = view.values(row, "sample", "kl"), view.values(row, "sample", measure)
    if isinstance(kl_SP, Missing) or isinstance(reward_SP, Missing):
        return None
    x_S: Floats = kl_SP.mean(axis=1)
    y_S: Floats = reward_SP.mean(axis=1)
    if len(x_S) > 1:
        ax.plot(x_S, y_S, marker, color=colour, markersize=2.8, alpha=0.35, markeredgewidth=0, linestyle="", zorder=1)
    ax.plot([x_S.mean()], [y_S.mean()], marker, color=colour, markersize=5.5, markeredgecolor="white", zorder=3)
    return float(x_S.mean()), float(y_S.mean())


def _shades(colour: str, values: Sequence[float]) -> dict[float, str]:
    """The colour for each value in turn, darker for the larger ones; the colour itself for a single one."""
    rgb = np.array(to_rgb(colour))
    whites = [0.0] if len(values) == 1 else np.linspace(0.5, -0.45, len(values)).tolist()  # of black, below 0
    mixed = [rgb + (1 - rgb) * w if w > 0 else rgb * (1 + w) for w in whites]
    hexes = ["#" + "".join(f"{round(255 * c):02x}" for c in m.tolist()) for m in mixed]
    return dict(zip(values, hexes, strict=True))


def _keys(
    view: View, frontier: _Frontier, shades: dict[str, dict[float, str]], weights: Sequence[float]
) -> list[Line2D]:
    def key(words: str, colour: str, marker: str, line: str = "") -> Line2D:
        return Line2D([], [], color=colour, marker=marker, linestyle=line, label=words)

    keys = [key(f"PPO, lr {lr:g}", colour, "o", "-") for lr, colour in shades["ppo"].items()]
    keys += [key(f"RRHF, lr {lr:g}", colour, "o") for lr, colour in shades["rrhf"].items()]
    if len(weights) > 1:
        keys += [key(f"ranking x {w:g}", GREY, _MARKERS[i % len(_MARKERS)]) for i, w in enumerate(weights)]
    for row in frontier.others:
        keys.append(key(f"best of {getattr(view.methods[row], 'n', 1)}", KIND_COLOURS["best_of_n"], "D"))
    return [*keys, key("initial policy", "black", "P")]
