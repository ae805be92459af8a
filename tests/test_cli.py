"""The command line: what bad input gets, and what good input prints.

Bad input gets exit code 2 and one line a fault, which names the file, line or key, what was found and what is allowed;
no traceback, and nothing is left on disk.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer

from rrhf_bench import cli as program
from rrhf_bench.data.sources import load_candidates
from rrhf_bench.errors import BenchError
from rrhf_bench.pipeline.scheduler import run_plan
from rrhf_bench.pipeline.services import ModelRef
from rrhf_bench.pipeline.stage_graph import Plan, make_plan
from rrhf_bench.pipeline.store import Store
from rrhf_bench.settings.reading import load_experiment

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"
QUESTION = "\n\nHuman: Hi there! What is a glacier?\n\nAssistant:"
SCORED = {"query": QUESTION, "responses": [" Ice.", " A river."], "scores": [1.0, 0.0]}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process, wide enough for any table."""
    for name in ("FORCE_COLOR", "RRHF_BENCH_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["rrhf-bench", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            program.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., list[str]]:
    """Runs what must be refused: the lines of the error, once it is sure that nothing else was printed or written."""

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
    """Writes JSON lines."""

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
    """Makes folders of a random classifier."""

    def make(*, labels: int = 1, weight: float | None = None) -> Path:
        from transformers import AutoModelForSequenceClassification, LlamaConfig

        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_labels=labels,
            num_attention_heads=1, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(config)
        if weight is not None:
            torch.nn.init.constant_(model.score.weight, weight)
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


# Experiment files


@pytest.mark.parametrize("command", ["plan", "run"])
def test_each_fault_of_an_experiment_file_is_one_line(command: str, refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("sedes = [0]\n[data]\ntrain_prompts = 'many'\n")
    found = refused(command, path, "--runs", tmp_path / "runs", "--set", "candidates.n=0")
    assert sorted(line.split(", data")[0] for line in found) == [
        f"{path}: candidates.n: found 0; input should be greater than or equal to 1",
        f"{path}: data.train_prompts: found 'many'; input should be a valid integer",
        f"{path}: sedes: unknown key; allowed are name, seeds",
    ]


def test_an_experiment_file_that_is_missing(refused: Any, tmp_path: Path) -> None:
    (line,) = refused("run", tmp_path / "none.toml", "--runs", tmp_path / "runs")
    assert (
        line == f"{tmp_path}/none.toml: cannot be read (No such file or directory); give the path of an experiment file"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.source=files", "data.path=none.jsonl"],
            "data.path: found 'none.jsonl', which does not exist; expected",
        ),
        (
            ["methods.rrhf.candidates.sources=['chosen']"],
            "methods.rrhf.candidates: k = 1 response a prompt leaves nothing to rank; add",
        ),
        (["policy.source=none/here"], None),  # a hub id is looked up when it is used
    ],
)
def test_what_an_override_breaks(refused: Any, cli: Cli, tmp_path: Path, overrides: Any, expected: str | None) -> None:
    words = ["plan", SMOKE, "--runs", tmp_path / "runs", *(word for o in overrides for word in ("--set", o))]
    if expected is None:
        assert cli(*words).code == 0
    else:
        assert refused(*words)[0].startswith(f"{SMOKE}: {expected}")


@dataclass
class Quiet:
    """A Reporter without a terminal."""

    def reused(self, stage: Any) -> None: ...

    def started(self, stage: Any) -> None: ...

    def progress(self, name: str, done: int, total: int) -> None: ...

    def finished(self, stage: Any, seconds: float) -> None: ...

    def note(self, text: str) -> None: ...


def experiment_on(path: Path, *overrides: str) -> list[str]:
    """Overrides that put the smoke experiment on a data file, with models from scratch."""
    scratch = [f"{part}.source=scratch" for part in ("policy", "reward_model", "perplexity_model")]
    sizes = ["evaluation.prompts=1", "evaluation.pairs=1", "evaluation.dev_prompts=1", "evaluation.pool_prompts=1"]
    return ["data.source=files", f"data.path={path}", "runtime.workers=1", *scratch, *sizes, *overrides]


