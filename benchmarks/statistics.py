"""Simulate how often the report's verdicts are wrong, and how often they find a planted effect.

``python -m benchmarks.statistics`` prints a table; ``--out FOLDER`` also writes it as statistics.json and
statistics.md. Letters: N rows (row 0 is the initial policy), S training seeds, P prompts.

A world draws, for each row, a seed effect, an effect of its own on each topic and prompt, and noise, with the standard
deviations that an analysis of variance found in real runs of hh_compare.toml (``REAL``). All comparisons of a family
are then made by the code of the report: pooled variance, paired differences, Holm's adjustment, verdict at 0.05.

``COLUMN_WORDS`` says what each column holds. At most 0.07 of the families of equal rows may hold a verdict.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rrhf_bench.evaluation.statistics import Estimate, Floats, holm, paired_difference, pool_seed_variance
from rrhf_bench.seeding import generator

PROMPTS, TOPICS = 300, 40
ALPHA = 0.05


@dataclass(frozen=True)
class Noise:
    """Standard deviations of one row's values: between training seeds, and of what seeds and prompts leave over."""

    seed: float
    rest: float


# As found in three seeds and 300 prompts of a run of hh_compare.toml.
REAL = {
    "rrhf, greedy, proxy": Noise(0.022, 0.13),
    "rrhf, greedy, gold": Noise(0.098, 0.42),
    "sft, greedy, gold": Noise(0.036, 0.32),
    "ppo, greedy, gold": Noise(0.246, 0.85),
    "rrhf, sampled, proxy": Noise(0.012, 0.51),
    "rrhf, sampled, gold": Noise(0.0, 1.16),
}


@dataclass(frozen=True)
class Setting:
    """One kind of world. ``rows`` are the noises of the trained rows, taken in turn; the first row is the pivot.

    ``sampled``: the initial policy's replies are drawn anew for each seed; otherwise they are greedy and the same.
    ``interaction``: standard deviation of a row's own effect on each topic, and again on each prompt, the same for all
    seeds. ``shared``: correlation of the rows' noise, as with common candidates and sampling seeds.
    """

    name: str
    rows: tuple[Noise, ...]
    sampled: bool
    effect: float
    interaction: float = 0.0
    shared: float = 0.0


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
# Comparisons of each trained row with the pivot and with the initial policy: 2 x 6 - 1 and 2 x 17 - 1.
FAMILIES = {11: 6, 33: 17}


@dataclass(frozen=True)
class Rates:
    setting: str
    seeds: int
    comparisons: int
    effect: float
    false_family: float
    miss: float
    power: float
    power_known_spread: float
    power_alone: float
    worlds: int


def world(setting: Setting, trained: int, seeds: int, effect: float, draw: np.random.Generator) -> Floats:
    """Draw the values (N, S, P) of the initial policy and ``trained`` rows; the first of these is ``effect`` better."""
    noises = [setting.rows[i % len(setting.rows)] for i in range(trained)]
    initial = Noise(0.0, noises[0].rest if setting.sampled else 0.0)
    seed_N, rest_N = np.array([(noise.seed, noise.rest) for noise in (initial, *noises)]).T
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


def family(values_NSP: Floats) -> list[tuple[int, int, Estimate]]:
    """Return (a, b, estimate of a - b) of every comparison, made as the report makes them."""
    rows = len(values_NSP)
    pairs = [*((row, 1) for row in range(2, rows)), *((row, 0) for row in range(1, rows))]
    pooled = pool_seed_variance([values_SP.mean(axis=1) for values_SP in values_NSP[1:]])
    topics = (np.arange(PROMPTS) % TOPICS).tolist()
    return [(a, b, paired_difference(values_NSP[a], values_NSP[b], clusters_P=topics, pooled=pooled)) for a, b in pairs]


def verdicts(found: Sequence[tuple[int, int, Estimate]]) -> list[bool]:
    """Return which comparisons of a family get a verdict."""
    return (holm([estimate.p for *_, estimate in found if estimate.p is not None]) < ALPHA).tolist()


