"""Ranks with ties, win rates and the Pareto front, from synthetic records with known effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rrhf_bench.pipeline.results import RunRecords, Trial
from rrhf_bench.report import ranking
from rrhf_bench.report.ranking import pareto, places, ranking_parts, ranking_table, win_rate, win_rates_tables
from rrhf_bench.report.rows import tuning_table
from rrhf_bench.report.table import Missing, Table
from rrhf_bench.report.view import View
from tests.test_report import SEEDS, synthetic

ROWS = ["base", "sft", "rrhf", "ppo", "best_of_n"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    return synthetic(tmp_path_factory.mktemp("ranking"))


def test_equal_rows_share_a_range_and_planted_effects_part_the_others(records: RunRecords) -> None:
    """Sampled proxy: ppo 1.3; rrhf and best_of_n 1.0, equal in truth; sft 0.35; base 0.2."""
    found = places(View(records), ROWS, "sample", "reward")
    assert (found["ppo"].words, found["rrhf"].words, found["best_of_n"].words) == ("1", "2 to 3", "2 to 3")
    assert found["sft"].first == 4
    assert found["base"].last == 5


def test_one_training_seed_ranks_no_row_above_another_and_the_page_says_why(
    records: RunRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(
        records,
        experiment=records.experiment.model_copy(update={"seeds": (0,)}),
        evaluated=tuple(reply for reply in records.evaluated if reply.seed == 0),
    )
    assert {place.words for place in places(View(one), ROWS, "sample", "reward").values()} == {"1 to 5"}
    table = ranking_table(View(one), ROWS)
    assert any("one training seed" in note for note in table.footnotes)
    assert not any("one training seed" in note for note in ranking_table(View(records), ROWS).footnotes)
    monkeypatch.setattr(ranking, "LEAST_KINDS", 3)
    sentences = [part for part in ranking_parts(View(one)) if isinstance(part, str)]
    assert sentences
    assert all("no row gets a verdict" in sentence for sentence in sentences)


def test_a_win_rate_is_the_share_of_prompts_and_the_two_sides_add_to_one(records: RunRecords) -> None:
    view = View(records)
    found, other = win_rate(view, "ppo", "rrhf", "sample", "reward"), win_rate(view, "rrhf", "ppo", "sample", "reward")
    assert not isinstance(found, Missing)
    assert not isinstance(other, Missing)
    by = {(r.method, r.seed, r.prompt): r.reward for r in records.evaluated if r.decoding == "sample"}
    prompts = {prompt for _, _, prompt in by}
    wins = [by["ppo", s, p] > by["rrhf", s, p] for s in SEEDS for p in prompts if ("ppo", s, p) in by]
    assert found.value == pytest.approx(np.mean(wins), abs=1e-12)
    assert found.value + other.value == pytest.approx(1.0, abs=1e-12)
    assert found.low + other.high == pytest.approx(1.0, abs=1e-12)
    assert found.low < found.value < found.high


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = {
        "cheap": (1.0, 0.2),
        "dear": (3.0, 0.9),
        "beaten": (2.0, 0.1),
        "equal cost": (1.0, 0.1),
        "same": (3.0, 0.9),
    }
    assert pareto(points) == ["cheap", "dear"]


def test_a_run_of_few_kinds_is_not_ranked_and_one_of_many_is(
    records: RunRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(ranking_parts(View(records)))
    monkeypatch.setattr(ranking, "LEAST_KINDS", 3)
    parts = list(ranking_parts(View(records)))
    (table,) = (part for part in parts if isinstance(part, Table))
    ranked = {row[2].value: row for row in table.rows if row[0].value == "sampled"}
    calls, labelled = (next(i for i, c in enumerate(table.columns) if c.name == name)
                       for name in ("reward calls", "labelled prompts"))  # fmt: skip
    assert (ranked["rrhf"][calls].value, ranked["rrhf"][labelled].value) == (3000.0, 500)
    assert (ranked["sft"][calls].value, ranked["sft"][labelled].value) == (0.0, 500)
    assert {part[0].name for part in parts if isinstance(part, tuple)} == {
        "win_rates", "ranking_distance", "ranking_costs"
    }  # fmt: skip


def test_trials_are_listed_with_what_was_picked(records: RunRecords, tmp_path: Path) -> None:
    trials = (Trial({"lr": 1e-3}, 0.5, True), Trial({"lr": 1e-2}, None, False))
    table = tuning_table(View(replace(records, folder=tmp_path, tuned={"rrhf": trials})))
    assert [[cell.value for cell in row] for row in table.rows] == [
        ["rrhf", "lr 0.001", 0.5, "yes"],
        ["rrhf", "lr 0.01", None, "no"],
    ]


def test_places_and_win_rates_are_computed_once_a_report(records: RunRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    for name in ("_places", "_win_rate"):
        plain = getattr(ranking, name)

        def counted(view: View, *key: object, plain: Callable[..., object] = plain) -> object:
            made.append((*map(str, key),))
            return plain(view, *key)

        monkeypatch.setattr(ranking, name, counted)
    monkeypatch.setattr(ranking, "LEAST_KINDS", 3)
    view = View(records)
    assert len(list(ranking_parts(view))) > 3
    tables = win_rates_tables(view)
    assert len(made) == len(set(made)) > 40  # 20 pairs in either decoding, and places of both rewards in either
    monkeypatch.undo()
    monkeypatch.setattr(ranking, "LEAST_KINDS", 3)
    assert tables == win_rates_tables(View(records))
