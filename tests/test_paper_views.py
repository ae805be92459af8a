"""The report beside the paper: runs of several initial policies and many rows, from synthetic records."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.pipeline.results import Cost, RunRecords
from rrhf_bench.records import Candidates, CurvePoint, Evaluated, PairScored, PoolScored, Prompt, Response
from rrhf_bench.replication.counterparts import counterpart, counterparts, with_parts
from rrhf_bench.replication.departures import departures_table
from rrhf_bench.replication.eq7 import learner_sentences, learners
from rrhf_bench.replication.figures import loss_and_reward
from rrhf_bench.replication.paper import TABLE_6, load
from rrhf_bench.replication.published import (
    accuracies,
    best_of_n_learning,
    main_results,
    rank_ablation,
    reviews,
    samples_a_query,
    sampling_quality,
)
from rrhf_bench.replication.sections import SECTIONS
from rrhf_bench.replication.variants import variant_groups, variant_sentences, variants_table
from rrhf_bench.report.claims import RunEvidence
from rrhf_bench.report.comparisons import Comparison, comparison_pairs, comparison_words
from rrhf_bench.report.drawing import FREE_COLOURS, colours, markers
from rrhf_bench.report.figures import best_of_n_curve, reward_curves, training_curves
from rrhf_bench.report.findings import findings, trades
from rrhf_bench.report.forest import test_reward as forest
from rrhf_bench.report.frontier import frontiers, no_frontier
from rrhf_bench.report.rows import rows_table
from rrhf_bench.report.section import Section
from rrhf_bench.report.table import Cell, Missing, Table, to_markdown
from rrhf_bench.report.tables import main_table
from rrhf_bench.report.view import View
from rrhf_bench.seeding import generator
from rrhf_bench.settings.candidates import RECIPES, recipe_of
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import MethodSettings, candidates_of
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.training.rrhf_settings import RRHFSettings
from tests.test_report import tables_of, without_figures

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PROMPTS = tuple(Prompt(f"\n\nHuman: How do I do thing {i}?\n\nAssistant:") for i in range(30))
TRAIN = tuple(Prompt(f"\n\nHuman: training {i}?\n\nAssistant:") for i in range(20))
STARTS = {None: 0.0, "Alpaca": 0.0, "LLaMA": -1.0, "Alpaca-sft": -0.4}  # by part of the initial policy


def many(experiment: Experiment, folder: Path) -> RunRecords:
    """A run of an experiment file. A reward is the initial policy's start + the row's gain + a prompt's share that all
    rows have + noise of its own; the gain rises with the KL that a row spends, and gold falls where it spends a lot."""
    share = dict(zip(PROMPTS, generator("share").normal(0, 0.5, len(PROMPTS)), strict=True))
    seeds, methods = experiment.seeds, experiment.methods
    policies = ["base", *experiment.policies]
    evaluated = [
        reply(row, seed, decoding, prompt, level, share[prompt])
        for row in (*policies, *methods)
        for seed in seeds
        for level in [level_of(experiment, row, seed)]
        for decoding in ("greedy", "sample")
        if not (
            decoding == "greedy"
            and ((row in policies and seed) or (row in methods and methods[row].kind == "best_of_n"))
        )
        for prompt in PROMPTS
    ]
    for row in ("chosen", "rejected"):
        evaluated += [reply(row, 0, "given", p, level_of(experiment, row, 0), share[p]) for p in PROMPTS]
    trained = [row for row, settings in methods.items() if settings.family != "inference"]
    ranked = [row for row in trained if "candidates" in methods[row].requires]
    return RunRecords(
        folder=folder,
        experiment=experiment,
        arena="0123456789abcdef",
        arena_words={"prompts": "30 of the test"},
        evaluated=tuple(evaluated),
        pairs=tuple(p for row in (*policies, *trained) for seed in seeds for p in pairs(row, seed)),
        reward_pairs=tuple(pairs("reward model", 0)),
        curves=tuple(point for row in trained for seed in seeds for point in curve(experiment, row, seed)),
        pools={seed: tuple(pool(seed)) for seed in seeds},
        candidates={(row, seed): candidates(experiment, row, seed, TRAIN) for row in ranked for seed in seeds},
        test_candidates={(row, seed): candidates(experiment, row, seed, PROMPTS) for row in ranked for seed in seeds},
        training={(row, seed): tuple(log(methods[row], row, seed)) for row in trained for seed in seeds},
        data_counts={},
        counts={
            (row, seed): {"rollouts": 2000, "rollouts_without_end": 3}
            for row in trained
            for seed in seeds
            if methods[row].kind == "ppo"
        },
        timings=(),
        curve_seconds={
            (row, seed): tuple((k / 4, 9.0 + 30 * k) for k in range(5)) for row in trained for seed in seeds
        },
        notes=(),
        command="rrhf-bench run experiments/x.toml",
        environment={"python": "3.11"},
    )


def spent(settings: MethodSettings | None, row: str) -> float:
    """The KL of a row, in nats."""
    if settings is None:
        return 0.0
    kl = 2.0 + 1.5 * float(generator("kl", row).random())
    if settings.kind == "ppo":
        return float(kl * 2 / (1 + 8 * getattr(settings, "kl_coefficient", 0.0)))
    c = candidates_of(settings)
    return kl * (2.5 if c is not None and c.refresh and not c.reward_kl else 1.0)


def start_of(experiment: Experiment, row: str) -> float:
    """The reward of the initial policy that a row is, or starts from."""
    settings = experiment.methods.get(row)
    policy = experiment.policies.get(row, experiment.policy) if settings is None else experiment.initial(settings)
    return STARTS[policy.part]


def gains(experiment: Experiment, row: str) -> tuple[float, float]:
    """(proxy, gold)"""
    if row in ("chosen", "rejected"):
        return (0.3, -0.2) if row == "chosen" else (-0.2, -0.7)
    start = start_of(experiment, row)
    if row not in experiment.methods:
        return start, start - 0.5
    kl = spent(experiment.methods[row], row)
    return start + 0.6 * math.sqrt(kl), start - 0.5 + 0.6 * math.sqrt(kl) - 0.02 * kl**2


def level_of(experiment: Experiment, row: str, seed: int) -> tuple[float, float, float | None]:
    """(proxy, gold, KL of a row that has one) of a row trained with a seed."""
    settings = experiment.methods.get(row)
    proxy, gold = gains(experiment, row)
    between = float(generator("seed", row, seed).normal(0, 0.05)) if settings else 0.0
    known = settings is None or settings.family != "inference"
    return proxy + between, gold + between, spent(settings, row) if known else None


def reply(
    row: str, seed: int, decoding: Any, prompt: Prompt, level: tuple[float, float, float | None], share: float
) -> Evaluated:
    rng = generator("reply", row, seed, decoding, prompt.id)
    proxy, gold, kl = level
    up = 0.3 if decoding == "greedy" else 0.0
    tokens = int(rng.integers(8, 40))
    return Evaluated(
        method=row,
        seed=seed,
        decoding=decoding,
        prompt=prompt,
        response=f" Sure. I can help with {' '.join(f'w{k}' for k in rng.integers(0, 40, 6))}.",
        finish="given" if decoding == "given" else "eos",
        tokens=tokens,
        reward=proxy + up + share + float(rng.normal(0, 0.3)),
        gold=gold + up + share + float(rng.normal(0, 0.4)),
        features={"details": int(rng.integers(4)), "polite": int(rng.integers(2))},
        nll=tokens * (0.3 + 0.1 * float(rng.random())),
        nll_tokens=tokens,
        kl=kl + float(rng.normal(0, 0.5)) if decoding == "sample" and kl is not None else None,
    )


def pairs(row: str, seed: int) -> list[PairScored]:
    rng = generator("pairs", row, seed)
    scores = rng.normal(0.1, 0.5, (len(PROMPTS), 2)).tolist()
    scores[3][1] = scores[3][0]  # a tie
    return [PairScored(row, seed, p, *score) for p, score in zip(PROMPTS, scores, strict=True)]


def curve(experiment: Experiment, row: str, seed: int) -> Iterator[CurvePoint]:
    start = start_of(experiment, row)
    proxy, gold = gains(experiment, row)
    for decoding in ("greedy", "sample"):
        rng = generator("curve", row, seed, decoding)
        for k in range(5):
            rewards, golds = (
                tuple((start + (end - start) * (1 - math.exp(-k)) + rng.normal(0, 0.05, 5)).tolist())
                for end in (proxy, gold)
            )
            yield CurvePoint(
                row, seed, decoding, k / 4, 24 * k, 60_000 if k == 0 else 60_000 + 9000 * k, rewards, golds
            )


def candidates(experiment: Experiment, row: str, seed: int, prompts: tuple[Prompt, ...]) -> tuple[Candidates, ...]:
    """Return the candidates of a row, which all rows of the same sampling share."""
    settings = experiment.methods[row]
    c = candidates_of(settings)
    assert c is not None
    how = (settings.initial, c.sources, c.strategy, getattr(c, "temperature", None), c.rounds, c.refresh)
    rng = generator("candidates", repr(how), seed, len(prompts))
    sources = [s for source in c.sources for s in [source] * (c.n if source == "model" else 1)]
    centre = start_of(experiment, row) + 0.2 * c.rounds
    groups = []
    for prompt in prompts:
        scores = rng.normal(centre, 0.7, len(sources)).tolist()
        responses = (Response(f" reply {k}", s, score=x) for k, (s, x) in enumerate(zip(sources, scores, strict=True)))
        groups.append(Candidates(prompt, tuple(responses)))
    return tuple(groups)


def pool(seed: int) -> list[PoolScored]:
    rng = generator("pool", seed)
    rewards = [tuple(rng.normal(0.0, 0.8, 16).tolist()) for _ in PROMPTS[:20]]
    return [PoolScored(p, r, tuple(x / 2 for x in r)) for p, r in zip(PROMPTS, rewards, strict=False)]


def log(settings: MethodSettings, row: str, seed: int) -> Iterator[dict[str, float]]:
    rng = generator("log", row, seed)
    refresh = getattr(candidates_of(settings), "refresh", 0)
    for step in range(96):
        if refresh and step % refresh == 0:  # what a refresh logs is no step's
            yield {"step": step, "refresh": step // refresh + 1, "reward/mean": 0.1}
        yield {"step": step + 1, "loss": float(40 * math.exp(-step / 30) + 20 + rng.normal(0, 3))}


@cache
def view_of(name: str, *overrides: str) -> View:
    experiment = load_experiment(EXPERIMENTS / f"{name}.toml", ("worlds=[]", "seeds=[0, 1]", *overrides))
    return View(many(experiment, Path()))


def page_of(records: RunRecords, folder: Path, sections: Sequence[Section] = ()) -> str:
    return (without_figures(records, folder, sections) / "report.md").read_text(encoding="utf-8")


def rows_of(table: Table | None) -> list[dict[str, Any]]:
    """Return the values of a table's cells by column, or None for a cell without a value."""
    assert table is not None
    names = [column.name for column in table.columns]
    return [dict(zip(names, (cell.value for cell in row), strict=True)) for row in table.rows]


