"""Broken input: 200 experiment files that are known to be broken are refused with one line that says where; from any
other input nothing but a BenchError comes out; accepted input survives a round trip."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rrhf_bench import cli
from rrhf_bench.data.dialogue import (
    ASSISTANT,
    HUMAN,
    STOP_STRINGS,
    Template,
    as_prompt,
    as_reply,
    cut_at_stop,
    prompt_of,
    transcript_of,
    turns,
)
from rrhf_bench.data.preferences import load_preferences
from rrhf_bench.data.prompts import load_prompts
from rrhf_bench.data.rrhf_files import load_candidates, write_rrhf
from rrhf_bench.data.texts import load_texts
from rrhf_bench.errors import BenchError, ConfigError, DataError, visible
from rrhf_bench.jsonl import read_jsonl, to_json, write_jsonl
from rrhf_bench.records import Candidates, CurvePoint, Evaluated, PairScored, PoolScored, Prompt, Response
from rrhf_bench.settings.reading import load_experiment

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = 200
# The same examples in every run: a test that fails once a week is no test.
SAME = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Broken:
    """A file that must be refused. ``place``: a pattern that the one line of its error has after the file's path."""

    kind: str
    content: bytes
    place: str


@pytest.fixture(scope="module", autouse=True)
def built_once() -> Iterator[None]:
    """typer puts the whole command line together anew in each call, most of the time of a refusal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "app", typer.main.get_command(cli.app))
        yield


@dataclass(frozen=True)
class Result:
    code: Any
    out: str
    err: str


def run(*words: object) -> Result:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["rrhf-bench", *map(str, words)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def faults_of(result: Result, path: Path, case: Broken) -> list[str]:
    """Return the faults in how a broken file was refused."""
    lines = result.err.splitlines()
    wrong = []
    if result.code != 2:
        wrong.append(f"exit code {result.code}")
    if result.out:
        wrong.append(f"printed {result.out[:80]!r}")
    if len(lines) != 1:
        wrong.append(f"{len(lines)} lines")
    if not lines or not all(line.startswith(f"error: {path}") for line in lines):
        wrong.append("a line without the file")
    elif not any(re.match(case.place, line.removeprefix(f"error: {path}")) for line in lines):
        wrong.append(f"no place like {case.place!r}")
    return [f"{case.kind}: {', '.join(wrong)}: {result.err[:300]!r}"] if wrong else []


# Experiment files


def leaves(table: Mapping[str, Any], *where: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, *where, key)
        else:
            yield (*where, key), value


def changed(table: Mapping[str, Any], where: tuple[str, ...], value: Any, name: str | None = None) -> dict[str, Any]:
    """A table with another value at a place; ``name``: and another key."""
    first, *rest = where
    if rest:
        return {**table, first: changed(table.get(first, {}), tuple(rest), value, name)}
    return {**{key: old for key, old in table.items() if key != first}, name or first: value}


# Values that no key takes, whatever it is, where a real file has a value of another type.
WRONG: dict[type, tuple[Any, ...]] = {
    bool: ("true", 1, 0.5, [True], {"a": 1}),
    int: ("12", "twelve", True, [1], {"a": 1}, 2**63, float("nan"), float("inf")),
    float: ("0.5", True, [0.5], {"a": 1}, float("nan"), float("-inf"), 10**30),
    str: (12, 0.5, True, {"a": 1}, "\0"),
    list: (3, 0.5, True, "a", {"a": 1}, [[1]], [{"a": 1}]),
}
# Values beyond the bounds that the tables state.
BEYOND: dict[str, tuple[Any, ...]] = {
    "name": ("", "../up", "/abs", "a/b", "a\\b", ".hidden", "CON", "nul", "a b", "a" * 101, "-x", "\u202egnp", "a\n"),
    "seeds": ([], [0, 0], [-(2**63) - 1]),
    "data.train_prompts": (0, -1),
    "data.source": ("", "hub", "hub:", "toys"),
    "data.rows": ("pair", ""),
    "data.toy": ({"corpus": 0}, {"corpora": 5}, {"preferences": -5}),
    "policy.source": ("", " ", "x" * 5000, "methods.sft"),
    "policy.scratch": ({"vocabulary": 299}, {"hidden": 100}, {"warmup": 1.0}, {"lr": 0.0}, {"heads": 3}),
    "policy.template": ("HH", "alpaca"),
    "policy.dtype": ("float8",),
    "policy.max_length": (15,),
    "reward_model.source": ("", "x" * 5000),
    "reward_model.layout": ("value_head",),
    "reward_model.training": ({"lr": 0.0}, {"epochs": 0}, {"objective": "hinge"}),
    "candidates.n": (0, 1025),
    "candidates.temperature": (-0.1, 10.5),
    "candidates.top_p": (0.0, 1.01),
    "candidates.top_k": (-1,),
    "candidates.strategy": ("beams",),
    "candidates.recipe": ("DQ", "IP-0", "IP-100", "OP-", "OP-0"),
    "sampling.stop": ([""], ["a", 3]),
    "sampling.max_new_tokens": (0,),
    "evaluation.prompts": (0, 5000),
    "evaluation.decoding": ([], ["beam"], ["given"]),
    "evaluation.temperature": (0.0,),
    "evaluation.pool_prompts": (0, 10**6),
    "runtime.gpu_memory": (0.0, 1.0),
    "runtime.device": ("tpu",),
    "runtime.workers": (0,),
    "methods.rrhf.lr": (0.0, -1e-3),
    "methods.rrhf.variant": ("papers",),
    "methods.rrhf.kind": ("rrhfs", ["rrhf"], {"a": 1}),
    "methods.rrhf.candidates": ({"sources": ["nobody"]}, {"rounds": 100}, {"reward_kl": 0.1}, {"beams": 4}),
    "methods.rrhf.initial": ("nobody",),
    "methods.rrhf.betas": ([0.9], [0.9, 0.99, 0.999]),
    "methods.ppo.minibatch": (10**6,),
    "methods.ppo.kl": ("adaptive", "none"),
    "methods.ppo.clip": (0.0,),
    "methods.ppo.lam": (1.5,),
    "methods.ppo.top_k": (5,),
    "methods.best_of_n.n": (0,),
    "sources.x": (
        {},
        {"model": "nobody"},
        {"file": "nowhere.jsonl"},
        {"file": "x" * 999},
    ),
    "policies.x": ({"source": "methods.nobody"}, {"source": "toy", "template": "chat"}, {"part": "GPT"}),
    "judge": ({"source": "oracle"}, {"source": "endpoint"}, {"source": "endpoint", "endpoint": {"model": "m"}}),
    "claims.x": ({"margin": 0.1}, {"kind": "equivalence", "row": "rrhf"}, {"kind": ["difference"]}),
    "extends": ("nowhere.toml", ".", 3, {"file": "hh_compare.toml"}, ["hh_compare.toml", 3], "\0", "x" * 5000),
}
NAMED = ("policies", "sources", "methods")  # tables that others name
# Tables that bear a name of the file's own.
NAMES = ("../../etc", "a b", "[bold]", "[/x]", "a\n\x1b[2J", "", "x" * 101, "PRN", "ä", "a,b", '"', "$x$")


def of_syntax(text: str, rng: random.Random) -> Iterator[Broken]:
    """Yield a real file with one fault that TOML forbids anywhere, at a known line."""

    def at(kind: str, place: int, inserted: bytes, words: str) -> Broken:
        line = text[:place].count("\n") + 1
        return Broken(kind, text[:place].encode() + inserted + text[place:].encode(), words.format(line=line))

    def anywhere() -> int:
        return rng.randrange(len(text) - 1)

    control = bytes([rng.choice([*range(1, 9), 11, 12, *range(14, 32), 127])])
    yield at("control character", anywhere(), control, r": is not TOML: .* \(at line {line}, column \d+\)$")
    yield at("NUL", anywhere(), b"\0", r": is not TOML: .* \(at line {line}, column \d+\)$")
    yield at(
        "bare CR",
        rng.choice([m.end() - 1 for m in re.finditer(r"\w\w", text)]),
        b"\r",
        r": is not TOML: .*at line {line}",
    )
    byte = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80"])
    yield at("no UTF-8", anywhere(), byte, r": line {line}: is not UTF-8 text")
    yield Broken("UTF-16", text.encode("utf-16"), r": line 1: is not UTF-8 text")
    values = [m.end() for m in re.finditer(r"^[\w.]+ = ", text, re.MULTILINE)]
    cut = rng.choice(values)
    yield Broken("truncated before a value", text[:cut].encode(), r": is not TOML: .*\(at (line \d+|end of document)")
    headers = [m.start() + 2 for m in re.finditer(r"^\[[\w.]+\]", text, re.MULTILINE)]
    yield Broken("truncated in a header", text[: rng.choice(headers)].encode(), r": is not TOML: .*\(at (line|end)")
    strings = [m.end() for m in re.finditer(r'^\w+ = "\w', text, re.MULTILINE)]
    yield Broken("truncated in a text", text[: rng.choice(strings)].encode(), r": is not TOML: .*\(at (line|end)")
    header = rng.choice(re.findall(r"^\[[\w.]+\]", text, re.MULTILINE))
    yield Broken("a table twice", f"{text}\n{header}\n".encode(), r": is not TOML: .*\(at line \d+")
    twice = rng.choice(list(re.finditer(r"^\w+ = [\w\"].*\n", text, re.MULTILINE)))
    yield at("a key twice", twice.end(), twice[0].encode(), r": is not TOML: .*\(at line \d+")
    garbage = rng.choice(["]", "= 3", "x", "[", '"', "{}", "x = 1 2", "x = 01", "x = '", "x = tru", "x = [1,,2]"])
    place = rng.choice([m.end() for m in re.finditer(r"\n", text)])
    yield at("a line that says nothing", place, f"{garbage}\n".encode(), r": is not TOML: .*\(at (line|end)")
    deep = rng.choice(["[", "{a=", "[{a="]) * 50_000
    yield at("deep nesting", len(text), f"\nx = {deep}".encode(), r": is not TOML: values nested too deeply")
    digits = "9" * rng.randrange(4301, 9000)
    yield at(
        "endless number", len(text), f"\nx = {digits}".encode(), r": is not TOML: a whole number of too many digits"
    )


def of_values(name: str, table: dict[str, Any], rng: random.Random) -> Iterator[Broken]:
    """Yield the same file with one wrong key."""
    found = [(where, value) for where, value in leaves(table) if where != ("extends",)]

    def dumped(kind: str, where: tuple[str, ...], value: Any, as_key: str | None = None) -> Broken:
        key = ".".join([*where[:-1], as_key or where[-1]])
        content = tomli_w.dumps({"name": "broken", **changed(table, where, value, as_key)})
        return Broken(kind, content.encode(), rf": {re.escape(key)}\b")

    where, value = rng.choice(found)
    yield dumped(f"wrong type in {name}", where, rng.choice(WRONG[type(value)]))
    # Not of a claim, whose keys must be there, nor of keys that others depend on: these would be faults as well.
    where, value = rng.choice(
        [leaf for leaf in found if leaf[0][0] != "claims" and leaf[0][-1] not in ("kind", "recipe", "strategy")]
    )
    yield dumped(f"unknown key in {name}", where, value, where[-1] + rng.choice(["x", "_", "s2"]))
    where, value = rng.choice([leaf for leaf in found if len(leaf[0]) > 1 and leaf[0][0] not in NAMED])
    table_name = where[: rng.randrange(1, len(where))]
    yield dumped(f"a table that is a value in {name}", table_name, rng.choice([3, "x", [1], True]))
    where, value = rng.choice(found)
    nested: Any = 1
    for _ in range(rng.randrange(17, 60)):
        nested = rng.choice([[nested], {"a": nested}])
    yield replace(
        dumped(f"nested in {name}", where, nested), place=r": [\w.]+\.\.\.: tables or lists inside each other"
    )


def of_bounds(rng: random.Random) -> Iterator[Broken]:
    """Yield hh_compare.toml with one value out of bounds, or with one table of an impossible name."""
    base = {"extends": "hh_compare.toml", "name": "broken"}
    for key, values in BEYOND.items():
        where = tuple(key.split("."))
        for value in values:
            content = tomli_w.dumps(changed(base, where, value))
            place = r"(: extends|: \S*name|: .*extends)" if key == "extends" else rf": {re.escape(key.split('.')[0])}\b"
            yield Broken(f"{key} = {str(value)[:20]!r}", content.encode(), place)
    for of in ("methods", "policies", "sources", "claims"):
        for name in NAMES:
            claim = {"kind": "difference", "higher": "rrhf", "lower": "base", "margin": 0.0}
            tables = {"methods": {"kind": "sft"}, "policies": {}, "sources": {"model": "ppo"}, "claims": claim}
            table: dict[str, Any] = tables[of]
            content = tomli_w.dumps({**base, of: {name: table}})
            shown = r".*a name is letters, digits, - and _"
            yield Broken(f"{of} of name {name[:12]!r}", content.encode(), rf": {of}\.{shown}")


def broken_experiments() -> list[Broken]:
    """Return at least FILES different broken copies of real files, the same copies in every run."""
    rng = random.Random(5)
    names = ("hh_compare", "main_table", "imdb_sentiment", "wombat", "world", "smoke", "gpu", "sampling_quality")
    whole = {f"{name}.toml": (EXPERIMENTS / f"{name}.toml").read_text() for name in names}
    cases = list(of_bounds(rng))
    while len(cases) < FILES:
        name = rng.choice(sorted(whole))
        cases += of_syntax(whole[name], rng)
        for _ in range(3):
            cases += of_values(name, tomllib.loads(whole[name]), rng)
    return list({case.content: case for case in cases}.values())


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real files, which the broken ones extend."""
    folder = tmp_path_factory.mktemp("experiments")
    for path in EXPERIMENTS.glob("*.toml"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_real_experiments_are_accepted_by_the_same_way(experiments: Path, tmp_path: Path) -> None:
    for path in (experiments / "smoke.toml", experiments / "ppo_frontier.toml", experiments / "wombat.toml"):
        result = run("plan", path, "--runs", tmp_path / "runs")
        assert (result.code, result.err) == (0, ""), path
        for line_ends in (b"\r\n", b"\n\n"):  # CRLF and blank lines are no faults
            (experiments / "again.toml").write_bytes(path.read_bytes().replace(b"\n", line_ends))
            assert run("plan", experiments / "again.toml", "--runs", tmp_path / "runs").code == 0


def test_every_broken_experiment_file_is_refused_in_one_line_with_its_place(experiments: Path, tmp_path: Path) -> None:
    cases = broken_experiments()
    assert len(cases) >= FILES
    path, wrong = experiments / "broken.toml", []
    for case in cases:
        path.write_bytes(case.content)
        before = tree(experiments), tree(tmp_path)
        wrong += faults_of(run("plan", path, "--runs", tmp_path / "runs"), path, case)
        assert (tree(experiments), tree(tmp_path)) == before, case
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}", *wrong])


