"""The experiment file and its plan: complete and frozen, every fault in one go, keys that follow what decides them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rrhf_bench.errors import ConfigError
from rrhf_bench.pipeline.stage_graph import Plan, Stage, make_plan
from rrhf_bench.registry import METHODS
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import POLICIES, CandidateSettings
from rrhf_bench.settings.reading import TRAINED_WITH, load_experiment, parse_method

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "x.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def faults(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, each without the path of the file that it must start with."""
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


# Loading


def test_an_empty_file_is_a_whole_experiment_named_after_its_file(write: Write) -> None:
    experiment = load_experiment(write("", "mine.toml"))
    assert experiment == Experiment(name="mine")
    assert experiment.data.source == experiment.policy.source == experiment.reward_model.source == "toy"
    assert experiment.seeds == (0,)
    assert experiment.sampling.sources == ("model", "chosen", "rejected")
    assert experiment.evaluation.decoding == ("greedy", "sample")


def test_a_file_that_extends_another_says_only_what_differs(write: Write) -> None:
    methods = "[methods.rrhf]\nlr = 0.5\nepochs = 7\n[methods.sft]"
    write(f'name = "base"\nseeds = [1, 2]\n[sampling]\nn = 8\ntop_k = 5\n{methods}', "base.toml")
    write('extends = "base.toml"\n[sampling]\nn = 3', "middle.toml")
    experiment = load_experiment(write('extends = "middle.toml"\nseeds = [4]\n[methods.rrhf]\nlr = 0.25', "top.toml"))
    assert experiment.name == "top"  # never the name of the file below
    assert experiment.seeds == (4,)  # a list is replaced, not lengthened
    assert (experiment.sampling.n, experiment.sampling.top_k) == (3, 5)
    rrhf = experiment.methods["rrhf"]
    assert (rrhf.lr, rrhf.epochs, list(experiment.methods)) == (0.25, 7, ["rrhf", "sft"])


def test_extends_is_relative_to_the_file_that_says_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write("seeds = [5]", "below/base.toml")
    assert load_experiment(write('extends = "below/base.toml"')).seeds == (5,)


def test_extends_that_comes_back_to_itself(write: Write) -> None:
    write('extends = "b.toml"', "a.toml")
    path = write('extends = "a.toml"', "b.toml")
    with pytest.raises(ConfigError, match=r"b\.toml: extends: comes back to itself through .*a\.toml; remove one"):
        load_experiment(path)


def test_extends_a_file_that_is_not_there(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file"):
        load_experiment(write('extends = "none.toml"'))


def test_of_several_files_below_the_later_wins_and_the_file_itself_over_all(write: Write) -> None:
    write('name = "one"\nseeds = [1]\n[methods.sft]\nlr = 0.1\nepochs = 2\n[evaluation]\nprompts = 200', "one.toml")
    write('extends = "one.toml"\n[methods.rrhf]\nlr = 0.2\n[data]\nseed = 3', "over_one.toml")
    write("seeds = [2]\n[methods.sft]\nlr = 0.3\n[evaluation]\npairs = 900\n[data]\nseed = 4", "two.toml")
    experiment = load_experiment(write('extends = ["over_one.toml", "two.toml"]\n[data]\nseed = 5', "top.toml"))
    assert (experiment.name, experiment.seeds, experiment.data.seed) == ("top", (2,), 5)
    assert (experiment.evaluation.prompts, experiment.evaluation.pairs) == (200, 900)  # tables are merged, key by key
    sft = experiment.methods["sft"]
    assert (sft.lr, sft.epochs, list(experiment.methods)) == (0.3, 2, ["sft", "rrhf"])
    other = load_experiment(write('extends = ["two.toml", "over_one.toml"]', "top.toml"))
    assert (other.seeds, other.data.seed, other.methods["sft"].lr) == ((1,), 3, 0.1)
    assert load_experiment(write("extends = []", "none.toml")) == Experiment(name="none")


def test_a_file_may_be_reached_twice_but_not_through_itself(write: Write) -> None:
    write("seeds = [5]", "base.toml")
    write('extends = "base.toml"', "left.toml")
    write('extends = "base.toml"', "right.toml")
    assert load_experiment(write('extends = ["left.toml", "right.toml", "base.toml"]')).seeds == (5,)
    path = write('extends = ["base.toml", "b.toml"]', "a.toml")
    write('extends = ["left.toml", "a.toml"]', "b.toml")
    with pytest.raises(ConfigError, match=r"^\S*a\.toml: extends: comes back to itself through \S*b\.toml; remove one"):
        load_experiment(path)


@pytest.mark.parametrize("value", ["3", '["base.toml", 3]', '{ file = "base.toml" }'])
def test_extends_what_is_no_file(write: Write, value: str) -> None:
    found = repr(tomllib.loads(f"value = {value}")["value"])
    expected = f"extends: found {found}; expected paths of other files, relative to this one"
    assert faults(write(f"extends = {value}")) == [expected]


@pytest.mark.parametrize("text", ["name = ", "a = 1\na = 2", "\x00"])
def test_a_file_that_is_not_toml(write: Write, text: str) -> None:
    assert faults(write(text))[0].startswith("is not TOML: ")


def test_overrides_are_values_of_toml_and_bare_words_are_text(write: Write) -> None:
    overrides = [
        "seeds=[3, 4]",
        "policy.source=some/model",
        "methods.rrhf.lr=1e-5",
        "methods.mine.kind=sft",
        "evaluation.decoding=['greedy']",
        "sampling.cut_at_stop=false",
    ]
    experiment = load_experiment(write("[methods.rrhf]\nepochs = 2"), overrides)
    assert experiment.seeds == (3, 4)
    assert experiment.policy.source == "some/model"
    assert (experiment.methods["rrhf"].lr, experiment.methods["rrhf"].epochs) == (1e-5, 2)
    assert experiment.methods["mine"].kind == "sft"
    assert experiment.evaluation.decoding == ("greedy",)
    assert experiment.sampling.cut_at_stop is False


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seeds", "--set seeds: expected KEY=VALUE, such as methods.rrhf.lr=1e-5"),
        (".lr=1", "--set .lr=1: expected KEY=VALUE, such as methods.rrhf.lr=1e-5"),
        ("name.x=1", "--set name.x=1: name is a value, not a table"),
    ],
)
def test_an_override_that_cannot_be_applied(write: Write, override: str, fault: str) -> None:
    assert faults(write('name = "a"'), override) == [fault]


PUBLISHED = sorted((ROOT / "experiments").glob("*.toml"))


@pytest.fixture(params=PUBLISHED, ids=[path.name for path in PUBLISHED])
def published(request: pytest.FixtureRequest, write: Write) -> Experiment:
    """An experiment of the repository, with a data file where the command line is to name one."""
    return load(request.param, write)


def load(path: Path, write: Write) -> Experiment:
    own_data = tomllib.loads(path.read_text()).get("data", {}).get("source") == "files"
    return load_experiment(path, [f"data.path={write('', 'pairs.jsonl')}"] if own_data else [])


def test_the_resolved_file_gives_the_same_experiment(published: Experiment, write: Write) -> None:
    text = published.to_toml()
    assert "extends" not in text
    resolved = load_experiment(write(text, "resolved.toml"))
    assert resolved == published
    assert [stage.key for stage in make_plan(resolved).wanted] == [stage.key for stage in make_plan(published).wanted]
    assert resolved.to_toml() == text


