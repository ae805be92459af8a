"""Simulate how often the report's verdicts are wrong, and how often they find a planted effect.

``python -m benchmarks.statistics`` prints a table; ``--out FOLDER`` also writes it as statistics.json and
statistics.md. Letters: N rows (row 0 is the initial policy), S training seeds (of all worlds), P prompts.

A family draws, for each row, a seed effect, an effect of its own on each topic and prompt, and noise, with the standard
deviations that an analysis of variance found in real runs of hh_compare.toml (``REAL``). All comparisons of a family
are then made by the code of the report: pooled variance, paired differences, Holm's adjustment, verdict at 0.05.

In the settings with worlds, each world adds its own level to all rows, a gain to all trained rows and an effect to each
of them (``Between``). Truth is then what holds on average over worlds.

``COLUMN_WORDS`` says what each column holds. At most 0.07 of the families of equal rows may hold a verdict, except in
the settings that read the statistic of one world as a claim about worlds: they show why worlds are the random unit.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rrhf_bench.evaluation.statistics import Estimate, Floats, holm, paired_difference, pool_seed_variance
from rrhf_bench.seeding import generator

PROMPTS, TOPICS = 300, 40
ALPHA = 0.05


@dataclass(frozen=True)
class Noise:
    """Standard deviations of one row's values: between training seeds, and of what seeds and prompts leave over."""

    seed: float
    rest: float


# As found in three seeds and 300 prompts of a run of hh_compare.toml, in an earlier world of 40 topics.
REAL = {
    "rrhf, greedy, proxy": Noise(0.022, 0.13),
    "rrhf, greedy, gold": Noise(0.098, 0.42),
    "sft, greedy, gold": Noise(0.036, 0.32),
    "ppo, greedy, gold": Noise(0.246, 0.85),
    "rrhf, sampled, proxy": Noise(0.012, 0.51),
    "rrhf, sampled, gold": Noise(0.0, 1.16),
}


@dataclass(frozen=True)
class Between:
    """Standard deviations between worlds.

    ``level`` is common to all rows, the initial policy included. ``gain`` is common to all trained rows: how much
    training can gain in a world. ``effects`` are those of the trained rows, taken in turn.
    """

    level: float
    gain: float
    effects: tuple[float, ...]


def _between(base_RW: ArrayLike, rrhf_RW: ArrayLike, ppo_RW: ArrayLike) -> Between:
    """Return what the rewards of three rows in five worlds show, the mean over R runs under other roundings.

    PPO - RRHF has twice the variance of one row's effect, and RRHF - initial policy that of an effect and of the gain.
    """
    base_RW, rrhf_RW, ppo_RW = map(np.asarray, (base_RW, rrhf_RW, ppo_RW))
    level, effect, gain = (
        float(x_RW.var(axis=1, ddof=1).mean())
        for x_RW in (base_RW, (ppo_RW - rrhf_RW) / math.sqrt(2), rrhf_RW - base_RW)
    )
    return Between(math.sqrt(level), math.sqrt(max(0.0, gain - effect)), (math.sqrt(effect),))


# Greedy rewards of initial policy, RRHF and PPO in reports/hh_compare, hh_compare_avx512 and hh_compare_intel.
PROXY_WORLDS = _between(
    [[1.39, 1.27, 1.00, 1.27, 1.16], [0.89, 1.94, 0.85, 1.43, 1.16], [1.13, 0.97, 1.14, 0.87, 0.90]],
    [[1.73, 2.08, 1.58, 1.67, 1.66], [1.22, 2.44, 1.46, 1.86, 1.58], [1.31, 1.77, 1.93, 1.39, 1.22]],
    [[1.85, 2.11, 1.79, 1.67, 1.91], [1.36, 2.50, 1.82, 1.89, 1.72], [1.40, 1.97, 2.02, 1.50, 1.53]],
)
GOLD_WORLDS = _between(
    [[0.90, 0.87, 0.94, 0.40, 0.62], [0.89, 0.93, 0.85, 0.69, 0.81], [0.94, 0.92, 0.84, 0.84, 0.75]],
    [[0.78, 1.23, 0.95, 0.69, 0.71], [0.94, 1.19, 0.90, 1.12, 1.00], [0.83, 1.16, 1.14, 0.97, 0.74]],
    [[0.03, 0.59, 0.74, 0.46, 0.90], [0.17, 0.46, 0.49, 0.57, 0.79], [-0.05, 0.30, 0.97, 0.76, 0.80]],
)


