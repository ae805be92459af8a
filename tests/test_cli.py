"""The command line refuses bad input and prints what it did with good input.

Bad input ends with exit code 2 and one line a fault. The line names the file, line or key, what was found and what is
allowed. There is no traceback, and nothing is left on disk.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, make_llama, make_tokenizer

from rrhf_bench import cli as program
from rrhf_bench.data.dialogue import Template
from rrhf_bench.data.rrhf_files import load_candidates
from rrhf_bench.errors import BenchError
from rrhf_bench.pipeline.scheduler import run_plan
from rrhf_bench.pipeline.services import ModelRef
from rrhf_bench.pipeline.stage_graph import Plan, make_plan
from rrhf_bench.pipeline.store import Store, with_checksum
from rrhf_bench.records import Prompt
from rrhf_bench.rewards.hub import ClassifierReward
from rrhf_bench.rewards.input_contract import RewardContract
from rrhf_bench.settings.reading import load_experiment

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"
QUESTION = "\n\nHuman: Hi there! What is a glacier?\n\nAssistant:"
SCORED = {"query": QUESTION, "responses": [" Ice.", " A river."], "scores": [1.0, 0.0]}


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs a command, asserts that it prints and writes nothing else, and returns its errors."""

    def run(*words: object) -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        result = cli(*words)
        assert result.code == 2, result
        assert result.out == ""
        lines = result.err.splitlines()
        assert lines
        assert all(line.startswith("error: ") for line in lines), result.err
        assert sorted(tmp_path.rglob("*")) == before
        return [line.removeprefix("error: ") for line in lines]

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes JSON lines."""

    def write(*values: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    return write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def reward(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a folder of a random classifier."""

    def make() -> Path:
        from transformers import AutoModelForSequenceClassification, LlamaConfig

        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_labels=1,
            num_attention_heads=1, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(config)
        folder = tmp_path_factory.mktemp("reward")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def model(llama_folder: Callable[..., Path]) -> Path:
    return llama_folder(0)


def without(folder: Path, token: str, tmp_path: Path) -> Path:
    """A copy of a model folder whose tokenizer lacks ``pad_token`` or ``eos_token``."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    tokenizer = make_tokenizer()
    setattr(tokenizer, token, None)
    tokenizer.save_pretrained(bare)
    return bare


def sample(model: Path, prompts: Path, out: Path, *more: object) -> list[object]:
    words = ["--max-new-tokens", 8, "--backend", "transformers", "--device", "cpu", *more]
    return ["sample", "--model", model, "--prompts", prompts, "--out", out, *words]


def score(reward: Path, candidates: Path, out: Path, *more: object) -> list[object]:
    return ["score", "--reward-model", reward, "--candidates", candidates, "--out", out, "--device", "cpu", *more]


def train(method: str, model: Path, data: Path, out: Path, *more: object) -> list[object]:
    words = ["--backend", "transformers", "--device", "cpu", *more]
    return ["train", "--method", method, "--model", model, "--data", data, "--out", out, *words]


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


# Experiment files


def test_each_fault_of_an_experiment_file_is_one_line(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("sedes = [0]\n[data]\ntrain_prompts = 'many'\n")
    found = refused("run", path, "--runs", tmp_path / "runs", "--set", "candidates.n=0")
    assert sorted(line.split(": ")[1] for line in found) == ["candidates.n", "data.train_prompts", "sedes"]


class Quiet:
    """A Reporter without a terminal."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def experiment_on(path: Path, *overrides: str) -> list[str]:
    """Overrides that put the smoke experiment on a data file, with models from scratch."""
    scratch = [f"{part}.source=scratch" for part in ("policy", "reward_model", "perplexity_model")]
    sizes = ["evaluation.prompts=1", "evaluation.pairs=1", "evaluation.dev_prompts=1", "evaluation.pool_prompts=1"]
    return ["data.source=files", f"data.path={path}", "runtime.workers=1", *scratch, *sizes, *overrides]


def pair(question: str, chosen: str = " Yes.", rejected: str = " No.") -> dict[str, str]:
    asked = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": asked + chosen, "rejected": asked + rejected}