@pytest.mark.parametrize("table", ["policies", "sources"])
def test_a_name_is_a_word(write: Write, table: str) -> None:
    content = {"policies": 'source = "scratch"', "sources": 'model = "rrhf"\nn = 1'}[table]
    with pytest.raises(ConfigError, match=rf"{table}\.my own: a name is letters, digits, - and _; choose another"):
        load_experiment(write(f'[methods.rrhf]\n[{table}."my own"]\n{content}'))


def test_every_experiment_of_the_repository_passes_plan(published: Experiment) -> None:
    stages = make_plan(published).stages
    kinds = {stage.kind for stage in stages}
    assert kinds >= {"data", "model", "reward model", "evaluate"} | ({"train"} if published.methods else set())
    assert len({stage.name for stage in stages}) == len(stages)  # a person can tell them apart


def test_an_experiment_is_frozen(write: Write) -> None:
    experiment = load_experiment(write("[methods.rrhf]"))
    for part, key in ((experiment, "seeds"), (experiment.sampling, "n"), (experiment.methods["rrhf"], "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, 1)


def test_methods_inherit_of_sampling_what_they_do_not_say(write: Write) -> None:
    experiment = load_experiment(
        write("[sampling]\nn = 6\ntemperature = 0.5\n[methods.rrhf]\nn = 2\n[methods.sft]\n[methods.best_of_n]\nn = 9")
    )
    rrhf, sft, best_of_n = experiment.methods.values()
    assert (rrhf.n, rrhf.temperature, rrhf.sources) == (2, 0.5, ("model", "chosen", "rejected"))
    assert (sft.n, sft.temperature, sft.sources) == (None, None, None)  # trains on no candidates
    assert (best_of_n.n, best_of_n.temperature) == (9, None)


def test_the_key_of_a_method_is_its_kind_unless_it_says_so(write: Write) -> None:
    experiment = load_experiment(write('[methods.ppo]\n[methods.short]\nkind = "rrhf"\nepochs = 1'))
    assert [(name, method.kind) for name, method in experiment.methods.items()] == [("ppo", "ppo"), ("short", "rrhf")]


def test_a_method_from_words_alone() -> None:
    assert (
        parse_method("rrhf", ["lr=1e-4", "variant=official"]).model_dump().items()
        >= {
            "lr": 1e-4,
            "variant": "official",
        }.items()
    )
    with pytest.raises(ConfigError, match=r"method\.lrr: unknown key; .*did you mean 'lr'\?\n?.*"):
        parse_method("rrhf", ["lrr=1", "epochs=0"])
    with pytest.raises(ConfigError, match=rf"found 'dpp'; allowed are {', '.join(METHODS)}; did you mean 'ppo'\?"):
        parse_method("dpp", [])


# Faults


def test_every_fault_of_a_file_is_found_at_once(write: Write) -> None:
    path = write(
        """
        name = "two words"
        sedes = [1]
        [data]
        train_prompts = "many"
        [sampling]
        temprature = 1.0
        n = 0
        [methods.rrhf]
        lrr = 1e-3
        lr = -1.0
        [methods.ppoo]
        [methods]
        sft = 3
        [evaluation]
        decoding = ["gredy"]
        """
    )
    expected = {
        "methods.rrhf.lrr: unknown key; allowed are",
        "methods.rrhf.lr: found -1.0; input should be greater than 0",
        "methods.ppoo.kind: found 'ppoo'; allowed are rrhf, sft, best_of_n, ppo; did you mean 'ppo'?",
        "methods.sft: found 3; expected a table of the method's settings",
        "name: found 'two words'; ",
        "sedes: unknown key; allowed are name, seeds, data,",
        "data.train_prompts: found 'many'; input should be a valid integer",
        "sampling.temprature: unknown key; allowed are",
        "sampling.n: found 0; input should be greater than or equal to 1",
        "evaluation.decoding.0: found 'gredy'; input should be 'greedy' or 'sample'",
        "--set nonsense: expected KEY=VALUE",
    }
    found = faults(path, "nonsense")
    assert len(found) == len(expected)
    for start in expected:
        assert sum(line.startswith(start) for line in found) == 1, start


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sedes", "seeds"),
        ("evaluation.prompt", "prompts"),
        ("policy.scratch.hiden", "hidden"),
        ("data.toy.preference", "preferences"),
        ("methods.rrhf.varient", "variant"),
        ("runtime.worker", "workers"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(write: Write, key: str, nearest: str) -> None:
    (line,) = faults(write("[methods.rrhf]"), f"{key}=1")
    assert line.startswith(f"{key}: unknown key; allowed are ")
    assert line.endswith(f"; did you mean {nearest!r}?")


def test_an_unknown_key_far_from_all_others_is_given_no_neighbour(write: Write) -> None:
    (line,) = faults(write(""), "zzz=1")
    assert "did you mean" not in line


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seeds", "3", "valid tuple"),
        ("seeds", "[]", "at least 1"),
        ("data.train_prompts", "5.0", "valid integer"),  # nothing is converted
        ("data.train_prompts", "true", "valid integer"),
        ("sampling.temperature", "'1'", "valid number"),
        ("sampling.sources", "'model'", "valid tuple"),
        ("sampling.backend", "'sglang'", "'vllm' or 'transformers'"),
        ("methods.rrhf.variant", "'papers'", "'paper', 'intended' or 'official'"),
        ("data", "3", "dictionary"),
        ("policy.scratch.lr", "nan", "expected a finite number"),
    ],
)
def test_a_wrong_value_names_key_found_and_allowed(write: Write, key: str, value: str, words: str) -> None:
    (line,) = faults(write(""), f"{key}={value}")
    assert line.startswith(f"{key}: found ")
    assert words in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.source=hf"], 'data.source: found \'hf\'; allowed are "toy", "toy-reviews", "files" and "hub:'),
        (["data.source=files"], "data.path: missing; "),
        (["data.source=files", "data.path=none.jsonl"], "data.path: found 'none.jsonl', which does not exist"),
        (
            ["data.source=hub:a/b", "reward_model.source=a", "perplexity_model.source=a"],
            'policy.source: "toy" needs data.source = "toy"',
        ),
        (["policy.scratch.heads=3"], "policy.scratch: found hidden = 128 in 3 heads; expected heads of 32, 64,"),
        (["reward_model.layout=value-head"], 'reward_model.layout: a reward model trained here is a "classifier"'),
        (["evaluation.pairs=3"], "evaluation.pairs: found 3; expected at least evaluation.prompts (300)"),
        (["evaluation.pool_prompts=301"], "evaluation.pool_prompts: found 301; expected at most 300"),
        (["seeds=[1,1]"], "seeds: found [1, 1]; a seed may stand once only"),
        (["methods.base.kind=sft"], "methods.base: the name is taken; "),
        (["methods.rrhf.sources=['chosen']"], "methods.rrhf: k = 1 response a prompt leaves nothing to rank; "),
        (["methods.rrhf.sources=['model']", "sampling.n=1"], "methods.rrhf: k = 1 response a prompt leaves"),
        (["methods.rrhf.sources=['modle']"], "methods.rrhf.sources: found 'modle'; allowed are model, chosen, "),
        (["methods.rrhf.temperature=0.0"], "methods.rrhf: temperature 0 gives 4 equal samples; raise it or set n = 1"),
        (["name=store"], "name: found 'store', the folder"),
        (["sampling.policy=[1]"], "sampling.policy: found [1]; input should be "),
        (["methods.sft.policy=P"], "methods.sft.policy: found 'P', which changes nothing: "),
        (["methods.ppo.beams=4"], "methods.ppo.beams: found 4, which changes nothing: "),
        (["sampling.policy=DP", "sampling.temperature=0.8"], 'sampling.policy: temperature has no effect beside "DP"'),
        (
            ["sampling.policy=SP", "sampling.groups=2"],
            'sampling.policy: groups has no effect beside "SP", strategy "sam',
        ),
        (
            ["sampling.policy=DP", "sampling.strategy=beam"],
            'sampling.policy: "DP" has strategy = "diverse-beam"; found \'beam\' beside it',
        ),
        (
            ["sampling.policy=DP", "methods.rrhf.top_p=0.9"],
            'methods.rrhf.top_p: has no effect where strategy = "diverse-beam"; remove the key',
        ),
        (["methods.rrhf.beams=8"], 'methods.rrhf.beams: has no effect where strategy = "sample"; remove the key'),
        (
            ["methods.rrhf.policy=BP", "methods.rrhf.n=8"],
            "methods.rrhf: n = 8, but a search returns all its 4 beams; set beams and remove n",
        ),
        (
            ["sampling.policy=DP", "sampling.beams=6", "methods.rrhf.lr=0.5"],
            "sampling: 6 beams do not divide into 4 groups of equal size; change beams or groups",
        ),
    ],
)
def test_settings_that_contradict_each_other(write: Write, overrides: list[str], expected: str) -> None:
    (line,) = faults(write(""), *overrides)
    assert line.startswith(expected)


