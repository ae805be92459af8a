"""From records to verdicts, with the noise that real runs have: how often equal rows are told apart, what is found.

The rates are simulated by ``python -m benchmarks.statistics``; the slow test here holds them to their bounds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baselines.sft_settings import SFTSettings
from benchmarks import statistics as simulation
from benchmarks.statistics import ONE_WORLD_SETTINGS, REAL, SETTINGS, WORLD_SETTINGS, Noise, Setting
from rrhf_bench.evaluation import statistics
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.records import Evaluated, Prompt
from rrhf_bench.report.comparisons import Comparison, compare
from rrhf_bench.report.view import View
from rrhf_bench.seeding import generator
from rrhf_bench.settings.experiment import EvaluationSettings, Experiment

WORLDS = 20
PROMPTS = tuple(Prompt(f"\n\nHuman: Question {i}?\n\nAssistant:") for i in range(300))
ROWS = ("a", "b", "c", "d")
BY_NAME = {setting.name: setting for setting in (*SETTINGS, *WORLD_SETTINGS, *ONE_WORLD_SETTINGS)}


def error(noise: Noise, seeds: int) -> float:
    """The standard error of the difference of two rows on the same prompts, which take the prompts' share out."""
    return float(np.sqrt(2 * (noise.seed**2 + noise.rest**2 / len(PROMPTS)) / seeds))


def family(noise: Noise, world: int, *, seeds: int, effect: float) -> list[Comparison]:
    """Copies of one row, trained with other seeds each, of which "b" is better by ``effect``; each against "a"."""
    draw = generator("power", world, seeds, noise.rest.hex())
    share = draw.normal(0, 0.2, len(PROMPTS))
    evaluated = []
    for row in ROWS:
        for seed in range(seeds):
            level = (effect if row == "b" else 0.0) + draw.normal(0, noise.seed)
            rewards = (level + share + draw.normal(0, noise.rest, len(PROMPTS))).tolist()
            evaluated += [
                Evaluated(row, seed, "greedy", prompt, " x", "eos", 2, reward)
                for prompt, reward in zip(PROMPTS, rewards, strict=True)
            ]
    experiment = Experiment(
        name="power",
        seeds=tuple(range(seeds)),
        methods=dict.fromkeys(ROWS, SFTSettings()),
        evaluation=EvaluationSettings(decoding=("greedy",)),
    )
    records = RunRecords(
        folder=Path("power"), experiment=experiment, arena="0" * 12, arena_words={}, evaluated=tuple(evaluated),
        pairs=(), reward_pairs=(), curves=(), pools={}, candidates={}, test_candidates={}, training={}, counts={},
        timings=(), curve_seconds={}, notes=(), command="", environment={},
    )  # fmt: skip
    return compare(View(records), [(row, "a") for row in ROWS[1:]], ("reward",))


def families(noise: Noise, *, seeds: int, effect: float = 0.0) -> list[list[Comparison]]:
    return [family(noise, world, seeds=seeds, effect=effect) for world in range(WORLDS)]


@pytest.mark.parametrize("noise", REAL.values(), ids=REAL)
def test_copies_of_a_row_with_other_training_seeds_are_hardly_ever_told_apart(noise: Noise) -> None:
    """At most 3 of 20 families of three comparisons: at a rate of 5% more come once in 60 tries."""
    assert sum(any(c.verdict != "inside noise" for c in found) for found in families(noise, seeds=3)) <= 3


@pytest.mark.parametrize("noise", REAL.values(), ids=REAL)
def test_a_planted_effect_of_seven_standard_errors_is_found(noise: Noise) -> None:
    """At least 18 of 20 in a family of three, and never the other way round."""
    found = [of_b.verdict for of_b, *_ in families(noise, seeds=3, effect=7 * error(noise, 3))]
    assert found.count("higher") >= 18
    assert found.count("lower") == 0


