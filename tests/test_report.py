"""The report shows the numbers and verdicts of synthetic records with known effects."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image as plt_image
import numpy as np
import pytest

from baselines.best_of_n_settings import BestOfNSettings
from baselines.ppo_settings import PPOSettings
from baselines.sft_settings import SFTSettings
from rrhf_bench.errors import StoreError
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.pipeline.results import Cost, RunRecords, Timing, Trial
from rrhf_bench.pipeline.run_folder import write_metrics
from rrhf_bench.records import Candidates, CurvePoint, Evaluated, PairScored, PoolScored, Prompt, Response
from rrhf_bench.replication.sections import SECTIONS
from rrhf_bench.report.budgets import budgets_table
from rrhf_bench.report.claims import claim_results
from rrhf_bench.report.comparisons import comparisons
from rrhf_bench.report.drawing import styled
from rrhf_bench.report.findings import standing
from rrhf_bench.report.page import _tables, write_report
from rrhf_bench.report.ranking import ranking_parts
from rrhf_bench.report.rows import rows_table
from rrhf_bench.report.section import Section
from rrhf_bench.report.table import Cell, Column, Table, printed, to_csv, write_table
from rrhf_bench.report.tables import level_words, main_table, method_costs
from rrhf_bench.report.topics import topics_table
from rrhf_bench.report.view import View
from rrhf_bench.seeding import generator
from rrhf_bench.settings.experiment import Experiment, ReportSettings, SamplingSettings
from rrhf_bench.settings.reading import parse_method
from rrhf_bench.training.rrhf_settings import RRHFSettings

SEEDS = (0, 1, 2)
PROMPTS = tuple(Prompt(f"\n\nHuman: How do I do thing {i}?\n\nAssistant:") for i in range(60))
# Mean (proxy, gold) of each row, sampled; greedy adds GREEDY. best_of_n equals rrhf in truth.
EFFECTS = {"base": (0.2, -0.5), "sft": (0.35, -0.3), "rrhf": (1.0, 0.4), "ppo": (1.3, -0.6), "best_of_n": (1.0, 0.4)}
GREEDY = 0.4
KL = {"base": 0.0, "sft": 0.3, "rrhf": 1.8, "ppo": 3.6}


def synthetic(folder: Path, *, gold_of: tuple[str, ...] = tuple(EFFECTS)) -> RunRecords:
    """Return a whole run. A reward adds the effect of the row, a share of the prompt that all rows have, and noise."""
    share = dict(zip(PROMPTS, generator("share").normal(0, 0.5, len(PROMPTS)), strict=True))
    evaluated = [
        _reply(row, seed, decoding, prompt, share[prompt], row in gold_of)
        for row in EFFECTS
        for decoding in ("greedy", "sample")
        for seed in (SEEDS if row != "base" or decoding == "sample" else SEEDS[:1])
        for prompt in PROMPTS
    ]
    evaluated += [_reply(row, 0, "given", p, share[p], True) for row in ("chosen", "rejected") for p in PROMPTS]
    experiment = Experiment(
        name="synthetic",
        seeds=SEEDS,
        report=ReportSettings(against="rrhf"),
        methods={
            "sft": SFTSettings(),
            "rrhf": RRHFSettings(),
            "ppo": PPOSettings(),
            "best_of_n": BestOfNSettings(n=4),
        },
        sampling=SamplingSettings(),
    )
    return RunRecords(
        folder=folder,
        experiment=experiment,
        arena="0123456789abcdef",
        arena_words={"prompts": "60 of the test", "reward model": "synthetic"},
        evaluated=tuple(evaluated),
        pairs=tuple(p for row in EFFECTS if row != "best_of_n" for seed in SEEDS for p in _pairs(row, seed)),
        reward_pairs=tuple(_pairs("reward model", 0)),
        curves=tuple(_curves()),
        pools={seed: tuple(_pool(seed)) for seed in SEEDS},
        candidates={("rrhf", seed): tuple(_candidates("train", seed, 200)) for seed in SEEDS},
        test_candidates={("rrhf", seed): tuple(_candidates("test", seed, len(PROMPTS))) for seed in SEEDS},
        training={(row, seed): tuple(_log(row, seed)) for row in ("sft", "rrhf", "ppo") for seed in SEEDS},
        data_counts={None: {"duplicates": 12, "cut_at_length": 3}},
        counts={},
        timings=tuple(_timings()),
        costs=_costs(),
        curve_seconds={(row, seed): tuple(_clock(row)) for row in ("rrhf", "ppo") for seed in SEEDS},
        notes=("synthetic records",),
        command="rrhf-bench run experiments/synthetic.toml",
        environment={"python": "3.11", "device": "cpu"},
    )


def _reply(row: str, seed: int, decoding: Any, prompt: Prompt, share: float, gold: bool) -> Evaluated:
    rng = generator("reply", row, seed, decoding, prompt.id)
    proxy_effect, gold_effect = EFFECTS.get(row, (0.5 if row == "chosen" else 0.1, 0.0))
    up = GREEDY * (1.5 - proxy_effect) if decoding == "greedy" else 0.0
    tokens = int(rng.integers(8, 40))
    return Evaluated(
        method=row,
        seed=seed,
        decoding=decoding,
        prompt=prompt,
        response=f" Sure. I can help with {row} and words like {' '.join(f'w{k}' for k in rng.integers(0, 40, 6))}.",
        finish="given" if decoding == "given" else ("eos", "eos", "eos", "stop", "length")[int(rng.integers(5))],
        tokens=tokens,
        reward=proxy_effect + up + share + float(rng.normal(0, 0.3)),
        gold=gold_effect + up + share + float(rng.normal(0, 0.5)) if gold else None,
        features={"details": int(rng.integers(4)), "polite": int(rng.integers(2)), "garbled": 0, "refused": 0},
        nll=tokens * (0.3 + 0.1 * float(rng.random())),
        nll_tokens=tokens,
        kl=KL[row] + float(rng.normal(0, 0.5)) if decoding == "sample" and row in KL else None,
    )


def _pairs(row: str, seed: int) -> list[PairScored]:
    rng = generator("pairs", row, seed)
    edge = {"base": 0.05, "rrhf": 0.3, "reward model": 0.6}.get(row, 0.1)
    return [PairScored(row, seed, p, float(rng.normal(edge, 0.5)), float(rng.normal(0, 0.5))) for p in PROMPTS]


def _curves() -> list[CurvePoint]:
    points = []
    for row, steps, before, during in (("rrhf", 94, 60_000, 0), ("ppo", 224, 0, 54_000), ("sft", 94, 0, 0)):
        for seed in SEEDS:
            for decoding in ("greedy", "sample"):
                rng = generator("curve", row, seed, decoding)
                for k in range(9):
                    proxy = EFFECTS["base"][0] + (EFFECTS[row][0] - EFFECTS["base"][0]) * (1 - math.exp(-k / 2.5))
                    proxy += GREEDY * (decoding == "greedy") * (1.2 - proxy) + float(rng.normal(0, 0.05))
                    gold = EFFECTS["base"][1] + (EFFECTS[row][1] - EFFECTS["base"][1]) * k / 8
                    rewards, golds = (tuple(rng.normal(m, 0.1, 20).tolist()) for m in (proxy, gold))
                    step, tokens = round(steps * k / 8), before + round(during * k / 8)
                    points.append(CurvePoint(row, seed, decoding, k / 8, step, tokens, rewards, golds))
    return points


def _clock(row: str) -> list[tuple[float, float]]:
    start, length = (14.0, 38.0) if row == "rrhf" else (0.0, 45.0)
    return [(k / 8, start + length * k / 8) for k in range(9)]


def _pool(seed: int) -> list[PoolScored]:
    rng = generator("pool", seed)
    pool = []
    for prompt in PROMPTS[:40]:
        rewards = rng.normal(EFFECTS["base"][0], 0.8, 32)
        golds = EFFECTS["base"][1] + 0.6 * (rewards - EFFECTS["base"][0]) + rng.normal(0, 0.5, 32)
        pool.append(PoolScored(prompt, tuple(rewards.tolist()), tuple(golds.tolist())))
    return pool


def _candidates(split: str, seed: int, prompts: int) -> list[Candidates]:
    rng = generator("candidates", split, seed)
    sources = ("model",) * 4 + ("chosen", "rejected")
    made = []
    for i in range(prompts):
        prompt = PROMPTS[i] if split == "test" else Prompt(f"\n\nHuman: training {i}?\n\nAssistant:")
        scores = rng.normal(EFFECTS["base"][0], 0.9, 6).tolist()
        scores[1] = scores[0]  # one tie, and one duplicate, a prompt
        texts = [" same", " same", *(f" reply {k}" for k in range(4))]
        responses = (Response(t, s, score=x) for t, s, x in zip(texts, sources, scores, strict=True))
        made.append(Candidates(prompt, tuple(responses)))
    return made


def _log(row: str, seed: int) -> list[Mapping[str, float]]:
    rng = generator("log", row, seed)
    if row == "ppo":
        return [{"iteration": i + 1, "step": 16 * (i + 1), "loss/policy_avg": float(rng.normal(-0.02, 0.01)),
                 "reward/mean": 0.2 + 0.07 * i} for i in range(14)]  # fmt: skip
    return [{"step": s + 1, "loss": float(40 * math.exp(-s / 30) + 20 + rng.normal(0, 3))} for s in range(94)]


def _timings() -> list[Timing]:
    shared = [Timing("policy", None, None, 66.0, 900.0), Timing("reward_model", None, None, 61.0, None)]
    return shared + [
        Timing("train", row, seed, 40.0 + seed, 1000.0) for row in ("sft", "rrhf", "ppo") for seed in SEEDS
    ]


def _costs() -> dict[tuple[str, int], Cost]:
    """Seconds, of these shared, sampled tokens, optimiser steps and peak; the peak of one sft run was not measured."""
    one = {
        "sft": Cost(30.0, 0.0, 0, 0, 0, 94, None),
        "rrhf": Cost(54.0, 14.0, 60_000, 2_000, 3_000, 94, None),
        "ppo": Cost(45.0, 0.0, 54_000, 1_800, 1_800, 224, None),
    }
    costs = {
        (row, seed): replace(cost, seconds=cost.seconds + seed, train_peak_mib=1000.0 + seed)
        for row, cost in one.items()
        for seed in SEEDS
    }
    return {**costs, ("sft", 1): replace(costs["sft", 1], train_peak_mib=None)}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    return synthetic(tmp_path_factory.mktemp("run"), gold_of=("base", "rrhf", "ppo", "best_of_n"))


@pytest.fixture(scope="module")
def report(records: RunRecords) -> Path:
    return write_report(records, records.folder / "report", SECTIONS).parent


def without_figures(records: RunRecords, folder: Path, sections: Sequence[Section] = ()) -> Path:
    """Write a report without the files of its figures, which take most of the time, and return its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rrhf_bench.report.figures._save", lambda *_: None)
        return write_report(records, folder, sections).parent