@pytest.mark.parametrize("kind", ["sft", "rrhf", "ppo"])
def test_a_rate_whose_first_step_is_beyond_float32_is_refused(write: Write, kind: str) -> None:
    """AdamW divides it by 1 - betas[0] and would stop with an error of its own."""
    for rate, betas, bound in (3.5e37, [0.9, 0.999], "3.4e+37"), (1e35, [0.9999, 0.999], "3.4e+34"):
        table = f"[methods.{kind}]\nbetas = {betas}\nlr = "
        (line,) = faults(write(f"{table}{rate}"))
        assert line.startswith(f"methods.{kind}.lr: found {rate:g}; expected at most {bound}")
        load_experiment(write(f"{table}{rate / 10}"))
    (line,) = faults(write("[reward_model.training]\nlr = 1e38"))
    assert line.startswith("reward_model.training.lr: found ")
    for betas in ([1.0, 0.9], [0.9, 1.0], [-0.1, 0.9]):
        (line,) = faults(write(f"[methods.{kind}]\nbetas = {betas}"))
        assert line.startswith(f"methods.{kind}.betas.")


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *(
            ("sft", *key)
            for key in (
                ("n", 8),
                ("temperature", 0.7),
                ("sources", ["model"]),
                ("top_p", 0.9),
                ("top_k", 5),
                ("rounds", 2),
                ("refresh", 8),
                ("reward_kl", 0.1),
                ("scored_by", "judge"),
            )
        ),
        *(("best_of_n", *key) for key in (("temperature", 0.7), ("sources", ["model"]), ("top_p", 0.9), ("top_k", 5))),
        *(("ppo", *key) for key in (("n", 8), ("sources", ["model"]), ("top_p", 1.0), ("scored_by", "file"))),
    ],
)
def test_a_key_that_a_method_does_not_read_is_refused(write: Write, kind: str, key: str, value: Any) -> None:
    """In the row's table, in the defaults of its kind, and for `train`."""
    shown = repr(value)
    for table in ("methods", "defaults"):
        (line,) = faults(write(f"[{table}.{kind}]\n{key} = {json.dumps(value)}"))
        assert line.startswith(f"{table}.{kind}.{key}: found {shown}, ")
        allowed = line.split("allowed are ")[1].split("; ")[0].split(", ")
        assert "lr" in allowed or kind == "best_of_n"
        assert key not in allowed
        assert line.endswith("; remove the key")
    with pytest.raises(ConfigError, match=rf"^method\.{key}: found "):
        parse_method(kind, [f"{key}={json.dumps(value)}"])


def test_the_candidate_keys_that_a_method_reads_are_allowed(write: Write) -> None:
    rows = "[methods.best_of_n]\nn = 8\n[methods.ppo]\ntemperature = 0.7"
    experiment = load_experiment(write(rows))
    assert experiment.methods["best_of_n"].n == 8
    assert experiment.methods["ppo"].temperature == 0.7


# Sampling policies


PAIR = ("chosen", "rejected")
BEAM = {"strategy": "beam", "beams": 4, "n": 4}
DIVERSE = {"strategy": "diverse-beam", "beams": 4, "groups": 4, "diversity_penalty": 1.0, "n": 4}
TOP_P = {"strategy": "sample", "n": 4, "temperature": 0.8, "top_p": 1.0, "top_k": 0}
INHERITED = {"strategy": "sample", "n": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 0}


@pytest.mark.parametrize(
    ("name", "expected", "k"),
    [
        ("BP", {"sources": ("model", *PAIR), **BEAM}, 6),
        ("DP", {"sources": ("model", *PAIR), **DIVERSE}, 6),
        ("SP", {"sources": ("model", *PAIR), **TOP_P}, 6),
        ("D", {"sources": ("model",), **DIVERSE}, 4),
        ("P", {"sources": PAIR, **INHERITED}, 2),
        ("B", {"sources": ("model",), **BEAM}, 4),
    ],
)
def test_a_sampling_policy_is_what_it_stands_for(write: Write, name: str, expected: dict[str, object], k: int) -> None:
    others = '[sampling]\nsources = ["model"]\nn = 7\ntemperature = 0.5\ntop_p = 0.9\n'
    experiment = load_experiment(write(f'{others}[methods.rrhf]\npolicy = "{name}"'))
    method = experiment.methods["rrhf"]
    found = {key: value for key in CandidateSettings.model_fields if (value := getattr(method, key)) is not None}
    assert (found, experiment.responses(method)) == (expected, k)
    text = experiment.to_toml()
    assert "policy =" not in text
    assert load_experiment(write(text, "resolved.toml")).methods == experiment.methods


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"P"}))
def test_a_sampling_policy_of_all_methods_is_that_of_each(write: Write, name: str) -> None:
    of_all = load_experiment(write(f'[sampling]\npolicy = "{name}"\n[methods.rrhf]'))
    of_one = load_experiment(write(f'[methods.rrhf]\npolicy = "{name}"'))
    assert of_all.methods == of_one.methods