def row_of(table: Table | None, **wanted: object) -> dict[str, Any]:
    (row,) = (
        row for row in rows_of(table) if all(row[key.replace("_", " ")] == value for key, value in wanted.items())
    )
    return row


# --- the names of the sampling policies -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RECIPES, "IP-3", "OP-8", "OP-32+KL"])
def test_a_row_of_a_recipe_is_called_by_it(name: str) -> None:
    assert recipe_of(RRHFSettings(candidates={"recipe": name}).candidates) == name


@pytest.mark.parametrize(
    ("name", "other", "found"),
    [
        ("DP", {"beams": 8, "groups": 8}, None),
        ("DP", {"diversity_penalty": 0.5}, None),
        ("DP", {"sources": ("model",)}, "D"),
        ("BP", {"sources": ("model", "chosen")}, None),
        ("BP", {"sources": ("model", "reply")}, "BP"),  # a data set of single replies
        ("SP", {"temperature": 1.0}, None),
        ("SP", {"n": 8}, None),
        ("SP", {"top_k": 50}, None),
        ("IP-1", {}, "DP"),
        ("IP-2", {"beams": 8}, None),
        ("OP-8", {"strategy": "diverse-beam"}, "OP-8"),
        ("OP-8", {"temperature": 1.0, "top_k": 50}, "OP-8"),
        ("OP-8", {"sources": ("model",)}, None),
        ("OP-8+KL", {"reward_kl": 0.1}, "OP-8+KL"),  # as on IMDB
        ("OP-8+KL", {"reward_kl": 0.5}, None),
        ("OP-8+KL", {"reward_kl": 0.0}, "OP-8"),
    ],
)
def test_a_row_that_samples_in_another_way_is_not(name: str, other: dict[str, Any], found: str | None) -> None:
    assert recipe_of(RRHFSettings(candidates={"recipe": name, **other}).candidates) == found