def tables_of(view: View, sections: Sequence[Section] = ()) -> list[Table]:
    """Return all tables of a report that hold no wall-clock."""
    with styled():
        parts = [*ranking_parts(view), *(part for section in sections for part in section.parts(view))]
    return _tables(view, claim_results(view), sections, parts)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def row_of(path: Path, **wanted: str) -> dict[str, str]:
    (row,) = (row for row in rows_of(path) if all(row[key] == value for key, value in wanted.items()))
    return row


def test_the_csv_holds_the_records_numbers_to_the_last_digit_that_a_sum_keeps(
    records: RunRecords, report: Path
) -> None:
    row = row_of(report / "tables/main.csv", method="ppo", decoding="sampled")
    replies = [r for r in records.evaluated if (r.method, r.decoding) == ("ppo", "sample")]
    assert len(replies) == len(SEEDS) * len(PROMPTS)
    assert float(row["proxy reward"]) == pytest.approx(sum(r.reward for r in replies) / len(replies), abs=1e-12)
    nll, tokens = sum(r.nll or 0 for r in replies), sum(r.nll_tokens or 0 for r in replies)
    assert float(row["PPL"]) == pytest.approx(math.exp(nll / tokens), rel=1e-12)
    assert float(row["KL"]) == pytest.approx(sum(r.kl or 0 for r in replies) / len(replies), abs=1e-12)
    assert float(row["fake turn"]) == sum(r.finish == "stop" for r in replies) / len(replies)
    assert (row["models"], row["prompts"], row["seeds"]) == ("3", "60", "3")
    assert row["proxy reward low"] < row["proxy reward"] < row["proxy reward high"]