def pair(question: str, chosen: str = " Yes.", rejected: str = " No.") -> dict[str, str]:
    asked = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": asked + chosen, "rejected": asked + rejected}


def test_a_run_that_meets_a_bad_row_says_where_and_stores_nothing(cli: Cli, rows: Any, tmp_path: Path) -> None:
    path = rows(pair("a"), pair("b", chosen=" Yes.\n\nHuman: And now?"))
    words = (word for o in experiment_on(path) for word in ("--set", o))
    result = cli("run", SMOKE, "--runs", tmp_path / "runs", *words)
    assert result.code == 2
    assert result.err == (
        f"error: data: {path}:2: chosen: ends with a Human turn; expected the last turn to be the assistant's; "
        'mend the row, or drop and count such rows with faulty_rows = "drop" (--faulty-rows drop)\n'
    )
    assert list((tmp_path / "runs" / "store").iterdir()) == []
    assert not (tmp_path / "runs" / "smoke" / "report").exists()


@pytest.mark.parametrize(
    ("overrides", "counts", "kept"),
    [
        ([], {"diverging": 1, "diverging_dropped": 1}, 5),
        (["data.diverging=common-prefix"], {"diverging": 1, "diverging_dropped": 0}, 6),
    ],
)
def test_odd_pairs_are_counted_and_kept_or_dropped_by_the_rule(
    rows: Any, tmp_path: Path, overrides: list[str], counts: dict[str, int], kept: int
) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: "
    path = rows(
        *(pair(f"question {i}") for i in range(3)),
        pair("question 0", chosen=" Certainly."),  # a duplicate
        pair("an empty one", chosen=""),
        pair("the same twice", rejected=" Yes."),
        pair("ends badly", rejected=" No.\n\nHuman: Why?"),
        {"chosen": f"{talk}How?\n\nAssistant: So.", "rejected": f"{talk}Why?\n\nAssistant: Because."},
        pair("question 3"),
    )
    experiment = load_experiment(SMOKE, experiment_on(path, "data.faulty_rows=drop", *overrides))
    plan = make_plan(experiment)
    data = plan.stages[0]
    store = Store(tmp_path / "store")
    run_plan(Plan(experiment, plan.backend, (data,)), store, Quiet())
    found = json.loads((store.folder(data.key) / "about.json").read_text())["counts"]
    expected = {
        "rows": 9,
        "kept": kept,
        "duplicate_prompt": 1,
        "empty_reply": 1,
        "identical_replies": 1,
        "not_ending_with_assistant": 1,
        **counts,
    }
    assert {name: found[name] for name in expected} == expected


# The single steps


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Hi"}, "{path}:2: prompt: is missing; expected text (found the fields question)"),
        ({"prompt": 3}, "{path}:2: prompt: found 3; expected text"),
        ({"prompt": " "}, "{path}:2: prompt: the prompt is empty; expected a question or a transcript ending with"),
        ({"prompt": QUESTION + " Ice."}, "{path}:2: prompt: ends with a finished assistant turn; expected it to end"),
        ([], "{path}:2: found []; expected one JSON object a line"),
    ],
)
def test_prompts_that_are_none(refused: Any, rows: Any, model: Path, out: Path, row: Any, expected: str) -> None:
    path = rows({"prompt": "Hi"}, row)
    (line,) = refused(*sample(model, path, out))
    assert line.startswith(expected.format(path=path))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair("a", chosen=" Yes.\n\nHuman: Why?"), "{path}:2: chosen: ends with a Human turn; expected the last turn"),
        (
            {"chosen": "Yes.", "rejected": "No."},
            "{path}:2: chosen: found 'Yes.'; expected a transcript that starts with",
        ),
        ({"chosen": QUESTION}, "{path}:2: rejected: is missing; expected text (found the fields chosen)"),
    ],
)
def test_pairs_that_are_none(refused: Any, rows: Any, model: Path, out: Path, row: Any, expected: str) -> None:
    path = rows(pair("a"), row)
    (line,) = refused(*train("sft", model, path, out))
    assert line.startswith(expected.format(path=path))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"query": None}, "{path}:1: query: is missing; expected text"),
        ({"responses": [" Ice.", ""]}, '{path}:1: responses[1]: found ""; expected text that is not empty'),
        ({"scores": [1.0]}, "{path}:1: scores: found 1 of them; expected 2, one for each response"),
        ({"scores": [1.0, float("nan")]}, "{path}:1: scores[1]: found NaN; expected a finite number"),
        ({"scores": [1.0, "0"]}, '{path}:1: scores[1]: found "0"; expected a finite number'),
    ],
)
def test_candidates_that_are_none(refused: Any, rows: Any, model: Path, out: Path, change: Any, expected: str) -> None:
    path = rows({**SCORED, **change})
    (line,) = refused(*train("rrhf", model, path, out))
    assert line.startswith(expected.format(path=path))