def test_a_word_for_the_table_of_the_initial_policy_is_no_sampling_policy(write: Write) -> None:
    """One fault, its own: the file's [sources] are not dropped as a sampling policy's would be."""
    text = """
[policies.raw]
source = "toy-raw"
[sources.old]
model = "raw"
[methods.rrhf]
sources = ["model", "old"]
"""
    expected = "policy: found 'DP'; input should be a valid dictionary or instance of PolicySettings"
    below = write(text, "below.toml")
    assert faults(below, "policy=DP") == [expected]
    assert faults(write('policy = "DP"\nextends = "below.toml"', "above.toml")) == [expected]

    # The tables of candidates, each by one word: what was said before of candidates is gone.
    written = write(
        """
[defaults.rrhf]
n = 7
[sources.old]
model = "raw"
top_p = 0.5
[policies.raw]
source = "toy-raw"
[sampling]
n = 5
[methods.x]
kind = "rrhf"
temperature = 0.3
""",
        "written.toml",
    )
    words = ["defaults.rrhf.policy=D", "sources.old.policy=B", "sampling.policy=SP", "methods.x.policy=DP"]
    found = load_experiment(written, words)
    assert (found.sampling.n, found.sampling.strategy) == (4, "sample")
    assert (found.methods["x"].n, found.methods["x"].temperature) == (4, None)
    assert (found.sources["old"].beams, found.sources["old"].top_p) == (4, None)
    by_default = load_experiment(written, ["defaults.rrhf.policy=SP"]).methods["x"]
    assert (by_default.n, by_default.temperature) == (4, 0.3)
    assert parse_method("rrhf", ["n=9", "policy=DP"]) == parse_method("rrhf", ["policy=DP"])


def test_keys_beside_a_policy_override_their_parts(write: Write) -> None:
    text = '[methods.rrhf]\npolicy = "DP"\nbeams = 8\ngroups = 2\n[methods.hot]\nkind = "rrhf"\npolicy = "SP"\nn = 2'
    experiment = load_experiment(write(f"[sampling]\ntemperature = 0.3\n{text}\ntemperature = 1.5"))
    rrhf, hot = experiment.methods.values()
    assert (rrhf.n, rrhf.beams, rrhf.groups, rrhf.diversity_penalty) == (8, 8, 2, 1.0)
    assert experiment.responses(rrhf) == 10
    assert (hot.n, hot.temperature, hot.top_p, hot.beams) == (2, 1.5, 1.0, None)
    shared = load_experiment(write('[sampling]\npolicy = "BP"\nbeams = 3\n[methods.rrhf]\n'))
    assert (shared.sampling.n, shared.methods["rrhf"].n, shared.methods["rrhf"].responses({})) == (3, 3, 5)
    bare = load_experiment(write('[sampling]\nstrategy = "diverse-beam"\nbeams = 8\n[methods.rrhf]\nbeams = 12'))
    assert (bare.sampling.n, bare.methods["rrhf"].n, bare.methods["rrhf"].groups) == (8, 12, 4)
    assert load_experiment(write(bare.to_toml(), "resolved.toml")) == bare


def test_a_policy_replaces_what_was_said_before_it(write: Write) -> None:
    write("[sampling]\nn = 9\ntemperature = 0.5\nmax_new_tokens = 7\n[methods.rrhf]\nlr = 0.5\ntop_k = 3", "base.toml")
    above = '[sampling]\npolicy = "DP"\n[methods.rrhf]\npolicy = "BP"'
    experiment = load_experiment(write(f'extends = "base.toml"\n{above}'))
    assert (experiment.sampling.n, experiment.sampling.max_new_tokens) == (4, 7)
    rrhf = experiment.methods["rrhf"]
    assert (rrhf.strategy, rrhf.top_k, rrhf.temperature, rrhf.lr) == ("beam", None, None, 0.5)
    path = write('extends = "base.toml"')
    assert load_experiment(path, ["sampling.policy=DP", "methods.rrhf.policy=BP"]) == experiment
    later = load_experiment(path, ["sampling.policy=SP", "sampling.n=2", "methods.rrhf.policy=D"])
    assert (later.sampling.n, later.sampling.temperature, later.methods["rrhf"].sources) == (2, 0.8, ("model",))