def test_the_numbers_of_candidates_and_eq7_follow_from_the_records(records: RunRecords, report: Path) -> None:
    scores = [c.scores for seed in SEEDS for c in records.candidates["rrhf", seed]]
    row = row_of(report / "tables/table6.csv", **{"this run": "rrhf"})
    maximum = sum(map(max, scores)) / len(scores)
    assert float(row["max"]) == pytest.approx(maximum, abs=1e-12)
    assert float(row["std"]) == pytest.approx(np.std(scores), abs=1e-12)
    row = row_of(report / "tables/candidates.csv", method="rrhf")
    assert (row["k"], row["duplicates"], row["ties"]) == ("6.0", "600", "600")

    eq7 = row_of(report / "tables/eq7.csv", method="rrhf", decoding="sampled")
    rewards = {(r.seed, r.prompt): r.reward for r in records.evaluated if (r.method, r.decoding) == ("rrhf", "sample")}
    gaps = [max(c.scores) - rewards[seed, c.prompt] for seed in SEEDS for c in records.test_candidates["rrhf", seed]]
    assert float(eq7["gap, paired"]) == pytest.approx(sum(gaps) / len(gaps), abs=1e-12)
    assert float(eq7["gap, unpaired"]) == pytest.approx(maximum - sum(rewards.values()) / len(rewards), abs=1e-12)
    base = [r.reward for r in records.evaluated if (r.method, r.decoding) == ("base", "sample")]
    mean = float(eq7["candidates: mean"])
    own = (sum(base) / len(base) - mean) / (maximum - mean)
    assert float(eq7["untrained policy's own share of the way"]) == pytest.approx(own, abs=1e-12)


