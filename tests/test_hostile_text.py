"""Markdown, LaTeX, spreadsheets and terminals show foreign text and never obey it. Secrets are written nowhere."""

from __future__ import annotations

import csv
import io
import json
import pickle
import random
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from rrhf_bench.errors import BenchError, ConfigError, DataError, StageError, redacted, visible
from rrhf_bench.jsonl import read_jsonl, write_jsonl
from rrhf_bench.pipeline.run_folder import open_run
from rrhf_bench.pipeline.stage_graph import Stage, make_plan
from rrhf_bench.records import Prompt, Response
from rrhf_bench.report.table import Cell, Column, Table, fenced, latex, markdown, to_csv, to_latex, to_markdown
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.terminal import TerminalReporter
from tests.test_fuzz import run
from tests.test_pipeline import CUTS, SMOKE

SAME = settings(max_examples=300, deadline=None, derandomize=True, database=None)
MARKS = [
    *"*_`~|\\[]()<>#&!:;=+-.0123456789@$^{}\"'/%, abwxyz",
    "www.", "http://", "\n", "\t", "![", "](", "<!--", "&lt;", "&#35;", "- ", "1. ", "---", "===", "> ", "```",
    "    ",     "\u2028", "\x1b[31m", "  \n", "a_b", "__", "**", "\u202e", "\r\n",
    "\\input{x}", "\\end{tabular}", "$$", "^^M", "``",
]  # fmt: skip
HOSTILE = st.lists(st.sampled_from(MARKS) | st.characters(), max_size=8).map("".join)
ESCAPE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# Markdown: where the report puts foreign text.
PLACES = (
    "x {} y", "{}", "- {}", "- x: {}", "# {}", "**{}**", "*{}.* more", "![{}](figures/x.png)", "**x**\n\n{}\n\ny",
    "| a | b |\n| :--- | ---: |\n| {} | 1 |", "| {} | b |\n| :--- | ---: |\n| c | 1 |",
)  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shape(page: str) -> tuple[list[str], list[list[str]], str]:
    """(blocks, marks inside each, words) of a page as a Markdown reader sees it."""
    tokens = PARSER.parse(page)
    inline = [token.children for token in tokens if token.children is not None]
    marks = [[t.type for t in children if t.type not in ("text", "text_special")] for children in inline]

    def words(children: Any) -> str:
        return "".join(words(t.children) if t.children else t.content for t in children)

    return [token.type for token in tokens], marks, "\n".join(map(words, inline))


@SAME
@given(HOSTILE.filter(bool))
@example("- - -")
@example("=====")
@example("1) x")
@example(" a ")
def test_markdown_shows_any_text_as_words_in_every_place(text: str) -> None:
    for place in PLACES:
        blocks, marks, words = shape(place.format(markdown(text)))
        plain_blocks, plain_marks, plain_words = shape(place.format("abc"))
        assert (blocks, marks) == (plain_blocks, plain_marks), place
        assert words == plain_words.replace("abc", visible(text)), place


@SAME
@given(HOSTILE)
def test_nothing_in_a_fence_ends_it(text: str) -> None:
    tokens = PARSER.parse(f"before\n\n{fenced(text)}\n\nafter\n")
    (block,) = [token for token in tokens if token.type == "fence"]
    assert block.content == visible(text, keep="\n") + "\n"
    assert tokens[-2].content == "after"
    assert not ESCAPE.search(block.content)


# What LaTeX reads as anything but a letter to print, once our own escapes are taken away.
LATEX_OURS = re.compile(
    r"\\text(backslash|ascii(circum|tilde)|less|greater|bar|quotedbl|asciigrave)\{\}|\\[{}$&#%_]|\{\[\}|\{\]\}"
)


@SAME
@given(HOSTILE)
def test_latex_prints_any_text(text: str) -> None:
    left = LATEX_OURS.sub("", latex(text))
    assert not re.search(r"[\\{}$&#%_^~\[\]]", left)
    assert "\n" not in left  # a blank line would end a paragraph
    assert not ESCAPE.search(left)
    assert not re.search(r"[\\{}$&#%_^~\[\]]", LATEX_OURS.sub("", latex(visible(text))))


