"""What judges has one id, and two runs are compared under one id only: paired by prompt and seed, from records."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rrhf_bench.errors import ConfigError, StoreError
from rrhf_bench.evaluation.statistics import Estimate, holm
from rrhf_bench.pipeline import run_folder as runs
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.pipeline.stage_graph import Stage, make_plan
from rrhf_bench.records import Evaluated, Prompt
from rrhf_bench.report.compare_runs import compare_runs, comparison_json, comparison_table
from rrhf_bench.report.comparisons import Comparison
from rrhf_bench.report.table import Missing, to_markdown
from rrhf_bench.report.view import View
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.terminal import Screen, table_of
from tests.test_fuzz import run
from tests.test_report import PROMPTS, SEEDS, synthetic

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"

Write = Callable[..., Path]


# What the id covers


def judged_by(stage: Stage) -> dict[str, Any]:
    """Of an evaluation, what judges."""
    own = ("sampler", "dtype")  # of the policy that is judged
    decoding = {key: value for key, value in stage.settings["evaluation"].items() if key not in own}
    return {
        "decoding": decoding,
        "reward": stage.inputs["reward model"].key,
        "ppl": stage.inputs["perplexity model"].key,
    }


def arena(*overrides: str, prompts: tuple[Prompt, ...] = PROMPTS[:3], gold: str | None = "toy") -> tuple[str, Any]:
    """(id, its words) of the smoke experiment with other settings."""
    experiment = load_experiment(SMOKE, overrides)
    stage = next(stage for stage in make_plan(experiment).wanted if stage.kind == "evaluate")
    entry = {"settings": stage.settings, "inputs": {role: needed.key for role, needed in stage.inputs.items()}}
    evaluated = [Evaluated("base", 0, "greedy", prompt, " x", "eos", 2, 0.5) for prompt in prompts]
    about = {"gold": gold, "identity": "toy, seed 0"}
    unread: Any = None
    return runs._arena(unread, experiment, entry, evaluated, about)


@pytest.mark.parametrize(
    ("part", "overrides"),
    [
        ("decoding", ["evaluation.max_new_tokens=41"]),
        ("decoding", ["evaluation.temperature=0.7"]),
        ("decoding", ["evaluation.top_k=50"]),
        ("decoding", ["evaluation.decoding=['greedy']"]),
        ("decoding", ["sampling.stop=['Human:']"]),
        ("reward", ["reward_model.training.lr=1e-3"]),
        ("reward", ["reward_model.source=OpenAssistant/reward"]),
        ("reward", ["reward_model.source=OpenAssistant/reward", "reward_model.revision=v2"]),
        ("reward", ["reward_model.source=OpenAssistant/reward", "reward_model.label=good"]),
        ("perplexity", ["perplexity_model.scratch.layers=3"]),
        ("perplexity", ["perplexity_model.source=gpt2-medium"]),
        ("perplexity", ["perplexity_model.source=gpt2-medium", "perplexity_model.revision=v2"]),
        ("template", ["policy.template=raw"]),
    ],
)
def test_every_part_of_what_judges_decides_the_id_and_is_named(part: str, overrides: list[str]) -> None:
    (plain, words), (other, its) = arena(), arena(*overrides)
    assert other != plain
    assert words[part] != its[part]
    shorter = arena(*overrides[:-1])
    assert shorter[0] != other
    assert shorter[1][part] != its[part]  # the last key alone is seen as well


def test_prompts_and_gold_decide_the_id_and_are_named() -> None:
    plain, words = arena()
    one_less, fewer = arena(prompts=PROMPTS[:2])
    another, others = arena(prompts=(*PROMPTS[:2], PROMPTS[4]))
    assert len({plain, one_less, another}) == 3
    assert len({words["prompts"], fewer["prompts"], others["prompts"]}) == 3
    assert arena(gold=None)[0] != plain
    assert arena(gold=None)[1]["gold"] != words["gold"]


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "seeds=[5, 6]",
        "methods.rrhf.lr=0.5",
        "methods.new.kind=sft",
        "candidates.n=7",
        "candidates.temperature=0.5",
        "sampling.backend=transformers",
        "evaluation.curve_points=4",
        "evaluation.pool_samples=5",
        "runtime.workers=1",
        "runtime.score_batch=3",
    ],
)
def test_what_belongs_to_a_row_is_no_part_of_the_id(override: str) -> None:
    assert arena(override) == arena()


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*.toml")), ids=lambda path: path.name)
def test_a_run_has_one_arena_whatever_its_rows(path: Path) -> None:
    overrides = ["data.path=" + str(SMOKE.parent)] if path.name == "hh_local.toml" else []
    if overrides:
        pytest.skip("reads a file of one's own")
    plan = make_plan(load_experiment(path, overrides))
    evaluations = [stage for stage in plan.wanted if stage.kind == "evaluate"]
    assert evaluations
    given = [stage for stage in plan.wanted if stage.kind == "evaluate pairs"]
    for world in {stage.world for stage in evaluations}:
        own, its = ([stage for stage in stages if stage.world == world] for stages in (evaluations, given))
        first = judged_by(own[0])
        assert all(judged_by(stage) == first for stage in own)
        assert {stage.inputs["reward model"].key for stage in its} == {first["reward"]}
        assert {stage.inputs["prompts"].key for stage in (*its, *own)} == {its[0].inputs["prompts"].key}


# Two runs


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    return synthetic(tmp_path_factory.mktemp("a"))


def other_than(records: RunRecords, change: Callable[[Evaluated], Evaluated | None], **more: Any) -> RunRecords:
    evaluated = tuple(new for reply in records.evaluated if (new := change(reply)) is not None)
    return replace(records, folder=Path("runs/b"), evaluated=evaluated, **more)


def found(compared: list[Comparison], a: str, b: str, decoding: str, measure: str) -> Comparison:
    (one,) = (c for c in compared if (c.a, c.b, c.decoding, c.measure) == (a, b, decoding, measure))
    return one


def shifted(records: RunRecords, row: str, by: float) -> RunRecords:
    """Every reply of a row with more reward, by an amount that differs from prompt to prompt, ``by`` on average."""
    ids = sorted(prompt.id for prompt in PROMPTS)
    more = {name: by + 0.4 * (i % 2 - 0.5) for i, name in enumerate(ids)}
    return other_than(records, lambda r: replace(r, reward=r.reward + more[r.prompt.id]) if r.method == row else r)


def test_a_run_beside_itself_differs_in_nothing(a: RunRecords) -> None:
    compared = compare_runs(a, a)
    assert {(c.a, c.b) for c in compared} == {(row, row) for row in View(a).rows}
    assert len(compared) == 5 * 2 * 2
    for c in compared:
        assert isinstance(c.estimate, Estimate)
        assert (c.estimate.value, c.estimate.low, c.estimate.high, c.p, c.verdict) == (0, 0, 0, 1, "inside noise")


def test_a_difference_is_a_minus_b_on_the_prompts_and_seeds_of_both(a: RunRecords) -> None:
    b = shifted(a, "rrhf", 0.3)
    compared = compare_runs(a, b)
    c = found(compared, "rrhf", "rrhf", "sample", "reward")
    assert isinstance(c.estimate, Estimate)
    assert c.estimate.value == pytest.approx(-0.3)
    assert -0.4 < c.estimate.low < -0.3 < c.estimate.high < -0.2
    assert (c.estimate.n, c.estimate.seeds, c.verdict) == (60, 3, "lower")
    back = found(compare_runs(b, a), "rrhf", "rrhf", "sample", "reward")
    assert (back.verdict, isinstance(back.estimate, Estimate)) == ("higher", True)
    assert found(compared, "ppo", "ppo", "sample", "reward").verdict == "inside noise"
    assert found(compared, "rrhf", "rrhf", "sample", "gold").verdict == "inside noise"  # only the proxy moved


def test_pairing_is_by_prompt_and_seed_not_by_place(a: RunRecords) -> None:
    b = shifted(a, "rrhf", 0.3)
    turned = replace(b, evaluated=b.evaluated[::-1])
    assert compare_runs(a, turned) == compare_runs(a, b)
    # A reward that belongs to the prompt and the seed cancels; under another pairing it would not.
    places = [(p.id, s) for k, p in enumerate(PROMPTS) for s in (SEEDS if k % 2 else SEEDS[::-1])]
    noise = {place: 50.0 * (k % 6 - 2.5) for k, place in enumerate(places)}  # no seed has more of it than another
    loud = [other_than(x, lambda r: replace(r, reward=r.reward + noise[r.prompt.id, r.seed])) for x in (a, turned)]
    c = found(compare_runs(loud[0], loud[1]), "rrhf", "rrhf", "sample", "reward")
    assert isinstance(c.estimate, Estimate)
    assert c.estimate.value == pytest.approx(-0.3)
    assert c.estimate.high - c.estimate.low < 0.2


def test_what_one_of_the_two_lacks_is_left_out_and_the_sizes_say_so(a: RunRecords) -> None:
    lost = {prompt.id for prompt in PROMPTS[:7]}
    fewer = other_than(a, lambda r: None if r.prompt.id in lost or (r.method == "rrhf" and r.seed == 1) else r)
    c = found(compare_runs(a, fewer), "rrhf", "rrhf", "greedy", "reward")
    assert isinstance(c.estimate, Estimate)
    assert (c.estimate.n, c.estimate.seeds, c.estimate.value) == (53, 2, 0)
    ppo = found(compare_runs(a, fewer), "ppo", "ppo", "greedy", "reward").estimate
    assert isinstance(ppo, Estimate)
    assert (ppo.n, ppo.seeds) == (53, 3)
    apart = other_than(a, lambda r: replace(r, seed=r.seed + 10))
    c = found(compare_runs(a, apart), "rrhf", "rrhf", "greedy", "reward")
    assert c.estimate == Missing("no seed in common")
    assert c.verdict is None
    gone = other_than(a, lambda r: None if r.method == "rrhf" else r)
    c = found(compare_runs(a, gone), "rrhf", "rrhf", "greedy", "reward")
    assert c.estimate == Missing("the run holds no greedy replies of rrhf")
    without_gold = other_than(a, lambda r: replace(r, gold=None))
    assert {c.measure for c in compare_runs(a, without_gold)} == {"reward"}


def test_rows_of_other_names_are_compared_where_they_are_named(a: RunRecords) -> None:
    compared = compare_runs(a, a, ["ppo,rrhf", " rrhf , base ", "ppo,rrhf"])
    assert [(c.a, c.b) for c in compared[:2]] == [("ppo", "rrhf"), ("rrhf", "base")]
    assert len(compared) == 2 * 4
    c = found(compared, "ppo", "rrhf", "sample", "reward")
    inside = View(a).difference("ppo", "rrhf", "sample", "reward")
    assert isinstance(c.estimate, Estimate)
    assert isinstance(inside, Estimate)
    assert c.estimate.value == inside.value
    # Another bootstrap's draws, so not quite the same percentile: 0.003 apart where this was written; 0.01 is a tenth
    # of the interval's half-width.
    assert c.estimate.low == pytest.approx(inside.low, abs=0.01)
    base = found(compared, "rrhf", "base", "greedy", "reward")
    assert isinstance(base.estimate, Estimate)
    assert base.estimate.seeds == 3  # one greedy run of the initial policy stands against every seed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["ppo"], "--rows ppo: expected a row of each run"),
        (["ppo,rrhf,sft"], "--rows ppo,rrhf,sft: expected a row of each run"),
        (
            ["pppo,rrhf"],
            r"--rows pppo,rrhf: found 'pppo'; \S* has the rows base, sft, rrhf, ppo, best_of_n; did you mean 'ppo'\?",
        ),
        (["ppo,"], "--rows ppo,: found ''; runs/b has the rows base"),
    ],
)
def test_a_row_that_is_not_there(a: RunRecords, rows: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_runs(a, other_than(a, lambda r: r), rows)


def test_no_row_of_one_name(a: RunRecords) -> None:
    methods = {f"my_{name}": method for name, method in a.experiment.methods.items()}
    renamed = other_than(a, lambda r: r, experiment=a.experiment.model_copy(update={"methods": methods}))
    with pytest.raises(ConfigError, match=r"\(sft, rrhf, .*\) and runs/b \(my_sft, .*\) have no method of one name"):
        compare_runs(a, renamed)


def test_holms_p_is_over_the_rows_of_one_decoding_and_reward(a: RunRecords) -> None:
    b = shifted(shifted(a, "rrhf", 0.06), "ppo", 0.04)
    compared = compare_runs(a, b)
    for decoding in ("greedy", "sample"):
        family = [c for c in compared if (c.decoding, c.measure) == (decoding, "reward")]
        ps = [c.estimate.p for c in family if isinstance(c.estimate, Estimate)]
        assert len(ps) == len(family)
        np.testing.assert_array_equal([c.p for c in family], holm(np.array(ps, dtype=float)))
        assert any(c.p != c.estimate.p for c in family if isinstance(c.estimate, Estimate))


def test_runs_of_two_arenas_are_refused_in_one_line_that_names_what_differs(a: RunRecords) -> None:
    words = {"prompts": "50 of the test", "reward model": "synthetic", "gold": "none"}
    b = other_than(a, lambda r: r, arena="fedcba9876543210", arena_words=words)
    with pytest.raises(StoreError) as caught:
        compare_runs(a, b)
    assert str(caught.value) == (
        f"{a.folder} and runs/b were judged differently, so nothing compares: "
        "prompts (60 of the test against 50 of the test)"
    )
    c = replace(b, arena_words=a.arena_words)
    with pytest.raises(StoreError, match=r"nothing compares: arena 0123456789abcdef, fedcba9876543210$"):
        compare_runs(a, c)


def test_runs_of_two_reward_models_of_the_same_settings_are_refused(a: RunRecords) -> None:
    def scored(change: Callable[[float], float]) -> RunRecords:
        pairs = (replace(p, chosen=change(p.chosen), rejected=change(p.rejected)) for p in a.reward_pairs)
        return replace(other_than(a, lambda r: r), reward_pairs=tuple(pairs))

    assert a.reward_pairs
    spread = float(np.std([score for pair in a.reward_pairs for score in (pair.chosen, pair.rejected)]))
    with pytest.raises(StoreError, match=r"two reward models of the same settings, .* by 0\.30 standard deviations"):
        compare_runs(a, scored(lambda score: score + 0.3 * spread))
    rounded = scored(lambda score: score + 0.05 * spread)  # another precision of one model
    assert len(compare_runs(a, rounded)) == len(compare_runs(a, a))


# The command


@pytest.fixture
def folders(a: RunRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, and one of another arena, as they would be read from their folders."""
    b = replace(shifted(a, "rrhf", 0.3), folder=Path("B"))
    known = {
        "A": replace(a, folder=Path("A")),
        "B": b,
        "C": replace(b, folder=Path("C"), arena="c" * 16, arena_words={}),
    }
    monkeypatch.setattr(runs, "load_run", lambda folder: known[str(folder)])
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("folders")
def test_the_command_prints_the_table_and_its_notes() -> None:
    result = run("compare", "A", "B", "--rows", "rrhf,rrhf")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    (line,) = (line for line in lines if line.startswith("rrhf - rrhf") and "sampled" in line and "proxy" in line)
    assert "-0.300 [-0.3" in line
    assert line.split()[-2:] == ["60", "3"]
    assert " lower " in line
    assert lines[-1] == "Arena 0123456789abcdef."
    assert "Each row: of A minus of B." in lines