def test_a_planted_difference_gets_its_verdict(report: Path) -> None:
    table = report / "tables/differences.csv"
    words = {
        (c, measure): row_of(table, comparison=c, decoding="sampled", reward=measure)["verdict"]
        for c in ("ppo - rrhf", "best_of_n - rrhf", "rrhf - base")
        for measure in ("proxy", "gold")
    }
    assert words["ppo - rrhf", "proxy"] == "higher"
    assert words["ppo - rrhf", "gold"] == "lower"
    assert words["best_of_n - rrhf", "proxy"] == words["best_of_n - rrhf", "gold"] == "exploratory"  # not trained
    assert words["rrhf - base", "proxy"] == "higher"
    row = row_of(table, comparison="best_of_n - rrhf", decoding="sampled", reward="proxy")
    assert float(row["detectable"]) > 0
    assert row["p (Holm)"] == ""
    row = row_of(table, comparison="ppo - rrhf", decoding="sampled", reward="proxy")
    assert float(row["p (Holm)"]) >= float(row["p"])
    page = (report / "report.md").read_text(encoding="utf-8")
    assert "**ppo trades gold for proxy reward** (sampled)" in page


def named_primary(records: RunRecords, *pairs: tuple[str, str]) -> View:
    report = ReportSettings(against="rrhf", primary=pairs)
    return View(replace(records, experiment=records.experiment.model_copy(update={"report": report})))


def test_the_experiment_file_names_the_primary_comparisons(records: RunRecords) -> None:
    """A family of one: its p is not adjusted. Everything else is exploratory, and no verdict word is left for it."""
    found = comparisons(named_primary(records, ("ppo", "rrhf")))
    verdicts = {(c.a, c.b): c.verdict for c in found if (c.decoding, c.measure) == ("sample", "reward")}
    assert verdicts.pop(("ppo", "rrhf")) == "higher"
    assert set(verdicts.values()) == {None}
    assert ("rrhf", "base") in verdicts
    for c in found:
        if (c.a, c.b) == ("ppo", "rrhf") and isinstance(c.estimate, Estimate):
            assert c.p == c.estimate.p
    turned = comparisons(named_primary(records, ("rrhf", "ppo")))  # named the other way round: not shown twice
    assert len(turned) == len(found)
    assert {c.verdict for c in turned if (c.a, c.decoding, c.measure) == ("rrhf", "sample", "reward")} == {
        "lower",
        None,
    }


def test_one_training_seed_gets_no_verdict(records: RunRecords) -> None:
    """Its p takes the trained model as given."""
    one = replace(
        records,
        experiment=records.experiment.model_copy(update={"seeds": (0,)}),
        evaluated=tuple(r for r in records.evaluated if r.seed == 0),
    )
    found = [c for c in comparisons(View(one)) if isinstance(c.estimate, Estimate)]
    assert found
    assert {c.verdict for c in found} == {None}
    assert {c.standing for c in found if c.a != "best_of_n"} == {"one seed"}
    assert "one seed, so training again is not covered" in level_words(View(one))