def test_a_path_that_is_no_file_is_refused(experiments: Path, tmp_path: Path) -> None:
    (experiments / "folder.toml").mkdir()
    (experiments / "loop.toml").symlink_to(experiments / "loop.toml")
    (experiments / "nowhere.toml.link").symlink_to(experiments / "nowhere")
    for name in ("folder.toml", "loop.toml", "nowhere.toml.link", "missing.toml", "x" * 300, "new\nline.toml"):
        result = run("plan", experiments / name, "--runs", tmp_path / "runs")
        assert result.code == 2
        (line,) = result.err.splitlines()
        assert ": cannot be read (" in line


# JSON lines


QUESTION = f"{HUMAN} How do I bake bread, and what is \u201cproofing\u201d?{ASSISTANT}"
PAIRS = [
    {"prompt": QUESTION, "chosen": " Mix flour.\u2028Then wait.", "rejected": " No idea."},
    {"prompt": "How tall is Etna?", "chosen": " 3,357 m \U0001f30b", "rejected": " Tall."},
    {"prompt": f"{HUMAN} Hi{ASSISTANT} Hello!{HUMAN} Bye{ASSISTANT}", "chosen": " Bye.", "rejected": " Hi."},
    {"prompt": QUESTION, "chosen": " Ask a baker.", "rejected": " Buy it."},
]
CANDIDATES = [
    {"query": QUESTION, "responses": [" Mix.", " Buy.", " Wait."], "scores": [1.0, -0.5, 0]},
    {"query": "Hi", "responses": [" a", " b"], "scores": [1e-3, 2], "sources": ["model", "chosen"]},
    {
        "query": QUESTION,
        "responses": [" c", ""],
        "scores": [0.0, 0.0],
        "finish": ["eos", "length"],
        "token_ids": [[5, 6], None],
        "logprobs": [[-0.5, -0.25], None],
    },
]
PROMPTS = [{"prompt": QUESTION}, {"prompt": "What is a glacier?"}, {"prompt": "Hi", "id": 3}]
LOADERS: dict[str, tuple[list[dict[str, Any]], Callable[[Path], Any]]] = {
    "score": (CANDIDATES, lambda path: load_candidates(path, scored=False)),
    "rrhf": (CANDIDATES, load_candidates),
    "sft": (PAIRS, lambda path: load_preferences("files", path)),
    "ppo": (PROMPTS, load_prompts),
    "sample": (PROMPTS, load_prompts),
    "evaluate": (PAIRS, lambda path: load_preferences("files", path)),
}


