"""Reward models trained by a user: margins, ties, all pairs of a prompt in a batch, ensembles, the filter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Cli
from safetensors.torch import load_file

from rrhf_bench.data.preferences import load_pairs
from rrhf_bench.errors import ConfigError, DataError
from rrhf_bench.pipeline import stages
from rrhf_bench.pipeline.results import JudgedReward
from rrhf_bench.pipeline.services import ModelRef, load_reward
from rrhf_bench.pipeline.stage_graph import make_plan
from rrhf_bench.records import Candidates, PoolScored, Preference, Prompt, Response
from rrhf_bench.report import preference_models as report
from rrhf_bench.rewards import ensemble
from rrhf_bench.rewards.perplexity_filter import filter_pairs, typical_pairs
from rrhf_bench.rewards.train_head import count_steps, train_head
from rrhf_bench.seeding import generator
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.settings.reward import EnsembleSettings, PerplexityFilterSettings, RewardTrainingSettings

SMOKE = Path(__file__).parents[1] / "experiments" / "smoke.toml"
Folder = Callable[[int], Path]


def pairs(n: int, *, of_prompt: int = 1, **options: Any) -> list[Preference]:
    return [
        Preference(
            Prompt(f"\n\nHuman: Question {i // of_prompt}?\n\nAssistant:"),
            f" The flour {i % of_prompt}. I hope this helps!",
            f" The water {i % of_prompt}. I am sad!",
            **options,
        )
        for i in range(n)
    ]


def write_pairs(path: Path, *rows: dict[str, Any]) -> Path:
    whole = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    path.write_text("".join(json.dumps({**whole, **row}) + "\n" for row in rows))
    return path


# Training


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in load_file(folder / "model.safetensors").items()}


def test_prompts_with_one_pair_make_the_same_batches_as_pairs(llama_folder: Folder, tmp_path: Path) -> None:
    by_pairs = RewardTrainingSettings(batch_pairs=4)
    by_prompts = RewardTrainingSettings(batch_prompts=4)
    data = pairs(16)
    for name, settings in (("pairs", by_pairs), ("prompts", by_prompts)):
        assert train_head(llama_folder(0), data, settings, tmp_path / name, seed=0).steps == 4
    one, other = weights(tmp_path / "pairs"), weights(tmp_path / "prompts")
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=2e-4)
    assert count_steps(pairs(16, of_prompt=4), by_prompts) == 1  # all pairs of a prompt are in one batch
    assert count_steps(pairs(16, of_prompt=4), by_pairs) == 4


def test_training_reads_only_the_first_pairs_of_its_settings(llama_folder: Folder, tmp_path: Path) -> None:
    few = RewardTrainingSettings(batch_pairs=4, pairs=8)
    whole = train_head(llama_folder(0), pairs(16), few, tmp_path / "few", seed=0)
    assert (whole.steps, whole.counts["pairs"], count_steps(pairs(16), few)) == (2, 8, 2)
    train_head(llama_folder(0), pairs(8), RewardTrainingSettings(batch_pairs=4), tmp_path / "first", seed=0)
    one, other = weights(tmp_path / "few"), weights(tmp_path / "first")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_margins_push_apart_ties_pull_together_and_centring_holds_the_mean(
    llama_folder: Folder, tmp_path: Path
) -> None:
    def gap(name: str, data: list[Preference], **options: Any) -> tuple[float, dict[str, int]]:
        settings = RewardTrainingSettings(batch_pairs=8, epochs=10, lr=1e-2, **options)
        lines: list[dict[str, float]] = []
        counts = train_head(
            llama_folder(0), data, settings, tmp_path / name, seed=0, log=lambda line: lines.append(dict(line))
        ).counts
        return lines[-1]["rewards/margins"], dict(counts)

    plain, counts = gap("plain", pairs(16))
    assert counts == {"pairs": 16, "truncated": 0}
    wide, counts = gap("margin", pairs(16, margin=3.0))
    assert counts == {"pairs": 16, "truncated": 0, "margins": 16}
    assert wide > plain + 0.5
    assert gap("ignored", pairs(16, margin=3.0), margin_scale=0.0) == (plain, {"pairs": 16, "truncated": 0})
    tied = [*pairs(8), *pairs(8, tie=True)]
    half, counts = gap("half", tied)
    assert counts == {"pairs": 16, "truncated": 0, "ties": 8}
    assert half < plain - 0.5
    assert gap("rao-kupper", tied, ties="rao-kupper")[0] < plain - 0.5
    dropped, counts = gap("drop", tied, ties="drop")
    assert counts == {"pairs": 8, "truncated": 0, "ties_dropped": 8}
    assert dropped > half
    with pytest.raises(DataError, match="found no pairs"):
        gap("nothing", pairs(4, tie=True), ties="drop")


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("centring", {"objective": "classification", "centring": 0.1}),
        ("batch_prompts", {"objective": "classification", "batch_prompts": 2}),
        ("tie_threshold", {"tie_threshold": 1.0}),
        ("batch_pairs", {"batch_pairs": 4, "batch_prompts": 2}),
        ("filter.quantile", {"filter": {}}),
        ("ensemble.members", {"ensemble": {"members": 1}}),
    ],
)
def test_a_key_that_does_nothing_is_refused(key: str, settings: dict[str, Any]) -> None:
    from rrhf_bench.settings.reading import parse_reward_training

    words = [f"{name}={json.dumps(value)}" for name, value in settings.items() if not isinstance(value, dict)]
    words += [
        f"{name}.{k}={v}" for name, value in settings.items() if isinstance(value, dict) for k, v in value.items()
    ]
    if not words:
        words = ["filter={}"]
    with pytest.raises(ConfigError, match=f"^method.{key}: "):
        parse_reward_training(words)


# Data


def test_ties_are_always_read_and_margins_on_request(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "p.jsonl", {"margin": 1}, {"tie": True}, {"tie": False, "margin": None})
    read = load_pairs(file, margins_and_ties=True)
    assert [(p.margin, p.tie) for p in read.preferences] == [(1.0, None), (None, True), (None, None)]
    assert read.counts["ties"] == 1
    assert [(p.margin, p.tie) for p in load_pairs(file).preferences] == [(None, None), (None, True), (None, None)]


def test_an_experiment_refuses_ties_that_it_would_read_as_decided(tmp_path: Path) -> None:
    rows = ({"prompt": f"Why {i}?", "tie": i == 0} for i in range(4))
    data = load_experiment(SMOKE, []).data.model_dump(mode="json")
    s = {**data, "source": "files", "path": write_pairs(tmp_path / "p.jsonl", *rows), "dev": 1, "test": 1}
    with pytest.raises(DataError, match=r"^data.margins_and_ties: found false, but 1 of 4 pairs have tie = true; set"):
        stages._read(s)
    *_, parts = stages._read({**s, "margins_and_ties": True})
    assert sum(pair.tie is True for part in parts for pair in part) == 1


def test_policies_do_not_train_on_ties(llama_folder: Folder, tmp_path: Path, cli: Cli) -> None:
    rows = ({"prompt": f"Why {i}?", "tie": i == 0} for i in range(4))
    words = ("--model", llama_folder(0), "--data", write_pairs(tmp_path / "p.jsonl", *rows), "--device", "cpu")
    found = cli("train", "--method", "dpo", *words, "--out", tmp_path / "dpo", "--set", "epochs=1", "--json").json
    assert (found["counts"]["ties"], found["counts"]["examples"]) == (1, 3)


@pytest.mark.parametrize(
    "row",
    [*({"margin": value} for value in (float("nan"), float("inf"), -1, "1")), {"tie": 1}, {"tie": True, "margin": 2}],
)
def test_a_faulty_margin_is_one_line(row: dict[str, Any], llama_folder: Folder, tmp_path: Path, cli: Cli) -> None:
    file = write_pairs(tmp_path / "p.jsonl", {}, row)
    words = ("--model", llama_folder(0), "--data", file, "--out", tmp_path / "rm", "--device", "cpu")
    found = cli("train", "--method", "reward-model", *words)
    assert found.code == 2
    assert found.err.count("\n") == 1
    assert f"{file}:2: {min(row)}: found" in found.err
    assert not (tmp_path / "rm").exists()


def test_faults_of_the_command_are_named(llama_folder: Folder, tmp_path: Path, cli: Cli) -> None:
    data = write_pairs(tmp_path / "p.jsonl", {}, {"prompt": "Who?"})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n')
    words = ("train", "--method", "reward-model", "--model", llama_folder(0))
    words = (*words, "--out", tmp_path / "rm", "--device", "cpu")
    for where, extra in (
        ("chosen", ("--data", prompts)),
        ("--dtype", ("--data", data, "--dtype", "bfloat16")),
        ("--reward-model", ("--data", data, "--reward-model", llama_folder(0))),
        ("method.lrs", ("--data", data, "--set", "lrs=1")),
        ("filter: found no pair", ("--data", data, "--set", "filter.quantile=0.001")),
    ):
        found = cli(*words, *extra)
        assert found.code == 2
        assert where in found.err
        assert not (tmp_path / "rm").exists()


# The filter


def test_the_filter_equals_a_hand_worked_one() -> None:
    # Mean negative log-likelihoods; the median of the eight is 2.25, and log 2 = 0.693.
    nll_P2 = np.array([[1.0, 1.2], [1.0, 2.0], [2.5, 2.6], [3.0, 4.0]])
    keep = {name: typical_pairs(nll_P2, PerplexityFilterSettings(**s)).tolist() for name, s in {
        "quantile": {"quantile": 0.5}, "ratio": {"ratio": 2.0}, "both": {"quantile": 0.5, "ratio": 2.0},
    }.items()}  # fmt: skip
    assert keep == {
        "quantile": [True, True, False, False],
        "ratio": [True, False, True, False],
        "both": [True, False, False, False],
    }
    # A broken copy that looks at one side, at the mean or at the wrong sign of the gap keeps others.
    assert (nll_P2[:, 0] <= 2.25).tolist() == keep["quantile"]  # so this side alone decides nothing here:
    assert typical_pairs(nll_P2[:, ::-1], PerplexityFilterSettings(ratio=2.0)).tolist() == keep["ratio"]
    lopsided = np.array([[1.0, 9.0], [9.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    assert typical_pairs(lopsided, PerplexityFilterSettings(quantile=0.7)).tolist() == [False, False, True, True]
    assert typical_pairs(lopsided, PerplexityFilterSettings(ratio=1e3)).tolist() == [False, False, True, True]


def test_a_random_subset_has_the_size_of_the_filtered_one() -> None:
    rng = np.random.default_rng(0)
    nll_P2, data = rng.gamma(2.0, size=(200, 2)), pairs(200)
    kept, about = filter_pairs(data, nll_P2, PerplexityFilterSettings(quantile=0.6), generator(0))
    drawn = [
        filter_pairs(data, nll_P2, PerplexityFilterSettings(quantile=0.6, keep="random"), generator(seed))
        for seed in (0, 0, 1)
    ]
    assert len(kept) == about["after"]["pairs"] == drawn[0][1]["after"]["pairs"] < 120
    assert about["before"] == drawn[0][1]["before"]
    assert about["after"]["chosen_perplexity"] < about["before"]["chosen_perplexity"]
    assert drawn[0][0] == drawn[1][0] != drawn[2][0]
    assert drawn[0][0] == [pair for pair in data if pair in drawn[0][0]]  # in their order
    with pytest.raises(DataError, match="found no pair of 200"):
        filter_pairs(data, nll_P2, PerplexityFilterSettings(quantile=1e-6), generator(0))


# Ensembles


def test_combined_scores_equal_hand_worked_ones() -> None:
    # Two members on three texts: means 2, 0, 1; minima 1, -1, 1; population variances 1, 1, 0.
    score_MN = np.array([[1.0, 1.0, 1.0], [3.0, -1.0, 1.0]])
    found = {
        how: ensemble.combine(score_MN, EnsembleSettings(combine=how, weight=0.5)).tolist()
        for how in ("mean", "minimum", "uncertainty")
    }
    assert found == {"mean": [2, 0, 1], "minimum": [1, -1, 1], "uncertainty": [1.5, -0.5, 1]}
    assert (score_MN.mean(axis=0) - 0.5 * score_MN.var(axis=0, ddof=1)).tolist() != found["uncertainty"]


def test_an_ensemble_scores_as_its_members_do(llama_folder: Folder, tmp_path: Path, cli: Cli) -> None:
    data, out = tmp_path / "p.jsonl", tmp_path / "rm"
    write_pairs(data, *({"prompt": f"{p.prompt.text}", "chosen": p.chosen, "rejected": p.rejected} for p in pairs(24)))
    words = ("--model", llama_folder(0), "--data", data, "--out", out, "--device", "cpu", "--json")
    settings = ("--set", "ensemble.members=2", "--set", "ensemble.combine=minimum", "--set", "batch_pairs=8")
    counts = cli("train", "--method", "reward-model", *words, *settings, "--set", "filter.quantile=0.9").json["counts"]
    assert counts["pairs"] + counts["filtered_out"] == 24
    assert json.loads((out / "filter.json").read_text())["after"]["pairs"] == counts["pairs"] < 24

    candidates, scored = tmp_path / "c.jsonl", tmp_path / "s.jsonl"
    candidates.write_text(json.dumps({"query": "Why?", "responses": [" I hope this helps!", " I am sad!"]}) + "\n")
    assert cli("score", "--reward-model", out, "--candidates", candidates, "--out", scored, "--device", "cpu").code == 0
    found = json.loads(scored.read_text())["scores"]
    prompt = Prompt("\n\nHuman: Why?\n\nAssistant:")
    about = json.loads((out / "ensemble.json").read_text())
    by_hand = []
    for i in range(2):
        member = load_reward(ModelRef(str(out / f"member_{i}")), "cpu", 8)
        score = member.score([prompt, prompt], [" I hope this helps!", " I am sad!"])
        by_hand.append((score - about["mean"][i]) / about["std"][i])
    np.testing.assert_allclose(found, np.min(by_hand, axis=0), rtol=1e-4)
    assert not np.allclose(by_hand[0], by_hand[1])

    # The scores are standardised on the pairs that the members have read.
    scales = []
    for name, rows, keys in (("few", 8, ()), ("first", 24, ("--set", "pairs=8"))):
        few = tmp_path / f"{name}.jsonl"
        few.write_text("".join(data.read_text().splitlines(keepends=True)[:rows]))
        words = ("--model", llama_folder(0), "--data", few, "--out", tmp_path / name, "--device", "cpu")
        assert cli("train", "--method", "reward-model", *words, *settings, *keys).code == 0
        scales.append(json.loads((tmp_path / name / "ensemble.json").read_text())["mean"])
    assert scales[0] == scales[1]

    (out / "ensemble.json").write_text(json.dumps({**about, "std": [1.0]}))
    with pytest.raises(DataError, match=r"ensemble\.json: is not the file of an ensemble"):
        load_reward(ModelRef(str(out)), "cpu", 8)


# Stages


def test_further_reward_models_share_the_stages_of_the_rows() -> None:
    toy = 'reward_models.{}={{source="toy", training={}}}'.format
    overrides = (
        "seeds=[0, 1]",
        toy("plain", "{}"),
        toy("three", '{ensemble={members=3, combine="minimum"}}'),
        toy("filtered", "{filter={quantile=0.5}}"),
        toy("random", '{filter={quantile=0.5, keep="random"}}'),
    )
    plan = make_plan(load_experiment(SMOKE, overrides))
    found = plan.reward_models
    before = {stage.name: stage.key for stage in make_plan(load_experiment(SMOKE, overrides[:1])).stages}
    after = {stage.name: stage.key for stage in plan.stages}
    assert found["plain", 0]["model"].key == before["reward model"]
    assert {name: after.get(name, before[name]) for name in before} == before  # the stages of the rows are as they were
    assert found["three", 0]["model"].inputs["member 0"].key == before["reward model"]
    members = [
        stage.key for seed in (0, 1) for role, stage in found["three", seed]["model"].inputs.items() if role != "data"
    ]
    assert len(set(members)) == 6
    pairs_of = {key: own["model"].inputs["data"].key for key, own in found.items()}
    assert pairs_of["filtered", 0] == pairs_of["filtered", 1]
    assert pairs_of["random", 0] != pairs_of["random", 1]
    filters = [stage for stage in plan.stages if stage.kind == "filter"]
    assert len(filters) == 3
    assert len({stage.inputs["perplexities"].key for stage in filters}) == 1
    assert found["filtered", 0]["pool"].inputs["candidates"].key == found["plain", 0]["pool"].inputs["candidates"].key


def test_default_training_has_no_further_keys() -> None:
    assert set(RewardTrainingSettings().model_dump(mode="json")) == {
        "objective", "lr", "epochs", "batch_pairs", "warmup", "weight_decay", "max_length",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ('reward_models.a={source="toy", layout="value-head"}', "reward_models.a.layout"),
        ('reward_models."a b"={source="toy"}', "reward_models"),
        ("data.margins_and_ties=true", "data.margins_and_ties"),
        ('reward_models.a={source="b/c", layout="value-head", pad_token="x"}', "reward_models.a.pad_token"),
    ],
)
def test_contradictions_name_their_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_experiment(SMOKE, [override])


# Held-out pairs


def judged(gaps: list[list[float]], words: list[int], **about: Any) -> report.JudgedPairs:
    clusters = [f"topic {i % 4}" for i in range(len(words))]
    return report.JudgedPairs("rm", np.array(gaps), np.array(words), clusters, **about)


def test_accuracy_and_calibration_equal_hand_worked_ones() -> None:
    # sigma(1) = 0.7310586 and sigma(3) = 0.9525741 are in the bins from 0.7 and from 0.9, equal rewards in the first.
    model = judged([[1.0, 1.0, -1.0, 3.0, -3.0, 3.0, 3.0, 0.0]], list(range(8)))
    assert model.right_SP.tolist() == [[1, 1, 0, 1, 0, 1, 1, 0.5]]
    bins = report.calibration(model)
    assert [n for *_, n in bins] == [1, 3, 4]
    np.testing.assert_allclose(bins, [(0.5, 0.5, 1), (0.7310586, 2 / 3, 3), (0.9525741, 0.75, 4)], rtol=1e-6)
    # (3 x 0.0643919 + 4 x 0.2025741) / 8 = 0.1254340. The signed sum, or the share of labels, would be another.
    assert report.calibration_error(model) == pytest.approx(0.1254340, abs=1e-6)
    assert model.mean(model.right_SP, "accuracy").value == pytest.approx(5.5 / 8)
    table = report.models_table([model], "x")
    assert [column.name for column in table.columns] == ["reward model", "accuracy", "log loss", "calibration error"]
    # log(1 + e^-d): 0.3132617 twice, 1.3132617, 0.0485874 three times, 3.0485874, 0.6931472; the mean of the eight:
    assert table.rows[0][2].value == pytest.approx(5.8272826 / 8, abs=1e-6)


def test_bins_of_length_hold_each_pair_once_and_show_a_bias() -> None:
    words = [-9, -9, -9, -8, -3, -1, 0, 0, 0, 0, 0, 2, 3, 5, 5, 6, 7, 8, 9, 20]
    bins = report.length_bins(np.array(words))
    assert sum(of_P.astype(int) for _, _, of_P in bins).tolist() == [1] * len(words)
    assert [(low, high) for low, high, _ in bins] == sorted((low, high) for low, high, _ in bins)
    longer = judged([[1.0 if w > 0 else -1.0 for w in words]], words)  # a model that has learnt length
    table = report.lengths_table([longer], "x")
    assert table is not None
    accuracy = [row[3].value for row in table.rows]
    assert accuracy[0] == 0.0
    assert accuracy[-1] == 1.0
    assert report.length_bins(np.zeros(5, dtype=int))[0][2].all()  # one bin


def test_models_are_compared_with_the_first() -> None:
    rng = np.random.default_rng(0)
    pool = {0: [PoolScored(Prompt(f"{i}"), (0.0, 1.0, 2.0, 3.0), (0.0, 1.0, 2.0, float(i))) for i in range(4)]}
    about = {"before": {"pairs": 9}, "after": {"pairs": 4}}
    keys = ("chosen_perplexity", "rejected_perplexity", "chosen_words", "rejected_words", "chosen_likelier")
    for side in about.values():
        side |= dict.fromkeys(keys, 1)
    shared: dict[str, Any] = {"pool": pool, "pool_clusters": list("abcd"), "trained_on": 9}
    one = judged(rng.normal(0.2, 1, (2, 40)).tolist(), list(range(40)), **shared)
    other = replace(
        judged(rng.normal(2.0, 1, (2, 40)).tolist(), list(range(40)), filtered=about, **shared), name="better"
    )
    table = report.models_table([one, other], "x")
    cells = dict(zip([column.name for column in table.columns], table.rows[1], strict=True))
    difference = other.right_SP.mean() - one.right_SP.mean()
    assert cells["less rm"].value == pytest.approx(difference)
    assert cells["less rm"].low is not None
    assert cells["less rm"].low < difference
    assert cells["gold of best of 1"].value == pytest.approx(np.mean([(0 + 1 + 2 + i) / 4 for i in range(4)]))
    assert table.rows[0][3].reason
    after = report.filter_table([one, other], "x")
    assert after is not None
    assert [row[1].value for row in after.rows] == [9, 4]
    assert report.filter_table([one], "x") is None


def view_of_judged(counts: Sequence[int], pairs: int, pool: int, worlds: bool) -> Any:
    """Return what the section reads of a run with two reward models, trained on ``counts`` pairs by repetition."""
    rng = np.random.default_rng(0)

    def groups(number: int) -> tuple[Candidates, ...]:
        return tuple(
            Candidates(
                Prompt(f"{number} {i}"),
                tuple(Response("a b", s, score=float(rng.normal())) for s in ("chosen", "rejected")),
            )
            for i in range(pairs)
        )

    samples = tuple(PoolScored(Prompt(f"{i}"), (1.0, 2.0, 3.0, 0.5), (0.0, 1.0, 2.0, 3.0)) for i in range(pool))
    side = dict.fromkeys(("chosen_perplexity", "rejected_perplexity", "chosen_words", "rejected_words"), 1)
    about = {when: {"pairs": 9, "chosen_likelier": 1, **side} for when in ("before", "after")}
    judged = [
        JudgedReward(name, number, groups(number), samples, trained_on=count, filtered=about)
        for name in ("random", "filtered")
        for number, count in enumerate(counts)
    ]
    of = {number: number for number in range(len(counts))} if worlds else {}
    return SimpleNamespace(
        records=SimpleNamespace(reward_models=judged, worlds=of, arena="x"), clusters=lambda ids: list(ids)
    )


def test_several_worlds_have_the_mean_of_their_training_pairs() -> None:
    models, filtered = (part for part in report.SECTION.parts(view_of_judged((9, 12), 5, 3, worlds=True))[1:3])
    assert [row[1].value for row in models.rows] == [10.5, 10.5]
    assert any("mean over worlds" in note for note in models.footnotes)
    assert "first world" in filtered.footnotes[0]


@pytest.mark.parametrize(("pairs", "pool"), [(1, 3), (5, 1)])
def test_a_single_pair_or_prompt_has_a_mean_without_an_interval_and_so_a_dash(pairs: int, pool: int) -> None:
    models = report.SECTION.parts(view_of_judged((9,), pairs, pool, worlds=False))[1]
    cells = dict(zip([column.name for column in models.columns], models.rows[1], strict=True))
    assert (cells["accuracy"].value is None) == (cells["p"].value is None) == (pairs == 1)
    assert (cells["gold of best of 1"].value is None) == (cells["gold less random"].value is None) == (pool == 1)


def test_the_command_judges_a_file(llama_folder: Folder, tmp_path: Path, cli: Cli) -> None:
    train_head(llama_folder(0), pairs(16), RewardTrainingSettings(batch_pairs=4, lr=1e-2), tmp_path / "rm", seed=0)
    rows = [{"prompt": p.prompt.text, "chosen": p.chosen, "rejected": p.rejected} for p in pairs(12)]
    data = write_pairs(tmp_path / "p.jsonl", *rows, {"tie": True})
    words = ("score-pairs", "--reward-model", tmp_path / "rm", "--device", "cpu", "--json")
    found = cli(*words, "--data", data, "--out", tmp_path / "out").json
    assert found["accuracy"]["n"] == 12  # without the tie
    assert found["counts"]["ties"] == 1
    assert found["accuracy"]["value"] == 1.0
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"scored.jsonl", "reward_models.png", "reward_models.csv", "reward_model_lengths.csv"} <= names
    ties = write_pairs(tmp_path / "ties.jsonl", {"tie": True})
    refused = cli(*words, "--data", ties, "--out", tmp_path / "none")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert not (tmp_path / "none").exists()