def test_files_and_models_that_are_missing(refused: Any, rows: Any, model: Path, out: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    for words in (sample(model, missing, out), score(model, missing, out), train("rrhf", model, missing, out)):
        (line,) = refused(*words)
        assert line.startswith(f"{missing}: is missing; expected ")
    prompts, scored = rows({"prompt": "Hi"}, name="prompts.jsonl"), rows(SCORED, name="scored.jsonl")
    for words in (sample(missing, prompts, out), score(missing, scored, out), train("rrhf", missing, scored, out)):
        (line,) = refused(*words)
        assert line.startswith(f"{missing}: cannot be loaded as ")


def test_a_folder_that_holds_something_is_not_overwritten(refused: Any, rows: Any, model: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    (line,) = refused(*train("rrhf", model, rows(SCORED), out))
    assert line == f"{out}: is a folder that is not empty; name a new one, nothing is overwritten"


def test_a_prompt_beyond_the_context(refused: Any, rows: Any, model: Path, out: Path) -> None:
    path = rows({"prompt": "bread " * 600})
    (line,) = refused(*sample(model, path, out))
    assert re.match(rf"{re.escape(str(path))}:1: prompt [0-9a-f]{{16}}: has \d+ tokens, at most 504 fit; ", line)


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


def test_a_prompt_without_room_names_its_row_before_it_is_sampled_for_training_or_judged(
    refused: Any, rows: Any, model: Path, reward: Any, out: Path
) -> None:
    path, judge = rows({"prompt": "Hi"}, LONG), ["--reward-model", reward(), "--max-new-tokens", 8]
    ppo = train("ppo", model, path, out, *judge, "--set", "iterations=1", "--set", "rollouts=2", "--set", "minibatch=2")
    evaluate = ["evaluate", "--model", model, "--prompts", path, "--out", out, "--backend", "transformers", *judge]
    for words in (ppo, evaluate):
        (line,) = refused(*words)
        assert re.match(rf"{re.escape(str(path))}:2: prompt [0-9a-f]{{16}}: has \d+ tokens, at most 504 fit; ", line)


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
    refused: Any, cli: Cli, rows: Any, alternating: Path, out: Path
) -> None:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for prompt in (TWICE, "\n\nAssistant: Hi\n\nHuman: Hi\n\nAssistant:", "\n\nAssistant:", system):
        path = rows({"prompt": "Hi"}, {"prompt": prompt})
        (line,) = refused(*sample(alternating, path, out, "--template", "chat"))
        assert re.match(
            rf"{re.escape(str(path))}:2: prompt [0-9a-f]{{16}}: the chat template refuses the dialogue", line
        )
        words = ["--template", "chat", "--faulty-rows", "drop", "--json"]
        counts = cli(*sample(alternating, path, out.with_name("dropped"), *words)).json["counts"]
        assert counts.items() >= {"prompts": 2, "refused_by_template": 1}.items()
    path = rows(SCORED, {**SCORED, "query": TWICE})
    (line,) = refused(*train("rrhf", alternating, path, out, "--template", "chat"))
    assert line.startswith(f"{path}:2: prompt ")


def test_a_dialogue_that_the_reward_models_template_refuses_names_its_row_or_is_counted(
    refused: Any, cli: Cli, rows: Any, reward: Any, out: Path
) -> None:
    folder = reward()
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    path = rows(SCORED, {**SCORED, "query": TWICE})
    (line,) = refused(*score(folder, path, out, "--template", "chat"))
    assert line.startswith(f"{path}:2: prompt ")
    words = ["--template", "chat", "--faulty-rows", "drop", "--json"]
    counts = cli(*score(folder, path, out, *words)).json["counts"]
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
        with pytest.raises(BenchError, match=rf"{re.escape(str(path))}:4: prompt .* refuses the dialogue"):
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
    (line,) = refused(*train("rrhf", model, rows(long), out.with_name("another")))
    assert line.startswith("max_length 512: none of 1 prompts leaves room for a response (the shortest has ")


def test_a_tokenizer_without_a_pad_token(
    refused: Any, cli: Cli, rows: Any, model: Path, out: Path, tmp_path: Path
) -> None:
    bare = without(model, "pad_token", tmp_path)
    path = rows({"prompt": "Hi"})
    (line,) = refused(*sample(bare, path, out))
    assert line.startswith(f"{bare}: the tokenizer has no pad token; name one of its tokens with ")
    assert "--pad-token" in line
    (line,) = refused(*sample(bare, path, out, "--pad-token", "<none>"))
    assert line == f"{bare}: pad_token '<none>' is not in the tokenizer's vocabulary; name one that is"
    assert cli(*sample(bare, path, out, "--pad-token", "<eos>")).code == 0


def test_a_tokenizer_without_an_end_token(refused: Any, rows: Any, model: Path, out: Path, tmp_path: Path) -> None:
    bare = without(model, "eos_token", tmp_path)
    (line,) = refused(*sample(bare, rows({"prompt": "Hi"}), out))
    assert line == f"{bare}: the tokenizer has no EOS token, so no reply could end; name it in tokenizer_config.json"


def test_a_reward_model_with_two_labels(refused: Any, rows: Any, reward: Any, out: Path) -> None:
    folder = reward(labels=2)
    (line,) = refused(*score(folder, rows(SCORED), out))
    assert line == (
        f"{folder}: has 2 labels (LABEL_0, LABEL_1); name the one whose probability is the reward: reward_model.label, "
        "--label"
    )
    assert refused(*score(folder, rows(SCORED), out), "--label", "POSITIVE") == [
        f"{folder}: has 2 labels (LABEL_0, LABEL_1); found the label 'POSITIVE'; expected one of them"
    ]


def test_a_language_model_in_the_place_of_a_reward_model(refused: Any, rows: Any, model: Path, out: Path) -> None:
    (line,) = refused(*score(model, rows(SCORED), out))
    assert line.startswith(f"{model}: holds no trained score.weight, which would be random; expected a trained reward")


def test_scores_that_are_not_numbers(refused: Any, rows: Any, reward: Any, out: Path) -> None:
    folder = reward(weight=float("nan"))
    (line,) = refused(*score(folder, rows(SCORED), out))
    assert line.startswith(f"{folder}: 8 of 8 ")  # of the texts that every load scores


def test_groups_that_nothing_can_be_ranked_in(refused: Any, cli: Cli, rows: Any, model: Path, out: Path) -> None:
    equal = {**SCORED, "scores": [0.5, 0.5]}
    single = {**SCORED, "responses": [" Ice."], "scores": [1.0]}
    for path in (rows(equal, equal), rows(single)):
        (line,) = refused(*train("rrhf", model, path, out))
        assert "has two responses with different scores, so nothing can be ranked" in line
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
    settings = [word for o in ("iterations=1", "rollouts=2", "minibatch=2") for word in ("--set", o)]
    found = cli(*train("ppo", model, prompts, out.with_name("trained"), *words, *settings)).json
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


def test_what_a_step_leaves_out_of_its_input_is_counted(cli: Cli, rows: Any, model: Path, out: Path) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: "
    parted = {"chosen": f"{talk}How?\n\nAssistant: So.", "rejected": f"{talk}Why?\n\nAssistant: Because."}
    path = rows(pair("a"), pair("a", chosen=" Certainly."), pair("b", rejected=""), parted)
    expected = {"rows": 4, "kept": 2, "duplicate_prompt": 1, "empty_reply": 1, "diverging_dropped": 1}
    assert cli(*sample(model, path, out, "--json")).json["counts"].items() >= expected.items()
    found = cli(*train("sft", model, path, out.with_name("trained"), "--set", "epochs=1", "--json")).json
    assert found["counts"].items() >= expected.items()
    prompts = rows({"prompt": "a"}, {"prompt": "a"}, name="prompts.jsonl")
    counts = cli(*sample(model, prompts, out.with_name("again"), "--json")).json["counts"]
    expected = {"rows": 2, "prompts": 2, "duplicate_prompt": 1, "prompt_rewritten": 2}
    assert {name: count for name, count in counts.items() if count} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sources", "modle"], "--sources: found 'modle'; allowed are model, chosen, rejected"),
        (["--temperature", "0"], "--temperature 0 gives 4 equal samples; raise it or use --n 1"),
        (["--sources", "model,chosen"], '{path}: has no "chosen" and "rejected"; they are needed for --sources model,'),
    ],
)
def test_sampling_that_makes_no_sense(
    refused: Any, rows: Any, model: Path, out: Path, words: Any, expected: str
) -> None:
    path = rows({"prompt": "Hi"})
    (line,) = refused(*sample(model, path, out, *words))
    assert line.startswith(expected.format(path=path))


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