def command(reader: str, path: Path, out: Path) -> list[object]:
    """Return the command that reads a file, with models that do not exist: the file is read before them."""
    model, reward = ["--model", "none/such"], ["--reward-model", "none/such"]
    words: dict[str, list[object]] = {
        "score": [*reward, "--candidates", path],
        "sample": [*model, "--prompts", path],
        "evaluate": [*model, *reward, "--prompts", path],
    }
    return [reader, *words[reader], "--out", out] if reader in words else [
        "train", "--method", reader, *model, *(reward if reader == "ppo" else []), "--data", path, "--out", out,
    ]  # fmt: skip


@pytest.mark.parametrize("reader", LOADERS)
@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\n\n"])
def test_sound_files_are_accepted(reader: str, ends: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.jsonl"
    rows, load = LOADERS[reader]
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + ends for row in rows))
    load(path)
    result = run(*command(reader, path, tmp_path / "out"))
    assert str(path) not in result.err  # it was read; what is missing is a model


@pytest.mark.parametrize("reader", LOADERS)
def test_every_command_names_file_and_line_and_writes_nothing(reader: str, tmp_path: Path) -> None:
    """Every fault of a line is a case of test_sources.py; here each command meets one, and what is no file."""
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in LOADERS[reader][0]) + b'{"a": \n')
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in ("broken.jsonl", "folder.jsonl", "loop.jsonl", "missing.jsonl", "x" * 300 + ".jsonl"):
        before = tree(tmp_path)
        result = run(*command(reader, tmp_path / name, tmp_path / "out"))
        assert (result.code, result.out) == (2, ""), (name, result)
        (line,) = result.err.splitlines()
        place = f":{len(LOADERS[reader][0]) + 1}: " if name == "broken.jsonl" else ": "
        assert line.startswith(f"error: {tmp_path / name}{place}")
        assert tree(tmp_path) == before