# --- which row stands beside which published one --------------------------------------------------------------------


def test_every_published_row_of_the_main_table_has_its_counterpart() -> None:
    view = view_of("main_table")
    sft = next(name for name, policy in view.experiment.policies.items() if policy.part == "Alpaca-sft")
    found = {(row["paper: model"], row["setting"]): row["this run"] for row in rows_of(main_results(view))}
    assert found == {
        ("Good responses", "none"): "chosen", ("Bad responses", "none"): "rejected",
        ("LLaMA", "none"): "raw", ("Alpaca", "none"): "base", ("Alpaca-sft", "none"): sft,
        ("LLaMA", "PPO"): "raw_ppo", ("Alpaca", "PPO"): "ppo", ("Alpaca-sft", "PPO"): "sft_ppo",
        ("LLaMA", "RRHF_DP"): "raw_dp", ("Alpaca", "RRHF_DP"): "dp", ("Alpaca-sft", "RRHF_DP"): "sft_dp",
        ("Alpaca", "RRHF_SP"): "sp", ("Alpaca", "Best-of-4"): "best_of_n",
    }  # fmt: skip
    table = main_results(view)
    assert table is not None
    assert any("-1.01, -1.02, -1.05" in note and "0.04 apart" in note for note in table.footnotes)
    row = row_of(table, setting="Best-of-4")
    assert row["reward, greedy"] is None  # there is nothing to choose from
    assert isinstance(row["reward, sampled"], float)


def test_the_plain_row_of_several_is_the_counterpart_and_the_choice_is_noted() -> None:
    view = view_of("ppo_frontier")
    assert len(counterparts(view, "Alpaca", "PPO")) == 9
    assert counterparts(view, "Alpaca", "RRHF_DP") == ["dp_slow", "dp", "dp_fast"]  # a rank weight of 1 is the paper's
    assert counterpart(view, "Alpaca", "PPO") == "ppo"
    assert counterpart(view, "Alpaca", "RRHF_DP") == "dp"  # not dp_slow, which stands before it in the file
    table = main_results(view)
    assert table is not None
    assert any("Alpaca RRHF_DP: dp rather than dp_slow, dp_fast" in note for note in table.footnotes)


def test_a_published_row_without_a_counterpart_has_a_reason() -> None:
    view = view_of("reward_model_accuracy")
    assert counterpart(view, "Alpaca-sft", "PPO") == Missing(
        "no initial policy of this run is in the part of Alpaca-sft"
    )
    assert counterpart(view, "LLaMA", "PPO") == Missing("no row of this run that starts from raw is trained by PPO")
    assert counterpart(view, "Alpaca", "SP") == Missing("no row of this run that starts from base samples as SP")
    (row,) = (r for r in rows_of(main_results(view)) if (r["paper: model"], r["setting"]) == ("LLaMA", "PPO"))
    assert (row["this run"], row["reward, greedy"], row["paper: reward"]) == (None, None, -1.62)


