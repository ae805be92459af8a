"""The report names collapsed and failed rows, and counts dropped, cut and tied texts under every table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baselines.grpo_settings import GRPOSettings
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.records import Candidates, Prompt, Response
from rrhf_bench.report.compare_runs import compare_runs
from rrhf_bench.report.findings import findings
from rrhf_bench.report.health import collapses, count_losses, health_sentences
from rrhf_bench.report.tables import main_table, seeds_table
from rrhf_bench.report.view import View
from tests.test_report import SEEDS, synthetic, tables_of, without_figures

Log = list[dict[str, float]]

# The ends of a real run's log (PPO with a KL penalty on the embedded dialogues, rounded), 16 iterations.
START = {
    "iteration": 1, "objective/kl": 0.0, "policy/entropy_estimate": 0.49, "completions/mean_length": 27.7,
    "completions/clipped_ratio": 0.03, "val/ratio": 1.0, "policy/clipfrac_avg": 0.06, "val/explained_variance": 0.0,
    "policy/approxkl_avg": 3.5, "reward/mean": 0.95,
}  # fmt: skip
END = {
    "iteration": 16, "objective/kl": 4.7, "policy/entropy_estimate": 0.36, "completions/mean_length": 31.9,
    "completions/clipped_ratio": 0.01, "val/ratio": 1.0, "policy/clipfrac_avg": 0.09, "val/explained_variance": 0.3,
    "policy/approxkl_avg": 0.05, "reward/mean": 3.1,
}  # fmt: skip


def history(**end: float) -> Log:
    """A sound run of 16 iterations that goes evenly from START to END, or to what ``end`` says instead."""
    ends = {**END, **{key.replace("__", "/"): value for key, value in end.items()}}
    return [{key: START[key] + (ends[key] - START[key]) * i / 15 for key in START} for i in range(16)]


def with_value(name: str, value: float, iteration: int) -> Log:
    log = history()
    log[iteration - 1][name] = value
    return log


def test_a_sound_run_is_no_collapse() -> None:
    assert collapses(history()) == []
    assert collapses([]) == []
    assert collapses(history()[:1]) == []
    assert collapses([{"iteration": 1.0}, {"iteration": 2.0}]) == []  # nothing was recorded that could be looked at


# By hand: 4 nats a token x 31.9 tokens = 127.6 nats; a quarter of 27.7 tokens = 6.925.
@pytest.mark.parametrize(
    ("sound", "collapsed", "words"),
    [
        (history(objective__kl=127.5), history(objective__kl=127.7), "the KL ends at 127.7 nats a reply, 4.0 a token"),
        (history(policy__entropy_estimate=0.051), history(policy__entropy_estimate=0.049), "falls from 0.49 to 0.049"),
        (history(completions__mean_length=6.93), history(completions__mean_length=6.92), "shrink from 27.7 to 6.9"),
        (history(completions__clipped_ratio=0.9), history(completions__clipped_ratio=0.95), "cuts 95% of the replies"),
        (history(val__explained_variance=-1.0), history(val__explained_variance=-1.01), "explain -1.0 of the returns'"),
        (
            with_value("val/ratio", 1.0099, 7),
            with_value("val/ratio", 1.011, 7),
            "is 1.011 in iteration 7 and must be 1",
        ),
        (with_value("val/ratio", 0.9901, 7), with_value("val/ratio", 0.98, 7), "is 0.980 in iteration 7 and must be 1"),
        (with_value("policy/clipfrac_avg", 0.5, 3), with_value("policy/clipfrac_avg", 0.52, 3), "52% of the tokens"),
        (history(), with_value("objective/kl", math.nan, 9), "objective/kl is nan in iteration 9"),
        (history(), with_value("val/ratio", math.inf, 2), "val/ratio is inf in iteration 2"),
    ],
)
def test_each_collapse_is_named_and_its_bound_is_sharp(sound: Log, collapsed: Log, words: str) -> None:
    assert collapses(sound) == []
    (found,) = collapses(collapsed)
    assert words in found


def test_a_ratio_of_sequences_is_clipped_by_design() -> None:
    log = with_value("policy/clipfrac_avg", 0.9, 3)
    of_tokens = GRPOSettings().most_clipped
    of_sequences = GRPOSettings(ratio="sequence", clip_low=3e-4, clip_high=4e-4).most_clipped
    assert (len(collapses(log, of_tokens)), collapses(log, of_sequences)) == (1, [])


def test_a_policy_that_never_varied_or_never_ended_has_not_collapsed() -> None:
    sure = [{**line, "policy/entropy_estimate": 0.04} for line in history()]
    endless = [{**line, "completions/clipped_ratio": 0.95} for line in history()]
    assert collapses(sure) == collapses(endless) == []


def test_a_loss_that_is_recovered_is_no_collapse() -> None:
    for name, value in (("completions/mean_length", 1.0), ("policy/entropy_estimate", 0.0), ("objective/kl", 900.0)):
        assert collapses(with_value(name, value, 8)) == []


def test_several_collapses_of_one_run_are_all_named() -> None:
    log = history(completions__mean_length=1.5, policy__entropy_estimate=0.001, val__explained_variance=-3.0)
    found = collapses(log)
    assert len(found) == 3  # the KL ends at 4.7 / 1.5 = 3.1 nats a token, which is no collapse
    assert not [sentence for sentence in found if sentence.endswith(".")]


# Rows that failed: the report's side


REASON = "train ppo, seed 1: ppo, iteration 3, step 37: the loss is nan | <b>; lower lr"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    return synthetic(tmp_path_factory.mktemp("run"))


def failed(records: RunRecords, *seeds: int) -> RunRecords:
    """The records of a run whose PPO failed with these seeds."""
    lost = {("ppo", seed): REASON for seed in seeds}

    def left(items: Any) -> Any:
        return tuple(item for item in items if (item.method, item.seed) not in lost)

    return replace(
        records,
        failures=lost,
        evaluated=left(records.evaluated),
        pairs=left(records.pairs),
        curves=left(records.curves),
        training={key: log for key, log in records.training.items() if key not in lost},
    )


def test_a_row_that_failed_is_shown_as_failed_with_its_step_and_reason(records: RunRecords, tmp_path: Path) -> None:
    lost = failed(records, *SEEDS)
    view = View(lost)
    (row, _) = (row for row in main_table(view).rows if row[0].value == "ppo")
    assert row[2].value is None
    assert row[2].reason.startswith(f"ppo failed: seed 0 ({REASON}); seed 1 (")
    sentence = findings(view)[0]
    assert sentence.startswith("**ppo failed**: seed 0 (train ppo, seed 1: ppo, iteration 3, step 37: the loss is nan")
    assert "\\| &lt;b&gt;" in sentence  # shown, not obeyed
    for table in tables_of(view):
        assert any(note.startswith(f"ppo failed: seed 0 ({REASON})") for note in table.footnotes), table.name
    folder = without_figures(lost, tmp_path / "report")
    assert "- **ppo failed**: seed 0 (train ppo" in (folder / "report.md").read_text(encoding="utf-8")
    for path in (folder / "tables").glob("*"):
        if path.suffix in (".md", ".tex"):
            assert "step 37" in path.read_text(encoding="utf-8"), path.name
    for name in ("main", "differences", "seeds"):
        assert "step 37" in (folder / f"tables/{name}.csv").read_text(encoding="utf-8")


def test_a_row_keeps_the_seeds_that_did_not_fail(records: RunRecords) -> None:
    view = View(failed(records, 1))
    row = next(row for row in main_table(view).rows if (row[0].value, row[1].value) == ("ppo", "sampled"))
    assert isinstance(row[2].value, float)
    assert row[-1].value == 2  # seeds
    (lost,) = (r for r in seeds_table(view).rows if tuple(c.value for c in r[:3]) == ("ppo", "sampled", 1))
    assert lost[3].reason == f"failed: {REASON}"
    assert all(f"ppo failed: seed 1 ({REASON})." in table.footnotes for table in tables_of(view))


def test_a_failed_row_does_not_change_the_other_rows(records: RunRecords) -> None:
    without = {name: settings for name, settings in records.experiment.methods.items() if name != "ppo"}
    never = replace(
        failed(records, *SEEDS), failures={}, experiment=records.experiment.model_copy(update={"methods": without})
    )
    rows, lost = (main_table(View(r)).rows for r in (never, failed(records, *SEEDS)))
    assert list(rows) == [row for row in lost if row[0].value != "ppo"]


def test_a_failed_row_has_no_difference_to_another_runs(records: RunRecords) -> None:
    compared = compare_runs(records, failed(records, *SEEDS), ["rrhf,ppo"])
    assert {str(getattr(c.estimate, "reason", ""))[:40] for c in compared} == {f"ppo failed: seed 0 ({REASON}"[:40]}


def test_a_run_without_failures_names_none(records: RunRecords) -> None:
    view = View(records)
    assert list(health_sentences(view)) == []
    assert not [note for table in tables_of(view) for note in table.footnotes if "failed" in note]


def test_a_collapse_is_among_the_findings(records: RunRecords) -> None:
    logs: dict[Any, Any] = {**records.training, ("ppo", 1): tuple(history(completions__mean_length=2.0))}
    sentences = findings(View(replace(records, training=logs)))
    assert sentences[0].startswith("**ppo did not train soundly** (seed 1: the replies shrink from 27.7 to 2.0")


# Counts


def test_dropped_cut_and_tied_texts_are_counted(records: RunRecords) -> None:
    prompt = Prompt("\n\nHuman: Hi\n\nAssistant:")
    # Four candidates, of which one repeats another: 6 pairs, of which (a, a), (a, b), (a, b) tie.
    scores = ((" a", 1.0), (" a", 1.0), (" b", 1.0), (" c", 0.0))
    group = Candidates(prompt, tuple(Response(text, "model", score=score) for text, score in scores))
    finish = ("eos", "eos", "stop", "length", "length")
    greedy = [r for r in records.evaluated if r.decoding == "greedy" and r.method == "rrhf" and r.seed == 0][:5]
    evaluated = tuple(
        replace(reply, finish=how, response="" if i == 0 else " x")
        for i, (reply, how) in enumerate(zip(greedy, finish, strict=True))
    )
    data = {None: {"rows": 500, "test_long_prompt": 3, "label_pos": 9}}
    counts = {("x", 0): {"examples": 9, "test_long_prompt": 1}}
    held = replace(records, candidates={("rrhf", 0): (group,)}, evaluated=evaluated, data_counts=data, counts=counts)
    view = View(held)
    assert count_losses(view) == (
        "Counted over all rows and seeds: 1 of 4 training candidates repeat another to their prompt and 3 of 6 of "
        "their pairs tie; of 5 replies 2 were cut at the length cap, 1 at a fake turn, 1 say nothing; on the way: test "
        "long prompt 4 (table of counts)."
    )
    empty = View(replace(records, candidates={}, evaluated=(), data_counts={}, counts={}))
    assert count_losses(empty) == "Counted over all rows and seeds: on the way: nothing left out (table of counts)."


def test_every_table_of_the_page_has_the_count(records: RunRecords, tmp_path: Path) -> None:
    folder = without_figures(records, tmp_path / "report")
    note = count_losses(View(records))
    for path in (folder / "tables").glob("*.md"):
        assert path.read_text(encoding="utf-8").count("Counted over all rows and seeds") == 1, path.name
    assert "on the way: duplicates 12, cut at length 3" in note