# Records of a store


PROMPT = Prompt(QUESTION)
RECORDS: tuple[Any, ...] = (
    Evaluated("rrhf", 0, "greedy", PROMPT, " Mix.", "eos", 3, 0.5, 0.25, {"polite": 1}, 2.5, 3, 0.1),
    Candidates(PROMPT, (Response(" a", "model", "eos", (5, 6), (-0.5, -0.25), 1.0), Response(" b", "chosen"))),
    PairScored("rrhf", 0, PROMPT, -1.5, -2.0),
    CurvePoint("ppo", 1, "sample", 0.5, 10, 100, (0.5, 0.25), (1.0, 2.0)),
    PoolScored(PROMPT, (0.5, 1.0), None, (" a", " b")),
)
WRONG_JSON: dict[type, tuple[Any, ...]] = {
    str: (3, 0.5, True, [], {}, ["x"]),
    int: ("3", 0.5, True, [], {}, 2**63, -(10**400)),
    float: ("0.5", True, [], {}, float("nan"), float("inf"), 10**400),
    list: ("x", 3, True, {}, [{}], [[]], [None]),
    dict: ("x", 3, True, [], {"a": "x"}, {"a": 0.5}),
}


def test_a_record_with_any_field_of_another_type_names_file_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    refused = 0
    for record in RECORDS:
        sound = to_json(record)
        for field, value in sound.items():
            for wrong in WRONG_JSON[type(value)]:
                path.write_text("\n" + json.dumps({**sound, field: wrong}))
                with pytest.raises(DataError, match=rf"records\.jsonl:2: {field}\b.*(: found .*; |missing; )expected "):
                    read_jsonl(path, type(record))
                refused += 1
            path.write_text(json.dumps({k: v for k, v in sound.items() if k != field} | {f"{field}x": value}))
            with pytest.raises(DataError, match=rf"records\.jsonl:1: unknown field '{field}x'; allowed are"):
                read_jsonl(path, type(record))
    assert refused > 130