def test_another_objective_or_judge_is_no_counterpart() -> None:
    view = view_of("rank_ablation")
    assert counterparts(view, "Alpaca", "BP") == ["bp"]  # of seven that sample so


# --- Tables 5 to 8 --------------------------------------------------------------------------------------------------


def test_table_6_has_a_line_for_each_published_row_with_ours_in_it() -> None:
    view = view_of("sampling_quality")
    rows = rows_of(sampling_quality(view))
    others = ["dp_official", "p_official", "d_official", "d_permuted", "dp_permuted", "dp_double", "sp_op"]
    published = [r.name for r in load(TABLE_6)]  # all have a counterpart
    assert [row["paper: row"] for row in rows] == [*published, *(None for _ in others)]
    assert [row["this run"] for row in rows[len(published) :]] == others
    by_name = {row["paper: row"]: row for row in rows}
    assert by_name["Alpaca IP-1"]["this run"] == by_name["Alpaca DP"]["this run"] == "dp"
    op = by_name["Alpaca OP-32"]
    assert (op["samples as"], op["paper: reward"], op["paper: std"]) == ("OP-8", 0.34, None)
    ip3 = by_name["Alpaca IP-3"]
    assert (ip3["paper: PPL"], ip3["paper: mean"], ip3["paper: max"]) == (14.51, -1.05, -0.65)

    groups = [c.scores for seed in (0, 1) for c in view.records.candidates["ip3", seed]]
    pooled = [score for scores in groups for score in scores]
    assert ip3["std"] == pytest.approx(np.std(pooled), abs=1e-12)
    assert ip3["mean"] == pytest.approx(np.mean(pooled), abs=1e-12)
    assert ip3["std within prompt"] == pytest.approx(np.mean([np.std(scores) for scores in groups]), abs=1e-12)
    assert ip3["max"] == pytest.approx(np.mean([max(scores) for scores in groups]), abs=1e-12)
    greedy = [r.reward for r in view.records.evaluated if (r.method, r.decoding) == ("ip3", "greedy")]
    assert ip3["reward, greedy"] == pytest.approx(np.mean(greedy), abs=1e-12)


def test_table_6_lists_our_other_rows_after_the_published_ones() -> None:
    rows = rows_of(sampling_quality(view_of("online_sampling")))
    names = [(row["paper: row"], row["this run"]) for row in rows]
    assert names[:4] == [
        ("Alpaca DP", "dp"), ("Alpaca IP-1", "dp"), ("Alpaca OP-32", "op32"), ("Alpaca OP-32+KL", "op32_kl")
    ]  # fmt: skip
    assert names[4:] == [(None, row) for row in ("sp", "op8", "op8_kl", "op8_beams")]


def test_eq7_has_the_papers_way_and_gap_beside_greedy_replies() -> None:
    rows = [row for row in rows_of(best_of_n_learning(view_of("online_sampling"))) if row["method"] == "dp"]
    by_decoding = {row["decoding"]: row for row in rows}
    assert by_decoding["greedy"]["paper: gap"] == pytest.approx(-0.95 + 1.02, abs=1e-12)
    assert by_decoding["greedy"]["paper: way"] == pytest.approx((-1.02 + 1.30) / (-0.95 + 1.30), abs=1e-12)
    assert by_decoding["sampled"]["paper: gap"] is None


def test_a_p_of_eq7_is_never_printed_as_0() -> None:
    table = best_of_n_learning(view_of("sampling_quality"))
    p = [column.name for column in table.columns].index("p")
    small = replace(table, rows=(tuple(Cell(1e-9) if c == p else cell for c, cell in enumerate(table.rows[0])),))
    assert "< 0.0001" in to_markdown(small)


def test_table_5_counts_a_tie_as_half_and_says_how_many() -> None:
    view = view_of("reward_model_accuracy")
    published = {row["scorer"]: row["paper: accuracy, %"] for row in rows_of(accuracies(view))}
    assert published == {"reward model": 68.49, "base": 45.13, "raw": 45.09, "ppo": 46.03, "dp": 61.75}
    row = row_of(accuracies(view), scorer="dp")
    scored = [p for p in view.records.pairs if p.method == "dp"]
    wins, ties = sum(p.chosen > p.rejected for p in scored), sum(p.chosen == p.rejected for p in scored)
    assert (ties, row["ties"], row["pairs"], row["seeds"]) == (2, 2, 30, 2)
    assert row["accuracy, %"] == pytest.approx(100 * (wins + ties / 2) / len(scored), abs=1e-12)