RAW = '[policies.raw]\nsource = "toy-raw"\n'
ROW = '[methods.rrhf]\nsources = ["model", "s"]\n'
KNOWN = "BP, DP, SP, D, P, B, IP-n, OP-k, OP-k+KL (n rounds, k optimiser steps)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (f'[methods.rrhf]\npolicy = "{name}"', [f"methods.rrhf.policy: found '{name}'; allowed are {KNOWN}"])
            for name in ("dp", "OP-0", "IP-x", "IP-0", "IP-100", "OP-", "OP-8+kl")
        ),
        (
            '[sampling]\npolicy = "OP-8"',
            ['sampling.policy: "OP-8" says how a method trains (refresh); set it in its table'],
        ),
        (
            '[methods.rrhf]\npolicy = "OP-4"\nsources = ["mine"]\n[sources.mine]\nfile = "FILE"',
            [
                "methods.rrhf.refresh: OP-4 samples the policy while it trains, but sources = ['mine'] has no "
                '"model"; add it, or remove refresh'
            ],
        ),
        (
            '[methods.rrhf]\npolicy = "IP-2"\nsources = ["chosen", "rejected"]',
            ['methods.rrhf.rounds: IP-2 samples the model of the round before, but sources has no "model"; add it'],
        ),
        (
            '[methods.rrhf]\npolicy = "IP-2"\nrefresh = 8',
            [
                "methods.rrhf.rounds: has no effect beside refresh, which samples the policy all the time; remove one "
                "of the two"
            ],
        ),
        (
            "[methods.rrhf]\nreward_kl = 0.1",
            ["methods.rrhf.reward_kl: is of online sampling only; set refresh (k of OP-k), or remove it"],
        ),
        (
            '[methods.rrhf]\nscored_by = "judge"',
            [
                'methods.rrhf.scored_by: found "judge", and there is no [judge]; add the table, with source = "toy" or '
                '"endpoint"'
            ],
        ),
        (
            '[judge]\n[methods.rrhf]\npolicy = "OP-8"\nscored_by = "judge"',
            ["methods.rrhf.scored_by: found 'judge'; the reward model scores online candidates; remove the key"],
        ),
        (
            '[methods.rrhf]\nscored_by = "file"\nsources = ["mine", "chosen"]\n[sources.mine]\nfile = "FILE"',
            [
                "methods.rrhf.scored_by: found \"file\", but of sources = ['mine', 'chosen'] only ['mine'] are files; "
                "scores of two kinds have no common scale: keep the files alone, or let the reward model score them all"
            ],
        ),
        (
            f'{RAW}[methods.rrhf]\ninitial = "rwa"',
            [
                "methods.rrhf.initial: found 'rwa'; expected a table of [policies] (raw); did you mean 'raw'?, or "
                "nothing for [policy]"
            ],
        ),
        (
            '[methods.sft]\n[methods.rrhf]\ninitial = "sft"',
            [
                "methods.rrhf.initial: found 'sft'; expected a table of [policies] (there is none), or nothing for "
                "[policy]"
            ],
        ),
        (
            '[policies.a]\nsource = "methods.sf"\n[methods.sft]\n[methods.best_of_n]',
            ["policies.a.source: found 'methods.sf'; expected a row that trains (sft); did you mean 'sft'?"],
        ),
        (
            '[policies.a]\nsource = "methods.best_of_n"\n[methods.sft]\n[methods.best_of_n]',
            ["policies.a.source: found 'methods.best_of_n'; expected a row that trains (sft)"],
        ),
        (
            '[policies.a]\nsource = "methods.sft"\ndtype = "bfloat16"\npart = "Alpaca-sft"\n[methods.sft]',
            ["policies.a.dtype: has no effect: a row's result is as what the row started from; remove the key"],
        ),
        (
            f"{RAW}scratch = {{ layers = 3 }}",
            ['policies.raw.scratch: has no effect: "toy-raw" is trained as [policy.scratch] says; remove the table'],
        ),
        (
            '[policy]\nsource = "methods.sft"\n[methods.sft]',
            ["policy.source: found 'methods.sft'; only a table of [policies] may be a row's result"],
        ),
        (
            "[policies.sft]\n[methods.sft]",
            ["policies.sft: the name is taken; it would be a row of the tables beside the one of that name"],
        ),
        (
            "[policies.policy]\n[policies.base]",
            [
                f"policies.{name}: the name is taken; it would be a row of the tables beside the one of that name"
                for name in ("policy", "base")
            ],
        ),
        (
            '[policies.a]\nsource = "org/model"\ntemplate = "chat"',
            ["policies.a.template: found 'chat'; expected 'hh', that of [policy]"],
        ),
        (
            "[sources.model]\nmodel = 'rrhf'\n[methods.rrhf]",
            ["sources.model: the name is taken; model, chosen, rejected, reply need no table"],
        ),
        (
            f"{ROW}[sources.s]\nmodel = 'rw'\n{RAW}[methods.best_of_n]",
            [
                "sources.s.model: found 'rw'; expected a table of [policies] or a row that trains (raw, rrhf); did you "
                "mean 'raw'?"
            ],
        ),
        (
            f'{ROW}[sources.s]\nmodel = "best_of_n"\n[methods.best_of_n]',
            ["sources.s.model: found 'best_of_n'; expected a table of [policies] or a row that trains (rrhf)"],
        ),
        (
            f"{ROW}[sources.s]\nn = 2",
            ["sources.s.model: a source has either model = a policy or row, or file = a path; give one of the two"],
        ),
        (
            f'{ROW}[sources.s]\nfile = "FILE"\nmodel = "rrhf"',
            ["sources.s.model: a source has either model = a policy or row, or file = a path; give one of the two"],
        ),
        (
            f'{ROW}[sources.s]\nfile = "none.jsonl"',
            ["sources.s.file: found 'none.jsonl', which does not exist; expected a JSON-lines file"],
        ),
        (
            f'{ROW}[sources.s]\nfile = "FILE"\nn = 2\npolicy = "DP"',
            [
                f"sources.s.{key}: has no effect on the responses of a file; remove the key"
                for key in ("n", "strategy", "beams", "groups", "diversity_penalty")
            ],
        ),
        (
            f'{RAW}{ROW}[sources.s]\nmodel = "raw"\nsources = ["model"]\npolicy = "DP"',
            ["sources.s.sources: found ['model']; a source is one; remove the key"],
        ),
        (
            f'{RAW}{ROW}[sources.s]\nmodel = "raw"\npolicy = "P"',
            ["sources.s.policy: found 'P', which takes no samples; allowed are BP, DP, SP, D, B"],
        ),
        (
            f'{RAW}{ROW}[sources.s]\nmodel = "raw"\nstrategy = "beam"\ntemperature = 0.5',
            ['sources.s.temperature: has no effect where strategy = "beam"; remove the key'],
        ),
        (
            f'{RAW}{ROW}[sources.s]\nmodel = "raw"\ntemperature = 0.0',
            ["sources.s: temperature 0 gives 4 equal samples; raise it or set n = 1"],
        ),
        (
            f'{RAW}{ROW}[sources.s]\nmodel = "raw"\npolicy = "DP"\nbeams = 6',
            ["sources.s: 6 beams do not divide into 4 groups of equal size; change beams or groups"],
        ),
        (
            "[methods.rrhf]\nsources = ['model', 'chosen', 'model']",
            ["methods.rrhf.sources: found 'model' twice; a source may stand once only"],
        ),
        (
            f'{RAW}{ROW}[sources.s]\nmodel = "raw"\npolicy = ["DP"]',
            ["sources.s.policy: found ['DP']; input should be a valid string"],
        ),
        ("[methods.rrhf]\nsources = ['mine']", [UNKNOWN := "methods.rrhf.sources: found 'mine'; allowed are model, "]),
        ("[judge]\nsource = 'endpoint'", [ENDPOINT := "judge.endpoint: the table goes with source = "]),
        (
            '[claims.difference]\nhigher = "rhf"\nlower = "base"\nmargin = 0.0\n[methods.rrhf]',
            ["claims.difference: found the row 'rhf'; allowed are base, rrhf; did you mean 'rrhf'?"],
        ),
        (
            f'{RAW}[claims.a]\nkind = "difference"\nhigher = "raw"\nlower = "chosen"\nmargin = 0.0',
            ["claims.a: found the row 'chosen'; allowed are base, raw"],
        ),
        (
            '[report]\nagainst = "best_of_n"\n[methods.best_of_n]\n[methods.rrhf]',
            ["report.against: found 'best_of_n'; expected a row that trains (rrhf)"],
        ),
        (
            "[report]\nprimary = [['rrhf', 'bas'], ['rrhf', 'rrhf'], ['rrhf', 'base'], ['base', 'rrhf']]\n"
            "[methods.rrhf]",
            [
                "report.primary: found the row 'bas'; allowed are base, rrhf; did you mean 'base'?",
                "report.primary: found 'rrhf' on both sides; a row cannot be compared with itself",
                "report.primary: found ['base', 'rrhf'] twice; a comparison may stand once only",
            ],
        ),
        ("[claims.diference]\nmargin = 0.0", [CLAIM := "claims.diference.kind: found 'diference'; allowed are "]),
        ("[defaults.rhf]\nlr = 0.1", [DEFAULT := "defaults.rhf: found 'rhf'; allowed are rrhf, sft, "]),
        ("[defaults]\nrrhf = 3\n[methods.rrhf]", ["defaults.rrhf: found 3; expected a table of the method's settings"]),
        ("defaults = 3\n[methods.rrhf]", ["defaults: found 3; expected tables such as [defaults.rrhf]"]),
        (
            "[defaults.rrhf]\nlr = -1.0\n[methods.rrhf]\n[methods.b]\nkind = 'rrhf'",
            ["defaults.rrhf.lr: found -1.0; input should be greater than 0"],
        ),
        (
            '[defaults.rrhf]\nkind = "sft"\n[methods.rrhf]',
            ["defaults.rrhf.kind: found 'sft'; the table's name is the kind; remove the key"],
        ),
    ],
)
def test_what_a_row_starts_from_and_trains_on_must_be_there(write: Write, text: str, expected: list[str]) -> None:
    text = text.replace("FILE", str(write("", "responses.jsonl")))
    found = faults(write(text))
    open_ended = (UNKNOWN, ENDPOINT, CLAIM, DEFAULT)
    cut = [line[: len(e)] if e in open_ended else line for line, e in zip(found, expected, strict=True)]
    assert cut == expected