def rates(setting: Setting, seeds: int, comparisons: int, worlds: int) -> Rates:
    """Simulate ``worlds`` families without any effect and as many with one."""
    trained = FAMILIES[comparisons]
    false: list[bool] = []
    missed: list[bool] = []
    called: list[bool] = []
    alone: list[bool] = []
    known: list[bool] = []
    for i in range(worlds):
        found = family(world(setting, trained, seeds, 0.0, generator("statistics", setting.name, seeds, i, "null")))
        false.append(any(verdicts(found)))
        missed += [not e.low <= 0.0 <= e.high for *_, e in found]
        draw = generator("statistics", setting.name, seeds, i, "effect")
        found = family(world(setting, trained, seeds, setting.effect, draw))
        touched = [1 in (a, b) for a, b, _ in found]
        sign = [1 if a == 1 else -1 for a, *_ in found]
        right = [sign * e.value > 0 for sign, (*_, e) in zip(sign, found, strict=True)]
        called += [v and r for v, r, t in zip(verdicts(found), right, touched, strict=True) if t]
        alone += [e.significant and r for (*_, e), r, t in zip(found, right, touched, strict=True) if t]
        known += _with_known_spread(setting, seeds, found, touched)
    return Rates(
        setting.name,
        seeds,
        comparisons,
        setting.effect,
        false_family=float(np.mean(false)),
        miss=float(np.mean(missed)),
        power=float(np.mean(called)),
        power_known_spread=float(np.mean(known)),
        power_alone=float(np.mean(alone)),
        worlds=worlds,
    )


def _with_known_spread(
    setting: Setting, seeds: int, found: Sequence[tuple[int, int, Estimate]], touched: Sequence[bool]
) -> Iterator[bool]:
    """Yield which true effects a z test with the true standard errors finds under Holm's adjustment."""
    p = []
    for a, b, estimate in found:
        variance = 0.0
        for row in (a, b):
            noise = setting.rows[(row - 1) % len(setting.rows)] if row else Noise(0.0, 0.0)
            rest = setting.rows[0].rest if not row and setting.sampled else noise.rest
            variance += (noise.seed**2 + (1 - setting.shared) * rest**2 / PROMPTS) / seeds
            variance += setting.interaction**2 * (1 / TOPICS + 1 / PROMPTS)
        p.append(2 * float(stats.norm.sf(abs(estimate.value) / np.sqrt(variance))))
    yield from (bool(q < ALPHA) for q, t in zip(holm(p), touched, strict=True) if t)


COLUMNS = {
    "setting": "setting", "seeds": "seeds", "comparisons": "comparisons", "effect": "effect",
    "false_family": "false family", "miss": "miss", "power": "power", "power_known_spread": "power, known spread",
    "power_alone": "power alone",
}  # fmt: skip


COLUMN_WORDS = {
    "false family": "all rows are equal in truth, and at least one comparison of the family gets a verdict.",
    "miss": "the share of 95% intervals, each by itself, that leave out the true difference, which is 0.",
    "power": "the first row is better than all others by the effect; the share of its comparisons that are called so.",
    "power, known spread": "the same if the variance between seeds were known: the price of estimating it is the rest.",
    "power alone": "the same if each comparison were the only one: the price of the family is the rest.",
}


def page(found: Sequence[Rates]) -> str:
    """Return the table as a Markdown page that says what it holds and how it was made."""
    words = [f"* **{name}**: {text}" for name, text in COLUMN_WORDS.items()]
    return "\n".join([
        "# How often verdicts are wrong, and what they find",
        "",
        f"Simulated with the code of the report: {PROMPTS} prompts in {TOPICS} topics, the seed noise of real runs, "
        f"{found[0].worlds} worlds a row (a share of 0.05 is known to 0.011). The settings and their noise stand in "
        "`benchmarks/statistics.py`.",
        "",
        *words,
        "",
        markdown(found),
        "",
        f"Made by `python -m benchmarks.statistics --worlds {found[0].worlds} --out reports/statistics`.",
        "",
    ])  # fmt: skip


def markdown(found: Sequence[Rates]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "| :--- |" + " ---: |" * (len(COLUMNS) - 1)]
    for row in found:
        values: dict[str, Any] = asdict(row)
        shares = ("false_family", "miss", "power", "power_known_spread", "power_alone")
        cells = [f"{values[key]:.3f}" if key in shares else str(values[key]) for key in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, default=400, help="worlds of each setting (400: 0.05 is +- 0.011)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--comparisons", type=int, nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    found = []
    for seeds in options.seeds:
        for comparisons in options.comparisons:
            for setting in SETTINGS:
                found.append(rates(setting, seeds, comparisons, options.worlds))
                print(markdown(found[-1:]).splitlines()[-1], flush=True)
    text = markdown(found)
    print(f"\n{text}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "statistics.json").write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
        (options.out / "statistics.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