def test_table_7_compares_each_weight_with_the_full_objective() -> None:
    view = view_of("rank_ablation")
    rows = rows_of(rank_ablation(view))
    assert [(row["paper: row"], row["this run"], row["weight of ranking"]) for row in rows] == [
        ("Alpaca BP", "bp", 1.0), ("Alpaca BP - L_rank", "bp_no_rank", 0.0), (None, "bp_rank10", 10.0),
        (None, "bp_rank100", 100.0), (None, "bp_official", 1.0), (None, "bp_official_no_rank", 0.0),
    ]  # fmt: skip
    assert [row["paper: reward"] for row in rows[:2]] == [-1.03, -1.14]
    assert rows[0]["less full, greedy"] is None
    replies = {(r.method, r.seed, r.prompt): r.reward for r in view.records.evaluated if r.decoding == "sample"}
    gaps = [x - replies["bp", seed, p] for (row, seed, p), x in replies.items() if row == "bp_no_rank"]
    assert rows[1]["less full, sampled"] == pytest.approx(np.mean(gaps), abs=1e-12)
    gaps = [
        x - replies["bp_official", seed, p] for (row, seed, p), x in replies.items() if row == "bp_official_no_rank"
    ]
    assert rows[5]["less full, sampled"] == pytest.approx(np.mean(gaps), abs=1e-12)  # within its variant
    assert rank_ablation(view_of("main_table")) is None


def with_costs(view: View, replies: Mapping[str, int]) -> View:
    """Return the run with so many sampled replies of each row in the record of its costs."""
    none = Cost(1.0, 0.0, 0, 0, 0, 9, None)
    costs = {(row, seed): replace(none, sampled_replies=count) for row, count in replies.items() for seed in (0, 1)}
    return View(replace(view.records, costs=costs))


def test_table_8_counts_the_records() -> None:
    spent = {"dp": 1200, "p": 0, "ip3": 3600, "op": 1200, "sft": 0}
    view = with_costs(view_of("sampling_quality"), spent)
    rows = {row["method"]: row for row in rows_of(samples_a_query(view))}
    columns = ("paper: training", "trained on", "of these sampled", "sampled in all", "inference")
    counted = {name: tuple(row[column] for column in columns) for name, row in rows.items()}
    assert counted["dp"] == ("fixed n", 6.0, 4.0, 4.0, 1)
    assert counted["p"] == ("fixed n", 2.0, 0.0, 0.0, 1)
    assert counted["ip3"] == ("fixed n", 6.0, 4.0, 12.0, 1)  # three rounds of four
    assert counted["op"] == ("n", 6.0, 4.0, 4.0, 1)
    assert counted["sft"] == ("fixed 1", 1.0, 0.0, 0.0, 1)
    assert rows["bp"]["sampled in all"] is None  # no cost was recorded
    rows = {row["method"]: row for row in rows_of(samples_a_query(view_of("main_table")))}
    assert (rows["best_of_n"]["trained on"], rows["best_of_n"]["inference"]) == (None, 4)


def test_table_8_counts_the_replies_of_online_rows_and_of_labelled_pairs() -> None:
    view = with_costs(view_of("methods"), {"ppo": 1200, "rloo": 1200, "remax": 1200, "coh": 0, "sft": 0})
    rows = {row["method"]: row for row in rows_of(samples_a_query(view))}
    columns = ("trained on", "of these sampled", "sampled in all")
    counted = {name: tuple(row[column] for column in columns) for name, row in rows.items()}
    replies = view.methods["rloo"].replies  # type: ignore[attr-defined]
    assert replies > 1
    assert counted["ppo"] == (1, 1, 4.0)
    assert counted["rloo"] == (replies, replies, 4.0)
    assert counted["remax"] == (1, 1, 4.0)  # half of them greedy
    assert counted["coh"] == (2, 0, 0.0)
    assert counted["sft"] == (1, 0, 0.0)
    assert counted["dpo_labelled"] == (2, 0, None)


def test_an_experiment_on_reviews_has_table_10_and_no_table_2() -> None:
    view = view_of("imdb_sentiment")
    assert main_results(view) is None
    assert reviews(view_of("main_table")) is None
    table = reviews(view)
    found = {(row["paper: method"], row["setting"]): row["this run"] for row in rows_of(table)}
    assert found == {
        ("SFT", "none"): "base", ("PPO", "w/o KL penalty"): "ppo", ("NLPO", "w/o KL penalty"): None,
        ("RRHF", "BP"): "bp", ("RRHF", "B"): "b", ("RRHF-OP-128", "w/o KL penalty"): "op",
        ("PPO", "0.1 KL penalty"): "ppo_kl", ("NLPO", "0.1 KL penalty"): "nlpo",
        ("RRHF-OP-128", "0.1 KL penalty"): "op_kl", (None, None): "bp_official",
    }  # fmt: skip
    row = row_of(table, this_run="op")
    assert (row["samples as"], row["paper: reward"], row["paper: PPL"]) == ("OP-16", 0.99, 32.081)
    assert table is not None
    assert any("PPL column does not compare its rows" in note for note in table.footnotes)
    columns = {column.name for column in sampling_quality(view).columns}
    assert not any(name.startswith("paper") for name in columns)  # its Table 6 is of HH


# --- what is compared -----------------------------------------------------------------------------------------------