@dataclass(frozen=True)
class Setting:
    """One kind of family. ``rows`` are the noises of the trained rows, taken in turn; the first row is the pivot.

    ``sampled``: the initial policy's replies are drawn anew for each seed; otherwise they are greedy and the same.
    ``interaction``: standard deviation of a row's own effect on each topic, and again on each prompt, the same for all
    seeds of a world. ``shared``: correlation of the rows' noise, as with common candidates and sampling seeds.
    ``between``: what worlds add; None: the truth is that of the one world at hand.
    """

    name: str
    rows: tuple[Noise, ...]
    sampled: bool
    effect: float
    interaction: float = 0.0
    shared: float = 0.0
    between: Between | None = None

    def noise(self, row: int) -> Noise:
        """Return the noise of a row; the initial policy, row 0, has no training seeds."""
        if row == 0:
            return Noise(0.0, self.rows[0].rest if self.sampled else 0.0)
        return self.rows[(row - 1) % len(self.rows)]


def _named(*names: str) -> tuple[Noise, ...]:
    return tuple(REAL[name] for name in names)


_MIXED = _named("rrhf, greedy, gold", "sft, greedy, gold", "rrhf, greedy, gold", "ppo, greedy, gold")
_QUIET, _LOUD = Noise(0.03, 0.13), Noise(0.3, 0.13)
SETTINGS = (
    Setting("greedy proxy", _named("rrhf, greedy, proxy"), False, 0.1),
    Setting("greedy gold, PPO spreads most", _MIXED, False, 0.3),
    Setting("sampled proxy", _named("rrhf, sampled, proxy"), True, 0.2),
    Setting("sampled gold", _named("rrhf, sampled, gold"), True, 0.4),
    Setting("one row spreads ten times as far", (*[_QUIET] * 4, _LOUD), False, 0.2),
    Setting("the pivot spreads ten times as far", (_LOUD, *[_QUIET] * 40), False, 1.5),
    Setting("rows with effects on topics", _named("rrhf, greedy, proxy"), False, 0.15, interaction=0.1),
    Setting("rows that share their noise", _named("rrhf, sampled, proxy"), True, 0.2, shared=0.8),
)
_GREEDY_PROXY = Setting("greedy proxy", _named("rrhf, greedy, proxy"), False, 0.3, 0.1, between=PROXY_WORLDS)
_GREEDY_GOLD = Setting("greedy gold", _named("rrhf, greedy, gold"), False, 0.6, 0.1, between=GOLD_WORLDS)


def _over_worlds(name: str, *effects: float, effect: float = 0.3) -> Setting:
    """Return the proxy's setting with other effects of the rows, and no gain that trained rows share."""
    between = Between(PROXY_WORLDS.level, 0.0, effects)
    return replace(_GREEDY_PROXY, name=f"worlds, {name}", effect=effect, between=between)


# Judged over worlds.
WORLD_SETTINGS = (
    replace(_GREEDY_PROXY, name="worlds, greedy proxy"),
    replace(_GREEDY_GOLD, name="worlds, greedy gold"),
    _over_worlds("one row varies ten times as far", *[0.05] * 4, 0.5),
    _over_worlds("the pivot varies ten times as far", 0.5, *[0.05] * 40, effect=2.0),
    _over_worlds("rows vary alike, no common gain", 0.1),
)
# Judged by the statistic of one world, although the claim is about worlds.
ONE_WORLD_SETTINGS = tuple(
    replace(setting, name=f"one world read as a claim about worlds, {setting.name}")
    for setting in (_GREEDY_PROXY, _GREEDY_GOLD)
)
# Comparisons of each trained row with the pivot and with the initial policy: 2 x 6 - 1 and 2 x 17 - 1.
FAMILIES = {11: 6, 33: 17}


@dataclass(frozen=True)
class Rates:
    """The rates of one setting. ``seeds`` are those of one world. The power of a test with a false size is None."""

    setting: str
    worlds: int
    seeds: int
    comparisons: int
    effect: float
    false_family: float
    miss: float
    power: float | None
    power_known_spread: float | None
    power_alone: float | None
    families: int