@SAME
@given(st.lists(st.tuples(HOSTILE, HOSTILE.filter(bool)), min_size=1, max_size=4))
def test_a_table_of_hostile_cells_keeps_its_rows_and_columns(pairs: list[tuple[str, str]]) -> None:
    rows = tuple((Cell(name), Cell(0.5), Cell(None, reason=reason)) for name, reason in pairs)
    title = pairs[0][1]
    table = Table("t", title, (Column(title), Column("n", 2), Column("why")), rows, (title,), "id")
    blocks, marks, _ = shape(to_markdown(table))
    assert blocks.count("tr_open") == len(rows) + 1
    assert blocks.count("td_open") == 3 * len(rows)
    assert [m for m in marks if m] in ([], [["strong_open", "strong_close"]])
    body = to_latex(table).split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert len(body) == len(rows)
    assert all(LATEX_OURS.sub("", line.removesuffix(r" \\")).count("&") == 2 for line in body)
    read = list(csv.reader(io.StringIO(to_csv(table))))
    assert [len(row) for row in read] == [len(read[0])] * (len(rows) + 1)
    assert not any(field.startswith(("=", "+", "@", "-", "\t", "\r")) for row in read for field in row)
    for page in (to_markdown(table), to_latex(table), to_csv(table)):
        assert not ESCAPE.search(page)


@SAME
@given(st.text(max_size=20))
def test_what_cannot_be_seen_is_spelled_and_spelled_once(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable() or any(c.isspace() for c in shown)  # such as U+00A0, a space that prints
    assert not ESCAPE.search(shown)
    assert visible(shown) == shown
    shown.encode()


# The terminal

COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich itself writes
EVIL = (
    "\x1b[2J\x1b]0;title\x07[bold]x[/bold] [/x] \x9b31m \r \x08 [link=file:///etc]a[/link] :smile: {task.fields} %s {}"
)


def terminal(live: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=live, width=400, color_system="standard" if live else None), out


@pytest.mark.parametrize("live", [False, True])
def test_the_terminal_shows_names_and_acts_on_none(live: bool) -> None:
    console, out = terminal(live)
    stage = Stage(EVIL, "train", {}, {}, EVIL)
    with TerminalReporter(console) as reporter:
        reporter.reused(stage)
        reporter.started(stage)
        reporter.progress(EVIL, 1, 3)
        reporter.finished(stage, 1.5)
        reporter.begin(EVIL)
        reporter.progress(EVIL, 2, 3)
    text = out.getvalue()
    ours = COLOURS.sub("", text).replace("\r", "" if live else "\r")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ours)
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    shown = "\\x1b[2J\\x1b]0;title\\x07[bold]x[/bold] [/x] \\x9b31m \\r \\x08 [link=file:///etc]a[/link] :smile:"
    assert shown in ours


@pytest.mark.parametrize("words", [("plan",), ("plan", "--json")])
def test_plan_shows_paths_and_acts_on_none(words: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "[bold]x[/bold] [/y] \x9b2J"
    folder.mkdir(parents=True)
    row = {"query": "Hi", "responses": [" a", " b"], "scores": [1.0, 0.0]}
    (folder / "\x1b[2Jf.jsonl").write_text(json.dumps(row))
    name = json.dumps(str(folder / "\x1b[2Jf.jsonl"))
    path = tmp_path / "x.toml"
    text = f'[sources.a]\nfile = {name}\n[methods.m]\nkind = "rrhf"\ncandidates = {{ sources = ["a", "model"] }}\n'
    path.write_text(text)
    command, *options = words
    result = run(command, path, *options, "--runs", folder / "runs")
    assert result.code == 0, result.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.out + result.err)
    if not options:
        assert "[bold]x[/bold] [/y]" in result.out.replace("\n", "")


@pytest.mark.parametrize("command", [("report",), ("ls", "--runs"), ("ls", "--json", "--runs"), ("plan",)])
def test_the_name_of_a_folder_is_shown_and_not_acted_on(command: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "[bold]x[/y]\x1b[2J\n\x9b"
    result = run(*command, folder)
    assert result.code in (0, 2), result
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.out + result.err)
    assert "[bold]x[/y]" in (result.out + result.err).replace("\n", "") or "--json" in command


@pytest.mark.parametrize("kind", [DataError, StageError, ConfigError])
def test_a_message_is_one_line_without_control_characters(kind: type[BenchError]) -> None:
    message = f"{EVIL}: found \u202e\ud800\u2028 in \x85 it"
    error = kind(message)
    assert len(str(error).splitlines()) == 1
    assert not ESCAPE.search(str(error))
    str(error).encode()
    back = pickle.loads(pickle.dumps(error))  # as it comes from another process
    assert (type(back), str(back)) == (kind, str(error))
    assert str(kind(f"train x: {error}")) == f"train x: {error}"


# Secrets

SECRET = "hf_" + "pLaNtEdSecret0123456789"
KEY = "sk-" + "pLaNtEdJudge0123456789"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("JUDGE_KEY", KEY)


def leaks(folder: Path) -> list[str]:
    """The files below a folder that hold a planted secret, in their name or content."""
    return [
        str(path)
        for path in folder.rglob("*")
        if any(
            secret in str(path) or (path.is_file() and secret.encode() in path.read_bytes()) for secret in (SECRET, KEY)
        )
    ]