# Anything at all


def only_bench_errors(path: Path, content: bytes, read: Callable[[Path], Any]) -> Any:
    """Return what a reader makes of a file, or its BenchError, which has one line a fault that names the file."""
    path.write_bytes(content)
    try:
        return read(path)
    except BenchError as error:
        refused = error
    lines = str(refused).splitlines()
    assert lines
    assert isinstance(refused, ConfigError) or len(lines) == 1
    assert all(str(path) in line for line in lines)
    assert all(visible(line) == line for line in lines)
    return refused


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file.jsonl"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside, max_size=3),
    max_leaves=6,
)
FIELDS = ("query", "responses", "scores", "sources", "finish", "token_ids", "logprobs", "prompt", "chosen", "rejected")
ROWS = st.dictionaries(
    st.sampled_from((*FIELDS, "text", "label", "method", "seed", "decoding", "reward")),
    JSON_VALUES | st.sampled_from([QUESTION, " Mix.", [" a", " b"], [0.5, 1], ["eos", "stop"], 1, "sample"]),
    max_size=8,
)
ANY_LINES = st.binary(max_size=80) | st.lists(ROWS, max_size=3).map(
    lambda rows: "\n".join(json.dumps(row) for row in rows).encode()
)


@SAME
@given(ANY_LINES)
@example(b'{"prompt": "\\ud800"}')
@example(b'{"prompt": "a", "prompt": "b"}')
@example(b'{"query": "a", "responses": ["b"], "scores": [' + b"9" * 400 + b"]}")
def test_any_lines_are_read_or_raise_a_data_error(scratch: Path, content: bytes) -> None:
    readers: list[Callable[[Path], Any]] = [
        *(load for _, load in LOADERS.values()),
        lambda path: load_preferences("files", path, diverging="common-prefix", faulty_rows="drop"),
        lambda path: load_texts("files", path, prompt_words=2),
        lambda path: load_prompts(path, verbatim=True),
        *(partial(read_jsonl, kind=type(record)) for record in RECORDS),
    ]
    for read in readers:
        found = only_bench_errors(scratch, content, read)
        assert not isinstance(found, ConfigError)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTS = st.integers(-(2**63), 2**63 - 1)