def test_prompts_that_share_a_cluster_count_as_one_unit(records: RunRecords) -> None:
    prompts = sorted({r.prompt.id for r in records.evaluated})
    topics = {prompt: f"topic {i // 10}" for i, prompt in enumerate(prompts)}
    view = View(replace(records, clusters=topics))
    for c in (c for c in comparisons(view) if isinstance(c.estimate, Estimate)):
        assert (c.estimate.n, c.estimate.clusters) == (60, 6)
    mean = view.mean("rrhf", "greedy", "reward")
    assert isinstance(mean, Estimate)
    assert mean.clusters == 6
    assert "60 evaluation prompts in 6 clusters and 3 training seeds" in level_words(view)


def test_the_digit_that_decides_is_printed() -> None:
    columns = (Column("difference", 3, interval=True, decides=0.0), Column("p", 4, decides=0.05))
    rows = (
        (Cell(-0.2, -0.41, -0.0004), Cell(0.049998)),
        (Cell(0.2, 0.0, 0.4), Cell(0.05)),  # exactly these
        (Cell(0.2, 0.1, 0.4), Cell(2e-7)),
    )
    table = Table("t", "T", columns, rows, (), "0" * 12)
    assert printed(table, str) == [
        ["-0.2000 [-0.4100, -0.0004]", "0.049998"],
        ["0.200 [0.000, 0.400]", "0.0500"],
        ["0.200 [0.100, 0.400]", "< 0.0001"],
    ]


def test_base_with_one_greedy_run_pairs_with_every_seed(report: Path) -> None:
    row = row_of(report / "tables/differences.csv", comparison="rrhf - base", decoding="greedy", reward="proxy")
    assert row["seeds"] == "3"