def world(setting: Setting, trained: int, seeds: int, effect: float, draw: np.random.Generator) -> Floats:
    """Draw the values (N, S, P) of the initial policy and ``trained`` rows; the first of these is ``effect`` better."""
    seed_N, rest_N = np.array([astuple(setting.noise(row)) for row in range(trained + 1)]).T
    shape = trained + 1, seeds, PROMPTS
    common_SP = draw.normal(size=shape[1:])
    rest_NSP = np.sqrt(setting.shared) * common_SP + np.sqrt(1 - setting.shared) * draw.normal(size=shape)
    topic_P = np.arange(PROMPTS) % TOPICS
    own_NP = draw.normal(size=(trained + 1, TOPICS))[:, topic_P] + draw.normal(size=(trained + 1, PROMPTS))
    values_NSP = (
        seed_N[:, None, None] * draw.normal(size=(trained + 1, seeds, 1))
        + setting.interaction * own_NP[:, None, :]
        + rest_N[:, None, None] * rest_NSP
    )
    values_NSP[1] += effect
    return values_NSP


def several_worlds(
    setting: Setting, trained: int, worlds: int, seeds: int, effect: float, draw: np.random.Generator
) -> Floats:
    """Draw the values (N, S, P) of ``worlds`` worlds of ``seeds`` seeds each, one world after the other."""
    between = setting.between
    if between is None:
        assert worlds == 1
        return world(setting, trained, seeds, effect, draw)
    effect_N = np.array([0.0, *(between.effects[i % len(between.effects)] for i in range(trained))])
    gain_N = np.array([0.0, *[between.gain] * trained])
    drawn = []
    for _ in range(worlds):
        shift_N = between.level * draw.normal() + gain_N * draw.normal() + effect_N * draw.normal(size=trained + 1)
        drawn.append(world(setting, trained, seeds, effect, draw) + shift_N[:, None, None])
    return np.concatenate(drawn, axis=1)