def test_each_row_is_compared_with_the_policy_that_it_started_from() -> None:
    view = view_of("main_table")
    sft = next(name for name, policy in view.experiment.policies.items() if policy.part == "Alpaca-sft")
    pairs, exploratory = comparison_pairs(view)
    assert {("ppo", "base"), ("raw_dp", "raw"), ("sft_sp", sft)} <= set(pairs)
    assert {("ppo", "dp"), ("raw_ppo", "raw_dp"), ("sft_sp", "sft_dp")} <= set(pairs)
    assert not [(a, b) for a, b in pairs if view.initial(a) != view.initial(b)]
    assert {("best_of_n", "base"), ("best_of_n", "dp")} == set(exploratory)  # it is not trained
    found = view.difference("raw_dp", "raw", "greedy", "reward")
    assert isinstance(found, Estimate)
    assert found.seeds == 2  # though raw, which is one model, was decoded greedily once


def test_of_many_rows_the_best_on_the_dev_prompts_are_compared() -> None:
    view = view_of("ppo_frontier")
    pairs, exploratory = comparison_pairs(view)
    assert (len(pairs), exploratory) == (21 + 1, [])
    end = {
        row: np.mean(
            [p.rewards for p in view.records.curves if (p.method, p.decoding, p.fraction) == (row, "greedy", 1)]
        )
        for row in view.methods
    }
    # Another variant is another objective, and no row of the same search.
    rows = {kind: [row for row in view.rows_from("base", kind) if "official" not in row] for kind in ("ppo", "rrhf")}
    best = [max(rows[kind], key=lambda row: end[row]) for kind in ("ppo", "rrhf")]
    assert pairs[0] == tuple(best)
    curves = [
        replace(p, rewards=(99.0,)) if p.method == "dp_fast_rank10" and p.fraction == 1 else p
        for p in view.records.curves
    ]
    other = View(replace(view.records, curves=tuple(curves)))
    assert comparison_pairs(other)[0][0] == (best[0], "dp_fast_rank10")
    assert "hyper-parameters alone" in comparison_words(view)
    assert "first RRHF row" not in comparison_words(view)


def test_many_rows_are_summed_up_in_a_sentence() -> None:
    sentences = findings(view_of("ppo_frontier"))
    (against,) = (s for s in sentences if s.startswith("Against **base** on the proxy reward, greedy"))
    assert re.search("higher: 21 rows, from ", against)
    assert len(list(learner_sentences(view_of("ppo_frontier")))) == 2  # one a decoding


def test_many_rows_have_sentences_about_what_each_gained_and_no_more() -> None:
    found = findings(view_of("sampling_quality"))
    told = [sentence for sentence in found if sentence.startswith("Against")]
    assert [words.split("**")[1] for words in told] == [row for row in ("base", "raw", "chosen_sft") for _ in range(4)]
    assert sum(" on the gold reward, " in sentence for sentence in told) == 6
    assert "with each other stand in the table of differences" in found[found.index(told[-1]) + 1]


def test_many_trades_are_one_sentence_a_decoding() -> None:
    def trade(row: str, decoding: Any) -> Iterator[Comparison]:
        for measure, sign in (("reward", 1), ("gold", -1)):
            estimate = Estimate(0.5 * sign, 0.5 * sign - 0.1, 0.5 * sign + 0.1, 30, 2, 0.001, "bootstrap")
            yield Comparison(row, "base", decoding, measure, estimate, 0.001)

    rows = [f"row{i}" for i in range(9)]
    many = [c for decoding in ("greedy", "sample") for row in rows for c in trade(row, decoding)]
    assert [sentence.split(":")[0] for sentence in trades(many)] == [
        f"**9 rows trade gold for proxy reward** ({way})" for way in ("greedy", "sampled")
    ]
    assert all(sentence.endswith(f": {', '.join(rows)}.") for sentence in trades(many))
    assert [s.split(" trades")[0] for s in trades(many[:4])] == ["**row0", "**row1"]
    assert not list(trades([replace(c, p=None) for c in many]))  # exploratory comparisons have no verdict


def test_scores_of_a_judge_are_not_compared_with_rewards() -> None:
    view = view_of("wombat")
    judged = {
        row for row, settings in view.methods.items() if getattr(candidates_of(settings), "scored_by", None) == "judge"
    }
    assert judged < set(view.candidates)
    assert judged & set(view.rewarded) == set()
    assert not judged & {row["this run"] for row in rows_of(sampling_quality(view))}
    assert not judged & {row for row, _ in learners(view)}


def test_variants_on_the_same_candidates_are_compared() -> None:
    view = view_of("rank_ablation")
    assert variant_groups(view) == [["bp", "bp_intended", "bp_official"], ["bp_no_rank", "bp_official_no_rank"]]
    rows = rows_of(variants_table(view))
    assert [row["variant"] for row in rows] == ["paper", "intended", "official"] * 2 + ["paper", "official"] * 2
    for measure in ("reward", "gold", "tokens"):
        values = {
            (r.method, r.seed, r.prompt): getattr(r, measure) for r in view.records.evaluated if r.decoding == "greedy"
        }
        gaps = [x - values["bp", seed, p] for (row, seed, p), x in values.items() if row == "bp_official"]
        name = {"reward": "proxy reward", "gold": "gold reward", "tokens": "length"}[measure]
        assert rows[2][f"{name}: less paper"] == pytest.approx(np.mean(gaps), abs=1e-12)
        assert rows[0][f"{name}: less paper"] is None
    words = " ".join(variant_sentences(view))
    assert "padded length" in words
    assert "**bp\\_official**" in words or "**bp_official**" in words


