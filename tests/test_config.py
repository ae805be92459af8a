"""Experiment files are read whole, report all faults at once, and compose and inherit candidates."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rrhf_bench.errors import ConfigError
from rrhf_bench.pipeline.stage_graph import make_plan
from rrhf_bench.registry import METHODS, settings_class
from rrhf_bench.settings.candidates import RECIPES
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import MethodSettings, OfflineSettings, candidates_of
from rrhf_bench.settings.reading import load_experiment, parse_method

ROOT = Path(__file__).parents[1]

Write = Callable[..., Path]


def faults(path: Path, *overrides: str) -> dict[str, str]:
    """Return the key path of each line of the error, with the rest of the line."""
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    parts = [line.removeprefix(f"{path}: ").partition(": ") for line in lines]
    found = {place: rest for place, _, rest in parts}
    assert len(found) == len(lines)
    return found


def of_row(experiment: Experiment, row: str) -> dict[str, Any]:
    """Return every key of a row's candidates."""
    candidates = candidates_of(experiment.methods[row])
    assert candidates is not None
    return candidates.model_dump()


# Loading


def test_an_empty_file_is_a_whole_experiment_named_after_its_file(write: Write) -> None:
    experiment = load_experiment(write("", "mine.toml"))
    assert experiment == Experiment(name="mine")
    assert experiment.data.source == experiment.policy.source == experiment.reward_model.source == "toy"
    assert experiment.seeds == (0,)
    assert experiment.candidates.sources == ("model", "chosen", "rejected")
    assert experiment.evaluation.decoding == ("greedy", "sample")


def test_a_file_that_extends_another_says_only_what_differs(write: Write) -> None:
    methods = "[methods.rrhf]\nlr = 0.5\nepochs = 7\n[methods.sft]"
    write(f'name = "base"\nseeds = [1, 2]\n[candidates]\nn = 8\ntop_k = 5\n{methods}', "base.toml")
    write('extends = "base.toml"\n[candidates]\nn = 3', "middle.toml")
    experiment = load_experiment(write('extends = "middle.toml"\nseeds = [4]\n[methods.rrhf]\nlr = 0.25', "top.toml"))
    assert experiment.name == "top"  # never the name of the file below
    assert experiment.seeds == (4,)  # a list is replaced, not lengthened
    assert experiment.candidates.arguments() == {"n": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 5}
    rrhf = experiment.methods["rrhf"]
    assert (rrhf.lr, rrhf.epochs, list(experiment.methods)) == (0.25, 7, ["rrhf", "sft"])


def test_extends_is_relative_to_the_file_that_says_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write("seeds = [5]", "below/base.toml")
    assert load_experiment(write('extends = "below/base.toml"')).seeds == (5,)