SCORED = st.lists(FLOATS, max_size=4).map(tuple)
RESPONSES = st.builds(
    Response,
    TEXT,
    TEXT,
    st.sampled_from(["eos", "stop", "length", "given"]),
    st.none() | st.lists(INTS, max_size=3).map(tuple),
    st.none() | SCORED,
    st.none() | FLOATS,
)
ANY_RECORD = st.one_of(
    st.builds(Candidates, TEXT.map(Prompt), st.lists(RESPONSES, max_size=3).map(tuple)),
    st.builds(PairScored, TEXT, INTS, TEXT.map(Prompt), FLOATS, FLOATS),
    st.builds(PoolScored, TEXT.map(Prompt), SCORED, st.none() | SCORED, st.lists(TEXT, max_size=3).map(tuple)),
    st.builds(CurvePoint, TEXT, INTS, st.sampled_from(["greedy", "sample"]), FLOATS, INTS, INTS, SCORED, st.none()),
    st.builds(
        Evaluated, TEXT, INTS, st.sampled_from(["greedy", "given"]), TEXT.map(Prompt), TEXT,
        st.sampled_from(["eos", "stop"]), INTS, FLOATS, st.none() | FLOATS,
        st.none() | st.dictionaries(TEXT, INTS, max_size=3), st.none() | FLOATS, st.none() | INTS, st.none() | FLOATS,
    ),
)  # fmt: skip