@pytest.mark.parametrize(
    ("text", "row", "ways"),
    [
        ('[sources.s]\nmodel = "x"\n[methods.x]\nSOURCES s', "x", "x needs x (sources.s.model)"),
        (
            '[sources.s]\nmodel = "y"\n[sources.t]\nmodel = "x"\n[methods.x]\nSOURCES s\n[methods.y]\nSOURCES t',
            "x",
            "x needs y (sources.s.model), y needs x (sources.t.model)",
        ),
        (
            '[policies.a]\nsource = "methods.b"\n[methods.b]\nkind = "rrhf"\ninitial = "a"',
            "b",
            "b needs b (methods.b.initial)",
        ),
        (
            '[policies.a]\nsource = "methods.b"\n[sources.s]\nmodel = "a"\n[methods.c]\nkind = "sft"\n'
            '[methods.d]\nSOURCES s\n[policies.e]\nsource = "methods.d"\n[methods.b]\nkind = "sft"\ninitial = "e"',
            "d",
            "d needs b (sources.s.model), b needs d (methods.b.initial)",
        ),
    ],
)
def test_no_row_is_trained_before_itself(write: Write, text: str, row: str, ways: str) -> None:
    text = re.sub(r"SOURCES (\w)", r'kind = "rrhf"\nsources = ["\1", "chosen"]', text)
    expected = f"methods.{row}: would have to be trained before itself: {ways}; change one of these keys"
    assert faults(write(text)) == [expected]


def test_a_faulty_table_is_not_called_missing_where_it_is_named(write: Write) -> None:
    rows = '[methods.rrhf]\ninitial = "raw"\nsources = ["s"]\nscored_by = "judge"\n[methods.b]\nkind = "sft"\nlrr = 1'
    claim = '[claims.difference]\nhigher = "b"\nlower = "raw"\nmargin = 0.0\n[policies.c]\nsource = "methods.b"'
    tables = '[policies.raw]\nsorce = "toy-raw"\n[sources.s]\nmodle = "b"\n[judge]\nsauce = "toy"'
    found = [fault.partition(": unknown key; ")[0] for fault in faults(write(f"{rows}\n{claim}\n{tables}"))]
    assert found == ["methods.b.lrr", "policies.raw.sorce", "judge.sauce", "sources.s.modle"]


def test_rows_take_from_the_defaults_of_their_kind_what_they_do_not_say(write: Write) -> None:
    defaults = '[defaults.rrhf]\nlr = 0.25\nepochs = 2\nbetas = [0.5, 0.6]\npolicy = "DP"\nbeams = 8\n'
    rows = '[methods.rrhf]\n[methods.own]\nkind = "rrhf"\nlr = 0.5\npolicy = "SP"\n[methods.sft]\n'
    experiment = load_experiment(write(defaults + rows))
    rrhf, own, sft = experiment.methods.values()
    assert (rrhf.lr, rrhf.epochs, rrhf.betas, rrhf.strategy, rrhf.n) == (0.25, 2, (0.5, 0.6), "diverse-beam", 8)
    # A sampling policy of its own leaves nothing of the other's.
    assert (own.lr, own.epochs, own.betas, own.strategy, own.beams, own.n) == (0.5, 2, (0.5, 0.6), "sample", None, 4)
    assert sft == load_experiment(write("[methods.sft]")).methods["sft"]
    assert "defaults" not in experiment.to_toml()
    assert load_experiment(write(defaults + rows), ["defaults.rrhf.lr=0.125"]).methods["rrhf"].lr == 0.125
    write(defaults, "below.toml")
    above = write(f'extends = "below.toml"\n[defaults.rrhf]\nlr = 0.75\n{rows}')
    assert [m.lr for m in load_experiment(above).methods.values()] == [0.75, 0.5, sft.lr]


def test_sampling_while_training_is_a_policy_too(write: Write) -> None:
    def row(policy: str, *more: str) -> dict[str, Any]:
        text = f'[methods.x]\nkind = "rrhf"\nlr = 0.5\nn = 2\nrounds = 3\npolicy = "{policy}"\n'
        path = write(text.replace("n = 2\nrounds = 3\n", "") + "\n".join(more))
        method = load_experiment(path).methods["x"]
        # On the command line it replaces whatever the file said of candidates, rounds and refreshes.
        base = write('[methods.x]\nkind = "rrhf"\nlr = 0.5\nn = 2\nrounds = 3', "base.toml")
        words = [f"methods.x.{key.replace(' ', '')}" for key in more]
        assert load_experiment(base, [f"methods.x.policy={policy}", *words]).methods["x"] == method
        assert method.lr == 0.5
        return method.model_dump(exclude_none=True, include={*CandidateSettings.model_fields, *TRAINED_WITH})

    with_pair = {"sources": ("model", *PAIR)}
    assert row("IP-1") == {**with_pair, **DIVERSE, "rounds": 1}
    assert row("IP-3") == {**with_pair, **DIVERSE, "rounds": 3}
    assert row("OP-4") == {**with_pair, **TOP_P, "refresh": 4}
    assert row("OP-32+KL") == {**with_pair, **TOP_P, "refresh": 32, "reward_kl": 0.01}
    assert row("OP-32+KL", "reward_kl = 0.5")["reward_kl"] == 0.5
    assert row("OP-4", 'strategy = "diverse-beam"', "beams = 8", "groups = 2") == {
        **with_pair, **DIVERSE, "beams": 8, "n": 8, "groups": 2, "refresh": 4
    }  # fmt: skip
    assert row("OP-4", 'strategy = "beam"') == {**with_pair, **BEAM, "refresh": 4}
    assert row("IP-2", "beams = 8")["n"] == 8


def test_what_sampling_while_training_requires(write: Write) -> None:
    rows = {"offline": "DP", "rounds": "IP-2", "online": "OP-8", "penalised": "OP-8+KL"}
    text = "".join(f'[methods.{name}]\nkind = "rrhf"\npolicy = "{policy}"\n' for name, policy in rows.items())
    methods = load_experiment(write(text)).methods
    more = {name: method.needs - method.requires for name, method in methods.items()}
    online = {"sampler", "reward"}
    assert more == {"offline": set(), "rounds": set(), "online": online, "penalised": {*online, "reference"}}


def test_a_source_samples_as_all_do_unless_it_says_so(write: Write) -> None:
    file = write("", "responses.jsonl")
    tables = {
        "plain": 'model = "raw"\n',
        "cold": 'model = "raw"\ntemperature = 0.25\nn = 2\n',
        "wide": 'model = "raw"\npolicy = "DP"\nbeams = 8\n',
        "given": f'file = "{file}"\n',
    }
    text = "".join(f"[sources.{name}]\n{table}" for name, table in tables.items())
    row = '[methods.rrhf]\nsources = ["model", "chosen", "plain", "cold", "wide", "given"]\n'
    experiment = load_experiment(write(f"[sampling]\nn = 3\ntop_k = 5\n{RAW}{text}{row}"))
    found = {
        name: source.model_dump(exclude_none=True, exclude={"model"}) for name, source in experiment.sources.items()
    }
    drawn = {"strategy": "sample", "top_p": 1.0, "top_k": 5}
    assert found == {
        "plain": {**drawn, "n": 3, "temperature": 1.0},
        "cold": {**drawn, "n": 2, "temperature": 0.25},
        "wide": {**DIVERSE, "beams": 8, "n": 8},
        "given": {"file": str(file)},
    }
    # The file's responses, of which it is not known how many they are, count as one.
    assert experiment.responses(experiment.methods["rrhf"]) == 3 + 1 + 3 + 2 + 8 + 1
    assert load_experiment(write(experiment.to_toml(), "resolved.toml")) == experiment


def test_the_reward_model_scores_whether_said_or_not(write: Write) -> None:
    one, other = (
        load_experiment(write(f"[methods.rrhf]\n{x}"), ["name=a"]) for x in ("", 'scored_by = "reward model"')
    )
    assert one == other