def test_a_missing_file_below_is_named(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_experiment(write('extends = "none.toml"'))


def test_later_files_replace_earlier_ones_and_the_file_itself_replaces_all(write: Write) -> None:
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
    with pytest.raises(ConfigError, match=r"^\S*a\.toml: extends: .*b\.toml"):
        load_experiment(path)


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


@pytest.mark.parametrize("override", ["seeds", ".lr=1", "name.x=1"])
def test_an_override_that_cannot_be_applied_is_named(write: Write, override: str) -> None:
    assert [*faults(write('name = "a"'), override)] == [f"--set {override}"]


PUBLISHED = sorted((ROOT / "experiments").glob("*.toml"))


@pytest.fixture(params=PUBLISHED, ids=[path.name for path in PUBLISHED])
def published(request: pytest.FixtureRequest, write: Write) -> Experiment:
    """An experiment of the repository, with a data file where the command line is to name one."""
    own_data = tomllib.loads(request.param.read_text()).get("data", {}).get("source") == "files"
    return load_experiment(request.param, [f"data.path={write('', 'pairs.jsonl')}"] if own_data else [])


def test_every_experiment_of_the_repository_plans_as_its_resolved_file(published: Experiment, write: Write) -> None:
    text = published.to_toml()
    assert "extends" not in text
    resolved = load_experiment(write(text, "resolved.toml"))
    assert resolved == published
    assert resolved.to_toml() == text
    plan = make_plan(published)
    assert [stage.key for stage in make_plan(resolved).wanted] == [stage.key for stage in plan.wanted]
    kinds = {stage.kind for stage in plan.stages}
    assert kinds >= {"data", "model", "reward model", "evaluate"} | ({"train"} if published.methods else set())
    assert len({stage.name for stage in plan.stages}) == len(plan.stages)  # a person can tell the stages apart


def test_an_experiment_is_frozen(write: Write) -> None:
    experiment = load_experiment(write("[methods.rrhf]"))
    for part, key in ((experiment, "seeds"), (experiment.candidates, "n"), (experiment.methods["rrhf"], "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, 1)


def test_the_key_of_a_method_is_its_kind_unless_it_says_so(write: Write) -> None:
    experiment = load_experiment(write('[methods.ppo]\n[methods.short]\nkind = "rrhf"\nepochs = 1'))
    assert [(name, method.kind) for name, method in experiment.methods.items()] == [("ppo", "ppo"), ("short", "rrhf")]


def test_a_method_is_parsed_from_words() -> None:
    method = parse_method("rrhf", ["lr=1e-4", "variant=official", "candidates.n=9", "candidates.recipe=DP"])
    assert method.model_dump(include={"lr", "variant"}) == {"lr": 1e-4, "variant": "official"}
    assert method == parse_method("rrhf", ["lr=1e-4", "variant=official", "candidates.recipe=DP"])
    with pytest.raises(ConfigError, match=r"^method\.epochs: .*\nmethod\.lrr: .*'lr'\?$"):
        parse_method("rrhf", ["lrr=1", "epochs=0"])
    with pytest.raises(ConfigError, match=rf"{', '.join(METHODS)} or .*'ppo'\?$"):
        parse_method("dpp", [])  # the hint is last


def test_a_row_has_candidates_if_and_only_if_its_method_requires_them() -> None:
    for kind in METHODS:
        settings = settings_class(kind)
        field = settings.model_fields.get("candidates")
        assert ("candidates" in settings.requires) == (field is not None and field.default is not None)
    with pytest.raises(TypeError, match="candidates"):
        type("Bad", (OfflineSettings,), {"requires": frozenset({"candidates"}), "__annotations__": {}})


# Faults


def test_every_fault_of_a_file_is_found_at_once(write: Write) -> None:
    path = write(
        """
        name = "two words"
        sedes = [1]
        [data]
        train_prompts = "many"
        [candidates]
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
        "methods.rrhf.lrr", "methods.rrhf.lr", "methods.ppoo.kind", "methods.sft", "name", "sedes",
        "data.train_prompts", "candidates.temprature", "candidates.n", "evaluation.decoding.0", "--set nonsense",
    }  # fmt: skip
    assert faults(path, "nonsense").keys() == expected


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sedes", "seeds"),
        ("policy.scratch.hiden", "hidden"),
        ("data.toy.preference", "preferences"),
        ("methods.rrhf.varient", "variant"),
        ("methods.rrhf.candidates.source", "sources"),
        ("zzz", None),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(write: Write, key: str, nearest: str | None) -> None:
    (found,) = faults(write("[methods.rrhf]"), f"{key}=1").items()
    assert found[0] == key
    assert found[1].startswith("unknown key")
    assert found[1].endswith(f" {nearest!r}?") if nearest else "did you mean" not in found[1]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seeds", "3", "valid tuple"),
        ("seeds", "[]", "at least 1"),
        ("data.train_prompts", "5.0", "valid integer"),  # nothing is converted
        ("data.train_prompts", "true", "valid integer"),
        ("candidates.temperature", "'1'", "valid number"),
        ("candidates.sources", "'model'", "valid tuple"),
        ("candidates.strategy", "'beams'", "sample, beam, diverse-beam"),
        ("candidates", "3", "table"),
        ("sampling.backend", "'sglang'", "'vllm' or 'transformers'"),
        ("methods.rrhf.variant", "'papers'", "'paper', 'intended' or 'official'"),
        ("methods.rrhf.candidates", "3", "table"),
        ("methods.rrhf.candidates.n", "0", "greater than or equal to 1"),
        ("methods.rrhf.candidates.recipe", "[1]", "BP, DP, SP, D, P, B, IP-n, OP-k, OP-k+KL"),
        ("data", "3", "dictionary"),
        ("policy.scratch.lr", "nan", "expected a finite number"),
    ],
)
def test_a_wrong_value_names_key_found_and_allowed(write: Write, key: str, value: str, words: str) -> None:
    (found,) = faults(write(""), f"{key}={value}").items()
    assert found[0] == key
    assert found[1].startswith("found ")
    assert words in found[1]


@pytest.mark.parametrize("kind", ["sft", "rrhf", "ppo"])
def test_a_rate_whose_first_step_is_beyond_float32_is_refused(write: Write, kind: str) -> None:
    """AdamW divides the rate by 1 - betas[0] and would stop with an error of its own."""
    for rate, betas, bound in (3.5e37, [0.9, 0.999], "3.4e+37"), (1e35, [0.9999, 0.999], "3.4e+34"):
        table = f"[methods.{kind}]\nbetas = {betas}\nlr = "
        assert bound in faults(write(f"{table}{rate}"))[f"methods.{kind}.lr"]
        load_experiment(write(f"{table}{rate / 10}"))
    assert [*faults(write("[reward_model.training]\nlr = 1e38"))] == ["reward_model.training.lr"]
    for betas in ([1.0, 0.9], [0.9, 1.0], [-0.1, 0.9]):
        (place,) = faults(write(f"[methods.{kind}]\nbetas = {betas}"))
        assert place.startswith(f"methods.{kind}.betas.")


RAW = '[policies.raw]\nsource = "toy-raw"\n'
ROW = '[methods.rrhf]\ncandidates = { sources = ["model", "s"] }\n'
GIVEN = "".join(f'[{model}]\nsource = "a"\n' for model in ("policy", "reward_model", "perplexity_model"))
MINE = '[sources.mine]\nfile = "FILE"\n[methods.rrhf.candidates]\nsources = '


def row(candidates: str) -> str:
    return f"[methods.rrhf]\ncandidates = {{ {candidates} }}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Data, models, evaluation.
        ('name = "store"', {"name": "store"}),
        ("seeds = [1, 1]", {"seeds": "[1, 1]"}),
        ('[data]\nsource = "hf"', {"data.source": '"toy", "toy-reviews", "files" and "hub:'}),
        ('[data]\nsource = "files"', {"data.path": "missing"}),
        ('[data]\nsource = "files"\npath = "none.jsonl"', {"data.path": "'none.jsonl'"}),
        (
            '[data]\nsource = "hub:a/b"\n[reward_model]\nsource = "a"\n[perplexity_model]\nsource = "a"',
            {"policy.source": 'data.source = "toy"'},
        ),
        ("[policy.scratch]\nheads = 3", {"policy.scratch": "3 heads"}),
        ('[policy]\nsource = "methods.sft"\n[methods.sft]', {"policy.source": "[policies]"}),
        ('[reward_model]\nlayout = "value-head"', {"reward_model.layout": '"classifier"'}),
        ('[judge]\nsource = "endpoint"', {"judge.endpoint": "base_url"}),
        ("[evaluation]\npairs = 3", {"evaluation.pairs": "evaluation.prompts (300)"}),
        ("[evaluation]\npool_prompts = 301", {"evaluation.pool_prompts": "300"}),
        (
            '[runtime]\nautocast = "bfloat16"\n[policy]\nsource = "org/model"\ndtype = "bfloat16"',
            {"runtime.autocast": "bfloat16"},
        ),
        ("[data]\npath = 'FILE'", {"data.path": "'toy'"}),
        (
            "[data]\nsource = 'files'\npath = 'FILE'\nsplit = 'test'\nsubset = 'a'\nrevision = 'b'\n" + GIVEN,
            dict.fromkeys(("data.split", "data.subset", "data.revision"), "'files'"),
        ),
        (
            '[reward_model]\nsource = "a"\nlayout = "value-head"\ntemplate = "chat"\nlabel = "b"\npad_token = "c"',
            dict.fromkeys(("reward_model.template", "reward_model.label", "reward_model.pad_token"), "value-head"),
        ),
        ("[data]\nsource = 'hub:a/b'\npath = 'FILE'\n" + GIVEN, {"data.path": "'hub:a/b'"}),
        (
            "[data]\nsource = 'toy-reviews'\nsubset = 'a'\nfaulty_rows = 'drop'\nreply_words = 9",
            dict.fromkeys(("data.subset", "data.faulty_rows", "data.reply_words"), "'toy-reviews'"),
        ),
        ("[evaluation]\ndecoding = ['greedy', 'greedy']", {"evaluation.decoding": "once only"}),
        # Keys of models trained here, which have them from elsewhere.
        (
            '[runtime]\nautocast = "bfloat16"\n[policy]\ndtype = "bfloat16"\nmax_length = 64\npad_token = "<eos>"',
            {"policy.dtype": "runtime.autocast", "policy.max_length": "scratch.context", "policy.pad_token": ""},
        ),
        (f'{RAW}dtype = "float16"', {"policies.raw.dtype": "runtime.autocast"}),
        ("[perplexity_model]\ndtype = 'bfloat16'\nmax_length = 64",
         {"perplexity_model.dtype": "float32; remove the key", "perplexity_model.max_length": "scratch.context"}),
        ('[perplexity_model]\nsource = "org/model"\npad_token = "a"', {"perplexity_model.pad_token": "masked"}),
        (
            '[reward_model]\nlabel = "a"\ndtype = "float16"\n[reward_models.b]\npad_token = "a"\ntemplate = "raw"',
            dict.fromkeys(
                ("reward_model.label", "reward_model.dtype", "reward_models.b.pad_token", "reward_models.b.template"),
                "a reward model trained here",
            ),
        ),
        ('[runtime]\nkernels = "liger"\ndevice = "cpu"', {"runtime.kernels": "liger"}),
        ("[methods.sft]\nlora = { targets = [] }", {"methods.sft.lora.targets": "found []"}),
        # Rows and what they start from.
        ("[methods.base]\nkind = 'sft'", {"methods.base": "base, chosen, rejected"}),
        ("[methods.reply]\nkind = 'sft'\n[policies.reply]", {"methods.reply": "taken", "policies.reply": "taken"}),
        ("[methods.sft]\n[methods.rrhf]\ninitial = 'sft'", {"methods.rrhf.initial": "none here"}),
        (f"{RAW}[methods.rrhf]\ninitial = 'rwa'", {"methods.rrhf.initial": "are raw; did you mean 'raw'?"}),
        ("[policies.sft]\n[methods.sft]", {"policies.sft": "taken"}),
        ("[policies.policy]\n[policies.base]", {"policies.policy": "taken", "policies.base": "taken"}),
        ("[policies.'my own']\nsource = 'scratch'", {"policies.my own": "letters, digits, - and _"}),
        (
            '[policies.a]\nsource = "methods.best_of_n"\n[methods.sft]\n[methods.best_of_n]',
            {"policies.a.source": "are methods.sft"},
        ),
        (
            '[policies.a]\nsource = "methods.sft"\ndtype = "bfloat16"\npart = "Alpaca-sft"\n[methods.sft]',
            {"policies.a.dtype": "no effect"},
        ),
        (f"{RAW}scratch = {{ layers = 3 }}", {"policies.raw.scratch": "[policy.scratch]"}),
        ('[policies.a]\nsource = "org/model"\ntemplate = "chat"', {"policies.a.template": "'hh'"}),
        ("[defaults.rhf]\nlr = 0.1", {"defaults.rhf": "rrhf, sft, "}),
        ("[defaults]\nrrhf = 3\n[methods.rrhf]", {"defaults.rrhf": "found 3"}),
        ("defaults = 3\n[methods.rrhf]", {"defaults": "[defaults.rrhf]"}),
        ('[report]\nagainst = "best_of_n"\n[methods.best_of_n]\n[methods.rrhf]', {"report.against": "are rrhf"}),
        (
            "[defaults.rrhf]\nlr = -1.0\n[methods.rrhf]\n[methods.b]\nkind = 'rrhf'",
            {"defaults.rrhf.lr": "greater than 0"},
        ),
        ('[defaults.rrhf]\nkind = "sft"\n[methods.rrhf]', {"defaults.rrhf.kind": "'sft'"}),
        # Candidates: each strategy has its own keys.
        ("[candidates]\nbeams = 8", {"candidates.beams": 'strategy = "sample"'}),
        (row('recipe = "BP", n = 8'), {"methods.rrhf.candidates.n": 'strategy = "beam"; allowed are sources, '}),
        (row('recipe = "DP", temperature = 0.8'), {"methods.rrhf.candidates.temperature": '"diverse-beam"'}),
        (row('sources = ["chosen", "rejected"], n = 8'), {"methods.rrhf.candidates.n": 'without "model" in sources'}),
        (row('recipe = "P", rounds = 2'), {"methods.rrhf.candidates.rounds": 'without "model" in sources'}),
        (row('recipe = "DP", beams = 6'), {"methods.rrhf.candidates.groups": "6 beams do not divide into 4 groups"}),
        ('[candidates]\nrecipe = "DP"\nbeams = 6\n[methods.rrhf]\nlr = 0.5', {"candidates.groups": "6 beams"}),
        (row("temperature = 0.0"), {"methods.rrhf.candidates.temperature": "n = 1"}),
        (row("temperature = 1e-320"), {"methods.rrhf.candidates.temperature": "0 (greedy) or at least 0.01"}),
        ("[evaluation]\ntemperature = 1e-5", {"evaluation.temperature": "0.01"}),
        (row("rounds = 2, refresh = 8"), {"methods.rrhf.candidates.rounds": "refresh"}),
        (row("reward_kl = 0.1"), {"methods.rrhf.candidates.reward_kl": "refresh"}),
        (row("permute_rewards = true, refresh = 8"), {"methods.rrhf.candidates.permute_rewards": "refresh"}),
        *(
            (row(f'recipe = "{name}"'), {"methods.rrhf.candidates.recipe": f"'{name}'; allowed are BP, "})
            for name in ("dp", "OP-0", "IP-x", "IP-0", "IP-100", "OP-", "OP-8+kl")
        ),
        # Candidates: where they come from, and who scores them.
        (row('sources = ["chosen"]'), {"methods.rrhf.candidates": "k = 1 "}),
        ("[candidates]\nn = 1\n" + row('sources = ["model"]'), {"methods.rrhf.candidates": "k = 1 "}),
        (row('sources = ["mine"]'), {"methods.rrhf.candidates.sources": "model, chosen, rejected, reply"}),
        (row('sources = ["model", "chosen", "model"]'), {"methods.rrhf.candidates.sources": "'model' twice"}),
        (row('sources = ["model", "reply"]'), {"methods.rrhf.candidates.sources": '"chosen", "rejected"'}),
        (row('scored_by = "judge"'), {"methods.rrhf.candidates.scored_by": "[judge]"}),
        (
            "[judge]\n" + row('recipe = "OP-8", scored_by = "judge"'),
            {"methods.rrhf.candidates.scored_by": "the reward model"},
        ),
        (f"{MINE}['mine', 'chosen']\nscored_by = 'file'", {"methods.rrhf.candidates.scored_by": "['mine']"}),
        # A row without candidates.
        *(
            (f"[{table}.{kind}]\n{key} = 1", {f"{table}.{kind}.{key}": "unknown key; allowed are kind, initial, "})
            for table in ("methods", "defaults")
            for kind, key in (
                ("sft", "n"), ("sft", "candidates"), ("ppo", "top_k"), ("ppo", "max_length"),
                ("best_of_n", "temperature"),
            )
        ),
        # Further sources.
        ("[sources.model]\nmodel = 'rrhf'\n[methods.rrhf]", {"sources.model": "model, chosen, rejected, reply"}),
        (f"{ROW}[sources.s]\nmodel = 'rw'\n{RAW}", {"sources.s.model": "are raw, rrhf; did you mean 'raw'?"}),
        (f"{ROW}[sources.s]\nmodel = 'best_of_n'\n[methods.best_of_n]", {"sources.s.model": "are rrhf"}),
        (f"{ROW}[sources.s]\nn = 2", {"sources.s.model": "missing"}),
        (f"{ROW}[sources.s]\nfile = 'FILE'\nn = 2\n", {"sources.s.n": "of responses from a file"}),
        (f"{ROW}[sources.s]\nfile = 'FILE'\nmodel = 'rrhf'", {"sources.s.model": "of responses from a file"}),
        (f"{ROW}[sources.s]\nfile = 'none.jsonl'", {"sources.s.file": "'none.jsonl'"}),
        (f"{RAW}{ROW}[sources.s]\nmodel = 'raw'\nsources = ['model']", {"sources.s.sources": "model, strategy, n"}),
        (f"{RAW}{ROW}[sources.s]\nmodel = 'raw'\nrecipe = 'P'", {"sources.s.recipe": "BP, DP, SP, D, B"}),
        (
            f"{RAW}{ROW}[sources.s]\nmodel = 'raw'\nstrategy = 'beam'\ntemperature = 0.5",
            {"sources.s.temperature": 'strategy = "beam"'},
        ),
        (f"{RAW}{ROW}[sources.s]\nmodel = 'raw'\ntemperature = 0.0", {"sources.s.temperature": "n = 1"}),
        # Claims and comparisons.
        ("[claims.difference]\nhigher = 'rhf'\nlower = 'base'\nmargin = 0.0\n[methods.rrhf]",
         {"claims.difference": "rrhf"}),
        ("[claims.diference]\nmargin = 0.0", {"claims.diference.kind": "'difference'?"}),
        ("[report]\nprimary = [['rrhf', 'bas']]\n[methods.rrhf]", {"report.primary": "'base'?"}),
        ("[report]\nprimary = [['rrhf', 'rrhf']]\n[methods.rrhf]", {"report.primary": "both sides"}),
        (
            "[report]\nprimary = [['rrhf', 'base'], ['base', 'rrhf']]\n[methods.rrhf]",
            {"report.primary": "['base', 'rrhf'] twice"},
        ),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_with_its_key(write: Write, text: str, expected: dict[str, str]) -> None:
    found = faults(write(text.replace("FILE", str(write("", "responses.jsonl")))))
    assert found.keys() == expected.keys()
    for place, words in expected.items():
        assert words in found[place]


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
    text = re.sub(r"SOURCES (\w)", r'kind = "rrhf"\ncandidates = { sources = ["\1", "chosen"] }', text)
    (found,) = faults(write(text)).items()
    assert found[0] == f"methods.{row}"
    assert f": {ways}; " in found[1]


def test_a_faulty_table_is_not_called_missing_where_it_is_named(write: Write) -> None:
    rows = "[methods.rrhf]\ninitial = 'raw'\ncandidates = { sources = ['s'], scored_by = 'judge' }\n"
    rows += "[methods.b]\nkind = 'sft'\nlrr = 1"
    claim = '[claims.difference]\nhigher = "b"\nlower = "raw"\nmargin = 0.0\n[policies.c]\nsource = "methods.b"'
    tables = '[policies.raw]\nsorce = "toy-raw"\n[sources.s]\nmodle = "b"\n[judge]\nsauce = "toy"'
    found = faults(write(f"{rows}\n{claim}\n{tables}"))
    assert found.keys() == {"methods.b.lrr", "policies.raw.sorce", "judge.sauce", "sources.s.model", "sources.s.modle"}


def test_a_fault_of_the_shared_candidates_is_found_once(write: Write) -> None:
    text = f"{RAW}[candidates]\nstrategy = 'beams'\n{row('beams = 8')}[sources.s]\nmodel = 'raw'\ngroups = 2"
    assert [*faults(write(text))] == ["candidates.strategy"]


def test_contradictions_are_found_beside_a_faulty_key_elsewhere(write: Write) -> None:
    path = write("[methods.rrhf]")
    chosen = 'methods.rrhf.candidates.sources=["chosen"]'
    found = faults(path, "data.train_prompts=0", chosen, "evaluation.pairs=1")
    assert [*found] == ["data.train_prompts", "evaluation.pairs", "methods.rrhf.candidates"]
    # [evaluation] cannot be read at all: what it would contradict is not known.
    assert [*faults(path, "evaluation.prompts=x", "evaluation.pairs=1")] == ["evaluation.prompts"]


# Candidates


PAIR = ("chosen", "rejected")
OFFLINE = {"scored_by": "reward model", "rounds": 1, "refresh": 0, "reward_kl": 0.0}
BEAM = {**OFFLINE, "strategy": "beam", "beams": 4}
DIVERSE = {**OFFLINE, "strategy": "diverse-beam", "beams": 4, "groups": 4, "diversity_penalty": 1.0}
TOP_P = {**OFFLINE, "strategy": "sample", "n": 4, "temperature": 0.8, "top_p": 1.0, "top_k": 0}


@pytest.mark.parametrize(
    ("keys", "expected", "k"),
    [
        ('recipe = "BP"', {"sources": ("model", *PAIR), **BEAM}, 6),
        ('recipe = "DP"', {"sources": ("model", *PAIR), **DIVERSE}, 6),
        ('recipe = "SP"', {"sources": ("model", *PAIR), **TOP_P}, 6),
        ('recipe = "D"', {"sources": ("model",), **DIVERSE}, 4),
        ('recipe = "P"', {"sources": PAIR, "scored_by": "reward model"}, 2),
        ('recipe = "B"', {"sources": ("model",), **BEAM}, 4),
        ('recipe = "IP-1"', {"sources": ("model", *PAIR), **DIVERSE}, 6),
        ('recipe = "IP-3"', {"sources": ("model", *PAIR), **DIVERSE, "rounds": 3}, 6),
        ('recipe = "OP-4"', {"sources": ("model", *PAIR), **TOP_P, "refresh": 4}, 6),
        ('recipe = "OP-32+KL"', {"sources": ("model", *PAIR), **TOP_P, "refresh": 32, "reward_kl": 0.01}, 6),
        # Keys beside a recipe take the place of its own; another strategy, of all that it reads.
        ('recipe = "DP", beams = 8, groups = 2', {"sources": ("model", *PAIR), **DIVERSE, "beams": 8, "groups": 2}, 10),
        ('recipe = "SP", n = 2', {"sources": ("model", *PAIR), **TOP_P, "n": 2}, 4),
        ('recipe = "OP-4", strategy = "beam"', {"sources": ("model", *PAIR), **BEAM, "refresh": 4}, 6),
        ('recipe = "DP", sources = ["rejected", "chosen"]', {"sources": PAIR[::-1], "scored_by": "reward model"}, 2),
    ],
)
def test_a_recipe_sets_its_keys(write: Write, keys: str, expected: dict[str, object], k: int) -> None:
    """A recipe of the row leaves no key of [candidates] in place."""
    others = '[candidates]\nsources = ["model"]\nn = 7\ntop_p = 0.9\nrefresh = 3\n'
    experiment = load_experiment(write(others + row(keys)))
    assert of_row(experiment, "rrhf") == expected
    assert experiment.responses(experiment.methods["rrhf"]) == k
    text = experiment.to_toml()
    assert "recipe" not in text
    assert load_experiment(write(text, "resolved.toml")) == experiment


@pytest.mark.parametrize("name", [*RECIPES, "IP-2", "OP-8+KL"])
def test_a_shared_recipe_equals_one_in_each_row(write: Write, name: str) -> None:
    of_all = load_experiment(write(f'[candidates]\nrecipe = "{name}"\n[methods.rrhf]'))
    of_one = load_experiment(write(row(f'recipe = "{name}"')))
    assert of_all.methods == of_one.methods


@pytest.mark.parametrize(
    ("shared", "own", "expected"),
    [
        ("n = 6\ntemperature = 0.5", "n = 2", {"n": 2, "temperature": 0.5, "top_k": 0}),
        ("", "", {"sources": ("model", *PAIR), "n": 4, "temperature": 1.0}),
        ("n = 9", 'strategy = "beam"', {"strategy": "beam", "beams": 4}),
        ('recipe = "DP"\nbeams = 8', 'strategy = "beam"', {"strategy": "beam", "beams": 8}),
        ('recipe = "DP"', 'sources = ["chosen", "rejected"]', {"sources": PAIR, "scored_by": "reward model"}),
        ('sources = ["chosen", "s"]\nn = 2', "", {"sources": ("chosen", "s"), "scored_by": "reward model"}),
        ('sources = ["chosen", "s"]\nn = 2', 'sources = ["model"]', {"sources": ("model",), "n": 2}),
        ('scored_by = "judge"', 'recipe = "SP"', {"scored_by": "judge", "temperature": 0.8}),
    ],
)
def test_a_row_inherits_the_keys_of_the_shared_table(
    write: Write, shared: str, own: str, expected: dict[str, object]
) -> None:
    text = f"{RAW}[judge]\n[sources.s]\nmodel = 'raw'\n[candidates]\n{shared}\n{row(own)}"
    experiment = load_experiment(write(text))
    found = of_row(experiment, "rrhf")
    assert found | expected == found
    if "n" not in expected:
        assert "n" not in found or "temperature" in expected
    assert load_experiment(write(experiment.to_toml(), "resolved.toml")) == experiment


def test_a_recipe_replaces_the_keys_of_a_file_below(write: Write) -> None:
    below = "[candidates]\nn = 9\ntemperature = 0.5\n[sampling]\nmax_new_tokens = 7\n[methods.rrhf]\nlr = 0.5\n"
    write(below + "candidates = { top_k = 3, rounds = 3 }", "base.toml")
    above = '[candidates]\nrecipe = "DP"\n[methods.rrhf.candidates]\nrecipe = "BP"'
    experiment = load_experiment(write(f'extends = "base.toml"\n{above}'))
    assert (experiment.candidates.n, experiment.sampling.max_new_tokens) == (4, 7)
    assert of_row(experiment, "rrhf") == {"sources": ("model", *PAIR), **BEAM}
    assert experiment.methods["rrhf"].model_dump(include={"lr"}) == {"lr": 0.5}
    path = write('extends = "base.toml"')
    assert load_experiment(path, ["candidates.recipe=DP", "methods.rrhf.candidates.recipe=BP"]) == experiment
    later = load_experiment(path, ["candidates.recipe=SP", "candidates.n=2", "methods.rrhf.candidates.recipe=D"])
    assert later.candidates.arguments() == {"n": 2, "temperature": 0.8, "top_p": 1.0, "top_k": 0}
    assert of_row(later, "rrhf")["sources"] == ("model",)
    # Another strategy drops the keys of the one below.
    searched = load_experiment(path, ["candidates.strategy=beam", 'methods.rrhf.candidates={ strategy = "beam" }'])
    assert of_row(searched, "rrhf")["beams"] == 4


def test_rows_inherit_the_defaults_of_their_kind(write: Write) -> None:
    defaults = "[defaults.rrhf]\nlr = 0.25\nepochs = 2\nbetas = [0.5, 0.6]\n"
    defaults += 'candidates = { recipe = "DP", beams = 8 }\n'
    rows = '[methods.rrhf]\n[methods.own]\nkind = "rrhf"\nlr = 0.5\ncandidates = { recipe = "SP" }\n[methods.sft]\n'
    experiment = load_experiment(write(defaults + rows))
    rrhf, own, sft = experiment.methods.values()
    assert (rrhf.lr, rrhf.epochs, rrhf.betas) == (0.25, 2, (0.5, 0.6))
    assert of_row(experiment, "rrhf") == {"sources": ("model", *PAIR), **DIVERSE, "beams": 8}
    assert (own.lr, own.epochs, own.betas) == (0.5, 2, (0.5, 0.6))
    assert of_row(experiment, "own") == {"sources": ("model", *PAIR), **TOP_P}
    assert sft == load_experiment(write("[methods.sft]")).methods["sft"]
    assert "defaults" not in experiment.to_toml()
    assert load_experiment(write(defaults + rows), ["defaults.rrhf.lr=0.125"]).methods["rrhf"].lr == 0.125
    write(defaults, "below.toml")
    above = write(f'extends = "below.toml"\n[defaults.rrhf]\nlr = 0.75\n{rows}')
    assert [m.lr for m in load_experiment(above).methods.values()] == [0.75, 0.5, sft.lr]


def test_online_rows_need_a_sampler_and_a_reward_model(write: Write) -> None:
    rows = {"offline": "DP", "rounds": "IP-2", "online": "OP-8", "penalised": "OP-8+KL"}
    text = "".join(
        f'[methods.{name}]\nkind = "rrhf"\ncandidates = {{ recipe = "{recipe}" }}\n' for name, recipe in rows.items()
    )
    methods: dict[str, MethodSettings] = dict(load_experiment(write(text)).methods)
    more = {name: method.needs - method.requires for name, method in methods.items()}
    online = {"sampler", "reward"}
    assert more == {"offline": set(), "rounds": set(), "online": online, "penalised": {*online, "reference"}}


def test_a_source_inherits_the_shared_sampling_keys(write: Write) -> None:
    file = write("", "responses.jsonl")
    tables = {
        "plain": 'model = "raw"\n',
        "cold": 'model = "raw"\ntemperature = 0.25\nn = 2\n',
        "wide": 'model = "raw"\nrecipe = "DP"\nbeams = 8\n',
        "given": f'file = "{file}"\n',
    }
    text = "".join(f"[sources.{name}]\n{table}" for name, table in tables.items())
    text += row('sources = ["model", "chosen", "plain", "cold", "wide", "given"]')
    experiment = load_experiment(write(f"[candidates]\nn = 3\ntop_k = 5\nrefresh = 4\n{RAW}{text}"))
    drawn = {"model": "raw", "strategy": "sample", "top_p": 1.0, "top_k": 5}
    assert {name: source.model_dump() for name, source in experiment.sources.items()} == {
        "plain": {**drawn, "n": 3, "temperature": 1.0},
        "cold": {**drawn, "n": 2, "temperature": 0.25},
        "wide": {"model": "raw", "strategy": "diverse-beam", "beams": 8, "groups": 4, "diversity_penalty": 1.0},
        "given": {"file": str(file)},
    }
    # The file's responses, of which it is not known how many they are, count as one.
    assert experiment.responses(experiment.methods["rrhf"]) == 3 + 1 + 3 + 2 + 8 + 1
    assert load_experiment(write(experiment.to_toml(), "resolved.toml")) == experiment