def test_options_that_an_artifact_says_too_or_that_serve_another_model(
    cli: Cli, rows: Any, model: Path, reward: Any, out: Path, tmp_path: Path
) -> None:
    """--dtype and --template are of the policy alone, --layout and --reward-pad-token of the reward model."""
    stored, judge = artifact(tmp_path, model, dtype="bfloat16", template="raw"), reward()
    prompts = rows({"prompt": QUESTION})
    assert cli(*sample(stored, prompts, out, "--dtype", "bfloat16", "--template", "raw")).code == 0
    words = ["--prompts", prompts, "--out", tmp_path / "judged", "--max-new-tokens", 4, "--backend", "transformers"]
    options = ["--layout", "classifier", "--reward-pad-token", "<pad>", "--decoding", "greedy", "--dtype", "bfloat16"]
    assert cli("evaluate", "--model", stored, "--reward-model", judge, *words, *options).code == 0


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
    (row,) = cli(*words, "--perplexity-pad-token", "<eos>", "--json").json["results"]
    assert abs(row["objective/kl"]) < 1e-3
    assert row["perplexity"] > 1
    refused(*words)  # the perplexity model has no pad token
    words = [*words, "--perplexity-pad-token", "<eos>"]
    for option, value in (("--reward-dtype", "bfloat16"), ("--reward-template", "chat"), ("--reward-pad-token", "<p>")):
        (line,) = refused(*words, option, value)
        assert line.startswith(f"{option}: found {value!r}, but the artifact {judge} says ")