# The plan


def test_contradictions_are_found_beside_a_faulty_key_elsewhere(write: Write) -> None:
    path = write("[methods.rrhf]")
    found = faults(path, "data.train_prompts=0", 'methods.rrhf.sources=["chosen"]', "evaluation.pairs=1")
    assert [fault.partition(": ")[0] for fault in found] == ["data.train_prompts", "evaluation.pairs", "methods.rrhf"]
    # [evaluation] cannot be read at all: what it would contradict is not known.
    found = faults(path, "evaluation.prompts=x", "evaluation.pairs=1")
    assert [fault.partition(": ")[0] for fault in found] == ["evaluation.prompts"]


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
    """Names of the stages of the smoke experiment whose key is another one with the overrides."""
    before, after = ({stage.name: stage.key for stage in p.stages} for p in (plan(), plan(*overrides)))
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def downstream(roots: set[str]) -> set[str]:
    """Names of the stages that are among the roots or need one of them, however far down."""

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
        ("data.train_prompts=40", {"prompts"}),
        ("methods.rrhf.lr=5e-4", {"train rrhf, seed 0"}),
        ("methods.ppo.kl_coefficient=0.2", {"train ppo, seed 0"}),
        ("methods.best_of_n.n=3", {"evaluate best_of_n, seed 0"}),
        ("evaluation.pool_samples=8", {"best-of-n pool, seed 0"}),
        ("evaluation.curve_points=2", TRAININGS),
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
    ],
)
def test_where_and_under_what_name_it_runs_changes_no_key(override: str) -> None:
    assert changed(override) == set()


def test_the_name_of_a_row_is_no_part_of_its_keys(write: Write) -> None:
    one, other = (make_plan(load_experiment(write(f'[methods.{name}]\nkind = "rrhf"'))) for name in ("first", "second"))
    assert {stage.key for stage in one.stages} == {stage.key for stage in other.stages}


def test_rows_of_equal_settings_are_made_once(write: Write) -> None:
    one = make_plan(load_experiment(write("[methods.rrhf]")))
    two = make_plan(load_experiment(write('[methods.rrhf]\n[methods.again]\nkind = "rrhf"')))
    assert {stage.key for stage in one.stages} == {stage.key for stage in two.stages}
    assert len(two.wanted) > len(one.wanted)


def test_rows_share_candidates_when_they_sample_alike(write: Write) -> None:
    def candidates(text: str) -> int:
        return sum(stage.kind == "sample" for stage in make_plan(load_experiment(write(text))).stages)

    alone = candidates("[methods.rrhf]")
    assert (
        candidates('[methods.rrhf]\n[methods.hot]\nkind = "rrhf"\nlr = 0.5\nepochs = 9\nsources = ["model"]') == alone
    )
    assert candidates('[methods.rrhf]\n[methods.hot]\nkind = "rrhf"\ntemperature = 0.5') == alone + 2  # train and test


def test_the_pool_is_drawn_as_the_evaluation_draws(write: Write) -> None:
    """So the best of one of the pool is the initial policy that is evaluated beside it."""
    text = "[evaluation]\ntemperature = 0.9\ntop_k = 50\nmax_new_tokens = 24\n[methods.sft]"
    stages = {stage.name: stage for stage in make_plan(load_experiment(write(text))).stages}
    pool, arena = stages["best-of-n pool, seed 0"].settings, stages["evaluate base, seed 0"].settings["evaluation"]
    how = ("temperature", "top_k", "max_new_tokens", "stop", "sampler", "dtype")
    assert {key: pool[key] for key in how} == {key: arena[key] for key in how}
    assert (pool["top_k"], pool["top_p"]) == (50, 1.0)


def test_rows_that_search_alike_share_candidates_over_seeds_and_temperatures(write: Write) -> None:
    def samples(text: str) -> list[Stage]:
        return [stage for stage in make_plan(load_experiment(write(text))).stages if stage.kind == "sample"]

    rows = [f'[methods.{name}]\nkind = "rrhf"\npolicy = "{name}"\n' for name in POLICIES]
    whole = "".join(rows)
    pools = {f"best-of-n pool, seed {seed}" for seed in (0, 1)}
    drawn = {f"candidates for {s} prompts (n=4, T=0.8), seed {seed}" for s in ("train", "test") for seed in (0, 1)}
    ways = ("beam search, beams=4", "diverse beam search, beams=4, groups=4, penalty=1.0")
    beams = {f"candidates for {split} prompts ({way})" for split in ("train", "test") for way in ways}
    found = samples(f"seeds = [0, 1]\n{whole}")
    assert sorted(stage.name for stage in found) == sorted(pools | drawn | beams)
    cold = samples(f"seeds = [0, 1]\n[sampling]\ntemperature = 0.3\ntop_p = 0.5\n{whole}")
    assert {stage.key for stage in cold} == {stage.key for stage in found}
    assert {s.settings["sampler"] for s in found if "beam" in s.name} == {choose_backend("transformers").identity}
    one, other = ({s.key for s in samples('[methods.rrhf]\npolicy = "DP"\n' + more)} for more in ("", "beams = 8"))
    assert len(one & other) == 1  # the pool


def test_another_seed_makes_nothing_again_that_belongs_to_the_world() -> None:
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


def test_a_data_file_that_moved_is_the_same_data(write: Write, tmp_path: Path) -> None:
    row = '{"prompt": "\\n\\nHuman: Why?\\n\\nAssistant:", "chosen": " So.", "rejected": " No."}'
    path = write("", "experiment.toml")
    words = [
        "data.source=files",
        *(f"{model}.source=scratch" for model in ("policy", "reward_model", "perplexity_model")),
    ]
    keys = [
        [stage.key for stage in make_plan(load_experiment(path, [*words, f"data.path={file}"])).stages]
        for file in (write(row, "here.jsonl"), write(row, "there.jsonl"))
    ]
    assert keys[0] == keys[1]


def test_a_data_file_with_other_rows_is_other_data(write: Write) -> None:
    def key(content: str) -> str:
        path = write(content, "pairs.jsonl")
        overrides = [f"{part}.source=scratch" for part in ("policy", "reward_model", "perplexity_model")]
        return plan("data.source=files", f"data.path={path}", *overrides).stages[0].key

    assert key("1") == key("1")
    assert key("1") != key("2")


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
    body = "".join(f"{key} = {value}\n" for key, value in keys.items())
    return "".join(f'[methods.{name}]\nkind = "rrhf"\n{body}' for name in names)


def test_each_round_is_the_whole_of_the_experiment_with_fewer(write: Write) -> None:
    rows = {"dp": "DP", "ip1": "IP-1", "ip2": "IP-2", "ip3": "IP-3"}
    found = rows_plan(write, "seeds = [4, 5]\n" + "".join(rrhf(n, policy=f'"{p}"') for n, p in rows.items()))
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
    alone = rows_plan(write, "seeds = [4, 5]\n" + rrhf("x", policy='"IP-3"'))
    names = [stage.name for stage in alone.stages if stage.kind == "train"]
    assert names == [f"train {which}x, seed {seed}" for seed in (4, 5) for which in ("round 1 of ", "round 2 of ", "")]
    assert {stage.key for stage in alone.stages} < {stage.key for stage in found.stages}