def test_a_missing_number_is_a_dash_with_its_reason_and_never_zero(report: Path) -> None:
    row = row_of(report / "tables/main.csv", method="sft", decoding="greedy")
    assert row["gold reward"] == ""
    assert "gold reward: no gold reward was measured here" in row["missing"]
    text = (report / "tables/main.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("| sft | greedy |"))
    assert line.split("|")[4].strip() == "— (b)"
    assert "- — (b): no gold reward was measured here." in text


def test_costs_are_means_over_seeds_and_the_largest_peak(report: Path) -> None:
    """Seconds of rrhf: mean of 54, 55, 56. Peaks: 1000, 1001, 1002 MiB."""
    row = row_of(report / "cost.csv", method="rrhf")
    assert (row["seconds"], row["seconds seeds"], row["of these shared"]) == ("55.0", "3", "14.0")
    assert (row["sampled tokens"], row["optimiser steps"]) == ("60000.0", "94.0")
    assert (row["train peak MiB"], row["models"]) == ("1002.0", "1")
    page = (report / "cost.md").read_text(encoding="utf-8")
    assert "counted from the method's settings, not measured" in page


def test_a_peak_that_was_not_measured_is_a_dash_with_its_reason(records: RunRecords, report: Path) -> None:
    """One of three sft runs lacks its peak, and the largest of the others would be no peak of all."""
    for row in (
        row_of(report / "cost.csv", method="sft"),
        row_of(report / "cost_stages.csv", stage="reward_model"),
    ):
        assert "the peak of some stage was not measured" in row["missing"]
        assert row.get("train peak MiB", row.get("peak MiB")) == ""
    write_metrics(records)
    lines = (records.folder / "timing.csv").read_text(encoding="utf-8").splitlines()
    assert '"policy",,,66.000,900.0' in lines
    assert '"reward_model",,,61.000,' in lines


def test_the_cost_of_best_of_n_is_at_inference_and_that_of_a_failed_row_unknown(records: RunRecords) -> None:
    costs = {row: cost for row, cost in records.costs.items() if row[0] != "ppo"}
    failures = {("ppo", seed): "train ppo: the loss is not finite" for seed in SEEDS}
    table = method_costs(View(replace(records, costs=costs, failures=failures)))
    reasons = {row[0].value: {cell.reason for cell in row[1:6]} for row in table.rows}
    (failed,), (inference,) = reasons["ppo"], reasons["best_of_n"]
    assert "the loss is not finite" in failed
    assert inference.startswith("it trains nothing: its cost is at inference")


def test_tables_are_the_same_bytes_in_a_second_write_and_in_any_order_of_records(
    records: RunRecords, report: Path, tmp_path: Path
) -> None:
    order = generator("order").permutation(len(records.evaluated))
    shuffled = replace(
        records,
        evaluated=tuple(records.evaluated[i] for i in order),
        pairs=records.pairs[::-1],
        candidates={row: groups[::-1] for row, groups in records.candidates.items()},
        curves=records.curves[::-1],
    )
    np.random.seed(12345)  # a caller's global state must not matter
    again = tmp_path / "again"
    again.mkdir()
    for table in tables_of(View(shuffled), SECTIONS):
        write_table(table, again)
    for path in again.iterdir():
        assert path.read_bytes() == (report / "tables" / path.name).read_bytes(), path.name


def test_a_second_report_replaces_the_first_with_the_same_bytes(records: RunRecords, report: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(p.relative_to(report)): p.read_bytes() for p in sorted(report.rglob("*")) if p.is_file()}

    before = content()
    write_report(records, report, SECTIONS)
    assert content() == before
    assert [p.name for p in report.parent.iterdir() if p.name.startswith(".")] == []


def test_every_figure_exists_and_is_not_blank(report: Path) -> None:
    page = (report / "report.md").read_text(encoding="utf-8")
    for name in ("test_reward", "reward_curves", "sampling_quality", "best_of_n_curve", "training", "figure3"):
        image = plt_image.imread(report / f"figures/{name}.png")
        assert image.shape[1] > 800
        assert len(np.unique(image[::4, ::4, :3].reshape(-1, 3), axis=0)) > 20, f"{name} is blank"
        svg = (report / f"figures/{name}.svg").read_text(encoding="utf-8")
        assert "<dc:date>" not in svg
        assert f"](figures/{name}.png)" in page


HOSTILE = (
    "\x1b[31mred\x1b[0m | ``` <script>alert(1)</script> $x$ \\input{/etc/passwd} %_&#{}~^ "
    "\u202eevil\r\n# heading\n[a](b)"
)


def test_hostile_text_is_inert_everywhere(records: RunRecords, tmp_path: Path) -> None:
    replies = [replace(r, response=HOSTILE) for r in records.evaluated if r.method in ("base", "rrhf")]
    methods = {
        HOSTILE: records.experiment.methods["sft"],
        "rrhf": records.experiment.methods["rrhf"],
        "_x": SFTSettings(),
    }
    hostile = replace(
        records,
        experiment=records.experiment.model_copy(update={"methods": methods}),
        evaluated=(*replies, *(replace(r, method=HOSTILE) for r in replies if r.method == "rrhf")),
        notes=(HOSTILE,),
        environment={"device": HOSTILE},
        data_counts={},
        counts={(HOSTILE, 0): {HOSTILE: 1}},
        curves=(),  # of other rows
    )
    folder = write_report(hostile, tmp_path / "report").parent
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".csv", ".tex", ".svg"):
            text = path.read_bytes().decode()
            assert not [c for c in ("\x1b", "\u202e", "\r") if c in text], path.name
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "\\x1b" in page
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", page)
    assert "`" not in re.sub(r"\\`|`[0-9a-f]{16}`", "", outside)  # nothing opens a code block but the page itself
    assert "<script" not in outside
    assert "\n# heading" not in outside
    widths = {
        line.count("|") - line.count("\\|")
        for line in (folder / "tables/counts.md").read_text().splitlines()
        if line.startswith("|")
    }
    assert widths == {4}
    for path in (folder / "tables").glob("*.tex"):
        text = path.read_text(encoding="utf-8")
        assert "\\input" not in text
        assert not re.search(r"(?<!\\)[$#]", text), path.name
    assert all(row["count"] == "1" for row in rows_of(folder / "tables/counts.csv"))


def test_no_cell_of_a_csv_is_a_formula() -> None:
    table = Table("t", "t", (Column("=1+1"),), ((Cell("@sum"),), (Cell("plain"),)), (), "id")
    assert to_csv(table).splitlines() == ["'=1+1,missing,arena", "'@sum,,id", "plain,,id"]


def test_a_failed_method_and_an_empty_run_still_give_a_report(records: RunRecords, tmp_path: Path) -> None:
    failed = replace(records, evaluated=tuple(r for r in records.evaluated if r.method != "ppo"), pools={}, curves=())
    table = main_table(View(failed))
    cells = next(row for row in table.rows if row[0].value == "ppo")
    assert cells[2].value is None
    assert "no such records" in cells[2].reason
    empty = replace(failed, evaluated=(), pairs=(), reward_pairs=(), candidates={}, test_candidates={}, training={})
    text = write_report(empty, tmp_path / "empty").read_text(encoding="utf-8")
    assert "Nothing could be compared" in text