@pytest.mark.parametrize("option", ["--reward-dtype", "--reward-template", "--reward-pad-token", "--layout", "--label"])
def test_an_option_of_a_model_that_is_not_named(refused: Any, rows: Any, model: Path, out: Path, option: str) -> None:
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
def test_a_model_json_of_another_program(
    refused: Any, rows: Any, model: Path, out: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "exported")
    (folder / "model.json").write_text(content)
    (line,) = refused(*sample(folder, rows({"prompt": "Hi"}), out))
    assert line.startswith(f"{folder / 'model.json'}: ")
    (line,) = refused(*score(folder, rows(SCORED), out))
    assert line.startswith(f"{folder / 'model.json'}: ")


def test_a_top_p_that_leaves_no_token(refused: Any, rows: Any, model: Path, out: Path) -> None:
    (line,) = refused(*sample(model, rows({"prompt": "Hi"}), out, "--top-p", 0))
    assert line.startswith("--top-p: found 0")


def test_gold_on_prompts_that_are_not_of_the_embedded_world(
    refused: Any, rows: Any, tmp_path: Path, out: Path, model: Path
) -> None:
    """The prompts are read before any model: the reward model need not exist."""
    prompts = rows({"prompt": "How do I bake bread?"}, {"prompt": "Which port does Kubernetes use?"})
    words = ["--reward-model", tmp_path / "none", "--prompts", prompts, "--out", out, "--gold"]
    (line,) = refused("evaluate", "--model", model, *words, "--backend", "transformers")
    assert line.startswith(f"--gold: {prompts}: ")
    assert "Kubernetes" in line


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        ("rrhg", [], "method.kind: found 'rrhg'; allowed are rrhf, sft, best_of_n, ppo; did you mean 'rrhf'?"),
        ("rrhf", ["--set", "lrr=1"], "method.lrr: unknown key; allowed are "),
        ("rrhf", ["--set", "lr=fast"], "method.lr: found 'fast'; input should be a valid number"),
        ("best_of_n", [], "--method best_of_n: trains nothing; use `sample` and `score`"),
        ("ppo", [], "ppo: scores its own samples; name a reward model with --reward-model"),
        ("sft", [], '{path}: sft trains on pairs; expected lines with "chosen" and "rejected"'),
    ],
)
def test_training_that_makes_no_sense(
    refused: Any, rows: Any, model: Path, out: Path, method: str, words: Any, expected: str
) -> None:
    path = rows({"prompt": "Hi"})
    (line,) = refused(*train(method, model, path, out, *words))
    assert line.startswith(expected.format(path=path))