def test_a_row_samples_and_is_measured_from_where_it_starts(write: Write) -> None:
    policies = f'{RAW}[policies.tuned]\nsource = "methods.sft"\n'
    rows = "[methods.sft]\n[methods.plain]\nkind = 'rrhf'\n" + rrhf("from_raw", initial='"raw"')
    rows += rrhf("from_tuned", initial='"tuned"') + "[methods.tuned_ppo]\nkind = 'ppo'\ninitial = 'tuned'\n"
    rows += "[methods.best]\nkind = 'best_of_n'\nn = 4\ninitial = 'raw'\n"
    found = rows_plan(write, f"seeds = [7, 1]\n{policies}{rows}")
    evaluations, models = evaluated(found), trained(found)
    starts = {row: stage.inputs["policy"].name for row, stage in evaluations.items()}
    of_row = {"from_raw": "raw policy", "raw": "raw policy", "best": "raw policy"}
    of_row |= dict.fromkeys(("from_tuned", "tuned_ppo", "tuned"), "train sft, seed 7")  # the first seed's, for all
    of_row |= dict.fromkeys(("base", "sft", "plain"), "policy")
    assert starts == {(row, seed): start for row, start in of_row.items() for seed in (7, 1)}
    for row, model in models.items():
        assert model.inputs["policy"].key == evaluations[row].inputs["policy"].key
        if model.settings["method"]["kind"] == "rrhf":
            assert sampled(model).inputs["policy"].key == evaluations[row].inputs["policy"].key
    assert evaluations["tuned", 1].inputs["policy"].key == models["sft", 7].key != models["sft", 1].key
    assert {row for row, _ in evaluations} - {row for row, _ in models} == {"base", "raw", "tuned", "best"}


def test_policies_that_read_otherwise_shape_the_prompts_and_others_do_not(write: Write) -> None:
    def roles(text: str) -> list[str]:
        prompts = next(stage for stage in rows_plan(write, text).stages if stage.kind == "prompts")
        return sorted(set(prompts.inputs) - {"data", "policy"})

    assert roles("[policies.a]\nsource = 'methods.sft'\n[methods.sft]\n" + RAW) == []
    assert roles("[policies.a]\nsource = 'toy'\nscratch = { layers = 3 }") == []
    assert roles("[policies.a]\nsource = 'toy'\nscratch = { context = 256 }") == ["policy 1"]
    assert roles("[policies.a]\nsource = 'org/a'\n[policies.b]\nsource = 'org/b'") == ["policy 1", "policy 2"]
    assert roles("[policies.a]\nsource = 'org/a'\n[policies.b]\nsource = 'org/a'") == ["policy 1"]
    assert roles("[policy]\nsource = 'org/a'\n[policies.b]\nsource = 'org/a'") == []


def test_rows_of_one_sampling_policy_share_candidates_whatever_else_they_change(write: Write) -> None:
    ablation = trained(make_plan(load(ROOT / "experiments" / "rank_ablation.toml", write)))
    assert len({sampled(model).key for model in ablation.values()}) == 1  # over 6 rows and 3 seeds
    assert len({model.key for model in ablation.values()}) == len(ablation) == 18
    found = make_plan(load(ROOT / "experiments" / "sampling_quality.toml", write))
    models = trained(found)
    assert sampled(models["d", 0]).key == sampled(models["dp", 1]).key
    assert sampled(models["bp", 0]).key != sampled(models["dp", 0]).key != sampled(models["raw_dp", 0]).key
    # Three seeds. Of the pool of best-of-n one a seed; two searches (dp = d, bp) of each of three initial policies, on
    # training and evaluation prompts; the second round of ip2 (= ip3's) and the third of ip3, each seed and both
    # splits. p samples nothing, the online rows while they train.
    assert sum(stage.kind == "sample" for stage in found.stages) == 3 * 1 + 3 * 2 * 2 + 2 * 3 * 2
    assert len({model.key for model in models.values()}) == 3 * (1 + 14)  # sft, and the rows that train on candidates


def test_what_rows_and_policies_are_called_and_what_is_claimed_of_them_changes_no_key(write: Write) -> None:
    text = (
        "[policies.first]\nsource = 'org/z'\n[policies.second]\nsource = 'org/a'\n"
        "[policies.third]\nsource = 'methods.row'\n[methods.row]\nkind = 'sft'\n"
        + rrhf("other", initial='"first"', policy='"IP-2"')
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
        text = f"[judge]\n{RAW}[methods.sft]\n[sources.{name}]\n{table}\n[methods.rrhf]\nsources = ['{name}']\n{row}"
        return {stage.key: stage.kind for stage in rows_plan(write, text).stages}

    one, other = keys("one"), keys("other")
    assert {kind for key, kind in one.items() if key not in other} == again
    assert len(one) == len(other)


def test_a_source_samples_the_model_that_it_names(write: Write) -> None:
    tables = {"of_raw": "raw", "of_tuned": "tuned", "of_row": "sft", "again": "dp"}
    text = f"seeds = [3, 4]\n{RAW}[policies.tuned]\nsource = 'methods.sft'\n[methods.sft]\n" + rrhf("dp", policy='"DP"')
    text += "".join(f"[sources.{name}]\nmodel = '{model}'\npolicy = 'DP'\n" for name, model in tables.items())
    text += "[methods.sources]\nkind = 'rrhf'\nsources = ['model', 'rejected', 'of_raw', 'of_tuned', 'of_row', 'again']"
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


def test_whose_scores_a_row_trains_on(write: Write) -> None:
    file = write("{}", "responses.jsonl")
    moved, changed = write("{}", "moved.jsonl"), write("{ }", "changed.jsonl")

    def row(scored_by: str, path: Path = file, *overrides: str) -> tuple[Plan, Stage]:
        text = f"[judge]\n[sources.mine]\nfile = '{path}'\n[methods.rrhf]\nsources = ['mine']\n{scored_by}"
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


def test_how_candidates_are_scored_while_training_is_no_part_of_offline_rows(write: Write) -> None:
    found = rows_plan(write, rrhf("a", policy='"OP-8"') + rrhf("b", policy='"OP-8+KL"') + rrhf("c", policy='"SP"'))
    models = {row: stage for (row, _), stage in trained(found).items()}
    assert "sampling" not in models["c"].settings
    for row in ("a", "b"):
        assert not [role for role in models[row].inputs if role.startswith("scores ")]
        assert models[row].settings["sampling"]["max_new_tokens"] == 64
    assert models["a"].key != models["b"].key
    assert set(found.test_scores) == {(row, 0) for row in "abc"}
    assert [found.test_scores[row, 0].keys() for row in "abc"] == [set(), set(), {"model"}]


def test_a_long_chain_of_rows_is_planned_row_by_row(write: Write) -> None:
    """Each row is used three times by the next: planned anew each time, 24 rows would never come to an end."""
    text = "[methods.r0]\nkind = 'sft'\n"
    for i in range(1, 24):
        text += f"[policies.p{i}]\nsource = 'methods.r{i - 1}'\n[sources.s{i}]\nmodel = 'r{i - 1}'\n"
        text += rrhf(f"r{i}", initial=f'"p{i}"', policy='"IP-2"', sources=f'["model", "s{i}"]')
    found = rows_plan(write, text)
    assert sum(stage.kind == "train" for stage in found.stages) == 1 + 23 * 2