def test_the_page_says_nothing_of_a_decoding_or_of_methods_that_the_run_lacks(
    records: RunRecords, report: Path, tmp_path: Path
) -> None:
    page = (report / "report.md").read_text(encoding="utf-8")
    assert "sampling comes second" in page
    assert "does each\nmethod give (sft, rrhf, ppo, best_of_n)" in page
    evaluation = records.experiment.evaluation.model_copy(update={"decoding": ("sample",)})
    none = {"evaluation": evaluation, "methods": {}, "report": ReportSettings()}
    sampled = replace(
        records,
        experiment=records.experiment.model_copy(update=none),
        evaluated=tuple(r for r in records.evaluated if r.method == "base" and r.decoding == "sample"),
        pairs=(), curves=(), candidates={}, test_candidates={}, training={}, costs={}, curve_seconds={},
    )  # fmt: skip
    page = (without_figures(sampled, tmp_path / "sampled") / "report.md").read_text(encoding="utf-8")
    assert "sampling comes second" not in page
    assert "**Question.**" not in page


def test_prompts_that_a_seed_lacks_are_left_out_and_counted(records: RunRecords) -> None:
    lost = PROMPTS[7]
    some = tuple(r for r in records.evaluated if not (r.method == "rrhf" and r.seed == 1 and r.prompt == lost))
    table = main_table(View(replace(records, evaluated=some)))
    row = next(row for row in table.rows if row[0].value == "rrhf" and row[1].value == "sampled")
    assert row[[column.name for column in table.columns].index("prompts")].value == 59
    assert any("rrhf (sampled): 1" in note for note in table.footnotes)
    one = View(replace(records, evaluated=tuple(r for r in records.evaluated if r.seed == 0)))
    found = one.mean("rrhf", "sample", "reward")
    assert isinstance(found, Estimate)
    assert found.seeds == 1


def test_small_models_are_labelled(records: RunRecords) -> None:
    assert "embedded world" in standing(records.experiment)
    data = records.experiment.data.model_copy(update={"source": "files"})
    scratch = records.experiment.policy.model_copy(update={"source": "scratch"})
    files = records.experiment.model_copy(update={"data": data, "policy": scratch})
    assert "small models trained from scratch" in standing(files)


def test_departures_name_each_option_that_differs(report: Path) -> None:
    options = {row["option"]: row["rows"] for row in rows_of(report / "tables/departures.csv")}
    assert {"initial policy: base", "sampling.cut_at_stop", "rrhf: lr", "ppo: kl"} <= set(options)
    assert options["rrhf: lr"] == "rrhf"
    (candidates,) = (row for row in rows_of(report / "tables/departures.csv") if row["option"] == "rrhf: candidates")
    assert candidates["the paper"] == "diverse beam search, 4 beams in 4 groups, penalty 1"
    assert candidates["this run"] == "sampling, temperature 1, top-p 1"
    assert "rrhf: variant" not in options