@pytest.mark.usefixtures("folders")
def test_a_table_in_a_file_has_whole_rows_however_narrow_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = run("compare", "A", "B").out
    monkeypatch.setenv("COLUMNS", "60")
    assert run("compare", "A", "B").out == wide


def test_a_narrow_screen_folds_the_cells_of_a_table() -> None:
    printed, cells = io.StringIO(), ("0.123456789 [0.1, 0.2]", "a_row_of_a_long_name")
    Screen(width=30, file=printed).print(table_of("one", "other", rows=[cells]))
    assert sorted(printed.getvalue().replace("\n", "").replace(" ", "")) == sorted(
        "".join(("one", "other", *cells)).replace(" ", "")
    )


@pytest.mark.usefixtures("folders")
def test_the_command_for_machines() -> None:
    value = json.loads(run("compare", "A", "B", "--json").out)
    assert (value["a"], value["b"], value["arena"]) == ("A", "B", "0123456789abcdef")
    assert len(value["comparisons"]) == 20
    (one,) = (c for c in value["comparisons"] if (c["a"], c["decoding"], c["measure"]) == ("rrhf", "greedy", "reward"))
    assert one["difference"] == pytest.approx(-0.3)
    assert one["low"] < one["difference"] < one["high"]
    assert (one["prompts"], one["seeds"], one["verdict"]) == (60, 3, "lower")


@pytest.mark.usefixtures("folders")
def test_the_command_refuses_another_arena() -> None:
    result = run("compare", "A", "C")
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith(
        "error: A and C were judged differently, so nothing compares: prompts (60 of the test against"
    )


def test_the_command_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    result = run("compare", tmp_path / "a", tmp_path / "b")
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'a'}: holds no run")


def test_a_missing_comparison_is_a_dash_with_its_reason(a: RunRecords) -> None:
    gone = other_than(a, lambda r: None if r.method == "rrhf" else r)
    compared = compare_runs(a, gone, ["rrhf,rrhf"])
    page = to_markdown(comparison_table(a, gone, compared))
    assert "the run holds no greedy replies of rrhf" in page
    (first, *_) = comparison_json(a, gone, compared)["comparisons"]
    assert (first["difference"], first["missing"]) == (None, "the run holds no greedy replies of rrhf")