def test_rows_that_sampled_their_own_candidates_are_no_variants_of_each_other() -> None:
    rows = {
        name: RRHFSettings(candidates={"recipe": policy}, variant=variant)
        for policy in ("IP-2", "OP-8")
        for variant in ("paper", "official")
        for name in [f"{policy}_{variant}"]
    }
    view = view_of("rank_ablation")
    experiment = view.experiment.model_copy(update={"methods": rows})
    assert variant_groups(View(replace(view.records, experiment=experiment))) == []
    of_policies = [["dp", "dp_official"], ["raw_dp", "raw_dp_official"], ["sft_dp", "sft_dp_official"]]
    assert variant_groups(view_of("main_table")) == of_policies
    assert variants_table(view_of("online_sampling")) is None


# --- rows, departures and figures -----------------------------------------------------------------------------------


def test_the_table_of_rows_tells_them_apart() -> None:
    rows = rows_of(rows_table(view_of("online_sampling")))
    by_name = {row["row"]: row for row in rows}
    assert by_name["op8"]["samples as"] == by_name["op8_beams"]["samples as"] == "OP-8"
    assert by_name["op8"]["candidates"] == "model (sampling, temperature 0.8, top-p 1), chosen, rejected"
    assert by_name["op8_beams"]["candidates"].startswith("model (diverse beam search, 4 beams in 4 groups")
    by_name = {row["row"]: row for row in rows_of(rows_table(view_of("ppo_frontier")))}
    assert by_name["dp_fast_rank10"]["settings beside the defaults"] == "lr 0.003, rank_weight 10"
    view = view_of("ppo_frontier")
    by_name = {row["row"]: row for row in rows_of(with_parts(view, rows_table(view)))}
    assert by_name["base"]["in the part of"] == "Alpaca"


def test_departures_name_the_initial_policies_and_online_sampling() -> None:
    rows = rows_of(departures_table(view_of("sampling_quality")))
    found = {row["option"]: (row["the paper"], row["this run"], row["rows"]) for row in rows}
    assert found["initial policy: raw"] == ("LLaMA 7B", "toy-raw", "raw_dp, raw_bp, raw_p")
    assert found["rrhf: refresh (k of OP-k)"][1:] == ("every 8 steps", "op, op_kl")
    assert found["rrhf: candidates while training (OP-k)"] == (
        "diverse beam search, 4 beams in 4 groups, penalty 1", "sampling, temperature 0.8, top-p 1", "op, op_kl",
    )  # fmt: skip
    assert "rrhf: sources" not in found  # P and D are the paper's
    assert "rrhf: reward_kl (of OP-k)" not in found


def test_a_frontier_joins_the_ppo_rows_of_a_learning_rate_in_order_of_their_penalty() -> None:
    view = view_of("ppo_frontier")
    ((drawn, figure),) = frontiers(view)
    assert drawn.name == "frontier"
    slow = ["ppo_slow_kl0", "ppo_slow_kl003", "ppo_slow", "ppo_slow_kl03"]
    wanted = [
        tuple(
            np.mean([getattr(r, m) for r in view.records.evaluated if (r.method, r.decoding) == (row, "sample")])
            for m in ("kl", "reward")
        )
        for row in slow
    ]
    lines = [np.array(line.get_xydata()) for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert any(len(line) == 4 and np.allclose(line, wanted, rtol=1e-9) for line in lines)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == sorted(["0", "0.03", "0.1", "0.3"] * 2 + ["0.1"])
    hollow = [line for line in figure.axes[0].lines if line.get_fillstyle() == "none" and line.get_markersize() > 3]
    official = ["dp_official_slow", "dp_official", "dp_official_fast"]
    shown = [view.values(row, "sample", "kl").mean_S.mean() for row in official]
    assert sorted(line.get_xdata()[0] for line in hollow) == pytest.approx(sorted(shown), rel=1e-9)
    assert {line.get_marker() for line in hollow} == {"o"}  # as of the rows with the same rank weight, 1
    assert "RRHF, official, lr 0.003" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(list(frontiers(view_of("rank_ablation")))) == 1  # three and more rank weights
    assert list(frontiers(view_of("main_table"))) == []


def test_each_entry_of_a_frontier_with_several_searches_of_a_method_means_one_thing() -> None:
    ((_, figure), *_) = frontiers(view_of("claims"))
    found = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"RRHF, paper, DP, lr 0.001", "RRHF, official, DP, lr 0.001", "RRHF, paper, BP, lr 0.001"} <= set(found)
    assert len(set(found)) == len(found)


def test_a_frontier_of_many_kinds_shows_the_searches_and_names_the_kinds_left_out() -> None:
    ((drawn, figure),) = frontiers(view_of("methods"))
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any(words.startswith("DPO, lr") for words in shown)  # dpo, cdpo and rpo, the only rows of one kind
    left = drawn.caption.partition("Not shown, for want of room: ")[2]
    assert "KTO" in left
    assert "Not shown" not in next(frontiers(view_of("ppo_frontier")))[0].caption