@SAME
@given(st.lists(ANY_RECORD, max_size=4))
def test_any_record_comes_back_from_its_line_as_it_was(scratch: Path, records: list[Any]) -> None:
    for kind in {type(record) for record in records}:
        same = [record for record in records if type(record) is kind]
        write_jsonl(scratch, same)
        assert repr(read_jsonl(scratch, kind)) == repr(same)  # repr tells -0.0 from 0.0
        assert scratch.read_bytes().count(b"\n") == len(same)


SAID = TEXT.filter(lambda text: bool(text.strip()) and not re.search("(Human|Assistant):", text))
GROUPS = st.builds(
    lambda question, replies: Candidates(
        as_prompt(question),
        tuple(Response(as_reply(text), source, finish, score=score) for text, source, finish, score in replies),
    ),
    SAID,
    st.lists(st.tuples(SAID, TEXT, st.sampled_from(["eos", "given", "length"]), FLOATS), min_size=1, max_size=4),
)


@SAME
@given(st.lists(GROUPS, min_size=1, max_size=4))
def test_candidates_come_back_from_the_official_layout(scratch: Path, groups: list[Candidates]) -> None:
    write_rrhf(scratch, groups)
    assert load_candidates(scratch).candidates == tuple(groups)


# Dialogues


PIECES = st.lists(TEXT | st.sampled_from([HUMAN, ASSISTANT, "\n", "\n\n", "Human:", "Assistant:", " "]), max_size=8)
TRANSCRIPT = PIECES.map("".join)


@SAME
@given(TRANSCRIPT)
def test_a_transcript_is_the_turns_that_it_parts_into(text: str) -> None:
    try:
        dialogue = turns(text)
    except DataError:
        assert not text.lstrip("\n").startswith(("Human:", "Assistant:"))
        return
    assert transcript_of(dialogue) == "\n\n" + text.lstrip("\n")
    assert turns(transcript_of(dialogue)) == dialogue
    assert not any(mark in turn.text for turn in dialogue for mark in (HUMAN, ASSISTANT))
    if dialogue[-1].role == "assistant":
        assert prompt_of(dialogue[:-1]).text + dialogue[-1].text == transcript_of(dialogue)