def test_a_harmful_effect_is_found_as_harmful_and_with_more_seeds_a_smaller_one() -> None:
    noise = REAL["rrhf, greedy, gold"]
    found = [of_b.verdict for of_b, *_ in families(noise, seeds=5, effect=-5 * error(noise, 5))]
    assert found.count("lower") >= 18


def test_the_detectable_difference_is_of_the_order_of_what_is_found() -> None:
    noise = REAL["rrhf, greedy, proxy"]
    of_b, *_ = family(noise, 0, seeds=5, effect=0.0)
    assert of_b.detectable is not None
    assert 1 < of_b.detectable / error(noise, 5) < 12
    assert replace(of_b, p=1.0).verdict == "inside noise"


# --- families of 11, as in hh_compare


def rates(name: str, families: int = 100, seeds: int = 3, worlds: int = 1) -> simulation.Rates:
    return simulation.rates(BY_NAME[name], seeds, 11, families, worlds)


@pytest.mark.parametrize("name", ["greedy proxy", "sampled proxy", "one row spreads ten times as far"])
def test_a_family_of_equal_rows_seldom_holds_a_verdict_and_planted_effects_are_found(name: str) -> None:
    """100 families: 7% and 2 standard errors of 2.5% more. The effect is 3 (greedy) to 8 true standard errors."""
    found = rates(name)
    assert found.false_family <= 0.12
    assert found.miss <= 0.08
    assert found.power is not None
    assert found.power_alone is not None
    assert found.power >= 0.6
    assert found.power <= found.power_alone


# --- worlds as the random unit


@pytest.mark.parametrize("name", ["worlds, greedy proxy", "worlds, one row varies ten times as far"])
def test_over_three_worlds_a_family_of_equal_rows_seldom_holds_a_verdict(name: str) -> None:
    """100 families, as above. One of the six true effects, that against the initial policy, is too small to be found
    ("greedy proxy"), and the other five are 4 true standard errors."""
    found = rates(name, seeds=1, worlds=3)
    assert found.false_family <= 0.12
    assert found.miss <= 0.09
    assert found.power is not None
    assert found.power_alone is not None
    assert 0.15 <= found.power <= found.power_alone


@pytest.mark.parametrize("setting", ONE_WORLD_SETTINGS, ids=lambda setting: setting.name)
def test_three_seeds_of_one_world_say_nothing_of_worlds(setting: Setting) -> None:
    found = rates(setting.name, families=20)
    assert found.false_family > 0.6
    assert found.power is None


def test_without_centring_the_level_of_the_worlds_hides_the_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The level has three times the standard deviation of a row's effect."""
    name = "worlds, rows vary alike, no common gain"
    setting = BY_NAME[name]
    assert setting.between is not None
    monkeypatch.setitem(BY_NAME, name, replace(setting, between=replace(setting.between, level=0.3)))
    centred = rates(name, families=40, seeds=1, worlds=5)
    monkeypatch.setattr(statistics, "_centred", lambda rows, worlds_NS: list(rows))
    raw = rates(name, families=40, seeds=1, worlds=5)
    assert centred.power is not None
    assert raw.power is not None
    assert centred.power > raw.power + 0.3


# --- the whole table


@pytest.mark.slow
@pytest.mark.parametrize("repetitions", [3, 5])
@pytest.mark.parametrize("comparisons", [11, 33])
@pytest.mark.parametrize("setting", [*SETTINGS, *WORLD_SETTINGS], ids=lambda setting: setting.name)
def test_at_most_seven_families_in_a_hundred_hold_a_false_verdict(
    setting: Setting, comparisons: int, repetitions: int
) -> None:
    """400 families; the bound allows 1.5 standard errors of 1.3% beyond 7%. ``repetitions`` are seeds or worlds."""
    seeds, worlds = (repetitions, 1) if setting in SETTINGS else (1, repetitions)
    found = simulation.rates(setting, seeds, comparisons, 400, worlds)
    assert found.false_family <= 0.09
    assert found.miss <= 0.09