def test_a_folder_that_is_no_report_is_left_alone(records: RunRecords, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="no report"):
        write_report(records, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_failure_leaves_the_earlier_report_whole(
    records: RunRecords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.md").write_text("earlier")
    monkeypatch.setattr("rrhf_bench.report.page.write_figures", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(records, folder)
    assert (folder / "report.md").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_report_needs_no_torch() -> None:
    code = "import sys, rrhf_bench.replication.sections, rrhf_bench.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


# Held-out topics, and the ceiling of the world


def test_gains_on_seen_and_on_held_out_topics_are_separate(tmp_path: Path) -> None:
    """A quarter of the prompts is on held-out topics, where rrhf loses 0.5 of its gain of 0.8 sampled proxy reward."""
    records = synthetic(tmp_path)
    held_out = frozenset(prompt.id for prompt in PROMPTS[3::4])
    assert topics_table(View(records)) is None

    def carried_over(reply: Evaluated) -> Evaluated:
        lost = reply.method == "rrhf" and reply.prompt.id in held_out
        return replace(reply, reward=reply.reward - 0.5) if lost else reply

    view = View(replace(records, held_out=held_out, evaluated=tuple(map(carried_over, records.evaluated))))
    table = topics_table(view)
    assert table is not None
    lines = {tuple(cell.value for cell in row[:3]): row[3:] for row in table.rows}
    seen, unseen, gain, carried, *sizes = lines["rrhf", "sampled", "proxy"]
    assert [cell.value for cell in sizes] == [45, 15]
    for cell, truth in ((gain, 0.8), (carried, 0.3)):
        assert cell.low < truth < cell.high
    assert carried.high < 0.8  # the loss is seen
    values = view.values("rrhf", "sample", "reward")
    of_group = [i for i, prompt in enumerate(values.prompts) if prompt in held_out]
    assert unseen.value == pytest.approx(values.values_SP[:, of_group].mean())
    assert (45 * seen.value + 15 * unseen.value) / 60 == pytest.approx(values.values_SP.mean())
    assert [cell.value for cell in lines["base", "sampled", "proxy"][2:4]] == [None, None]
    assert lines["chosen", "none", "gold"][0].value is not None


def test_the_best_reply_is_a_row_of_the_main_table_and_nothing_is_compared_with_it(tmp_path: Path) -> None:
    records = synthetic(tmp_path)
    assert View(records).given == ("chosen", "rejected")
    best = [replace(r, method="best", gold=1.7) for r in records.evaluated if r.method == "chosen"]
    view = View(replace(records, evaluated=(*records.evaluated, *best)))
    assert view.given == ("chosen", "rejected", "best")
    (row,) = (row for row in main_table(view).rows if row[0].value == "best")
    assert (row[3].value, row[3].low, row[3].high) == pytest.approx((1.7, 1.7, 1.7))
    assert comparisons(view) == comparisons(View(records))
    tables = {table.name: to_csv(table) for table in tables_of(view, SECTIONS)}
    before = {table.name: to_csv(table) for table in tables_of(View(records), SECTIONS)}
    assert {name for name in tables if tables[name] != before[name]} <= {"main", "seeds", "features"}


def test_the_rows_table_marks_a_row_whose_rewards_are_permuted(records: RunRecords) -> None:
    control = parse_method("rrhf", ["candidates.permute_rewards=true"])
    experiment = records.experiment.model_copy(update={"methods": {**records.experiment.methods, "control": control}})
    table = rows_table(View(replace(records, experiment=experiment)))
    marked = {row["row"] for row in csv.DictReader(io.StringIO(to_csv(table))) if "permuted" in row["candidates"]}
    assert marked == {"control"}


def test_budgets_are_counted_from_settings_costs_and_trials(records: RunRecords) -> None:
    """sft reads one reply of each of 500 prompts, dpo and rrhf two; ppo none. rrhf was tuned in two trials."""
    methods = {**records.experiment.methods, "dpo": parse_method("dpo", []), "ip": parse_method("rrhf", IP3)}
    tuned = {"rrhf": (Trial({"lr": 1e-3}, 0.5, True), Trial({"lr": 1e-2}, None, False))}
    costs = {**records.costs, ("ip", 0): Cost(1.0, 0.0, 9, 6_000, 7_000, 282, None)}
    trials = {"rrhf": Cost(90.0, 0.0, 60_000, 2_000, 3_000, 188, None)}
    experiment = records.experiment.model_copy(update={"methods": methods})
    table = budgets_table(View(replace(records, experiment=experiment, costs=costs, tuned=tuned, trials=trials)))
    assert {row[0].value: tuple(cell.value for cell in row[1:]) for row in table.rows} == {
        "sft": (0.0, 0.0, 500, 94.0, 1, 0, 0, 0, 0),
        "rrhf": (2000.0, 3000.0, 1000, 94.0, 1, 2, 2000, 3000, 188),
        "ppo": (1800.0, 1800.0, 0, 224.0, 1, 0, 0, 0, 0),
        "best_of_n": (0, 0, 0, 0, 0, 0, 0, 0, 0),
        "dpo": (None, None, 1000, None, 1, 0, 0, 0, 0),
        "ip": (6000.0, 7000.0, 1000, 282.0, 3, 0, 0, 0, 0),
    }


IP3 = ["candidates.recipe=IP-3"]


def test_flops_stand_in_the_table_of_costs_if_all_seeds_have_them(records: RunRecords) -> None:
    costs = {k: replace(c, flops=(1 + k[1]) * 1e12) if k[0] == "ppo" else c for k, c in records.costs.items()}
    table = method_costs(View(replace(records, costs=costs)))
    at = [column.name for column in table.columns].index("training TFLOPs")
    assert {row[0].value: row[at].value for row in table.rows} == {
        "sft": None, "rrhf": None, "ppo": 2.0, "best_of_n": None,
    }  # fmt: skip