@pytest.mark.parametrize("name", ["methods", "claims"])
def test_no_two_rows_of_a_figure_look_the_same(name: str) -> None:
    view = view_of(name)
    rows = view.rows_from("base")
    assert len({(colours(view)[row], markers(view)[row]) for row in rows}) == len(rows)
    assert len(set(FREE_COLOURS)) == len(FREE_COLOURS)


def test_truncated_draws_have_no_kl_wherever_one_is_shown(tmp_path: Path) -> None:
    """This holds even if the records of an older run hold log-ratios in place of the KL."""
    whole, cut = view_of("ppo_frontier"), view_of("ppo_frontier", "evaluation.top_k=50")
    assert any(reply.kl is not None for reply in cut.records.evaluated)

    def kl_cell(view: View, row: str) -> Cell:
        table = main_table(view)
        column = [column.name for column in table.columns].index("KL")
        (cells,) = (cells for cells in table.rows if (cells[0].value, cells[1].value) == (row, "sampled"))
        return cells[column]

    assert kl_cell(whole, "ppo").value is not None
    found = kl_cell(cut, "ppo")
    assert found.value is None
    assert "top-k 50" in found.reason
    assert isinstance(cut.difference("ppo", "base", "sample", "kl"), Missing)
    assert isinstance(RunEvidence(cut).values("ppo", "sample", "kl"), Missing)
    assert not isinstance(RunEvidence(cut).values("ppo", "sample", "reward"), Missing)
    assert list(frontiers(cut)) == []
    assert no_frontier(whole) is None
    assert no_frontier(view_of("main_table", "evaluation.top_k=50")) is None  # which has no rows for one anyway

    ((drawn, figure),) = best_of_n_curve(cut)
    assert "top-k 50" in drawn.caption
    ((_, with_points),) = best_of_n_curve(whole)
    assert len(figure.axes[0].lines) < len(with_points.axes[0].lines)

    page = page_of(cut.records, tmp_path / "report")
    (section,) = re.findall(r"\n## Reward against distance\n(.*?)\n## ", page, re.S)
    assert "top-k 50" in section
    assert "![" not in section


def test_figures_of_many_rows_grow_or_leave_rows_out() -> None:
    def height(name: str) -> float:
        ((_, figure),) = forest(view_of(name))
        return float(figure.get_figheight())

    assert height("ppo_frontier") > height("online_sampling") > height("reward_model_accuracy")
    ((drawn, _),) = reward_curves(view_of("ppo_frontier"), "base")
    assert "in hyper-parameters alone" in drawn.caption
    ((_, figure),) = training_curves(view_of("sampling_quality"))
    titles = [ax.get_title().split("\n")[0] for ax in figure.axes if ax.get_title()]
    assert titles[:3] == ["sft", "dp", "bp"]
    assert len(titles) == 8
    made = loss_and_reward(view_of("sampling_quality"))
    assert made is not None
    assert [ax.get_title().split("\n")[0] for ax in made[1].axes[:2]] == ["dp", "paper, Figure 3 (DP)"]
    ((_, figure),) = training_curves(view_of("online_sampling"))
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert "op8\nloss" in titles  # though its first log line is a refresh's


def test_the_page_has_the_sections_of_its_run(tmp_path: Path) -> None:
    page = page_of(view_of("rank_ablation").records, tmp_path / "report", SECTIONS)
    sections = ("What the bug changed", "The ranking term", "Sampling quality beside the paper")
    for heading in (*sections, "Reward against distance", "Training candidates"):
        assert f"\n## {heading}\n" in page
    page = page_of(view_of("imdb_sentiment").records, tmp_path / "reviews", SECTIONS)
    assert "\n## What the bug changed\n" in page
    for heading in ("The ranking term", "Reward against distance"):
        assert f"\n## {heading}\n" not in page
    assert "Film reviews" in page
    found = {section.title for section in SECTIONS if section.parts(view_of("online_sampling"))}
    assert found & {*sections, "What the bug changed"} == {"Sampling quality beside the paper"}


def test_a_run_without_rrhf_has_a_whole_report_that_names_no_paper(tmp_path: Path) -> None:
    records = view_of("main_table").records
    methods = {row: settings for row, settings in records.experiment.methods.items() if settings.kind != "rrhf"}
    rows = ("base", *records.experiment.policies, "chosen", "rejected", *methods)
    unnamed = records.experiment.report.model_copy(update={"against": None})
    without = replace(
        records,
        experiment=records.experiment.model_copy(update={"methods": methods, "claims": {}, "report": unnamed}),
        evaluated=tuple(r for r in records.evaluated if r.method in rows),
        curves=tuple(p for p in records.curves if p.method in rows),
        candidates={},
        test_candidates={},
        training={key: log for key, log in records.training.items() if key[0] in rows},
    )
    view = View(without)
    assert [section.title for section in SECTIONS if section.parts(view)] == []
    tables = {table.name for table in tables_of(view, SECTIONS)}
    assert tables == {"rows", "main", "differences", "seeds", "features", "counts", "budgets"}
    assert comparison_pairs(view)[0][:1] == [("ppo", "sft")]  # sft is the first trained row
    page = page_of(without, tmp_path / "report", SECTIONS)
    for heading in ("Result", "Differences", "Reward while training", "Best-of-n", "Replies", "Cost"):
        assert f"\n## {heading}\n" in page
    assert "RRHF" not in page
    assert "in the part of" not in page
