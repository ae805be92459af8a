"""The axis of worlds: what it plans, how its records are put together, and what its report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rrhf_bench.errors import ConfigError
from rrhf_bench.evaluation.claims import evaluate_claims
from rrhf_bench.evaluation.grid import Grid, Missing, pair
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.pipeline.stage_graph import Plan, make_plan
from rrhf_bench.pipeline.worlds import merge_worlds
from rrhf_bench.records import Evaluated, Prompt
from rrhf_bench.replication.published import accuracies, best_of_n_learning
from rrhf_bench.report.claims import RunEvidence
from rrhf_bench.report.comparisons import comparisons
from rrhf_bench.report.page import write_report
from rrhf_bench.report.tables import candidates_table, level_words, seeds_table
from rrhf_bench.report.view import View
from rrhf_bench.settings.claims import DifferenceSettings
from rrhf_bench.settings.reading import load_experiment
from tests.test_report import PROMPTS, synthetic, without_figures

SMOKE = Path(__file__).parents[1] / "experiments" / "smoke.toml"


def plan(*overrides: str) -> Plan:
    return make_plan(load_experiment(SMOKE, overrides))


# Settings


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["worlds=[0, 0]"], "worlds"),
        (["worlds=[0, 1]", "data.seed=3"], "data.seed"),
        (["worlds=[0, 1]", "data.source=hub:Anthropic/hh-rlhf", "policy.source=gpt2"], "worlds"),
    ],
)
def test_worlds_that_cannot_be(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(SMOKE, overrides)
    assert any(line.split(": ")[1 if ".toml" in line else 0].startswith(key) for line in str(error.value).splitlines())


def test_repetitions_have_numbers_and_words() -> None:
    seeds = load_experiment(SMOKE, ["seeds=[4, 2]", "worlds=[]"])
    assert seeds.repetitions == {4: (0, 4), 2: (0, 2)}
    assert seeds.repetition_words(2) == "seed 2"
    one = load_experiment(SMOKE, ["seeds=[4, 2]", "worlds=[7]"])
    assert one.repetitions == {4: (7, 4), 2: (7, 2)}
    worlds = load_experiment(SMOKE, ["seeds=[5]", "worlds=[3, 1]"])
    assert worlds.repetitions == {3: (3, 5), 1: (1, 5)}
    assert worlds.repetition_words(3) == "world 3"
    both = load_experiment(SMOKE, ["seeds=[5, 6]", "worlds=[3, 1]"])
    assert both.repetitions == {0: (3, 5), 1: (3, 6), 2: (1, 5), 3: (1, 6)}
    assert both.repetition_words(3) == "world 1, seed 6"


# The plan


def test_a_world_of_several_is_the_run_of_that_world_alone_but_for_the_shared_perplexity_model() -> None:
    both = {stage.name: stage for stage in plan("worlds=[4, 2]").stages}
    of_world = {world: {s.name: s.key for s in plan(f"worlds=[{world}]").stages} for world in (4, 2)}
    assert {name for name in both if name.startswith("perplexity model")} == {"perplexity model, world 4"}
    judging = ("evaluate", "perplexity model")  # what depends on the perplexity model
    for world, alone in of_world.items():
        for name, key in alone.items():
            if world == 4 or not name.startswith(judging):
                assert both[f"{name}, world {world}"].key == key, name
    trained = [both[f"train rrhf, seed 0, world {world}"] for world in (4, 2)]
    assert [stage.world for stage in trained] == [4, 2]
    assert trained[0].key != trained[1].key
    judges = {both[f"evaluate rrhf, seed 0, world {world}"].inputs["perplexity model"].key for world in (4, 2)}
    assert judges == {of_world[4]["perplexity model"]}


def test_one_world_is_the_world_of_data_seed() -> None:
    keys = [[stage.key for stage in plan(override).stages] for override in ("worlds=[3]", "data.seed=3")]
    assert keys[0] == keys[1]


# Pairing


def grid(values: list[list[float]], seeds: tuple[int, ...], worlds: tuple[int, ...] | None, **about: Any) -> Grid:
    return Grid(seeds, ("a", "b"), np.array(values), worlds=worlds, **about)


def test_one_model_of_a_world_stands_against_every_seed_of_that_world() -> None:
    row = grid([[1, 2], [3, 4], [5, 6], [7, 8]], (0, 1, 2, 3), (7, 7, 9, 9))
    base = grid([[10, 20], [30, 40]], (0, 2), (7, 9), one_model=True)
    found = pair(row, base)
    assert not isinstance(found, Missing)
    assert found.a_SP.tolist() == row.values_SP.tolist()
    assert found.b_SP.tolist() == [[10, 20], [10, 20], [30, 40], [30, 40]]
    assert found.worlds == (7, 7, 9, 9)
    turned = pair(base, row)
    assert not isinstance(turned, Missing)
    assert (turned.a_SP.tolist(), turned.b_SP.tolist()) == (found.b_SP.tolist(), found.a_SP.tolist())


def test_a_row_that_failed_in_a_world_is_compared_in_the_others() -> None:
    row = grid([[1, 2], [5, 6]], (0, 2), (7, 9))
    other = grid([[0, 0], [1, 1], [2, 2]], (0, 1, 2), (7, 8, 9))
    base = grid([[0, 0], [1, 1], [2, 2]], (0, 1, 2), (7, 8, 9), one_model=True)
    for side in (other, base):
        found = pair(row, side)
        assert not isinstance(found, Missing)
        assert (found.worlds, found.b_SP.tolist()) == ((7, 9), [[0, 0], [2, 2]])


def test_two_rows_with_only_one_world_in_common_do_not_pair() -> None:
    row, other = grid([[1, 2]], (0,), (7,)), grid([[0, 0], [1, 1]], (0, 1), (7, 8))
    assert pair(row, other) == Missing("only one world has both rows")
    assert not isinstance(pair(grid([[1, 2]], (0,), None), grid([[0, 0]], (0,), None)), Missing)


# Records and report


def world_of(records: RunRecords, world: int, number: int, gain: float) -> RunRecords:
    """Return the records of seed 0 as those of a world with its own prompts, in which RRHF gains ``gain`` more."""

    def asked(prompt: Prompt) -> Prompt:
        return Prompt(prompt.text.replace("Human:", f"Human: In world {world},"))

    def own(items: Any, **change: Any) -> Any:
        return tuple(replace(x, seed=number, prompt=asked(x.prompt), **change) for x in items if x.seed == 0)

    def rows(found: Any) -> Any:
        return {
            (row, number): tuple(replace(x, prompt=asked(x.prompt)) for x in xs)
            for (row, s), xs in found.items()
            if not s
        }

    evaluated = own(records.evaluated)
    evaluated = tuple(
        replace(reply, reward=reply.reward + world + gain * (reply.method == "rrhf")) for reply in evaluated
    )
    return replace(
        records,
        experiment=records.experiment.in_world(world),
        arena=f"{world}" * 12,
        arena_words={"prompts": f"60 of world {world}", "reward model": "synthetic"},
        evaluated=evaluated,
        pairs=own(records.pairs),
        reward_pairs=own(records.reward_pairs),
        curves=tuple(replace(point, seed=number) for point in records.curves if point.seed == 0),
        pools={number: tuple(replace(x, prompt=asked(x.prompt)) for x in records.pools[0])},
        candidates=rows(records.candidates),
        test_candidates=rows(records.test_candidates),
        training={(row, number): log for (row, seed), log in records.training.items() if seed == 0},
        costs={(row, number): cost for (row, seed), cost in records.costs.items() if seed == 0},
        curve_seconds={(row, number): at for (row, seed), at in records.curve_seconds.items() if seed == 0},
        held_out=frozenset(asked(PROMPTS[i]).id for i in (3, (world + 4) % 60, 50)),
        prompts={
            "test": tuple(asked(prompt).id for prompt in PROMPTS),
            "train": tuple(asked(c.prompt).id for c in records.candidates["rrhf", 0]),
        },
    )


GAINS = {5: 0.0, 1: 0.3, 8: 0.9}


def same(one: Evaluated, other: Evaluated) -> bool:
    return (one.method, one.seed, one.decoding) == (other.method, other.seed, other.decoding)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    """Return synthetic records with the settings of several worlds."""
    records = synthetic(tmp_path_factory.mktemp("worlds"))
    experiment = records.experiment.model_copy(update={"worlds": tuple(GAINS), "seeds": (0,)})
    return replace(records, experiment=experiment)


@pytest.fixture(scope="module")
def of_worlds(one: RunRecords) -> dict[int, RunRecords]:
    return {world: world_of(one, world, world, gain) for world, gain in GAINS.items()}


@pytest.fixture(scope="module")
def merged(one: RunRecords, of_worlds: dict[int, RunRecords]) -> RunRecords:
    return merge_worlds(one.experiment, of_worlds)


def test_the_world_is_the_random_unit_and_prompts_meet_by_place(merged: RunRecords) -> None:
    view = View(merged)
    found = view.difference("rrhf", "base", "sample", "reward")
    assert isinstance(found, Estimate)
    assert (found.n, found.worlds) == (len(PROMPTS), 3)
    mean = {
        (reply.method, reply.seed): np.mean([r.reward for r in merged.evaluated if same(r, reply)])
        for reply in merged.evaluated
        if reply.method in ("rrhf", "base") and reply.decoding == "sample"
    }
    of_world = [mean["rrhf", world] - mean["base", world] for world in GAINS]
    assert found.value == pytest.approx(np.mean(of_world))
    assert found.error is not None
    assert found.error >= np.std(of_world, ddof=1) / np.sqrt(3) - 1e-12  # over 3 worlds, not over 180 prompts
    values = view.values("rrhf", "sample", "reward")
    assert isinstance(values, Grid)
    assert values.worlds == (1, 5, 8)
    assert values.prompts[:2] == ("test 0", "test 1")
    assert [p for p in values.prompts if p in merged.held_out] == [f"test on held-out topics {i}" for i in range(3)]
    first = merged.places[8][Prompt(PROMPTS[3].text.replace("Human:", "Human: In world 8,")).id]
    assert first == "test on held-out topics 0"


def test_the_report_of_several_worlds(merged: RunRecords, tmp_path: Path) -> None:
    view = View(merged)
    lines = [tuple(cell.value for cell in row[:4]) for row in seeds_table(view).rows]
    assert {line[2] for line in lines} == set(GAINS)
    assert "3 embedded worlds" in level_words(view)
    assert merged.arena_words["prompts"] == "world 5: 60 of world 5; world 1: 60 of world 1; world 8: 60 of world 8"
    assert merged.arena_words["reward model"] == "synthetic"
    page = write_report(merged, tmp_path / "report").read_text(encoding="utf-8")
    assert ", world 5]" in page  # the first reply's
    header = (tmp_path / "report/tables/differences.csv").read_text().splitlines()[0]
    assert "worlds" in header
    assert "clusters" not in header


def test_a_row_that_survives_in_one_world_only_has_dashes(
    one: RunRecords, of_worlds: dict[int, RunRecords], tmp_path: Path
) -> None:
    def without_ppo(records: RunRecords, world: int) -> RunRecords:
        kept = {
            name: {key: value for key, value in getattr(records, name).items() if key[0] != "ppo"}
            for name in ("candidates", "test_candidates", "training", "costs", "curve_seconds")
        }
        lists = {
            name: tuple(item for item in getattr(records, name) if item.method != "ppo")
            for name in ("evaluated", "pairs", "curves")
        }
        return replace(records, **kept, **lists, failures={("ppo", world): "train: the loss is nan"})

    failed = {world: without_ppo(records, world) if world != 5 else records for world, records in of_worlds.items()}
    records = merge_worlds(one.experiment, failed)
    view = View(records)
    assert isinstance(view.mean("ppo", "sample", "reward"), Missing)  # no bootstrap over the prompts of one world
    found = {(c.a, c.b): c for c in comparisons(view) if (c.decoding, c.measure) == ("sample", "reward")}
    assert found["ppo", "base"].estimate == Missing("only one world has both rows")
    assert found["ppo", "base"].verdict is None
    assert isinstance(found["rrhf", "base"].estimate, Estimate)
    claim = DifferenceSettings(higher="ppo", lower="base", margin=0.0)
    assert {r.verdict for r in evaluate_claims({"gain": claim}, RunEvidence(view))} == {"not tested"}
    page = without_figures(records, tmp_path / "report") / "report.md"
    assert "only one world has both rows" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("table", [candidates_table, accuracies, best_of_n_learning])
def test_the_tables_count_worlds_as_worlds(merged: RunRecords, table: Any) -> None:
    both = replace(merged, experiment=merged.experiment.model_copy(update={"seeds": (0, 1)}))
    made = table(View(both))
    names = [column.name for column in made.columns]
    assert "seeds" not in names
    assert {row[names.index("worlds")].value for row in made.rows} <= {3, None}


def test_a_world_with_other_labels_has_another_arena(
    one: RunRecords, of_worlds: dict[int, RunRecords], merged: RunRecords
) -> None:
    assert merge_worlds(one.experiment, of_worlds).arena == merged.arena
    other = {**of_worlds, 8: replace(of_worlds[8], arena="labels of another seed")}
    assert merge_worlds(one.experiment, other).arena != merged.arena