def test_a_folder_that_is_no_run(refused: Any, tmp_path: Path) -> None:
    (line,) = refused("report", tmp_path)
    assert line == f"{tmp_path}: holds no run (no run_folder.json); give the folder of a run, such as runs/hh_compare"


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
    monkeypatch.setattr(program, "_write_report", lambda records, folder: written)

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


@pytest.mark.parametrize("words", [["plann"], ["plan"], ["plan", SMOKE, "--runs"], ["sample", "--n", "none"]])
def test_a_command_that_cannot_be_read(cli: Cli, words: list[object]) -> None:
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
def test_a_kl_to_a_model_of_another_vocabulary(
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


def test_plan_says_sizes_budgets_and_models_in_memory(cli: Cli, tmp_path: Path) -> None:
    printed = cli("plan", SMOKE, "--runs", tmp_path).out
    assert "\x1b" not in printed  # not a terminal
    assert re.search(r"candidates for train prompts \(n=2, T=1.0\), seed 0 +to do +48 prompts x 2 *\n", printed)
    assert re.search(r"rrhf +48 prompts x 4 responses, 1 epochs of 16 prompts a step = 3 steps +1: policy *\n", printed)
    assert re.search(r"\n(\d+) stages: 0 done, \1 to do, store ", printed)


def test_text_from_outside_cannot_act_on_the_terminal(cli: Cli, tmp_path: Path) -> None:
    result = cli("plan", SMOKE, "--set", "se\x1b[31med\r=1")
    assert result.code == 2
    assert "\x1b" not in result.err
    assert "\r" not in result.err
    assert "se\\x1b[31med" in result.err


def on_a_terminal(*words: str, **environment: str) -> str:
    """What a command prints where standard output is a terminal."""
    reader, writer = pty.openpty()
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    try:
        subprocess.run(
            [sys.executable, "-m", "rrhf_bench.cli", *words],
            cwd=ROOT,
            env={**kept, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
            stdout=writer,
            stderr=writer,
            check=True,
        )
        return os.read(reader, 1 << 16).decode()  # a terminal holds what a short help prints
    finally:
        os.close(reader)
        os.close(writer)


def test_no_color_is_heeded_on_a_terminal() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colour.search(on_a_terminal("ls", "--help"))
    assert not colour.search(on_a_terminal("ls", "--help", NO_COLOR="1"))


def test_help_documents_the_exit_codes(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    words = " ".join(result.out.split())
    assert "Exit codes: 0 done, 1 a fault of this program, 2 input that cannot be used, 130 interrupted." in words


def test_exit_codes_of_a_process(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rrhf_bench.cli", *words], cwd=ROOT, capture_output=True, text=True
        )

    done = run("plan", str(SMOKE), "--runs", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    bad = run("plan", str(tmp_path / "none.toml"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert re.fullmatch(r"error: .*none\.toml: cannot be read .*\n", bad.stderr)


def test_an_interrupted_run_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "load_experiment", interrupt)
    result = cli("plan", SMOKE)
    assert result.code == 130
    assert result.err.startswith("interrupted; ")


def test_a_fault_of_the_program_is_not_dressed_up_as_bad_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(program, "load_experiment", broken)
    with pytest.raises(ZeroDivisionError):
        cli("plan", SMOKE)