JUDGED = """
[judge]
source = "endpoint"
[judge.endpoint]
base_url = "http://127.0.0.1:9/v1"
model = "m"
api_key_env = "JUDGE_KEY"
[methods.wombat]
kind = "rrhf"
candidates = { scored_by = "judge" }
"""


def test_a_run_folder_holds_no_secret(planted: None, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(JUDGED)
    plan = make_plan(load_experiment(path))
    folder = open_run(plan, tmp_path / "runs", f"rrhf-bench run {path}")
    assert "JUDGE_KEY" in (folder / "config.toml").read_text()  # the name of the variable, which is no secret
    assert load_experiment(folder / "config.toml").judge == plan.experiment.judge
    assert not leaks(tmp_path)
    assert not [stage for stage in plan.stages if SECRET in repr(stage) or KEY in repr(stage)]


@pytest.mark.parametrize(
    "table",
    [
        f'[judge]\nsource = "endpoint"\nendpoint = {{ base_url = "https://me:{KEY}@host/v1", model = "m" }}',
        f'[judge]\nsource = "endpoint"\nendpoint = {{ base_url = "me:{KEY}@host/v1", model = "m" }}',
        f'[judge]\nsource = "endpoint"\nendpoint = {{ base_url = "http://h/v1?key={KEY}", model = "m" }}',
        f'[judge]\nsource = "endpoint"\nendpoint = {{ base_url = "http://h/v1", model = "m", api_key_env = "{KEY}" }}',
        f'[judge]\nsource = "endpoint"\nendpoint = {{ base_url = "http://h/v1", model = "m", api_key = "{KEY}" }}',
        f'[judge]\nsource = "endpoint"\nendpoint = "{KEY}"',
        f'judge = "{KEY}"',
        f'[policy]\nsource = "https://me:{KEY}@hub/model"',
        f'[reward_model]\nsource = "https://me:{KEY}@hub/model"',
        f'[data]\nsource = "hub:https://me:{KEY}@hub/data"',
        f'[data]\nsource = "files"\npath = "https://me:{KEY}@hub/data.jsonl"',
        f'[sources.x]\nfile = "https://me:{KEY}@hub/data.jsonl"',
    ],
)
@pytest.mark.parametrize("told", [True, False])  # whether the environment knows the key as well
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(
    table: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told:
        monkeypatch.setenv("JUDGE_KEY", KEY)
    path = tmp_path / "x.toml"
    path.write_text(table)
    result = run("run", path, "--runs", tmp_path / "runs")
    assert result.code == 2
    assert KEY not in result.out + result.err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert KEY not in str(caught.value)


def test_a_secret_of_the_command_line_is_refused_before_it_is_recorded(planted: None, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(JUDGED)
    override = f"judge.endpoint.base_url=https://me:{KEY}@host/v1"
    result = run("run", path, "--set", override, "--runs", tmp_path / "runs")
    assert result.code == 2
    assert KEY not in result.out + result.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", [DataError, StageError, ConfigError])
def test_no_message_repeats_a_secret_of_a_library(planted: None, kind: type[BenchError]) -> None:
    said = f"401 for https://me:{KEY}@host/v1?x: Authorization: Bearer {SECRET}; key '{KEY}'; http://user@h/"
    error = kind(f"cannot be loaded ({said})")
    assert SECRET not in str(error)
    assert KEY not in str(error)
    assert str(error) == (
        "cannot be loaded (401 for https://***@host/v1?x: Authorization: Bearer ***; key '***'; http://***@h/)"
    )
    assert SECRET not in "".join(traceback.format_exception(error))


def test_an_ordinary_word_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "rrhf")
    monkeypatch.setenv("HOME_PAGE", "transformers")
    text = "rrhf with transformers at http://host:80/v1 and a@b.c"
    assert redacted(text) == text


def test_records_of_hostile_text_round_trip(tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = ["".join(rng.choices([*MARKS, "\u2029", "\x85", "\x0b", "\x1c", "\x00"], k=12)) for _ in range(200)]
    write_jsonl(tmp_path / "r.jsonl", [Response(text, "model") for text in texts])
    assert [response.text for response in read_jsonl(tmp_path / "r.jsonl", Response)] == texts
    assert Prompt(texts[0]).id


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_a_whole_run_writes_no_secret_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of the smoke experiment on less of everything, in one process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [word for cut in (*CUTS, "runtime.workers=1", "data.toy.raw_corpus=200") for word in ("--set", cut)]
    result = run("run", SMOKE, *words, "--runs", tmp_path / "runs")
    assert result.code == 0, result.err
    assert len(list(tmp_path.rglob("*.json"))) > 20
    assert not leaks(tmp_path)
    assert not any(secret in result.out + result.err for secret in (SECRET, KEY))