def test_a_run_that_meets_a_bad_row_names_it_and_stores_nothing(cli: Cli, rows: Any, tmp_path: Path) -> None:
    path = rows(pair("a"), pair("b", chosen=" Yes.\n\nHuman: And now?"))
    words = (word for o in experiment_on(path) for word in ("--set", o))
    result = cli("run", SMOKE, "--runs", tmp_path / "runs", *words)
    assert result.code == 2
    assert result.err.startswith(f"error: data: {path}:2: chosen: ")
    assert len(result.err.splitlines()) == 1
    assert list((tmp_path / "runs" / "store").iterdir()) == []
    assert not (tmp_path / "runs" / "smoke" / "report").exists()


# The single steps


def test_a_missing_model_is_named(refused: Any, rows: Any, out: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    prompts, scored = rows({"prompt": "Hi"}, name="prompts.jsonl"), rows(SCORED, name="scored.jsonl")
    for words in (sample(missing, prompts, out), score(missing, scored, out), train("rrhf", missing, scored, out)):
        (line,) = refused(*words)
        assert line.startswith(f"{missing}: cannot be loaded as ")


def test_a_folder_that_holds_something_is_not_overwritten(refused: Any, rows: Any, model: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    (line,) = refused(*train("rrhf", model, rows(SCORED), out))
    assert line.startswith(f"{out}: ")
    assert (out / "mine.txt").read_text() == "keep"


LONG = {"prompt": "bread " * 600}


def test_faulty_rows_are_an_error_or_counted_where_files_are_read(
    refused: Any, cli: Cli, rows: Any, model: Path, reward: Any, out: Path
) -> None:
    path = rows({"prompt": "Hi"}, LONG, {"prompt": " "}, {"prompt": "Ho"})
    (line,) = refused(*sample(model, path, out))
    assert line.startswith(f"{path}:3: prompt: the prompt is empty")
    assert "--faulty-rows drop" in line
    counts = cli(*sample(model, path, out, "--faulty-rows", "drop", "--json")).json["counts"]
    assert counts.items() >= {"rows": 4, "prompts": 3, "not_a_prompt": 1, "long_prompt": 1}.items()
    assert len(load_candidates(out, scored=False).candidates) == 2
    pairs = rows(pair("a"), pair("b", chosen=" Yes.\n\nHuman: Why?"), name="pairs.jsonl")
    words = ["--faulty-rows", "drop", "--set", "epochs=1", "--json"]
    counts = cli(*train("sft", model, pairs, out.with_name("trained"), *words)).json["counts"]
    assert counts.items() >= {"rows": 2, "kept": 1, "not_ending_with_assistant": 1}.items()
    unscored = rows(SCORED, {**SCORED, "query": QUESTION + " Done."}, name="c.jsonl")
    found = cli(*score(reward(), unscored, out.with_name("scored"), "--faulty-rows", "drop", "--json")).json
    assert (found["counts"]["not_a_prompt"], found["counts"]["prompts"]) == (1, 1)


def test_a_prompt_without_room_names_its_row_before_it_is_sampled_trained_on_or_judged(
    refused: Any, rows: Any, model: Path, reward: Any, out: Path
) -> None:
    path, judge = rows({"prompt": "Hi"}, LONG), ["--reward-model", reward(), "--max-new-tokens", 8]
    ppo = train("ppo", model, path, out, *judge, *settings("iterations=1", "rollouts=2", "minibatch=2"))
    evaluate = ["evaluate", "--model", model, "--prompts", path, "--out", out, "--backend", "transformers", *judge]
    for words in (sample(model, path, out), ppo, evaluate):
        (line,) = refused(*words)
        assert re.match(rf"{re.escape(str(path))}:2: prompt [0-9a-f]{{16}}: .* 504 ", line)


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def alternating(model: Path, tmp_path: Path) -> Path:
    """A policy whose chat template refuses a system message and two turns of one role."""
    folder = shutil.copytree(model, tmp_path / "alternating")
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    return folder


TWICE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nAssistant: Still there?\n\nHuman: Yes\n\nAssistant:"


def test_a_dialogue_that_the_chat_template_refuses_names_its_row_or_is_counted(
    refused: Any, cli: Cli, rows: Any, alternating: Path, reward: Any, out: Path
) -> None:
    drop = ["--template", "chat", "--faulty-rows", "drop", "--json"]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for prompt in (TWICE, system):
        path = rows({"prompt": "Hi"}, {"prompt": prompt})
        (line,) = refused(*sample(alternating, path, out, "--template", "chat"))
        assert line.startswith(f"{path}:2: prompt ")
        counts = cli(*sample(alternating, path, out.with_name("dropped"), *drop)).json["counts"]
        assert counts.items() >= {"prompts": 2, "refused_by_template": 1}.items()
    path = rows(SCORED, {**SCORED, "query": TWICE})
    judge = reward()
    (judge / "chat_template.jinja").write_text(ALTERNATING)
    for words in (train("rrhf", alternating, path, out), score(judge, path, out)):
        (line,) = refused(*words, "--template", "chat")
        assert line.startswith(f"{path}:2: prompt ")
    counts = cli(*score(judge, path, out.with_name("scored"), *drop)).json["counts"]
    assert counts.items() >= {"prompts": 1, "refused_by_template": 1}.items()


@pytest.mark.parametrize("faulty_rows", ["error", "drop"])
def test_an_experiment_finds_what_the_chat_template_refuses_before_it_samples(
    rows: Any, alternating: Path, tmp_path: Path, faulty_rows: str
) -> None:
    twice = {side: f"{TWICE} {side}" for side in ("chosen", "rejected")}
    path = rows(*(pair(f"question {i}") for i in range(3)), twice)
    overrides = experiment_on(path, f"data.faulty_rows={faulty_rows}", "data.train_prompts=1")
    policy = [f"policy.source={alternating}", "policy.template=chat", "reward_model.template=chat"]
    experiment = load_experiment(SMOKE, [o for o in overrides if o != "policy.source=scratch"] + policy)
    plan = make_plan(experiment)
    prompts = next(stage for stage in plan.stages if stage.kind == "prompts")
    needed = tuple(stage for stage in plan.stages if stage is prompts or stage in prompts.inputs.values())
    store = Store(tmp_path / "store")
    part = Plan(experiment, plan.backend, needed)
    if faulty_rows == "error":
        with pytest.raises(BenchError, match=rf"{re.escape(str(path))}:4: prompt "):
            run_plan(part, store, Quiet())
        return
    run_plan(part, store, Quiet())
    counts = json.loads((store.folder(prompts.key) / "about.json").read_text())["counts"]
    assert sum(counts.get(f"{split}_refused_by_template", 0) for split in ("train", "dev", "test")) == 1


def test_a_training_prompt_beyond_the_context_is_left_out_and_counted(
    refused: Any, cli: Cli, rows: Any, model: Path, out: Path
) -> None:
    long = {**SCORED, "query": f"\n\nHuman: {'bread ' * 600}\n\nAssistant:"}
    found = cli(*train("rrhf", model, rows(SCORED, long), out, "--json")).json
    assert found["counts"]["examples"] == found["counts"]["prompts_too_long"] == 1


def test_a_policy_needs_no_pad_token_and_one_that_is_named_must_be_known(
    refused: Any, cli: Cli, rows: Any, model: Path, out: Path, tmp_path: Path
) -> None:
    bare = without(model, "pad_token", tmp_path)
    path = rows({"prompt": "Hi"})
    (line,) = refused(*sample(bare, path, out, "--pad-token", "<none>"))
    assert line.startswith(f"{bare}: pad_token '<none>' ")
    assert cli(*sample(bare, path, out)).code == 0


def test_a_tokenizer_without_an_end_token_is_refused(
    refused: Any, rows: Any, model: Path, out: Path, tmp_path: Path
) -> None:
    bare = without(model, "eos_token", tmp_path)
    (line,) = refused(*sample(bare, rows({"prompt": "Hi"}), out))
    assert line.startswith(f"{bare}: ")
    assert "EOS" in line


@pytest.mark.parametrize("option", [["--label", "POSITIVE"], ["--layout", "value-head"]])
def test_a_reward_model_that_differs_from_the_options_is_named(
    refused: Any, rows: Any, reward: Any, out: Path, option: list[str]
) -> None:
    folder = reward()
    (line,) = refused(*score(folder, rows(SCORED), out, *option))
    assert line.startswith(f"{folder}: ")


def test_groups_of_equal_scores_are_refused_or_counted(
    refused: Any, cli: Cli, rows: Any, model: Path, out: Path
) -> None:
    equal = {**SCORED, "scores": [0.5, 0.5]}
    refused(*train("rrhf", model, rows(equal, equal), out))
    found = cli(*train("rrhf", model, rows(SCORED, equal), out, "--json")).json
    assert found["counts"]["groups_all_equal"] == 1


def test_equal_scores_single_replies_and_duplicates_are_counted(cli: Cli, rows: Any, reward: Any, out: Path) -> None:
    path = rows({**SCORED, "responses": [" Ice.", " Ice."]}, {**SCORED, "responses": [" Ice."]})
    counts = cli(*score(reward(), path, out, "--json")).json["counts"]
    assert counts.items() >= {"prompts": 2, "all_equal": 1, "single_response": 1, "duplicate_prompt": 1}.items()


def test_texts_that_a_reward_model_reads_in_part_are_counted(
    cli: Cli, rows: Any, model: Path, reward: Any, out: Path
) -> None:
    judge, long = reward(), " Mix the flour and the water." * 60  # it reads 256 tokens
    path = rows({**SCORED, "responses": [" Ice.", long, long]}, SCORED)
    assert cli(*score(judge, path, out, "--json")).json["counts"]["truncated"] == 1  # the same text is scored once
    assert "1 truncated" in cli(*score(judge, path, out.with_name("again"))).out
    prompts = rows({"prompt": "Hi"}, {"prompt": "bread " * 150}, name="prompts.jsonl")  # before any reply
    words = ["--reward-model", judge, "--max-new-tokens", 4, "--json"]
    evaluate = ["evaluate", "--model", model, "--prompts", prompts, "--out", out.with_name("judged"), *words]
    found = cli(*evaluate, "--backend", "transformers", "--decoding", "greedy").json
    assert found["counts"]["truncated"] == 1
    words += settings("iterations=1", "rollouts=2", "minibatch=2")
    found = cli(*train("ppo", model, prompts, out.with_name("trained"), *words)).json
    assert found["counts"]["truncated"] == 1


def test_a_reward_model_that_may_read_another_place_than_its_class_is_noted(
    cli: Cli, rows: Any, reward: Any, out: Path
) -> None:
    """Its padding is its EOS, with which the chat template ends; its class passes over both."""
    folder = reward()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(folder)
    words = score(folder, rows(SCORED), out, "--template", "chat")
    assert cli(*words).err == ""
    (line,) = cli(*words, "--pad-token", "<eos>").err.splitlines()
    assert line.startswith(f"note: {folder}: padding and EOS: ")


def test_rows_that_a_step_leaves_out_are_counted(cli: Cli, rows: Any, model: Path, out: Path) -> None:
    path = rows(pair("a"), pair("a", chosen=" Certainly."), pair("b", rejected=""), pair("c"))
    expected = {"rows": 4, "kept": 3, "duplicate_prompt": 1, "empty_reply": 1}
    assert cli(*sample(model, path, out, "--json")).json["counts"].items() >= expected.items()
    found = cli(*train("sft", model, path, out.with_name("trained"), "--set", "epochs=1", "--json")).json
    assert found["counts"].items() >= expected.items()


@pytest.mark.parametrize(
    "words",
    [
        ["--sources", "modle"],
        ["--sources", "model,model"],
        ["--temperature", 0],
        ["--temperature", "1e-320"],
        ["--max-new-tokens", 512],
        ["--top-p", 0],
        ["--groups", 3, "--strategy", "diverse-beam"],
        ["--sources", "model,chosen"],
    ],
)
def test_contradictory_options_of_sampling_are_refused(
    refused: Any, rows: Any, model: Path, out: Path, words: list[str]
) -> None:
    (line,) = refused(*sample(model, rows({"prompt": "Hi"}), out, *words))
    assert words[0] in line


def artifact(tmp_path: Path, source: Path, **said: object) -> Path:
    """The folder of an artifact that refers to a model."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    ModelRef(str(source), **said).write(folder)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    ("option", "found", "said"),
    [
        ("--dtype", "bfloat16", {}),
        ("--dtype", "float32", {"dtype": "bfloat16"}),  # also where it is the default of other models
        ("--template", "chat", {}),
        ("--pad-token", "<eos>", {}),
    ],
)
def test_an_option_that_differs_from_an_artifact_is_refused(
    refused: Any, rows: Any, model: Path, out: Path, tmp_path: Path, option: str, found: str, said: dict[str, str]
) -> None:
    stored = artifact(tmp_path, model, **said)
    (line,) = refused(*sample(stored, rows({"prompt": "Hi"}), out, option, found))
    assert line.startswith(f"{option}: found {found!r}, ")
    assert str(stored) in line
    assert str(model) in line  # on which the option can be given


@pytest.mark.parametrize(("option", "found"), [("--layout", "value-head"), ("--label", "LABEL_0")])
def test_an_option_of_a_reward_model_that_differs_from_an_artifact_is_refused(
    refused: Any, rows: Any, reward: Any, out: Path, tmp_path: Path, option: str, found: str
) -> None:
    (line,) = refused(*score(artifact(tmp_path, reward()), rows(SCORED), out, option, found))
    assert line.startswith(f"{option}: found {found!r}, ")


def test_options_equal_to_the_artifact_or_of_another_model_are_accepted(
    cli: Cli, rows: Any, model: Path, reward: Any, out: Path, tmp_path: Path
) -> None:
    """--dtype and --template are of the policy alone, --layout and --reward-pad-token of the reward model."""
    stored, judge = artifact(tmp_path, model, dtype="bfloat16", template="raw"), reward()
    prompts = rows({"prompt": QUESTION})
    assert cli(*sample(stored, prompts, out, "--dtype", "bfloat16", "--template", "raw")).code == 0
    words = ["--prompts", prompts, "--out", tmp_path / "judged", "--max-new-tokens", 4, "--backend", "transformers"]
    options = ["--layout", "classifier", "--reward-pad-token", "<pad>", "--decoding", "greedy", "--dtype", "bfloat16"]
    assert cli("evaluate", "--model", stored, "--reward-model", judge, *words, *options).code == 0


def test_a_value_head_reads_no_template_pad_token_or_label(
    refused: Any, rows: Any, reward: Any, out: Path, tmp_path: Path
) -> None:
    folder, candidates = reward(), rows(SCORED)
    for option, value in (("--reward-template", "chat"), ("--reward-pad-token", "<pad>"), ("--label", "A")):
        (line,) = refused(*score(folder, candidates, out, "--layout", "value-head", option, value))
        assert line == (f"{folder}: {option}: found {value!r}, which --layout value-head does not read; leave it out")


def test_a_raw_reward_model_scores_the_queries_as_they_are(cli: Cli, rows: Any, reward: Any, out: Path) -> None:
    folder = reward()
    RewardContract(template="raw", append_eos=False).write(folder)
    assert cli(*score(folder, rows({"query": "The film", "responses": [" was good.", " was dull."]}), out)).code == 0
    written = json.loads(out.read_text())
    assert written["query"] == "The film"
    expected = ClassifierReward.load(folder).score([Prompt("The film")] * 2, written["responses"])
    assert written["scores"] == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_raw_policy_trains_on_the_queries_as_they_are(
    cli: Cli, rows: Any, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    render = Template.render_prompt

    def recorded(self: Template, prompt: Prompt, tokenizer: Any) -> tuple[str, bool]:
        seen.append(prompt.text)
        return render(self, prompt, tokenizer)

    monkeypatch.setattr(Template, "render_prompt", recorded)
    stored = artifact(tmp_path, model, template="raw")
    data = rows({**SCORED, "query": "The film"})
    assert cli(*train("rrhf", stored, data, out, "--set", "epochs=1")).code == 0
    assert set(seen) == {"The film"}


def test_each_model_of_an_evaluation_has_its_own_options(
    cli: Cli, refused: Any, rows: Any, model: Path, reward: Any, out: Path, tmp_path: Path
) -> None:
    """Policy and initial policy pad with a token that the reward model lacks, and only they have a chat template."""
    policy = without(model, "pad_token", tmp_path)
    tokenizer = make_tokenizer(319)
    tokenizer.add_tokens(["<fill>"])
    tokenizer.pad_token = None
    tokenizer.chat_template = ALTERNATING
    tokenizer.save_pretrained(policy)
    path, judge = rows({"prompt": "Hi"}), artifact(tmp_path, reward())
    words = ["--model", policy, "--initial", policy, "--perplexity-model", policy, "--reward-model", judge]
    words = ["evaluate", *words, "--prompts", path, "--out", out, "--decoding", "sample", "--max-new-tokens", 4]
    words += ["--backend", "transformers", "--template", "chat", "--dtype", "bfloat16", "--pad-token", "<fill>"]
    (row,) = cli(*words, "--json").json["results"]
    assert abs(row["objective/kl"]) < 1e-3
    assert row["perplexity"] > 1
    for option, value in (("--reward-dtype", "bfloat16"), ("--reward-template", "chat"), ("--reward-pad-token", "<p>")):
        (line,) = refused(*words, option, value)
        assert line.startswith(f"{option}: found {value!r}, but the artifact {judge} says ")


@pytest.mark.parametrize("option", ["--reward-dtype", "--reward-template", "--reward-pad-token", "--layout", "--label"])
def test_an_option_of_a_model_that_is_not_named_is_refused(
    refused: Any, rows: Any, model: Path, out: Path, option: str
) -> None:
    value = {"--reward-dtype": "float32", "--reward-template": "chat", "--layout": "classifier"}.get(option, "x")
    (line,) = refused(*train("rrhf", model, rows(SCORED), out, option, value))
    assert line.startswith(f"{option}: found {value!r}, ")
    assert "--reward-model" in line


def test_doctor_refuses_an_option_of_a_policy_that_is_not_named(refused: Any) -> None:
    (line,) = refused("doctor", "--template", "chat")
    assert line.startswith("--template: found 'chat', ")


@pytest.mark.parametrize(
    "content", ['{"format": "layers-model"}', "[]", "{", '{"source": 1}', '{"source": "model", "dtype": "int8"}', "{}"]
)
def test_a_model_json_of_another_program_is_named(
    refused: Any, rows: Any, model: Path, out: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "exported")
    (folder / "model.json").write_text(content)
    (line,) = refused(*sample(folder, rows({"prompt": "Hi"}), out))
    assert line.startswith(f"{folder / 'model.json'}: ")
    (line,) = refused(*score(folder, rows(SCORED), out))
    assert line.startswith(f"{folder / 'model.json'}: ")


def test_gold_is_refused_on_prompts_of_another_world(
    refused: Any, rows: Any, tmp_path: Path, out: Path, model: Path
) -> None:
    """The prompts are read before any model: the reward model need not exist."""
    prompts = rows({"prompt": "How do I bake bread?"}, {"prompt": "Which port does Kubernetes use?"})
    words = ["--reward-model", tmp_path / "none", "--prompts", prompts, "--out", out, "--gold"]
    (line,) = refused("evaluate", "--model", model, *words, "--backend", "transformers")
    assert line.startswith(f"--gold: {prompts}: ")
    assert "Kubernetes" in line


@pytest.mark.parametrize(
    ("method", "words", "place"),
    [
        ("rrhg", [], "--method"),
        ("rrhf", ["--set", "lrr=1"], "method.lrr"),
        ("best_of_n", [], "--method best_of_n"),
        ("ppo", [], "ppo"),  # which needs a reward model
        ("sft", [], "{path}"),  # which has no pairs
    ],
)
def test_contradictory_options_of_training_are_refused(
    refused: Any, rows: Any, model: Path, out: Path, method: str, words: Any, place: str
) -> None:
    path = rows({"prompt": "Hi"})
    (line,) = refused(*train(method, model, path, out, *words))
    assert line.startswith(place.format(path=path) + ": ")


def test_a_folder_whose_name_is_no_text_is_refused_before_a_model_is_made(refused: Any, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for words in (["run", SMOKE, "--runs", folder], train("sft", tmp_path, tmp_path, folder)):
        (line,) = refused(*words)
        assert line.startswith(rf"{tmp_path}/caf\udce9: is no UTF-8 name")


def test_an_unknown_method_is_answered_with_all_that_train_and_the_nearest(refused: Any, tmp_path: Path) -> None:
    (line,) = refused(*train("reward_model", tmp_path, tmp_path, tmp_path))
    assert line.endswith("reward-model or package.module:OBJECT; did you mean 'reward-model'?")


def test_a_report_that_cannot_be_written_advises_no_option_that_it_lacks(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "smoke" / ".lock").mkdir(parents=True)  # where no file can be opened
    (tmp_path / "smoke" / "run.json").write_text(json.dumps(with_checksum({"stages": {}})))
    (line,) = refused("report", tmp_path / "smoke")
    assert "cannot be written" in line
    assert "--runs" not in line


def test_a_folder_without_a_run_is_refused(refused: Any, tmp_path: Path) -> None:
    (line,) = refused("report", tmp_path)
    assert line.startswith(f"{tmp_path}: ")


def test_a_report_that_cannot_be_published_leaves_the_earlier_one(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rrhf_bench.pipeline import run_folder

    written, published = (
        tmp_path / "runs" / "mine" / "report" / "report.md",
        tmp_path / "reports" / "mine" / "report.md",
    )
    for path, text in ((written, "new"), (published, "earlier")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setattr(run_folder, "read_run", lambda folder: {})
    monkeypatch.setattr(run_folder, "load_run", lambda folder: None)
    monkeypatch.setattr(program, "_write_report", lambda records, folder, instead: written)

    def full(source: Path, place: Path, **rest: object) -> None:
        Path(place).mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["report", tmp_path / "runs" / "mine", "--publish", "--reports", tmp_path / "reports"]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", full)
        result = cli(*words)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result
    assert published.read_text() == "earlier"
    assert cli(*words).code == 0
    assert published.read_text() == "new"
    assert list((tmp_path / "reports").iterdir()) == [published.parent]


@pytest.mark.parametrize(
    "words",
    [["sample", "--temperature", "inf"], ["plann"], ["plan"], ["plan", SMOKE, "--runs"], ["sample", "--n", "none"]],
)
def test_an_unreadable_command_ends_with_code_2(cli: Cli, words: list[object]) -> None:
    result = cli(*words)
    assert result.code == 2
    assert "Error:" in result.err
    assert "Traceback" not in result.err


# What is printed


def test_the_steps_in_a_row_print_json_alone(cli: Cli, rows: Any, model: Path, reward: Any, tmp_path: Path) -> None:
    judge = reward()
    prompts = rows({"prompt": "Hi"}, {"prompt": "What is ice?"})
    drawn, scored, trained, judged = (tmp_path / name for name in ("c.jsonl", "s.jsonl", "model", "e.jsonl"))
    assert cli(*sample(model, prompts, drawn, "--n", 3, "--json")).json["out"] == str(drawn)
    assert cli(*score(judge, drawn, scored, "--json")).json["counts"]["responses"] == 6
    found = cli(*train("rrhf", model, scored, trained, "--set", "epochs=2", "--json")).json
    assert (found["steps"], found["counts"]["examples"]) == (2, 2)
    words = ["--backend", "transformers", "--device", "cpu", "--max-new-tokens", 8, "--initial", model, "--json"]
    found = cli(
        "evaluate", "--model", trained, "--reward-model", judge, "--prompts", prompts, "--out", judged, *words
    ).json
    greedy, sampled = found["results"]
    assert (greedy["decoding"], greedy["n"], greedy["objective/kl"]) == ("greedy", 2, None)
    records = [json.loads(line) for line in judged.read_text().splitlines()]
    rewards = [record["reward"] for record in records if record["decoding"] == "sample"]
    assert sampled["reward/mean"] == pytest.approx(sum(rewards) / 2)


@pytest.mark.parametrize("other", ["swapped", "smaller"])
def test_a_kl_to_a_model_of_another_vocabulary_is_refused(
    refused: Any, rows: Any, model: Path, reward: Any, out: Path, tmp_path: Path, other: str
) -> None:
    """Two tokens have each other's id, as many as before; or the vocabulary is a smaller one."""
    initial = tmp_path / "initial"
    if other == "swapped":
        shutil.copytree(model, initial)
        text = json.loads((initial / "tokenizer.json").read_text(encoding="utf-8"))
        ids = text["model"]["vocab"]
        ids["A"], ids["B"] = ids["B"], ids["A"]
        (initial / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    else:
        small = make_tokenizer(vocabulary=300)
        make_llama(small).save_pretrained(initial)
        small.save_pretrained(initial)
    words = ["--reward-model", reward(), "--prompts", rows({"prompt": "Hi"}), "--out", out, "--max-new-tokens", 8]
    (line,) = refused("evaluate", "--model", model, "--initial", initial, *words, "--backend", "transformers")
    assert line.startswith(f"--initial {initial}: ")
    assert str(model) in line


def test_plan_ls_and_doctor_print_json_alone(cli: Cli, model: Path, reward: Any, tmp_path: Path) -> None:
    planned = cli("plan", SMOKE, "--runs", tmp_path, "--json").json
    assert planned["experiment"] == "smoke"
    assert {stage["done"] for stage in planned["stages"]} == {False}
    assert planned["methods"]["ppo"]["models_in_memory"]
    assert cli("ls", "--runs", tmp_path, "--json").json == []
    words = ["--model", model, "--reward-model", reward(), "--backend", "transformers", "--device", "cpu", "--json"]
    findings = {finding["check"]: finding["ok"] for finding in cli("doctor", *words).json}
    assert findings.items() >= {"log-probs, sampler and trainer": True, "a missed sync would show": True}.items()


def test_the_runs_folder_is_also_an_environment_variable(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RRHF_BENCH_RUNS", str(tmp_path / "elsewhere"))
    assert f"no runs in {tmp_path / 'elsewhere'}" in cli("ls").out


def test_plan_prints_sizes_budgets_and_models_in_memory(cli: Cli, tmp_path: Path) -> None:
    printed = cli("plan", SMOKE, "--runs", tmp_path).out
    assert "\x1b" not in printed  # not a terminal
    assert re.search(r"candidates for train prompts .* to do +48 prompts x 2 *\n", printed)
    assert re.search(r"rrhf +48 prompts x 4 responses, .* = 3 steps +1: policy *\n", printed)


def test_a_process_that_is_given_bad_input_ends_with_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rrhf_bench.cli", "plan", str(tmp_path / "none.toml")]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["ls", "ls --json"])
@pytest.mark.parametrize(("output", "code", "lines"), [(">&-", 0, 0), ("> /dev/full", 2, 1)])
def test_an_output_that_is_closed_or_full_is_no_fault_of_the_program(
    words: str, output: str, code: int, lines: int, unbuffered: str
) -> None:
    command = f"{sys.executable} -m rrhf_bench.cli {words} {output}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (code, lines), ended.stderr


def test_a_run_kept_to_avx2_computes_with_it(tmp_path: Path) -> None:
    """PyTorch reads it once: a process of its own, which ends early, short of pairs, and says what it uses."""
    read = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
    environment = {name: value for name, value in os.environ.items() if name not in read}
    pair = {"prompt": "\n\nHuman: Hi.\n\nAssistant:", "chosen": " Hello.", "rejected": " No."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    settings = ["data.source=files", f"data.path={tmp_path / 'pairs.jsonl'}", "policy.source=scratch",
                "reward_model.source=scratch", "perplexity_model.source=scratch",
                "runtime.vector_instructions=avx2"]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "rrhf_bench.cli", "run", str(SMOKE), *words, "--runs", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    said = json.loads((tmp_path / "smoke" / "environment.json").read_text())
    assert said["vector instructions"] != "AVX512"


def test_an_interrupted_run_ends_with_code_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "load_experiment", interrupt)
    result = cli("plan", SMOKE)
    assert result.code == 130
    assert result.err.startswith("interrupted; ")


def test_a_fault_of_the_program_is_not_reported_as_bad_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(program, "load_experiment", broken)
    with pytest.raises(ZeroDivisionError):
        cli("plan", SMOKE)


@pytest.mark.parametrize(
    ("own", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_wait_as_the_environment_says_or_sleep_early(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, own: dict[str, str], found: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that the end of the test restores it
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert cli("ls", "--help").code == 0
    assert os.environ.get("GOMP_SPINCOUNT") == found
