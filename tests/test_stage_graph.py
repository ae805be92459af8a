"""The plan of an experiment derives keys from what decides them, shares stages between rows, and imports no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rrhf_bench.pipeline.stage_graph import Plan, Stage, make_plan
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.settings.candidates import RECIPES
from rrhf_bench.settings.reading import load_experiment

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"
RAW = '[policies.raw]\nsource = "toy-raw"\n'

Write = Callable[..., Path]


def test_planning_does_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from rrhf_bench import cli\n"
        f"sys.argv = ['rrhf-bench', 'plan', {str(SMOKE)!r}, '--json']\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "loaded = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"stages"' in done.stdout


def plan(*overrides: str) -> Plan:
    return make_plan(load_experiment(SMOKE, overrides))


def changed(*overrides: str) -> set[str]:
    """Return the names of the stages of the smoke experiment whose keys the overrides change."""
    before, after = ({stage.name: stage.key for stage in p.stages} for p in (plan(), plan(*overrides)))
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def downstream(roots: set[str]) -> set[str]:
    """Return the names of the roots and of all stages that need one of them, directly or not."""

    def needs(stage: Stage) -> bool:
        return stage.name in roots or any(map(needs, stage.inputs.values()))

    stages = plan().stages
    assert roots <= {stage.name for stage in stages}
    return {stage.name for stage in stages if needs(stage)}


EVALUATIONS = {stage.name for stage in plan().stages if stage.kind == "evaluate"}
PAIR_EVALUATIONS = {stage.name for stage in plan().stages if stage.kind == "evaluate pairs"}
TRAININGS = {stage.name for stage in plan().stages if stage.kind == "train"}
TEST_CANDIDATES = "candidates for test prompts (n=2, T=1.0), seed 0"


@pytest.mark.parametrize(
    ("override", "roots"),
    [
        ("data.seed=1", {"data"}),
        ("data.toy.preferences=700", {"data"}),
        ("policy.scratch.lr=1e-3", {"raw policy", "policy"}),
        ("policy.scratch.epochs=5", {"policy"}),
        ("policy.scratch.raw_epochs=5", {"raw policy"}),
        ("perplexity_model.scratch.lr=1e-3", {"perplexity model"}),
        ("reward_model.training.lr=3e-4", {"reward model"}),
        ("reward_model.training.pairs=100", {"reward model"}),
        ("data.train_prompts=40", {"prompts"}),
        ("methods.rrhf.lr=5e-4", {"train rrhf, seed 0"}),
        ("methods.rrhf_samples_only.candidates.permute_rewards=true", {"train rrhf_samples_only, seed 0"}),
        ("methods.ppo.kl_coefficient=0.2", {"train ppo, seed 0"}),
        ("methods.best_of_n.n=3", {"evaluate best_of_n, seed 0"}),
        ("evaluation.pool_samples=8", {"best-of-n pool, seed 0"}),
        ("evaluation.curve_points=2", TRAININGS),
        ("evaluation.curve_kl=true", TRAININGS),
        ("evaluation.prompts=30", {*EVALUATIONS, *PAIR_EVALUATIONS, TEST_CANDIDATES}),
        ("evaluation.temperature=0.9", {*EVALUATIONS, *TRAININGS, "best-of-n pool, seed 0"}),
        ("evaluation.top_k=50", {*EVALUATIONS, *TRAININGS, "best-of-n pool, seed 0"}),
    ],
)
def test_a_setting_changes_the_keys_of_its_stage_and_of_those_below(override: str, roots: set[str]) -> None:
    assert changed(override) == downstream(roots)


@pytest.mark.parametrize(
    "override",
    [
        "name=another",
        "runtime.device=cpu",
        "runtime.score_batch=8",
        "runtime.workers=3",
        "runtime.kv_cache_mib=64",
        "runtime.gpu_memory=0.5",
        'report.primary=[["rrhf", "base"]]',
        "methods.rrhf.candidates.permute_rewards=false",
        "evaluation.curve_kl=false",
    ],
)
def test_devices_and_names_change_no_key(override: str) -> None:
    assert changed(override) == set()


def test_rows_of_equal_settings_are_made_once(write: Write) -> None:
    one = make_plan(load_experiment(write("[methods.rrhf]")))
    two = make_plan(load_experiment(write('[methods.rrhf]\n[methods.again]\nkind = "rrhf"')))
    assert {stage.key for stage in one.stages} == {stage.key for stage in two.stages}
    assert len(two.wanted) > len(one.wanted)


def test_rows_share_candidates_when_they_sample_alike(write: Write) -> None:
    def candidates(text: str) -> int:
        return sum(stage.kind == "sample" for stage in make_plan(load_experiment(write(text))).stages)

    alone = candidates(rrhf("rrhf"))
    other = '[methods.hot]\nkind = "rrhf"\nlr = 0.5\nepochs = 9\ncandidates = { sources = ["model"] }'
    assert candidates(rrhf("rrhf") + other) == alone
    assert candidates(rrhf("rrhf") + rrhf("hot", temperature="0.5")) == alone + 2  # train and test


def test_the_pool_is_drawn_as_the_evaluation_draws(write: Write) -> None:
    """The best of one reply of the pool is then the initial policy that is evaluated beside it."""
    text = "[evaluation]\ntemperature = 0.9\ntop_k = 50\nmax_new_tokens = 24\n[methods.sft]"
    stages = {stage.name: stage for stage in make_plan(load_experiment(write(text))).stages}
    pool, arena = stages["best-of-n pool, seed 0"].settings, stages["evaluate base, seed 0"].settings["evaluation"]
    how = ("temperature", "top_k", "max_new_tokens", "stop", "sampler", "dtype")
    assert {key: pool[key] for key in how} == {key: arena[key] for key in how}
    assert (pool["top_k"], pool["top_p"]) == (50, 1.0)


def test_rows_that_search_alike_share_candidates_over_seeds_and_temperatures(write: Write) -> None:
    def samples(text: str) -> list[Stage]:
        return [stage for stage in make_plan(load_experiment(write(text))).stages if stage.kind == "sample"]

    rows = [f'[methods.{name}]\nkind = "rrhf"\ncandidates = {{ recipe = "{name}" }}\n' for name in RECIPES]
    whole = "".join(rows)
    pools = {f"best-of-n pool, seed {seed}" for seed in (0, 1)}
    drawn = {f"candidates for {s} prompts (n=4, T=0.8), seed {seed}" for s in ("train", "test") for seed in (0, 1)}
    ways = ("beam search, beams=4", "diverse beam search, beams=4, groups=4, penalty=1.0")
    beams = {f"candidates for {split} prompts ({way})" for split in ("train", "test") for way in ways}
    found = samples(f"seeds = [0, 1]\n{whole}")
    assert sorted(stage.name for stage in found) == sorted(pools | drawn | beams)
    cold = samples(f"seeds = [0, 1]\n[candidates]\ntemperature = 0.3\ntop_p = 0.5\n{whole}")
    assert {stage.key for stage in cold} == {stage.key for stage in found}
    assert {s.settings["sampler"] for s in found if "beam" in s.name} == {choose_backend("transformers").identity}
    one, other = ({s.key for s in samples(rrhf("x", recipe='"DP"', **more))} for more in ({}, {"beams": "8"}))
    assert len(one & other) == 1  # the pool


def test_another_seed_repeats_no_stage_of_the_world() -> None:
    one, two = plan(), plan("seeds=[0, 7]")
    new = {stage.key: stage for stage in two.stages}
    assert {stage.key for stage in one.stages} < set(new)
    assert {stage.seed for key, stage in new.items() if key not in {s.key for s in one.stages}} == {7}


def test_stages_come_after_what_they_need() -> None:
    seen: set[str] = set()
    for stage in plan("seeds=[0, 1]").stages:
        assert {needed.key for needed in stage.inputs.values()} <= seen
        assert stage.key not in seen
        seen.add(stage.key)


def test_a_model_folder_with_other_files_is_another_model(tmp_path: Path) -> None:
    def key(content: str) -> str:
        (tmp_path / "config.json").write_text(content)
        return {s.name: s.key for s in plan(f"policy.source={tmp_path}").stages}["train rrhf, seed 0"]

    assert key("1") == key("1")
    assert key("1") != key("2")


def test_a_data_file_is_known_by_its_rows_and_not_by_its_name(write: Write) -> None:
    def keys(content: str, name: str) -> list[str]:
        overrides = [f"{part}.source=scratch" for part in ("policy", "reward_model", "perplexity_model")]
        found = plan("data.source=files", f"data.path={write(content, name)}", *overrides)
        return [stage.key for stage in found.stages]

    assert keys("1", "here.jsonl") == keys("1", "there.jsonl")
    assert keys("1", "here.jsonl")[0] != keys("2", "here.jsonl")[0]


# Rounds, initial policies and sources in the plan


def rows_plan(write: Write, text: str, *overrides: str) -> Plan:
    return make_plan(load_experiment(write(text), overrides))


def evaluated(found: Plan) -> dict[tuple[str, int | None], Stage]:
    """The evaluations of a plan by row and seed."""
    return {(stage.row or "", stage.seed): stage for stage in found.wanted if stage.kind == "evaluate"}


def trained(found: Plan) -> dict[tuple[str, int | None], Stage]:
    """The trained model of each row and seed."""
    return {row: stage.inputs["trained"] for row, stage in evaluated(found).items() if "trained" in stage.inputs}


def sampled(stage: Stage, source: str = "model") -> Stage:
    """The samples of a source that a training stage is given."""
    return stage.inputs[f"scores {source}"].inputs["candidates"]


def rrhf(*names: str, **keys: str) -> str:
    """A row of kind rrhf for each name, alike in the other keys."""
    body = "".join(f"{'' if key == 'initial' else 'candidates.'}{key} = {value}\n" for key, value in keys.items())
    return "".join(f'[methods.{name}]\nkind = "rrhf"\n{body}' for name in names)


def test_each_round_is_the_row_of_an_experiment_with_fewer_rounds(write: Write) -> None:
    rows = {"dp": "DP", "ip1": "IP-1", "ip2": "IP-2", "ip3": "IP-3"}
    found = rows_plan(write, "seeds = [4, 5]\n" + "".join(rrhf(n, recipe=f'"{p}"') for n, p in rows.items()))
    models = trained(found)
    for seed in (4, 5):
        dp, ip1, ip2, ip3 = (models[row, seed] for row in rows)
        assert dp.key == ip1.key
        assert len({stage.key for stage in (dp, ip2, ip3)}) == 3
        # Every round starts from the initial policy and samples from what the round before made of it.
        assert len({stage.inputs["policy"].key for stage in (dp, ip2, ip3)}) == 1
        assert sampled(dp).inputs["policy"].key == dp.inputs["policy"].key
        assert sampled(ip2).inputs["policy"].key == dp.key
        assert sampled(ip3).inputs["policy"].key == ip2.key
    # A search of the initial policy is the same for all seeds; what was trained with a seed has that seed.
    assert sampled(models["dp", 4]).key == sampled(models["dp", 5]).key
    assert sampled(models["ip2", 4]).key != sampled(models["ip2", 5]).key
    assert (sampled(models["dp", 4]).seed, sampled(models["ip2", 4]).seed) == (None, 4)
    alone = rows_plan(write, "seeds = [4, 5]\n" + rrhf("x", recipe='"IP-3"'))
    names = [stage.name for stage in alone.stages if stage.kind == "train"]
    assert names == [f"train {which}x, seed {seed}" for seed in (4, 5) for which in ("round 1 of ", "round 2 of ", "")]
    assert {stage.key for stage in alone.stages} < {stage.key for stage in found.stages}


def test_a_row_samples_and_is_measured_from_where_it_starts(write: Write) -> None:
    policies = f'{RAW}[policies.tuned]\nsource = "methods.sft"\n'
    rows = "[methods.sft]\n[methods.plain]\nkind = 'rrhf'\n" + rrhf("from_raw", initial='"raw"')
    rows += rrhf("from_tuned", initial='"tuned"') + "[methods.tuned_ppo]\nkind = 'ppo'\ninitial = 'tuned'\n"
    rows += "[methods.best_of_4]\nkind = 'best_of_n'\nn = 4\ninitial = 'raw'\n"
    found = rows_plan(write, f"seeds = [7, 1]\n{policies}{rows}")
    evaluations, models = evaluated(found), trained(found)
    starts = {row: stage.inputs["policy"].name for row, stage in evaluations.items()}
    of_row = {"from_raw": "raw policy", "raw": "raw policy", "best_of_4": "raw policy"}
    of_row |= dict.fromkeys(("from_tuned", "tuned_ppo", "tuned"), "train sft, seed 7")  # the first seed's, for all
    of_row |= dict.fromkeys(("base", "sft", "plain"), "policy")
    assert starts == {(row, seed): start for row, start in of_row.items() for seed in (7, 1)}
    for row, model in models.items():
        assert model.inputs["policy"].key == evaluations[row].inputs["policy"].key
        if model.settings["method"]["kind"] == "rrhf":
            assert sampled(model).inputs["policy"].key == evaluations[row].inputs["policy"].key
    assert evaluations["tuned", 1].inputs["policy"].key == models["sft", 7].key != models["sft", 1].key
    assert {row for row, _ in evaluations} - {row for row, _ in models} == {"base", "raw", "tuned", "best_of_4"}


def test_policies_of_other_tokenizers_or_contexts_decide_the_prompts(write: Write) -> None:
    def roles(text: str) -> list[str]:
        prompts = next(stage for stage in rows_plan(write, text).stages if stage.kind == "prompts")
        return sorted(set(prompts.inputs) - {"data", "policy"})

    assert roles("[policies.a]\nsource = 'methods.sft'\n[methods.sft]\n" + RAW) == []
    assert roles("[policies.a]\nsource = 'toy'\nscratch = { layers = 3 }") == []
    assert roles("[policies.a]\nsource = 'toy'\nscratch = { context = 256 }") == ["policy 1"]
    assert roles("[policies.a]\nsource = 'org/a'\n[policies.b]\nsource = 'org/b'") == ["policy 1", "policy 2"]
    assert roles("[policies.a]\nsource = 'org/a'\n[policies.b]\nsource = 'org/a'") == ["policy 1"]
    assert roles("[policy]\nsource = 'org/a'\n[policies.b]\nsource = 'org/a'") == []


def test_rows_of_one_recipe_share_candidates_whatever_else_they_change() -> None:
    one_world = ["worlds=[]", "seeds=[0, 1, 2]"]
    ablation = trained(make_plan(load_experiment(ROOT / "experiments" / "rank_ablation.toml", one_world)))
    assert len({sampled(model).key for model in ablation.values()}) == 1  # over 7 rows and 3 seeds
    assert len({model.key for model in ablation.values()}) == len(ablation) == 21
    found = make_plan(load_experiment(ROOT / "experiments" / "sampling_quality.toml", one_world))
    models = trained(found)
    assert sampled(models["d", 0]).key == sampled(models["dp", 1]).key
    assert sampled(models["bp", 0]).key != sampled(models["dp", 0]).key != sampled(models["raw_dp", 0]).key
    # Three seeds. Of the pool of best-of-n one a seed; two searches (dp = d, whatever the variant and the order of the
    # rewards, and bp) of each of three initial policies and the wider one of dp_double, on training and evaluation
    # prompts; the second round of ip2 (= ip3's), the third of ip3 and the draws of sp_op, each seed and both splits. p
    # samples nothing, the online rows while they train.
    assert sum(stage.kind == "sample" for stage in found.stages) == 3 * 1 + (3 * 2 + 1) * 2 + 3 * 3 * 2
    assert len({model.key for model in models.values()}) == 3 * (1 + 21)  # sft, and the rows that train on candidates


def test_names_and_claims_change_no_key(write: Write) -> None:
    text = (
        "[policies.first]\nsource = 'org/z'\n[policies.second]\nsource = 'org/a'\n"
        "[policies.third]\nsource = 'methods.row'\n[methods.row]\nkind = 'sft'\n"
        + rrhf("other", initial='"first"', recipe='"IP-2"')
        + rrhf("more", initial='"third"')
        + "[sources.s]\nmodel = 'second'\n[sources.t]\nmodel = 'row'\n"
        + rrhf("mixed", sources='["s", "t"]')
    )
    names = {"first": "zulu", "second": "alpha", "third": "mike", "row": "delta", "other": "x1", "more": "x2"}
    renamed = re.sub("|".join(names), lambda found: names[found[0]], text.replace("mixed", "x3"))
    claim = "[claims.difference]\nhigher = 'x1'\nlower = 'x2'\nmargin = 0.5"
    one, other, claimed = (rows_plan(write, t) for t in (text, renamed, f"{renamed}\n{claim}"))
    assert [stage.key for stage in one.stages if stage.kind == "train"]
    assert {stage.key for stage in one.stages} == {stage.key for stage in other.stages}
    assert [stage.key for stage in other.wanted] == [stage.key for stage in claimed.wanted]


@pytest.mark.parametrize(
    ("table", "row", "again"),
    [
        ("model = 'raw'", "", {"train", "evaluate"}),
        ("model = 'sft'", "", {"train", "evaluate"}),
        ("model = 'raw'", "scored_by = 'judge'", {"judge", "train", "evaluate"}),
        ("file = 'FILE'", "", {"file", "score", "train", "evaluate"}),
        ("file = 'FILE'", "scored_by = 'file'", {"file", "train", "evaluate"}),
    ],
)
def test_another_name_of_a_source_keeps_samples_and_scores(write: Write, table: str, row: str, again: set[str]) -> None:
    """Responses are called by their source in what holds whole groups: that alone is made again."""
    table = table.replace("FILE", str(write("{}", "responses.jsonl")))

    def keys(name: str) -> dict[str, str]:
        text = f"[judge]\n{RAW}[methods.sft]\n[sources.{name}]\n{table}\n"
        text += f"[methods.rrhf.candidates]\nsources = ['{name}']\n{row}"
        return {stage.key: stage.kind for stage in rows_plan(write, text).stages}

    one, other = keys("one"), keys("other")
    assert {kind for key, kind in one.items() if key not in other} == again
    assert len(one) == len(other)


def test_a_source_samples_the_model_that_it_names(write: Write) -> None:
    tables = {"of_raw": "raw", "of_tuned": "tuned", "of_row": "sft", "again": "dp"}
    text = f"seeds = [3, 4]\n{RAW}[policies.tuned]\nsource = 'methods.sft'\n[methods.sft]\n" + rrhf("dp", recipe='"DP"')
    text += "".join(f"[sources.{name}]\nmodel = '{model}'\nrecipe = 'DP'\n" for name, model in tables.items())
    text += "[methods.sources]\nkind = 'rrhf'\n"
    text += "candidates = { sources = ['model', 'rejected', 'of_raw', 'of_tuned', 'of_row', 'again'] }"
    found = rows_plan(write, text)
    models = trained(found)
    sources = {seed: {name: sampled(models["sources", seed], name) for name in tables} for seed in (3, 4)}
    whose = {seed: {name: stage.inputs["policy"].name for name, stage in of.items()} for seed, of in sources.items()}
    assert whose == {
        seed: {
            "of_raw": "raw policy",
            "of_tuned": "train sft, seed 3",  # a policy is one, whatever the seed of the row
            "of_row": f"train sft, seed {seed}",
            "again": f"train dp, seed {seed}",
        }
        for seed in (3, 4)
    }
    # Searches: one for all seeds where the model is one.
    shared = {name for name in tables if sources[3][name].key == sources[4][name].key}
    assert shared == {"of_raw", "of_tuned"}
    by_source = found.test_scores["sources", 4]
    assert {name: stage.inputs["candidates"].settings["split"] for name, stage in by_source.items()} == dict.fromkeys(
        ("model", *tables), "test"
    )


def test_the_scores_of_a_row_decide_its_key(write: Write) -> None:
    file = write("{}", "responses.jsonl")
    moved, changed = write("{}", "moved.jsonl"), write("{ }", "changed.jsonl")

    def row(scored_by: str, path: Path = file, *overrides: str) -> tuple[Plan, Stage]:
        text = f"[judge]\n[sources.mine]\nfile = '{path}'\n[methods.rrhf.candidates]\nsources = ['mine']\n{scored_by}"
        found = rows_plan(write, text, *overrides)
        return found, trained(found)["rrhf", 0]

    found, by_reward = row("")
    assert by_reward.inputs["scores mine"].kind == "score"
    assert found.test_scores == {("rrhf", 0): {}}  # a file has nothing for the evaluation prompts
    found, by_file = row("scored_by = 'file'")
    assert by_file.inputs["scores mine"].kind == "file"
    assert "score" not in {s.kind for s in found.stages if s.name != "scores of best-of-n pool, seed 0"}
    found, judged = row("scored_by = 'judge'")
    ratings = judged.inputs["judged"]
    assert (ratings.kind, ratings.inputs["candidates mine"].kind) == ("judge", "file")
    assert found.test_scores == {}
    assert not [role for role in judged.inputs if role.startswith("scores ")]
    keys = [row("", path)[1].key for path in (file, moved, changed)]
    assert keys[0] == keys[1] != keys[2]

    def endpoint(url: str, model: str) -> str:
        table = f"{{ source = 'endpoint', endpoint = {{ base_url = '{url}', model = '{model}' }} }}"
        return row("scored_by = 'judge'", file, f"judge={table}")[1].key

    assert endpoint("http://a/v1", "m") == endpoint("http://b/v1", "m") != endpoint("http://a/v1", "n")


def test_only_online_rows_depend_on_sampling_while_training(write: Write) -> None:
    found = rows_plan(write, rrhf("a", recipe='"OP-8"') + rrhf("b", recipe='"OP-8+KL"') + rrhf("c", recipe='"SP"'))
    models = {row: stage for (row, _), stage in trained(found).items()}
    assert "sampling" not in models["c"].settings
    for row in ("a", "b"):
        assert not [role for role in models[row].inputs if role.startswith("scores ")]
        assert models[row].settings["sampling"]["max_new_tokens"] == 64
    assert models["a"].key != models["b"].key
    assert set(found.test_scores) == {(row, 0) for row in "abc"}
    assert [found.test_scores[row, 0].keys() for row in "abc"] == [set(), set(), {"model"}]


def test_a_long_chain_of_rows_is_planned_row_by_row(write: Write) -> None:
    """Each row uses the one before it three times, so a plan that repeats rows would not end for 24 rows."""
    text = "[methods.r0]\nkind = 'sft'\n"
    for i in range(1, 24):
        text += f"[policies.p{i}]\nsource = 'methods.r{i - 1}'\n[sources.s{i}]\nmodel = 'r{i - 1}'\n"
        text += rrhf(f"r{i}", initial=f'"p{i}"', recipe='"IP-2"', sources=f'["model", "s{i}"]')
    found = rows_plan(write, text)
    assert sum(stage.kind == "train" for stage in found.stages) == 1 + 23 * 2
