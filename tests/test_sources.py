"""The readers of preference pairs, prompts and scored candidates keep, count or refuse each row of a file."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rrhf_bench.data.dialogue import ASSISTANT, HUMAN, SYSTEM, RefusedDialogue, prompt_of, turns
from rrhf_bench.data.preferences import PreferenceData, load_pairs, load_preferences
from rrhf_bench.data.prompts import fit_context, load_prompts
from rrhf_bench.data.rrhf_files import count_candidates, load_candidates, write_rrhf
from rrhf_bench.data.splits import _prompts_inside, split_preferences
from rrhf_bench.data.texts import load_texts
from rrhf_bench.errors import DataError
from rrhf_bench.pipeline.file_commands import read_prompts
from rrhf_bench.records import Candidates, Preference, Prompt, Response

ASK = "\n\nHuman: Ask\n\nAssistant:"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (objects, or lines as they are) into a file of the test's folder."""

    def write(*rows: Any, name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def pair(i: int, prompt: str | None = None) -> dict[str, str]:
    return {
        "prompt": prompt or f"\n\nHuman: Question {i}\n\nAssistant:",
        "chosen": f" good {i}",
        "rejected": f" bad {i}",
    }


def nonzero(counts: Any) -> dict[str, int]:
    return {name: number for name, number in counts.items() if number}


# Preference pairs: the two layouts and the files


def test_a_row_may_hold_a_prompt_and_two_replies(write: Write) -> None:
    path = write(pair(0) | {"response": " good 0", "meta": {"a": 1}}, "", pair(1) | {"meta": [2]})
    data = load_pairs(path)
    assert data.preferences == tuple(
        Preference(Prompt(f"\n\nHuman: Question {i}\n\nAssistant:"), f" good {i}", f" bad {i}") for i in range(2)
    )
    assert nonzero(data.counts) == {"rows": 2, "kept": 2}


def test_a_row_names_the_cluster_of_its_prompt(write: Write) -> None:
    path = write(pair(0) | {"cluster": "bread"}, pair(1) | {"cluster": 7}, pair(2), pair(3) | {"cluster": None})
    assert [p.cluster for p in load_pairs(path).preferences] == ["bread", "7", None, None]
    for value, found in ((True, "true"), (1.5, "1.5"), (["a"], '"a"')):
        with pytest.raises(DataError, match=f"pairs.jsonl:1: cluster: found .*{found}.*; expected text or a whole"):
            load_pairs(write(pair(0) | {"cluster": value}))
    texts = write({"text": "one two three four", "label": "1", "cluster": "a"}, name="texts.jsonl")
    assert [t.cluster for t in load_texts("files", texts, prompt_words=2).texts] == ["a"]


def test_a_row_may_hold_two_transcripts(write: Write) -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Go\n\non\n\nAssistant:"
    data = load_pairs(write({"chosen": shared + " Gladly.", "rejected": shared + " No!\n"}))
    assert data.preferences == (Preference(Prompt(shared), " Gladly.", " No!\n"),)


def test_the_identity_of_a_source_is_that_of_its_contents(write: Write) -> None:
    plain = load_pairs(write(pair(0), pair(1), name="a [x]/pairs.jsonl"))  # brackets in a path are no glob
    zipped = load_pairs(write(pair(0), pair(1), name="b.jsonl.gz"))
    assert (zipped.preferences, zipped.identity) == (plain.preferences, plain.identity)
    assert load_pairs(write(pair(0), pair(2), name="a [x]/pairs.jsonl")).identity != plain.identity


def test_a_folder_and_a_glob_select_files(write: Write, tmp_path: Path) -> None:
    write(pair(0), name="d/train-00000-of-00002.jsonl")
    write(pair(1), name="d/deeper [x]/train.jsonl.gz")
    write(pair(2), name="d/test.jsonl")
    (tmp_path / "d/README.md").write_text("not data")
    (tmp_path / "d/folder.jsonl").mkdir()

    def chosen(path: Any) -> list[str]:
        return [item.chosen for item in load_preferences("files", path).preferences]

    assert sorted(chosen(tmp_path / "d")) == [" good 0", " good 1", " good 2"]
    assert chosen(tmp_path / "d" / "t[er]*.jsonl") == [" good 2", " good 0"]  # in the order of the names


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere", "is missing"), ("nowhere/*.jsonl", "is missing"), ("empty", "holds no data file")],
)
def test_a_missing_source_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{reason}; expected a file, a folder or a glob of \\*.jsonl"):
        load_pairs(tmp_path / name)


def test_a_file_of_another_type_is_named(write: Write) -> None:
    with pytest.raises(DataError, match=r"pairs.csv: found a .csv file; expected \*.jsonl"):
        load_pairs(write("a,b", name="pairs.csv"))


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(DataError, match="source 'hubs': expected 'files' with a path, or 'hub:<data set>'"):
        load_preferences("hubs")
    with pytest.raises(DataError, match="source 'files': path is missing"):
        load_preferences("files")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": ASK, "chosen": 5, "rejected": " b"}, r"pairs.jsonl:3: chosen: found 5; expected text"),
        ({"prompt": ASK, "chosen": " a"}, r"pairs.jsonl:3: rejected: is missing; expected text"),
        ({"prompt": ASK, "chosen": " a", "rejected": None}, r"pairs.jsonl:3: rejected: is missing"),
        ({"prompt": [{"role": "user"}], "chosen": " a", "rejected": " b"}, r"pairs.jsonl:3: prompt: found \[\{"),
    ],
)
@pytest.mark.parametrize("faulty_rows", ["error", "drop"])
def test_a_row_of_another_shape_is_an_error_even_where_faulty_rows_are_dropped(
    write: Write, line: Any, expected: str, faulty_rows: Any
) -> None:
    path = write(pair(0), "", line, pair(1))  # a blank line: line numbers are not row numbers
    with pytest.raises(DataError, match=expected) as caught:
        load_preferences("files", path, faulty_rows=faulty_rows)  # broken shapes are never dropped
    assert "\n" not in str(caught.value)


LINE = b'{"prompt": "x"}'
FAULTY_LINES = {
    "truncated": (LINE[:9], "is not JSON"),
    "goes on": (LINE + b" x", "is not JSON"),
    "two objects": (LINE * 2, "is not JSON"),
    "an array": (b"[1, 2]", r"found \[1, 2\]"),
    "a number": (b"NaN", "found NaN"),
    "Python's quotes": (b"{'prompt': 'x'}", "is not JSON"),
    "a control character": (b'{"prompt": "\x07"}', "is not JSON"),
    "a key twice": (b'{"prompt": "x", "prompt": "y"}', "is not JSON .*'prompt'"),
    "half a character": (b'{"prompt": "\\ud83d x"}', "holds .*ud83d"),
    "no UTF-8": (b'{"prompt": "\xff"}', "is not UTF-8 text .byte 12 "),
    "deep nesting": (b"[" * 60_000, "is not JSON"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "a second byte order mark": (b"\xef\xbb\xbf" + LINE, "is not JSON"),
}


@pytest.mark.parametrize("fault", FAULTY_LINES)
def test_a_faulty_line_is_named(tmp_path: Path, fault: str) -> None:
    line, found = FAULTY_LINES[fault]
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b"\n \n" + line + b"\n" + LINE)  # a blank line: line numbers are not row numbers
    with pytest.raises(DataError, match=f"a.jsonl:3: {found}") as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair(0)).encode())[:-12])
    with pytest.raises(DataError, match=r"b.jsonl.gz: cannot be read"):
        load_pairs(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"c.parquet: cannot be read as Parquet"):
        load_pairs(tmp_path / "c.parquet")


def test_parquet_faults_name_the_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [pair(0), {"prompt": ASK, "chosen": " a", "rejected": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p.parquet row 1: rejected: is missing"):
        load_pairs(tmp_path / "p.parquet")


def test_a_table_without_rows_is_passed_over(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([pair(0)])
    for name, part in (("a", table.slice(0, 0)), ("b", table)):
        pyarrow.parquet.write_table(part, tmp_path / f"{name}.parquet")
    assert [item.chosen for item in load_pairs(tmp_path).preferences] == [" good 0"]


# Lists of messages


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TALK = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Go\n\nAssistant:"
EXPECTED = Preference(Prompt(TALK), " Gladly.", " No!")
FORMS: dict[str, dict[str, Any]] = {
    "TRL, prompt apart": {
        "prompt": said("Hi", "Ho", "Go"), "chosen": assistant("Gladly."), "rejected": assistant("No!"),
    },
    "TRL, prompt within": {"chosen": said("Hi", "Ho", "Go", "Gladly."), "rejected": said("Hi", "Ho", "Go", "No!")},
    "UltraFeedback": {
        "prompt": TALK, "chosen": said("Hi", "Ho", "Go", "Gladly."), "rejected": said("Hi", "Ho", "Go", "No!"),
        "score_chosen": 8.5, "score_rejected": 6.0, "messages": said("Hi", "Ho", "Go", "Gladly."), "prompt_id": "x",
    },
    "text and messages": {"prompt": said("Hi", "Ho", "Go"), "chosen": "Gladly.", "rejected": assistant("No!")},
    "transcript and messages": {"chosen": TALK + " Gladly.", "rejected": said("Hi", "Ho", "Go", "No!")},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_row_may_hold_lists_of_messages(write: Write, form: str) -> None:
    assert load_pairs(write(FORMS[form])).preferences == (EXPECTED,)


def test_a_bare_prompt_beside_whole_dialogues_is_their_question(write: Write) -> None:
    row = {"prompt": "Go\n", "chosen": said("Go\n", "Gladly."), "rejected": said("Go\n", "No!")}
    data = load_pairs(write(row))
    assert data.preferences == (Preference(Prompt("\n\nHuman: Go\n\nAssistant:"), " Gladly.", " No!"),)
    assert nonzero(data.counts) == {"rows": 1, "kept": 1, "prompt_rewritten": 1}


def test_a_system_message_begins_the_prompt(write: Write) -> None:
    row = {"chosen": said("Go", "Gladly.", system="Be brief."), "rejected": said("Go", "No!", system="Be brief.")}
    prompt = Prompt("\n\nSystem: Be brief.\n\nHuman: Go\n\nAssistant:")
    assert load_pairs(write(row)).preferences == (Preference(prompt, " Gladly.", " No!"),)
    assert load_prompts(write({"prompt": said("Go", system="Be brief.")})).prompts == (prompt,)
    text = {side: prompt.text + reply for side, reply in (("chosen", " Gladly."), ("rejected", " No!"))}
    assert load_pairs(write(text)).preferences == (Preference(prompt, " Gladly.", " No!"),)


@pytest.mark.parametrize(
    "value",
    [[], ["a"], [{"role": "user"}], [{"role": "tool", "content": "a"}], [{"role": "user", "content": [{"text": "a"}]}]],
)
def test_a_faulty_list_of_messages_names_line_and_field(write: Write, value: Any) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl:1: chosen: found \["):
        load_preferences("files", write({"prompt": ASK, "chosen": value, "rejected": " b"}), faulty_rows="drop")


def test_a_held_out_prompt_with_a_system_turn_is_found_inside_a_training_text() -> None:
    asked = "\n\nSystem: s\n\nHuman: q\n\nAssistant:"
    around = Preference(Prompt("\n\nHuman: first\n\nAssistant:"), f" a{asked} b", " no")
    pairs = [Preference(Prompt(asked), " a", " b"), around, *many(1)]
    splits = [split_preferences(pairs, dev=0, test=1, seed=seed) for seed in range(10)]
    overlaps = [split.counts["overlap"] for split in splits if split.test[0].prompt.text == asked]
    assert overlaps
    assert set(overlaps) == {1}


# Containers


def container(name: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write the rows into a file or folder of one kind."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = folder / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name.lower().endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name == "saved":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(path)
        (path / "cache-0123456789abcdef.arrow").write_bytes(b"left by a map() of the user")
    elif name == "splits":
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
    elif name.startswith("array"):
        bom = b"\xef\xbb\xbf" if "bom" in name else b""
        path.write_bytes(bom + json.dumps(rows, indent=1, ensure_ascii=False).encode())
    else:
        bom = b"\xef\xbb\xbf" if "bom" in name else b""
        path.write_bytes(gzip.compress(bom + lines.encode()) if name.lower().endswith(".gz") else bom + lines.encode())
    return path


CONTAINERS = (
    "a.jsonl", "a.JSONL", "a.jsonl.gz", "a.JSONL.GZ", "lines.json", "array.json", "array.JSON", "array.bom.json",
    "bom.jsonl", "bom.jsonl.gz", "a.parquet", "a.PARQUET", "saved",
)  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_container_holds_pairs_prompts_and_candidates(tmp_path: Path, name: str) -> None:
    row = {"chosen": said("Wie geht’s?", "Gut."), "rejected": said("Wie geht’s?", "Nein."), "score_chosen": 8.5}
    prompt = Prompt("\n\nHuman: Wie geht’s?\n\nAssistant:")
    pairs = container(name, [row, row], tmp_path)
    assert load_pairs(pairs).preferences == (Preference(prompt, " Gut.", " Nein."),) * 2
    read = read_prompts(pairs)
    assert (len(read.pairs), read.prompts) == (2, [prompt] * 2)

    for asked in ("Wie geht’s?", said("Wie geht’s?")):
        folder = tmp_path / type(asked).__name__
        folder.mkdir()
        read = read_prompts(container(name, [{"prompt": asked}, {"prompt": asked}], folder))
        assert (read.pairs, read.prompts) == ([], [prompt] * 2)
        assert read.counts["duplicate_prompt"] == 1
    (tmp_path / "c").mkdir()
    scores = container(name, [{"query": "Wie geht’s?", "responses": ["a", "b"], "scores": [1.0, 0.0]}], tmp_path / "c")
    assert [item.scores for item in load_candidates(scores).candidates] == [(1.0, 0.0)]


def test_a_saved_data_set_has_its_splits(tmp_path: Path) -> None:
    path = container("splits", [pair(0), pair(1)], tmp_path)
    assert len(load_pairs(path).preferences) == 3
    assert [item.chosen for item in load_pairs(path / "test").preferences] == [" good 0"]


def test_a_fault_in_an_array_names_the_line_of_its_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for rows, expected in (
        ('[\n{"prompt": "a"},\n\n{"prompt": 3}]', r"a.json:4: prompt: found 3"),
        ('[\n{"prompt": "a"},\n{"prompt": "b", }]', r"a.json:3: is not JSON"),
        ('[\n{"prompt": "a"},\n3]', r"a.json:3: found 3; expected a JSON array of objects"),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', r"a.json:1: is not JSON \(found '{'"),
        ('[{"prompt": "a"},]', r"a.json:1: is not JSON"),
        ('[{"prompt": "a"}', r"a.json:1: is not JSON"),
        ('[{"prompt": "a"}] x', r"a.json: is not JSON \(found 'x' after"),
        ('[{"prompt": "a", "prompt": "b"}]', r"a.json:1: is not JSON .*twice"),
        ('[{"prompt": "\\ud800"}]', r"a.json:1: holds .*half of a surrogate pair"),
        ("[]", r"a.json: holds no prompts"),
        ('{"prompt": "a"}\n[3]', r"a.json:2: found \[3\]"),
    ):
        path.write_text(rows)
        with pytest.raises(DataError, match=expected):
            load_prompts(path)


# Preference pairs: the rules

NESTED = "Go\n\nHuman: x"  # a message that would be read as two turns

DAMAGED = {
    "CRLF": "\r\n\r\nHuman: Ask\r\n\r\nAssistant:",
    "CRLF between turns": "Human: Ask\r\n\r\nAssistant:",
    "a leading blank": " " + ASK,
    "a leading tab": "\t" + ASK,
    "a byte order mark": "\ufeff" + ASK,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_line_ends_and_leading_white_space_are_repaired_and_counted(write: Write, damage: str) -> None:
    text = DAMAGED[damage]
    beside = load_pairs(write({"prompt": text, "chosen": " a", "rejected": " b"}))
    assert beside.preferences == (Preference(Prompt(ASK), " a", " b"),)
    assert beside.counts["prompt_rewritten"] == 1
    whole = load_pairs(write({"chosen": text + " a", "rejected": text + " b"}))
    assert whole.preferences == beside.preferences
    assert whole.counts["transcript_repaired"] == 1
    prompts = load_prompts(write({"prompt": text}))
    assert (prompts.prompts, prompts.counts["prompt_rewritten"]) == ((Prompt(ASK),), 1)
    candidates = load_candidates(write({"query": text, "responses": ["a"], "scores": [1]}))
    assert candidates.candidates[0].prompt == Prompt(ASK)
    assert (candidates.counts["prompt_rewritten"], candidates.counts["cut_on_the_left"]) == (1, 0)


def test_text_before_the_first_turn_is_refused_or_dropped(write: Write) -> None:
    path = write({"prompt": "A talk." + ASK}, {"prompt": ASK})
    with pytest.raises(DataError, match=r"pairs.jsonl:1: prompt: found 'A talk.*before the first 'Human:'"):
        load_prompts(path)
    data = load_prompts(path, faulty_rows="drop")
    assert nonzero(data.counts) == {"rows": 2, "prompts": 1, "not_a_prompt": 1}
    assert data.places == {Prompt(ASK): f"{path}:2"}


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (
            {"chosen": ASK + " a\n\nHuman: ?", "rejected": ASK + " b"},
            "not_ending_with_assistant",
            "chosen: ends with a Human turn",
        ),
        ({"chosen": ASK + " a", "rejected": "b"}, "not_a_transcript", "rejected: found 'b'; expected a transcript"),
        ({"prompt": " ", "chosen": " a", "rejected": " b"}, "not_a_prompt", "prompt: the prompt is empty"),
        *(
            (
                {"prompt": ASK, "chosen": chosen, "rejected": " b"},
                "reply_is_a_transcript",
                "chosen: found a transcript beside a prompt",
            )
            for chosen in (ASK + " a", "Human: Ask\r\n\r\nAssistant: a")
        ),
        ({"prompt": "Come", "chosen": said("Go", "Gladly."), "rejected": said("Go", "No!")}, "prompt_differs", ""),
        ({"chosen": said("Go", "Oh", "Now"), "rejected": said("Go", "No!")}, "not_ending_with_assistant", ""),
        ({"chosen": assistant("Gladly."), "rejected": assistant("No!")}, "not_a_transcript", ""),
        ({"chosen": said(NESTED, "Gladly."), "rejected": said(NESTED, "No!")}, "not_a_transcript", ""),
        ({"prompt": said("Hi", "Ho"), "chosen": "Gladly.", "rejected": "No!"}, "not_a_prompt", ""),
    ],
)
def test_a_faulty_row_is_an_error_or_is_counted(write: Write, row: Any, kind: str, reason: str) -> None:
    path = write(pair(0), row, pair(1))
    with pytest.raises(DataError, match=rf'pairs.jsonl:2: {reason}.*faulty_rows = "drop"'):
        load_pairs(path)
    data = load_preferences("files", path, faulty_rows="drop")
    assert nonzero(data.counts) == {"rows": 3, "kept": 2, kind: 1}
    assert [item.chosen for item in data.preferences] == [" good 0", " good 1"]


def test_a_reply_that_only_begins_like_a_transcript_is_a_reply(write: Write) -> None:
    (item,) = load_pairs(write({"prompt": ASK, "chosen": " Human: a", "rejected": " b"})).preferences
    assert item.chosen == " Human: a"


def test_dropped_kept_and_changed_rows_are_counted(write: Write) -> None:
    path = write(
        {"prompt": ASK, "chosen": "a", "rejected": " b"},  # a space is missing
        {"prompt": ASK, "chosen": " c", "rejected": " d"},  # the same prompt again
        {"prompt": "Ask", "chosen": " e", "rejected": " f"},  # the same once more, as a bare question
        {"prompt": "Another", "chosen": " ", "rejected": " b"},
        {"prompt": "Another", "chosen": " a", "rejected": ""},
        {"prompt": "Another", "chosen": "a", "rejected": " a"},
    )
    data = load_pairs(path)
    assert nonzero(data.counts) == {
        "rows": 6,
        "kept": 3,
        "empty_reply": 2,
        "identical_replies": 1,
        "duplicate_prompt": 2,
        "prompt_rewritten": 1,
        "separator_added": 1,
    }
    assert {item.prompt.text for item in data.preferences} == {ASK}
    assert [item.chosen for item in data.preferences] == [" a", " c", " e"]


def test_nothing_left_is_an_error(write: Write) -> None:
    with pytest.raises(DataError, match=r"no usable pair is left; found rows 1, empty_reply 1"):
        load_pairs(write({"prompt": ASK, "chosen": "", "rejected": " b"}))
    with pytest.raises(DataError, match=r"no usable pair is left; found no rows"):
        load_pairs(write())


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # They part at the assistant's first turn: its reply and all that follows.
        (
            "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: B",
            "\n\nHuman: Q\n\nAssistant: C",
            Preference(Prompt("\n\nHuman: Q\n\nAssistant:"), " A\n\nHuman: R\n\nAssistant: B", " C"),
        ),
        # They part at a Human turn: a prompt ends before an assistant's turn, so the replies begin one turn earlier.
        (
            "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: B",
            "\n\nHuman: Q\n\nAssistant: A\n\nHuman: S\n\nAssistant: C",
            Preference(
                Prompt("\n\nHuman: Q\n\nAssistant:"),
                " A\n\nHuman: R\n\nAssistant: B",
                " A\n\nHuman: S\n\nAssistant: C",
            ),
        ),
        # One is the beginning of the other.
        (
            "\n\nHuman: Q\n\nAssistant: A",
            "\n\nHuman: Q\n\nAssistant: A\n\nAssistant: B",
            Preference(Prompt("\n\nHuman: Q\n\nAssistant:"), " A", " A\n\nAssistant: B"),
        ),
        # Nothing is shared.
        ("\n\nHuman: Q\n\nAssistant: A", "\n\nHuman: S\n\nAssistant: A", None),
        # Messages follow the same rule.
        (
            said("Go", "a", "b", "c"),
            said("Go", "x", "b", "c"),
            Preference(
                Prompt("\n\nHuman: Go\n\nAssistant:"),
                " a\n\nHuman: b\n\nAssistant: c",
                " x\n\nHuman: b\n\nAssistant: c",
            ),
        ),
    ],
)
def test_diverging_dialogues_are_dropped_or_share_a_prefix(
    write: Write, chosen: Any, rejected: Any, expected: Preference | None
) -> None:
    path = write({"chosen": chosen, "rejected": rejected}, pair(0))
    dropped = load_preferences("files", path)
    assert nonzero(dropped.counts) == {"rows": 2, "kept": 1, "diverging": 1, "diverging_dropped": 1}
    kept = load_preferences("files", path, diverging="common-prefix")
    assert kept.preferences[:-1] == ((expected,) if expected else ())
    assert kept.counts["diverging"] == 1
    assert kept.counts["diverging_dropped"] == (expected is None)


# The hub, without a network


def test_a_data_set_of_the_hub_is_read_by_folder_and_split(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write(pair(0), pair(1), name="hh/harmless-base/train.jsonl.gz")
    write(pair(2), name="hh/harmless-base/test.jsonl.gz")
    write(pair(3), name="hh/helpful-base/train.jsonl.gz")

    def load(split: str) -> PreferenceData:
        return load_preferences(f"hub:{tmp_path / 'hh'}", data_dir="harmless-base", split=split)

    assert [item.chosen for item in load("train").preferences] == [" good 0", " good 1"]
    assert [item.chosen for item in load("test").preferences] == [" good 2"]
    assert "@sha256:" in load("train").identity  # no commit: the contents stand in for it
    with pytest.raises(DataError, match="split 'dev' cannot be loaded"):
        load("dev")


@pytest.mark.parametrize("online", [True, False])
def test_the_commit_of_a_data_set_of_the_hub_is_recorded(monkeypatch: pytest.MonkeyPatch, online: bool) -> None:
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    commit = "0123456789" * 4
    asked: dict[str, Any] = {}

    def dataset_info(self: Any, name: str, revision: str | None) -> Any:
        if not online:
            raise next(base for base in HfHubHTTPError.__bases__ if base is not OSError)("no network")
        assert (name, revision) == ("Anthropic/hh-rlhf", "main")
        return SimpleNamespace(sha=commit)

    class Table(list[Any]):
        # What a cached data set remembers of where it came from.
        info = SimpleNamespace(download_checksums={f"hf://datasets/Anthropic/hh-rlhf@{commit}/train.jsonl.gz": None})

    def load_dataset(name: str, **options: Any) -> Table:
        asked.update(options, name=name)
        return Table([pair(0), {"prompt": ASK, "chosen": 3, "rejected": " b"}][: 1 if asked["split"] == "train" else 2])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_preferences("hub:Anthropic/hh-rlhf", data_dir="harmless-base", revision="main")
    assert data.identity == f"hub:Anthropic/hh-rlhf/harmless-base:train@{commit}"
    expected = commit if online else "main"  # what is loaded is what was resolved
    assert asked == {
        "name": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "split": "train", "revision": expected
    }  # fmt: skip
    with pytest.raises(DataError, match=r"Anthropic/hh-rlhf \(test\) row 1: chosen: found 3; expected text"):
        load_preferences("hub:Anthropic/hh-rlhf", split="test", revision="main")


# Splits and context


def many(n: int) -> list[Preference]:
    return [Preference(Prompt(f"\n\nHuman: Q{i}\n\nAssistant:"), f" a{i}", f" b{i}") for i in range(n)]


def test_split_is_disjoint_and_does_not_depend_on_the_order() -> None:
    pairs = many(50)
    split = split_preferences(pairs, dev=5, test=10, seed=3)
    assert [len(part) for part in (split.train, split.dev, split.test)] == [35, 5, 10]
    assert len({item.prompt for item in (*split.train, *split.dev, *split.test)}) == 50
    assert split.counts == {"pairs": 50, "duplicate_prompt": 0, "overlap": 0}
    assert split_preferences(pairs[::-1], dev=5, test=10, seed=3) == split
    assert split_preferences(pairs, dev=5, test=10, seed=4).test != split.test
    assert list(split.test) != sorted(split.test, key=pairs.index)  # shuffled


def test_held_out_prompts_occur_nowhere_in_the_training_text() -> None:
    questions = many(12)
    # Every question also stands at the start, in the middle, and in either reply of a longer dialogue.
    longer = []
    for i, item in enumerate(questions):
        asked = item.prompt.text
        go_on = f" x{i}\n\nHuman: more\n\nAssistant:"
        longer += [
            Preference(Prompt(asked + go_on), " yes", " no"),
            Preference(Prompt(f"\n\nHuman: before {i}\n\nAssistant: x" + asked + go_on), " yes", " no"),
            Preference(Prompt(f"\n\nHuman: first {i}\n\nAssistant:"), f" a{asked} b", " no"),
            Preference(Prompt(f"\n\nHuman: second {i}\n\nAssistant:"), " yes", f" a{asked} b"),
        ]
    pairs = questions + longer + questions[:2]
    split = split_preferences(pairs, dev=3, test=3, seed=0)
    held_out = [item.prompt.text for item in (*split.dev, *split.test)]
    assert any(text in {item.prompt.text for item in questions} for text in held_out)
    for item in split.train:
        for text in (item.prompt.text + item.chosen, item.prompt.text + item.rejected):
            assert not [prompt for prompt in held_out if prompt in text]
    # And no more than needed is left out.
    rest = [item for item in {p.prompt: p for p in pairs[::-1]}.values() if item.prompt.text not in held_out]
    clean = [i for i in rest if not any(h in i.prompt.text + r for h in held_out for r in (i.chosen, i.rejected))]
    assert set(split.train) == set(clean)
    assert split.counts == {"pairs": 62, "duplicate_prompt": 2, "overlap": 60 - 6 - len(clean)}
    assert split.counts["overlap"] > 0


def slow_prompts_inside(pair: Preference) -> Iterator[str]:
    """Yield every run of whole turns before an assistant's turn, also from a System marker inside a turn on."""
    for reply in filter(None, (pair.chosen, pair.rejected)):
        dialogue = turns(pair.prompt.text + reply)
        for end, turn in enumerate(dialogue):
            for start in range(end + 1) if turn.role == "assistant" else ():
                rest = prompt_of(dialogue[start:end]).text
                before = dialogue[start - 1].text if start > 0 else ""
                yield rest
                yield from (before[mark.start() :] + rest for mark in re.finditer(re.escape(SYSTEM), before))


def test_the_prompts_inside_a_text_equal_their_slow_definition() -> None:
    pieces = (SYSTEM, HUMAN, ASSISTANT, " a", "\n", "\n\n", "b ")
    rng = random.Random(0)
    for _ in range(300):
        asked, *replies = ("".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(3))
        pair = Preference(Prompt(rng.choice((SYSTEM, HUMAN)) + asked + ASSISTANT), *replies)
        assert set(_prompts_inside(pair, range(1000))) == set(slow_prompts_inside(pair))
        lengths = {len(text) for text in list(slow_prompts_inside(pair))[:2]}
        expected = {text for text in slow_prompts_inside(pair) if len(text) in lengths}
        assert set(_prompts_inside(pair, lengths)) == expected


def test_a_dialogue_of_hundreds_of_turns_is_searched_at_once() -> None:
    text = "".join(f"\n\nHuman: question {i}\n\nAssistant: answer {i}" for i in range(400))
    pair = Preference(Prompt(f"{text}\n\nHuman: x\n\nAssistant:"), " a", " b")
    start = time.process_time()
    assert len(list(_prompts_inside(pair, {len("\n\nHuman: x\n\nAssistant:")}))) == 2
    assert time.process_time() - start < 5  # every string took 58 s


@pytest.mark.parametrize("sizes", [(5, 5), (1, 10), (11, 0)])
def test_too_few_prompts_are_counted_in_the_error(sizes: tuple[int, int]) -> None:
    dev, test = sizes
    with pytest.raises(DataError, match=r"not enough prompts: found .* expected .* \(pairs 10\)"):
        split_preferences(many(10), dev=dev, test=test, seed=0)


def test_prompts_beyond_the_context_are_an_error_or_counted() -> None:
    pairs = [Preference(Prompt("x" * n), " a", " b") for n in (3, 5, 4)]
    kept, counts = fit_context(pairs, lambda prompt: len(prompt.text), 4)
    assert [len(item.prompt.text) for item in kept] == [3, 4]
    assert nonzero(counts) == {"kept": 2, "long_prompt": 1}
    with pytest.raises(DataError, match=rf"prompt {pairs[1].prompt.id}: has 5 tokens, at most 4 fit"):
        fit_context(pairs, lambda prompt: len(prompt.text), 4, long_prompts="error")
    with pytest.raises(DataError, match="no prompt of at most 2 tokens is left"):
        fit_context(pairs, lambda prompt: len(prompt.text), 2)
    places = {pairs[1].prompt: "a.jsonl:7"}
    with pytest.raises(DataError, match=r"^a.jsonl:7: prompt .* has 5 tokens"):
        fit_context(pairs, lambda prompt: len(prompt.text), 4, long_prompts="error", places=places)


def test_dialogues_that_a_template_refuses_are_an_error_or_counted() -> None:
    pairs = [Preference(Prompt("x" * n), " a", " b") for n in (3, 5, 4)]
    places = {pair.prompt: f"a.jsonl:{i}" for i, pair in enumerate(pairs, 1)}

    def length(prompt: Prompt) -> int:
        if len(prompt.text) == 5:
            raise RefusedDialogue("roles must alternate")
        return len(prompt.text)

    with pytest.raises(DataError, match=r"^a.jsonl:2: roles must alternate"):
        fit_context(pairs, length, 9, places=places)
    kept, counts = fit_context(pairs, length, 9, faulty_rows="drop")
    assert [len(pair.prompt.text) for pair in kept] == [3, 4]
    assert nonzero(counts) == {"kept": 2, "refused_by_template": 1}
    with pytest.raises(DataError, match=r"no prompt of at most .* is left .*a.jsonl:2: roles must alternate"):
        fit_context(pairs[1:2], length, 9, faulty_rows="drop", places=places)


# Prompts


def test_bare_questions_become_prompts(write: Write) -> None:
    path = write({"prompt": ASK, "id": 3}, "", {"prompt": "What is bread?"})
    assert load_prompts(path).prompts == (Prompt(ASK), Prompt("\n\nHuman: What is bread?\n\nAssistant:"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "x"}, r":2: prompt: is missing; expected text \(found the fields text\)"),
        ({"prompt": ""}, r":2: prompt: the prompt is empty"),
        ({"prompt": ASK + " done"}, r":2: prompt: ends with a finished assistant turn"),
    ],
)
def test_a_bad_prompt_names_file_line_and_field(write: Write, row: Any, expected: str) -> None:
    with pytest.raises(DataError, match="prompts.jsonl" + expected):
        load_prompts(write({"prompt": ASK}, row, name="prompts.jsonl"))


# The official RRHF file


def scored(*scores: float, prompt: str = ASK) -> Candidates:
    return Candidates(Prompt(prompt), tuple(Response(f" r{i}", "file", score=s) for i, s in enumerate(scores)))


def test_the_official_layout_is_read(write: Write) -> None:
    path = write({"query": ASK, "responses": ["one", " two"], "scores": [1, -0.5]})
    data = load_candidates(path)
    assert data.candidates == (
        Candidates(Prompt(ASK), (Response(" one", "file", score=1.0), Response(" two", "file", score=-0.5))),
    )
    assert nonzero(data.counts) == {"prompts": 1, "responses": 2, "separator_added": 1}


def test_the_written_file_is_official_and_lossless(tmp_path: Path) -> None:
    plain = scored(0.1, 1 / 3)
    rich = Candidates(
        Prompt("\n\nHuman: Wie geht’s?\n\nAssistant:"),
        (
            Response(" gut ", "model", "length", (3, 1, 4), (-0.1, -1 / 3, -2.0), 0.5),
            Response("\n x", "chosen", "given", score=-1e300),
            Response(" y", "model", "eos", (7,), None, 2.0),
        ),
    )
    path = tmp_path / "scored.jsonl"
    assert write_rrhf(path, [plain, rich]) == 2
    assert load_candidates(path).candidates == (plain, rich)
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert first == {"query": ASK, "responses": [" r0", " r1"], "scores": [0.1, 1 / 3]}  # official readers see no more
    assert second["scores"] == [0.5, -1e300, 2.0]
    assert second["token_ids"] == [[3, 1, 4], None, [7]]


def test_unscored_candidates_have_no_scores_and_are_read_only_where_none_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    unscored = Candidates(Prompt(ASK), (Response(" a", "model"),))
    write_rrhf(path, [unscored])
    assert "scores" not in json.loads(path.read_text())
    assert load_candidates(path, scored=False).candidates == (unscored,)
    with pytest.raises(DataError, match=r"x.jsonl:1: scores: found nothing"):
        load_candidates(path)


def test_candidates_of_which_some_are_scored_cannot_be_written(tmp_path: Path) -> None:
    half = Candidates(Prompt(ASK), (Response(" a", "model", score=1.0), Response(" b", "model")))
    with pytest.raises(AssertionError, match="scored"):
        write_rrhf(tmp_path / "x.jsonl", [half])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scores": [1.0]}, r"scores: found 1 of them; expected 2, one for each response"),
        ({"scores": [1.0, float("nan")]}, r"scores\[1\]: found NaN; expected a finite number"),
        ({"scores": [float("inf"), 1.0]}, r"scores\[0\]: found Infinity; expected a finite number"),
        ({"scores": [True, 1.0]}, r"scores\[0\]: found true; expected a finite number"),
        ({"scores": None}, r"scores: found null; expected a list"),
        ({"responses": [], "scores": []}, r"responses: found \[\]; expected a list that is not empty"),
        ({"responses": "ab"}, r'responses: found "ab"; expected a list'),
        ({"responses": ["a", " "]}, r'responses\[1\]: found " "; expected text that is not empty'),
        ({"responses": ["a", 3]}, r"responses\[1\]: found 3; expected text"),
        ({"query": 3}, r"query: found 3; expected text"),
        ({"finish": ["eos", "cut"]}, r'finish\[1\]: found "cut"; expected one of \'eos\''),
        ({"sources": ["model"]}, r"sources: found 1 of them; expected 2"),
        ({"token_ids": [[1], [1.5]]}, r"token_ids\[1\]\[0\]: found 1.5; expected a whole number"),
        ({"logprobs": [[float("nan")], None]}, r"logprobs\[0\]\[0\]: found NaN; expected a finite number"),
    ],
)
def test_bad_candidates_name_file_line_and_field(write: Write, change: Any, expected: str) -> None:
    row = {"query": ASK, "responses": ["a", "b"], "scores": [1.0, 2.0]}
    path = write(row, row | change, name="scored.jsonl")
    with pytest.raises(DataError, match=f"scored.jsonl:2: {expected}"):
        load_candidates(path)


def test_a_query_may_be_a_list_of_messages(write: Write) -> None:
    query = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (group,) = load_candidates(write({"query": query, "responses": ["Yes."], "scores": [1.0]})).candidates
    assert group.prompt.text == "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"
    with pytest.raises(DataError, match="the last message is"):
        load_candidates(
            write({"query": [{"role": "assistant", "content": "Hi"}], "responses": ["Yes."], "scores": [1.0]})
        )


def test_a_query_cut_on_the_left_is_repaired_and_a_finished_one_refused(write: Write) -> None:
    whole = "\n\nHuman: How?\n\nAssistant: So.\n\nHuman: And then?\n\nAssistant:"
    rest = {"responses": ["a", "b"], "scores": [1.0, 0.0]}
    path = write({"query": whole[10:], **rest}, {"query": whole[27:], **rest}, {"query": "Why?", **rest})
    data = load_candidates(path)
    assert [item.prompt.text for item in data.candidates] == [
        "\n\nHuman: ow?\n\nAssistant: So.\n\nHuman: And then?\n\nAssistant:",
        "\n\nAssistant: o.\n\nHuman: And then?\n\nAssistant:",
        "\n\nHuman: Why?\n\nAssistant:",
    ]
    assert (data.counts["cut_on_the_left"], data.counts["prompt_rewritten"]) == (2, 3)
    path = write({"query": whole + " Done.", **rest}, {"query": whole, **rest})
    with pytest.raises(DataError, match=r"pairs.jsonl:1: query: ends with a finished.*--faulty-rows drop"):
        load_candidates(path)
    data = load_candidates(path, faulty_rows="drop")
    assert (len(data.candidates), data.counts["not_a_prompt"]) == (1, 1)


def test_a_verbatim_query_is_not_changed(write: Write) -> None:
    path = write({"query": "The film was", "responses": [" good."], "scores": [1.0]})
    (group,) = load_candidates(path, verbatim=True).candidates
    assert group.prompt == Prompt("The film was")
    path = write({"query": "", "responses": [" good."], "scores": [1.0]}, {"query": [], "responses": ["a"]})
    with pytest.raises(DataError, match=r"pairs.jsonl:1: query: is empty; expected text; mend the row"):
        load_candidates(path, verbatim=True)
    with pytest.raises(DataError, match=r"pairs.jsonl:2: query: found \[\]; expected text"):
        load_candidates(path, verbatim=True, faulty_rows="drop")


def test_a_column_that_is_null_is_absent(write: Write) -> None:
    row = {"query": ASK, "responses": ["a"], "scores": [1.0], "finish": None, "sources": None}
    assert load_candidates(write(row)).candidates[0].responses == (Response(" a", "file", score=1.0),)


def test_policies_read_no_ties(write: Write) -> None:
    read = read_prompts(write(pair(0), pair(1) | {"tie": True}, pair(2) | {"margin": "much"}))
    assert [item.chosen for item in read.pairs] == [" good 0", " good 2"]
    assert (len(read.prompts), read.counts["ties"]) == (2, 1)
    with pytest.raises(DataError, match="found 1 ties and no other pair; expected pairs with a label"):
        read_prompts(write(pair(0) | {"tie": True}))
    with pytest.raises(DataError, match=r"pairs.jsonl:1: tie: found 1; expected true or false"):
        read_prompts(write(pair(0) | {"tie": 1}))


def test_groups_that_cannot_be_ranked_are_counted(write: Write) -> None:
    other = "\n\nHuman: Other\n\nAssistant:"
    items = [scored(1.0), scored(2.0, 2.0), scored(1.0, 2.0, prompt=other), scored(3.0, prompt=other)]
    expected = {"prompts": 4, "responses": 6, "duplicate_prompt": 2, "single_response": 2, "all_equal": 1}
    assert count_candidates(items) == expected