def family(values_NSP: Floats, worlds: int = 1) -> list[tuple[int, int, Estimate]]:
    """Return (a, b, estimate of a - b) of every comparison, made as the report makes them.

    Over several worlds the initial policy is pooled as well: it is another model in each of them.
    """
    rows = len(values_NSP)
    pairs = [*((row, 1) for row in range(2, rows)), *((row, 0) for row in range(1, rows))]
    of_row = np.repeat(np.arange(worlds), values_NSP.shape[1] // worlds).tolist()
    means = [values_SP.mean(axis=1) for values_SP in values_NSP[1 if worlds == 1 else 0 :]]
    pooled = pool_seed_variance(means, worlds_NS=[of_row] * len(means))
    topics = (np.arange(PROMPTS) % TOPICS).tolist()
    found = []
    for a, b in pairs:
        sides = values_NSP[a], values_NSP[b]
        found.append((a, b, paired_difference(*sides, clusters_P=topics, pooled=pooled, worlds_S=of_row)))
    return found


def adjusted(found: Sequence[tuple[int, int, Estimate]]) -> Floats:
    """Return the p of the comparisons of a family, adjusted by Holm."""
    return holm([estimate.p for *_, estimate in found if estimate.p is not None])


def rates(setting: Setting, seeds: int, comparisons: int, families: int, worlds: int = 1) -> Rates:
    """Simulate ``families`` families without any effect and as many with one."""
    name = ("statistics", setting.name, *((worlds, seeds) if worlds > 1 else (seeds,)))
    valid = worlds > 1 or setting.between is None

    def simulate(i: int, kind: str, effect: float) -> list[tuple[int, int, Estimate]]:
        draw = generator(*name, i, kind)
        return family(several_worlds(setting, FAMILIES[comparisons], worlds, seeds, effect, draw), worlds)

    false: list[bool] = []
    missed: list[bool] = []
    called: list[bool] = []
    known: list[bool] = []
    alone: list[bool] = []
    for i in range(families):
        found = simulate(i, "null", 0.0)
        false.append(bool((adjusted(found) < ALPHA).any()))
        missed += [not e.low <= 0.0 <= e.high for *_, e in found]
        if not valid:
            continue
        found = simulate(i, "effect", setting.effect)
        p_known = _with_known_spread(setting, seeds, worlds, found)
        for (a, b, e), p, p_true in zip(found, adjusted(found), p_known, strict=True):
            if 1 in (a, b):
                right = (e.value if a == 1 else -e.value) > 0
                called.append(p < ALPHA and right)
                alone.append(e.significant and right)
                known.append(p_true < ALPHA)

    return Rates(
        setting.name,
        worlds,
        seeds,
        comparisons,
        setting.effect,
        false_family=float(np.mean(false)),
        miss=float(np.mean(missed)),
        power=float(np.mean(called)) if valid else None,
        power_known_spread=float(np.mean(known)) if valid else None,
        power_alone=float(np.mean(alone)) if valid else None,
        families=families,
    )


def _with_known_spread(setting: Setting, seeds: int, worlds: int, found: Sequence[tuple[int, int, Estimate]]) -> Floats:
    """Return the p of every comparison by a z test with the true standard errors, adjusted by Holm."""

    def variance(row: int) -> float:
        noise = setting.noise(row)
        own = (noise.seed**2 + (1 - setting.shared) * noise.rest**2 / PROMPTS) / seeds
        own += setting.interaction**2 * (1 / TOPICS + 1 / PROMPTS)
        between = setting.between
        if between is not None:
            own += between.effects[(row - 1) % len(between.effects)] ** 2 if row else between.gain**2
        return own / worlds

    return holm([2 * special.ndtr(-abs(e.value) / np.sqrt(variance(a) + variance(b))) for a, b, e in found])


COLUMNS = {field.name: field.name.replace("_", " ") for field in fields(Rates) if field.name != "families"}
COLUMNS["power_known_spread"] = "power, known spread"
COLUMN_WORDS = {
    "false family": "all rows are equal in truth, and at least one comparison of the family gets a verdict.",
    "miss": "the share of 95% intervals, each by itself, that leave out the true difference, which is 0.",
    "power": "the first row is better than all others by the effect; the share of its comparisons that are called so.",
    "power, known spread": "the same if the true spread were known: the price of estimating it is the rest.",
    "power alone": "the same if each comparison were the only one: the price of the family is the rest.",
}


def page(found: Sequence[Rates]) -> str:
    """Return the table as a Markdown page that says what it holds and how it was made."""
    return "\n".join([
        "# How often verdicts are wrong, and what they find",
        "",
        f"Simulated with the code of the report: {PROMPTS} prompts in {TOPICS} topics, the noise of real runs, "
        f"{found[0].families} families a row (a share of 0.05 is known to 0.011). The settings and their noise stand "
        "in `benchmarks/statistics.py`.",
        "",
        *(f"* **{name}**: {words}" for name, words in COLUMN_WORDS.items()),
        "",
        "Rows named *worlds* are judged over worlds, with one seed in each. Rows named *one world read as a claim "
        "about worlds* draw one world, with the same variation between worlds, and judge it by its training seeds. "
        "Their *false family* is how often such a verdict is true of that world alone. Their power is left out: a test "
        "that is so often wrong finds anything.",
        "",
        markdown(found),
        "",
        f"Made by `python -m benchmarks.statistics --families {found[0].families} --out reports/statistics`.",
        "",
    ])  # fmt: skip


def markdown(found: Sequence[Rates]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "| :--- |" + " ---: |" * (len(COLUMNS) - 1)]
    shares = ("false_family", "miss", "power", "power_known_spread", "power_alone")
    for row in found:
        values: dict[str, Any] = asdict(row)
        values.update({key: f"{values[key]:.3f}" for key in shares if values[key] is not None})
        cells = ["-" if values[key] is None else str(values[key]) for key in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", type=int, default=400, help="families of each setting (400: 0.05 is +- 0.011)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write statistics.json and statistics.md")
    options = parser.parse_args()
    found = []
    for settings, of_worlds in ((SETTINGS, False), (WORLD_SETTINGS, True), (ONE_WORLD_SETTINGS, False)):
        for repetitions in (3, 5):
            worlds, seeds = (repetitions, 1) if of_worlds else (1, repetitions)
            for comparisons in FAMILIES:
                for setting in settings:
                    found.append(rates(setting, seeds, comparisons, options.families, worlds))
                    print(markdown(found[-1:]).splitlines()[-1], flush=True)
    print(f"\n{markdown(found)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "statistics.json").write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
        (options.out / "statistics.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