@SAME
@given(TRANSCRIPT)
def test_a_prompt_ends_where_the_assistant_is_to_speak_and_stays_as_it_is(text: str) -> None:
    try:
        prompt = as_prompt(text)
    except DataError:
        return
    assert prompt.text.startswith((HUMAN, ASSISTANT))
    assert prompt.text.endswith(ASSISTANT)
    assert as_prompt(prompt.text) == prompt
    assert len(prompt.id) == 16


@SAME
@given(TRANSCRIPT, st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_a_reply_cut_at_a_stop_string_holds_none(text: str, more: list[str]) -> None:
    stops = (*STOP_STRINGS, *more)
    kept, was_cut = cut_at_stop(text, stops)
    assert text.startswith(kept)
    assert was_cut == any(stop in text for stop in stops)
    assert not any(stop in kept for stop in stops)


@SAME
@given(TEXT, st.sampled_from(["hh", "raw", "chat"]))
def test_a_reply_is_read_as_it_was_written(text: str, kind: Any) -> None:
    template = Template(kind)
    reply = template.read_response(text)
    assert template.read_response(template.render_response(reply)) == reply


# Experiments


TOML_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TOML_TEXT,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TOML_TEXT, inside, max_size=3),
    max_leaves=5,
)
KEYS = sorted({key for text in EXPERIMENTS.glob("*.toml") for where, _ in leaves(tomllib.loads(text.read_text()))
               for key in where})  # fmt: skip
GOOD = (0, 1, 4, 0.5, 1e-3, True, "toy", "rrhf", "DP", "sft", "ppo", "methods.sft", ["model", "chosen"], "beam", [0])
TABLES = st.recursive(
    st.sampled_from(GOOD) | TOML_VALUES,
    lambda inside: st.dictionaries(st.sampled_from(KEYS) | TOML_TEXT, inside, max_size=4),
    max_leaves=12,
).filter(lambda value: isinstance(value, dict))
ROWS_OF_METHODS = st.dictionaries(
    st.sampled_from(["rrhf", "sft", "ppo", "best_of_n", "other", "base"]),
    st.dictionaries(st.sampled_from(["kind", "lr", "epochs", "n", "sources", "policy", "initial", "rollouts", "rounds",
                                     "temperature", "strategy", "beams", "refresh", "scored_by"]),
                    st.sampled_from(GOOD) | TOML_VALUES, max_size=4),
    max_size=3,
)  # fmt: skip


@SAME
@given(TABLES | st.builds(lambda table, rows: {**table, "methods": rows}, TABLES, ROWS_OF_METHODS))
def test_any_table_is_a_whole_experiment_or_refused(scratch: Path, table: dict[str, Any]) -> None:
    content = tomli_w.dumps({key: value for key, value in table.items() if key != "extends"}).encode()
    path = scratch.with_name("experiment.toml")
    found = only_bench_errors(path, content, load_experiment)
    if not isinstance(found, BenchError):
        path.write_text(found.to_toml())
        assert load_experiment(path) == found


@SAME
@given(st.binary(max_size=60) | TOML_TEXT.map(lambda text: text.encode()))
def test_any_bytes_are_an_experiment_or_refused(scratch: Path, content: bytes) -> None:
    only_bench_errors(scratch.with_name("experiment.toml"), content, load_experiment)


@SAME
@given(st.lists(st.text(max_size=12) | st.builds(
    lambda key, value: f"{key}={value}",
    st.sampled_from(["seeds", "data.seed", "methods.sft.lr", "policy.source", "a.b.c", "sampling.policy", "name"]),
    st.text(max_size=8) | st.sampled_from(["1e400", "nan", "9" * 5000, "[" * 9000, "{a=1}", "\ud800", "\0"])),
    max_size=3))  # fmt: skip
def test_any_override_is_applied_or_refused(scratch: Path, overrides: list[str]) -> None:
    path = scratch.with_name("experiment.toml")
    path.write_text("")
    with contextlib.suppress(ConfigError):
        load_experiment(path, overrides).to_toml()
