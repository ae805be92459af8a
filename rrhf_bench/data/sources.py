"""Real inputs: preference pairs and labelled texts from the hub or from files, prompts, and the official RRHF file of
scored responses. Dialogues are transcripts or lists of messages.

Nothing is repaired silently: what a rule drops, keeps or changes is counted, and the counts travel with the data.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from rrhf_bench.data.dialogue import (
    ASSISTANT,
    SYSTEM,
    RefusedDialogue,
    Turn,
    as_prompt,
    as_reply,
    begins_within_a_turn,
    is_message,
    prompt_of,
    prompt_of_messages,
    repaired,
    transcript_of,
    turns,
    turns_of_messages,
)
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import excerpt, finite_number, read_objects, write_jsonl
from rrhf_bench.records import Candidates, Finish, Preference, Prompt, Response
from rrhf_bench.seeding import derive_seed

# What happens to a pair of transcripts that part before the last turn, to a row whose text cannot be a pair of replies,
# and to a prompt that does not fit.
Diverging = Literal["drop", "common-prefix"]
FaultyRows = Literal["error", "drop"]
LongPrompts = Literal["drop", "error"]

# The suffixes of data files, compared in lower case. A folder of ``datasets.save_to_disk`` holds .arrow files.
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", *TABLE_SUFFIXES)
# Files that ``datasets`` puts beside its data: descriptions, and results of functions that it has cached.
_BESIDE_DATA = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow")

Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages, and its fields


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """Pairs in file order. ``rows`` = ``kept`` + every count of ``DROPPED``; the other counts are of rows kept."""

    preferences: tuple[Preference, ...]
    counts: Mapping[str, int]
    identity: str  # what decides the rows: the hub's commit, or the sha256 of the contents
    revision: str | None = None  # the hub's commit, where it is known
    places: Mapping[Prompt, str] = field(default_factory=dict)  # file and line of the first row of each prompt


@dataclass(frozen=True, slots=True)
class PromptData:
    """Prompts in file order. ``rows`` = ``prompts`` + ``not_a_prompt``; the other counts are of prompts kept."""

    prompts: tuple[Prompt, ...]
    counts: Mapping[str, int]
    places: Mapping[Prompt, str]  # file and line of the first row of each prompt


# Rows that a rule drops, by the first rule that holds. The last five only with faulty_rows = "drop".
DROPPED = (
    "diverging_dropped",
    "empty_reply",
    "identical_replies",
    "not_a_transcript",
    "not_ending_with_assistant",
    "not_a_prompt",
    "reply_is_a_transcript",
    "prompt_differs",
)


@dataclass(frozen=True, slots=True)
class CandidateData:
    """Scored candidates in file order, with the counts of what is odd or was changed."""

    candidates: tuple[Candidates, ...]
    counts: Mapping[str, int]
    places: Mapping[Prompt, str] = field(default_factory=dict)  # file and line of the first row of each prompt


@dataclass(frozen=True, slots=True)
class PreferenceSplit:
    """Disjoint sets with one pair a prompt; no dev or test prompt occurs anywhere in the training text."""

    train: tuple[Preference, ...]
    dev: tuple[Preference, ...]
    test: tuple[Preference, ...]
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text begun, and how it goes on: the one reply that the data set has to its prompt, with no pair to compare."""

    prompt: Prompt
    reply: str
    label: str  # as in the data; a policy is not trained on it
    ended: bool = True  # False if the reply was cut
    cluster: str | None = None  # as in ``Preference``

    def candidates(self) -> Candidates:
        """The prompt with its reply as a candidate of source "reply"."""
        return Candidates(self.prompt, (Response(self.reply, "reply", "given" if self.ended else "length"),))


@dataclass(frozen=True, slots=True)
class TextData:
    """Texts in file order. ``rows`` = ``kept`` + ``too_short``; the other counts are of rows kept."""

    texts: tuple[LabelledText, ...]
    counts: Mapping[str, int]
    identity: str  # as PreferenceData's
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class TextSplit:
    """Disjoint sets with one text a prompt; no dev or test prompt is a run of words anywhere in the training text."""

    train: tuple[LabelledText, ...]
    dev: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]
    counts: Mapping[str, int]


_DROP = 'faulty_rows = "drop" (--faulty-rows drop)'


class _FaultyRow(DataError):
    """A row of the right shape whose text cannot be a pair of replies; ``kind`` is the count it goes to."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{message}; mend the row, or drop and count such rows with {_DROP}")
        self.kind = kind


T = TypeVar("T")


def _usable(
    rows: Iterable[Row],
    read: Callable[[Mapping[str, Any], str], T],
    faulty_rows: FaultyRows,
    counts: MutableMapping[str, int],
) -> Iterator[tuple[str, T]]:
    """Yield (where it stands, what ``read`` returns) of each row, and count the rows.

    A faulty row raises DataError; if ``faulty_rows`` is "drop", it is left out and counted under its kind.
    """
    for where, row in rows:
        counts["rows"] += 1
        try:
            found = read(row, where)
        except _FaultyRow as fault:
            if faulty_rows == "error":
                raise DataError(str(fault)) from fault
            counts[fault.kind] += 1
            continue
        yield where, found


def load_preferences(
    source: str,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    data_dir: str | None = None,
    diverging: Diverging = "drop",
    faulty_rows: FaultyRows = "error",
) -> PreferenceData:
    """Return preference pairs of files or of a hub data set, which is read through ``datasets``.

    ``source`` is ``"hub:<dataset>"`` (``config``, ``data_dir`` and ``revision`` as for ``datasets.load_dataset``,
    ``split`` "train" unless named) or ``"files"`` with ``path``: a file, a folder or a glob of ``SUFFIXES``. Of these
    files ``split`` picks those named after it (``train.jsonl.gz``, ``test-00000-of-00001.parquet``), and the tables
    in a folder of that name.

    Rows are ``{"prompt", "chosen", "rejected"}`` (Dahoas/rm-static) or two whole dialogues ``{"chosen", "rejected"}``
    (Anthropic/hh-rlhf). Each field is text or a list of messages ``{"role", "content"}``. Whole dialogues in messages
    may stand beside their own prompt (UltraFeedback). A row may name the ``cluster`` of its prompt (text or a whole
    number: its topic, document or user); prompts of one cluster are not independent. Other fields are not read.

    Counts: ``rows``, ``kept``, those of ``DROPPED``; of all rows ``diverging`` (dialogues that part before the last
    turn); of the rows kept ``duplicate_prompt``, ``prompt_rewritten`` (a bare question became a transcript, or line
    ends or stray white space were changed), ``transcript_repaired`` (the same change of line ends or white space in a
    whole transcript) and ``separator_added`` (a pair with a reply that needed its leading space).

    Raises DataError for a source that cannot be read, for a missing field or a field of another type, for a row that
    cannot be a pair (unless ``faulty_rows`` is "drop"), and if no row is left. The message names file and line of a
    JSON file, and file or data set and row of the rest.
    """
    assert diverging in get_args(Diverging), diverging
    assert faulty_rows in get_args(FaultyRows), faulty_rows
    rows = _open(source, path, split, revision, config, data_dir)
    counts: Counter[str] = Counter(dict.fromkeys(("rows", "kept", "diverging", *DROPPED), 0))
    counts.update(dict.fromkeys(("duplicate_prompt", "prompt_rewritten", "transcript_repaired", "separator_added"), 0))
    places: dict[Prompt, str] = {}
    kept: list[Preference] = []
    for where, (preference, notes) in _usable(
        rows.rows, lambda row, where: _read_row(row, where, diverging), faulty_rows, counts
    ):
        counts.update(notes)
        if preference is not None:
            kept.append(preference)
            counts["duplicate_prompt"] += preference.prompt in places
            places.setdefault(preference.prompt, where)
    counts["kept"] = len(kept)
    if not kept:
        raise DataError(f"{path or source}: no usable pair is left; found {_said(counts) or 'no rows'}")
    return PreferenceData(tuple(kept), dict(counts), rows.identity(), rows.commit, places)


def load_texts(
    source: str,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    data_dir: str | None = None,
    prompt_words: int = 48,
    reply_words: int | None = None,
) -> TextData:
    """Texts with a label, each parted into a prompt and the reply that follows it in the data set.

    The source is one of ``load_preferences``; rows are ``{"text", "label"}`` (stanfordnlp/imdb), the label text or a
    whole number. A row may name its ``cluster`` as in ``load_preferences``; other fields are not read. The prompt is
    the first ``prompt_words`` words, split on white space, the reply the rest, its leading white space included, or its
    first ``reply_words`` words. 48 words are some 64 tokens of GPT-2, the prompt of arXiv 2304.05302 Appendix D, whose
    completions of 48 tokens are some 36 words.

    Counts: ``rows``, ``kept``, ``too_short`` (texts that end within the prompt); of the rows kept ``duplicate_prompt``,
    ``leading_space`` (white space removed before the first word), ``reply_cut`` and ``label_<label>``.

    Raises DataError as ``load_preferences`` does, and for a size below 1.
    """
    for name, size in {"prompt_words": prompt_words, "reply_words": reply_words}.items():
        if size is not None and size < 1:
            raise DataError(f"{source}: {name} = {size}; expected at least 1")
    rows = _open(source, path, split, revision, config, data_dir)
    counts = Counter(dict.fromkeys(("rows", "kept", "too_short", "duplicate_prompt", "leading_space", "reply_cut"), 0))
    seen: set[Prompt] = set()
    kept: list[LabelledText] = []
    for where, row in rows.rows:
        counts["rows"] += 1
        text, label = _text(row, "text", where), row.get("label")
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise DataError(f"{where}: label: found {excerpt(label)}; expected text or a whole number")
        words = list(_WORD.finditer(text))
        if len(words) <= prompt_words:
            counts["too_short"] += 1
            continue
        start, end = words[0].start(), words[prompt_words - 1].end()
        last = len(words) if reply_words is None else min(len(words), prompt_words + reply_words)
        cut = last < len(words)
        reply = text[end : words[last - 1].end() if cut else len(text)]
        kept.append(LabelledText(Prompt(text[start:end]), reply, str(label), not cut, _cluster(row, where)))
        counts["duplicate_prompt"] += kept[-1].prompt in seen
        counts["leading_space"] += start > 0
        counts["reply_cut"] += cut
        counts[f"label_{label}"] += 1
        seen.add(kept[-1].prompt)
    counts["kept"] = len(kept)
    if not kept:
        raise DataError(f"{path or source}: no usable text is left; found {_said(counts) or 'no rows'}")
    return TextData(tuple(kept), dict(counts), rows.identity(), rows.commit)


_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class _Rows:
    rows: Iterator[Row]
    commit: str | None
    identity: Callable[[], str]  # once every row has been read, for the digest to cover the contents


def _open(
    source: str,
    path: str | Path | None,
    split: str | None,
    revision: str | None,
    config: str | None,
    data_dir: str | None,
) -> _Rows:
    """The rows of a source. Raises DataError for one that is neither files nor a hub set."""
    digest = hashlib.sha256()
    commit: str | None = None
    if source == "files":
        if path is None:
            raise DataError("source 'files': path is missing; give a file, a folder or a glob")
        rows = _file_rows(find_files(path, split), digest)
        name = source
    elif source.startswith("hub:") and path is None:
        rows, commit = _hub_rows(source, config, data_dir, split or "train", revision, digest)
        name = "/".join(filter(None, (source, config, data_dir))) + f":{split or 'train'}"
    else:
        what = f"source {source!r} with path {str(path)!r}" if path is not None else f"source {source!r}"
        raise DataError(f"{what}: expected 'files' with a path, or 'hub:<data set>' without one")
    return _Rows(rows, commit, lambda: f"{name}@{commit or 'sha256:' + digest.hexdigest()}")


def load_pairs(path: str | Path, *, faulty_rows: FaultyRows = "error") -> PreferenceData:
    """Return the pairs of one's own file, by the default rules of ``load_preferences``."""
    return load_preferences("files", path, faulty_rows=faulty_rows)


def holds_pairs(path: str | Path) -> bool:
    """Return True if the first row of a file, folder or glob has a "chosen" reply."""
    return "chosen" in next((row for _, row in _file_rows(find_files(path))), {})


def load_prompts(path: str | Path, *, verbatim: bool = False) -> list[Prompt]:
    """Return the prompts of a file; ``load_prompt_data`` gives the counts with them."""
    return list(load_prompt_data(path, verbatim=verbatim).prompts)


def load_prompt_data(path: str | Path, *, verbatim: bool = False, faulty_rows: FaultyRows = "error") -> PromptData:
    """Return the prompts of rows ``{"prompt"}`` of a file, a folder or a glob of ``SUFFIXES``.

    A prompt is a transcript that ends with ``Assistant:``, or a bare question, which becomes one, or a list of messages
    ``{"role", "content"}``. With ``verbatim`` it is any text, which is not changed. Other fields are not read.

    Counts: ``rows``, ``prompts``, ``not_a_prompt`` (dropped, with ``faulty_rows`` "drop" only), ``duplicate_prompt``
    and ``prompt_rewritten``. Raises DataError naming file and line, also for an empty prompt and a file without any.
    """
    assert faulty_rows in get_args(FaultyRows), faulty_rows
    counts = dict.fromkeys(("rows", "prompts", "not_a_prompt", "duplicate_prompt", "prompt_rewritten"), 0)
    prompts: list[Prompt] = []
    places: dict[Prompt, str] = {}

    def read(row: Mapping[str, Any], where: str) -> tuple[Prompt, bool]:
        """Return (the prompt, whether it differs from the text of the row)."""
        said = _text(row, "prompt", where) if verbatim else _said_by(row, "prompt", where)
        if verbatim and not said:
            raise _FaultyRow("not_a_prompt", f"{where}: prompt: is empty; expected text")
        prompt = Prompt(str(said)) if verbatim else _prompt(said, f"{where}: prompt")
        return prompt, isinstance(said, str) and said != prompt.text

    for where, (prompt, rewritten) in _usable(_file_rows(find_files(path)), read, faulty_rows, counts):
        prompts.append(prompt)
        counts["duplicate_prompt"] += prompt in places
        counts["prompt_rewritten"] += rewritten
        places.setdefault(prompt, where)
    counts["prompts"] = len(prompts)
    if not prompts:
        found = _said(counts) or "no rows"
        raise DataError(f'{path}: holds no prompts; found {found}; expected rows such as {{"prompt": text}}')
    return PromptData(tuple(prompts), counts, places)


def find_files(path: str | Path, split: str | None = None) -> list[Path]:
    """Return the data files of a file, folder or glob in the order of their names, those of ``split`` if it is named.

    Raises DataError for a missing path, for a named file of another kind, and if nothing is left.
    """
    given = Path(path)
    try:
        if given.is_dir():
            files = [file for file in given.rglob("*") if file.is_file() and _has_data(file)]
        elif given.is_file():
            files = [given]
        else:
            files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file, a folder or a glob") from error
    expected = ", ".join("*" + suffix for suffix in SUFFIXES)
    if not files:
        found = "holds no data file" if given.is_dir() else "is missing"
        raise DataError(f"{path}: {found}; expected a file, a folder or a glob of {expected}")
    for file in files:
        if not file.name.lower().endswith(SUFFIXES):
            raise DataError(f"{file}: found a {file.suffix or 'nameless'} file; expected {expected}")
    if split is not None:
        names = sorted({file.name for file in files})
        files = [file for file in files if split in (re.split(r"[.\-_]", file.name)[0], _folder_of_split(file))]
        if not files:
            raise DataError(f"{path}: no file of split {split!r}; found {', '.join(names[:5])}")
    return sorted(files)


def _has_data(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIXES) and not _BESIDE_DATA.fullmatch(file.name)


def _folder_of_split(file: Path) -> str | None:
    """Return the name of the folder of an .arrow file: ``save_to_disk`` names it after the split."""
    return file.parent.name if file.suffix.lower() == ".arrow" else None


def _file_rows(files: Sequence[Path], digest: Any = None) -> Iterator[Row]:
    """Yield the rows of data files. A file whose suffix is none of ``SUFFIXES`` is read as JSON lines."""
    for file in files:
        if file.name.lower().endswith(TABLE_SUFFIXES):
            if digest is not None:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            yield from _table_rows(file)
        else:
            # Not through `datasets`: it knows no line numbers, turns a column of dates into dates, and fails on a blank
            # line beside a field of changing type.
            for number, row in read_objects(file, digest):
                yield f"{file}:{number}", row


def _table_rows(file: Path) -> Iterator[Row]:
    from datasets import load_dataset

    kind = file.suffix.lower().removeprefix(".")
    # Streamed: a user's file is not copied into a cache, and no progress bar is drawn.
    try:
        table = load_dataset(kind, data_files=[glob.escape(str(file))], split="train", streaming=True)
        for index, row in enumerate(table):
            yield f"{file} row {index}", row
    except Exception as error:  # whatever the format's own reader raises
        raise DataError(f"{file}: cannot be read as {kind.capitalize()} ({_one_line(error)})") from error


def _hub_rows(
    source: str, config: str | None, data_dir: str | None, split: str, revision: str | None, digest: Any
) -> tuple[Iterator[Row], str | None]:
    """(rows, the commit they are of). Offline the commit is read from the cached data set; None if it is not known."""
    import httpx
    from datasets import load_dataset
    from huggingface_hub import HfApi

    name = source.removeprefix("hub:")
    commit: str | None = None
    # Offline, or not there: load_dataset then finds it in the cache, or says why not.
    with suppress(OSError, ValueError, httpx.HTTPError):
        commit = HfApi().dataset_info(name, revision=revision).sha
    try:
        table = load_dataset(name, config, data_dir=data_dir, split=split, revision=commit or revision)
    except Exception as error:  # whatever the data set's own reader raises
        raise DataError(f"{source}: split {split!r} cannot be loaded ({_one_line(error)})") from error
    if commit is None:
        found = re.search(r"@([0-9a-f]{40})/", " ".join(table.info.download_checksums or {}))
        commit = found and found[1]

    def rows() -> Iterator[Row]:
        for index, row in enumerate(table):
            if commit is None:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            yield f"{name} ({split}) row {index}", row

    return rows(), commit


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    if value is None:
        raise DataError(f"{where}: {field}: is missing; expected text (found the fields {', '.join(row) or 'none'})")
    raise DataError(f"{where}: {field}: found {excerpt(value)}; expected text")


def _cluster(row: Mapping[str, Any], where: str) -> str | None:
    """Return the name of the row's cluster, or None if the row names none. Raises DataError for any other value."""
    value = row.get("cluster")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{where}: cluster: found {excerpt(value)}; expected text or a whole number")
    return str(value)


def _said_by(row: Mapping[str, Any], name: str, where: str) -> str | list[Mapping[str, Any]]:
    """Return the text or the messages of a field. Raises DataError for any other value."""
    value = row.get(name)
    if not isinstance(value, list):
        return _text(row, name, where)
    if not value or not all(map(is_message, value)):
        raise DataError(
            f'{where}: {name}: found {excerpt(value)}; expected text, or a list of messages {{"role", "content"}} with '
            "the roles system, user and assistant and text as content"
        )
    return value


def _read_row(row: Mapping[str, Any], where: str, diverging: Diverging) -> tuple[Preference | None, list[str]]:
    """Return (the pair, or None if a rule drops the row; the counts that the row adds to)."""
    replies = {name: _said_by(row, name, where) for name in ("chosen", "rejected")}
    notes: list[str] = []
    rewritten = repairs = False
    if row.get("prompt") is not None:
        said = _said_by(row, "prompt", where)
        prompt = _prompt(said, f"{where}: prompt")
        chosen, rejected = (_reply(reply, prompt, f"{where}: {name}") for name, reply in replies.items())
        rewritten = isinstance(said, str) and prompt.text != said
    else:
        chosen_turns, rejected_turns = (_whole(reply, f"{where}: {name}") for name, reply in replies.items())
        repairs = any(isinstance(reply, str) and repaired(reply) != reply for reply in replies.values())
        if chosen_turns[:-1] != rejected_turns[:-1]:
            notes.append("diverging")
        parts = _fork(chosen_turns, rejected_turns, diverging)
        if parts is None:
            return None, [*notes, "diverging_dropped"]
        prompt, chosen, rejected = parts
    if not (chosen.strip() and rejected.strip()):
        return None, [*notes, "empty_reply"]
    preference = Preference(prompt, as_reply(chosen), as_reply(rejected), cluster=_cluster(row, where))
    if preference.chosen == preference.rejected:
        return None, [*notes, "identical_replies"]
    if rewritten:
        notes.append("prompt_rewritten")
    if repairs:
        notes.append("transcript_repaired")
    if (preference.chosen, preference.rejected) != (chosen, rejected):
        notes.append("separator_added")
    return preference, notes


def _prompt(said: str | Sequence[Mapping[str, Any]], where: str) -> Prompt:
    """Return the prompt that a text or a list of messages means. Raises _FaultyRow if it means none."""
    try:
        return as_prompt(said, where) if isinstance(said, str) else prompt_of_messages(said, where)
    except DataError as error:
        raise _FaultyRow("not_a_prompt", str(error)) from error


def _reply(said: str | Sequence[Mapping[str, Any]], prompt: Prompt, where: str) -> str:
    """Return the reply to a prompt: a text, one message, or the last message of a whole dialogue with this prompt."""
    if isinstance(said, str):
        # A reply of HH may begin with "Human:" and still be one: whoever wrote it imitated the other side.
        text = repaired(said)
        if text.lstrip().startswith(("Human:", "System:")) and ASSISTANT in text:
            raise _FaultyRow(
                "reply_is_a_transcript",
                f"{where}: found a transcript beside a prompt; expected the reply alone",
            )
        return said
    dialogue = _dialogue(said, where)
    if len(dialogue) > 1 and prompt_of(dialogue[:-1]) != prompt:
        raise _FaultyRow(
            "prompt_differs",
            f"{where}: the messages before the last differ from the prompt; expected the reply alone, or the dialogue "
            "of the prompt",
        )
    return dialogue[-1].text


def _whole(said: str | Sequence[Mapping[str, Any]], where: str) -> tuple[Turn, ...]:
    """Return the turns of a dialogue that includes its prompt. Raises _FaultyRow for a single message."""
    if not isinstance(said, str) and len(said) == 1:
        raise _FaultyRow("not_a_transcript", f"{where}: found one message and no prompt; expected the whole dialogue")
    return _dialogue(said, where)


def _dialogue(said: str | Sequence[Mapping[str, Any]], where: str) -> tuple[Turn, ...]:
    """Return the turns of a transcript or of messages, the assistant's last. Raises _FaultyRow for anything else."""
    try:
        dialogue = turns(repaired(said), where) if isinstance(said, str) else turns_of_messages(said, where)
    except DataError as error:
        raise _FaultyRow("not_a_transcript", str(error)) from error
    if dialogue[-1].role != "assistant":
        ends = "ends with a Human turn" if dialogue[-1].role == "user" else "holds a System turn alone"
        raise _FaultyRow("not_ending_with_assistant", f"{where}: {ends}; expected the last turn to be the assistant's")
    return dialogue


def _fork(chosen: Sequence[Turn], rejected: Sequence[Turn], diverging: Diverging) -> tuple[Prompt, str, str] | None:
    """(common prompt, rest of each); None for transcripts that part early where the rule drops them, or part at once.

    The prompt has to end where the assistant speaks next in both, so where they part at a Human turn the rests begin
    with the assistant's turn before it.
    """
    if chosen[:-1] == rejected[:-1]:
        shared = len(chosen) - 1
    elif diverging == "drop":
        return None
    else:
        shared = next(i for i in count() if i == min(len(chosen), len(rejected)) or chosen[i] != rejected[i])
        # A transcript that is the beginning of the other still needs a reply of its own.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        while shared > 0 and not (chosen[shared].role == rejected[shared].role == "assistant"):
            shared -= 1
        if shared == 0:
            return None
    return prompt_of(chosen[:shared]), _rest(chosen, shared), _rest(rejected, shared)


def _rest(dialogue: Sequence[Turn], start: int) -> str:
    return dialogue[start].text + transcript_of(dialogue[start + 1 :])


def split_preferences(
    preferences: Iterable[Preference], *, train: int | None, dev: int, test: int, seed: int
) -> PreferenceSplit:
    """Test, dev and training sets, in the order of a hash of (seed, prompt): the order of the file changes nothing.

    Prompts are distinct (of several pairs with one prompt the first is taken). A training pair whose text, replies
    included, contains a dev or test prompt as an exact string is left out. ``train`` None takes all that remain.
    Counts: ``pairs``, ``duplicate_prompt``, ``overlap`` (left out for containing a held-out prompt), ``unused``.
    Raises DataError with the counts when there are not enough.
    """
    return PreferenceSplit(*_split(list(preferences), "pairs", _prompts_inside, train, dev, test, seed))


def split_texts(texts: Iterable[LabelledText], *, train: int | None, dev: int, test: int, seed: int) -> TextSplit:
    """The same of texts whose prompts all have one number of words: none of dev or test is a run of whole words in a
    training text. The first count is ``texts``."""
    return TextSplit(*_split(list(texts), "texts", _beginnings_inside, train, dev, test, seed))


Item = TypeVar("Item", Preference, LabelledText)


def _split(
    items: Sequence[Item],
    what: str,
    prompts_inside: Callable[[Item], Iterator[str]],
    train: int | None,
    dev: int,
    test: int,
    seed: int,
) -> tuple[tuple[Item, ...], tuple[Item, ...], tuple[Item, ...], dict[str, int]]:
    by_prompt: dict[str, Item] = {}
    for item in items:
        by_prompt.setdefault(item.prompt.text, item)
    shuffled: list[Item] = sorted(by_prompt.values(), key=lambda item: derive_seed(seed, "split", item.prompt.id))
    test_set, dev_set, rest = shuffled[:test], shuffled[test : test + dev], shuffled[test + dev :]
    held_out = {item.prompt.text for item in shuffled[: test + dev]}
    clean = [item for item in rest if held_out.isdisjoint(prompts_inside(item))]
    counts = {
        what: len(items),
        "duplicate_prompt": len(items) - len(shuffled),
        "overlap": len(rest) - len(clean),
        "unused": 0 if train is None else max(0, len(clean) - train),
    }
    if len(test_set) < test or len(dev_set) < dev or len(clean) < (1 if train is None else train):
        raise DataError(
            f"not enough prompts: found {len(test_set)} for test, {len(dev_set)} for dev and {len(clean)} for "
            f"training; expected {test}, {dev} and {'at least one' if train is None else train} ({_said(counts)}); "
            "ask for fewer or give more data"
        )
    return tuple(clean[:train]), tuple(dev_set), tuple(test_set), counts


def _beginnings_inside(item: LabelledText) -> Iterator[str]:
    """Every run of words inside a text that is as long as its prompt, as an exact string."""
    text = item.prompt.text + item.reply
    words = list(_WORD.finditer(text))
    length = len(item.prompt.text.split())
    for first, last in zip(words, words[length - 1 :], strict=False):
        yield text[first.start() : last.end()]


def _prompts_inside(pair: Preference) -> Iterator[str]:
    """Every string inside a pair's text that could be a prompt: the runs of whole turns before an assistant's turn.

    A prompt starts and ends with a turn marker, and ``turns`` parts a text at every marker but the System marker.
    """
    for reply in filter(None, (pair.chosen, pair.rejected)):
        dialogue = turns(pair.prompt.text + reply)
        for end, turn in enumerate(dialogue):
            if turn.role == "assistant":
                for start in range(end + 1):
                    yield prompt_of(dialogue[start:end]).text
                    # Inside a turn a System marker is text, but a prompt may start with it.
                    before = dialogue[start - 1].text if start > 0 else ""
                    for marker in re.finditer(re.escape(SYSTEM), before):
                        yield before[marker.start() :] + prompt_of(dialogue[start:end]).text


Asked = TypeVar("Asked", Preference, Candidates)


def fit_context(
    items: Iterable[Asked],
    prompt_length: Callable[[Prompt], int],
    limit: int,
    *,
    long_prompts: LongPrompts = "drop",
    faulty_rows: FaultyRows = "error",
    places: Mapping[Prompt, str] | None = None,
) -> tuple[tuple[Asked, ...], dict[str, int]]:
    """Return (the items whose prompt has at most ``limit`` tokens; the counts ``kept``, ``long_prompt`` and
    ``refused_by_template``).

    ``prompt_length`` is the policy's own count; it raises RefusedDialogue for a prompt that the chat template does not
    render. ``places`` names file and line of a prompt for messages. Raises DataError for the first long prompt if
    ``long_prompts`` is "error", for the first refused dialogue if ``faulty_rows`` is "error", and if none is left.
    """
    assert long_prompts in get_args(LongPrompts), long_prompts
    assert faulty_rows in get_args(FaultyRows), faulty_rows
    kept: list[Asked] = []
    counts = {"kept": 0, "long_prompt": 0, "refused_by_template": 0}
    reason = ""
    for item in items:
        place = (places or {}).get(item.prompt)
        at = f"{place}: " if place else ""
        try:
            length = prompt_length(item.prompt)
        except RefusedDialogue as error:
            if faulty_rows == "error":
                raise DataError(f"{at}{error}; {_DROP} leaves such rows out and counts them") from error
            counts["refused_by_template"] += 1
            reason = reason or f"{at}{error}"
            continue
        if length <= limit:
            kept.append(item)
        elif long_prompts == "error":
            raise DataError(
                f"{at}prompt {item.prompt.id}: has {length} tokens, at most {limit} fit; shorten it, or drop and count "
                'long prompts with long_prompts = "drop" (--faulty-rows drop)'
            )
        else:
            counts["long_prompt"] += 1
    counts["kept"] = len(kept)
    if counts["refused_by_template"] and not kept:
        raise DataError(f"no prompt is left (found {_said(counts)}); the first refusal is: {reason}")
    if counts["long_prompt"] and not kept:
        raise DataError(
            f"all {counts['long_prompt']} prompts are longer than {limit} tokens; expected some that fit the context"
        )
    return tuple(kept), counts


# The official file of github.com/GanjinZero/RRHF has "query", "responses" and "scores". The other keys are ours,
# written where they say more than their default, so that candidates survive the way through a file.
_OWN_KEYS = ("sources", "finish", "token_ids", "logprobs")


def read_rrhf(path: str | Path) -> list[Candidates]:
    """Scored candidates from the official RRHF layout; ``load_candidates`` gives the counts with them."""
    return list(load_candidates(path).candidates)


def load_candidates(path: str | Path, *, scored: bool = True, faulty_rows: FaultyRows = "error") -> CandidateData:
    """Return candidates of rows ``{"query", "responses", "scores"}`` (the file that RRHF's train.py reads).

    The path is one of ``load_prompt_data``, or a file of JSON lines with any name. Without ``scored`` the scores may be
    absent and are not read. A query is text or a list of messages. RRHF's own data_generation cuts a long query on its
    left, so a text may begin in the middle of a turn: that turn is then the Human's or the assistant's, as the turn
    after it requires.

    A response's source is "file" and its finish "given" unless the row says otherwise (``sources``, ``finish``,
    ``token_ids``, ``logprobs``: one entry a response). Counts: those of ``count_candidates``, ``prompt_rewritten``,
    ``cut_on_the_left``, ``not_a_prompt`` (dropped, with ``faulty_rows`` "drop" only) and ``separator_added``.

    Raises DataError naming file and line for a query that is no prompt (unless ``faulty_rows`` is "drop"), for fields
    of the wrong type or length, for a score that is not finite and for an empty response, unless it was sampled (its
    ``finish`` is not "given"): a policy may say nothing, and its samples are not changed.
    """
    assert faulty_rows in get_args(FaultyRows), faulty_rows
    notes = dict.fromkeys(("prompt_rewritten", "cut_on_the_left", "not_a_prompt", "separator_added"), 0)
    candidates: list[Candidates] = []
    places: dict[Prompt, str] = {}
    for where, row in _file_rows([Path(path)] if _is_file(path) else find_files(path)):
        query = _said_by(row, "query", where)
        try:
            if isinstance(query, str):
                prompt = as_prompt(query, f"{where}: query", cut_on_the_left=True)
            else:
                prompt = prompt_of_messages(query, f"{where}: query")
        except DataError as error:
            if faulty_rows == "error":
                raise DataError(str(_FaultyRow("not_a_prompt", str(error)))) from error
            notes["not_a_prompt"] += 1
            continue
        if isinstance(query, str):
            notes["prompt_rewritten"] += prompt.text != query
            notes["cut_on_the_left"] += begins_within_a_turn(query)
        places.setdefault(prompt, where)
        texts = _listed(row, "responses", where, None)
        scores = _listed(row, "scores", where, len(texts)) if scored else [None] * len(texts)
        sources, finish, token_ids, logprobs = (
            _listed(row, key, where, len(texts)) if key in row else None for key in _OWN_KEYS
        )
        responses: list[Response] = []
        for i, (text, score) in enumerate(zip(texts, scores, strict=True)):
            ended = _finish(finish[i], f"{where}: finish[{i}]") if finish else "given"
            if not isinstance(text, str) or not (text.strip() or ended != "given"):
                raise DataError(f"{where}: responses[{i}]: found {excerpt(text)}; expected text that is not empty")
            reply = as_reply(text) if ended == "given" else text
            notes["separator_added"] += reply != text
            response = Response(reply, "file", ended)
            if scored:
                response = replace(response, score=_number(score, f"{where}: scores[{i}]"))
            if sources:
                response = replace(response, source=_text({"": sources[i]}, "", f"{where}: sources[{i}]"))
            if token_ids and token_ids[i] is not None:
                ids = token_ids[i]
                if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
                    raise DataError(f"{where}: token_ids[{i}]: found {excerpt(ids)}; expected a list of token ids")
                response = replace(response, token_ids=tuple(ids))
            if logprobs and logprobs[i] is not None:
                values = logprobs[i]
                if not isinstance(values, list):
                    raise DataError(f"{where}: logprobs[{i}]: found {excerpt(values)}; expected a list of numbers")
                response = replace(
                    response, logprobs=tuple(_number(value, f"{where}: logprobs[{i}]") for value in values)
                )
            responses.append(response)
        candidates.append(Candidates(prompt, tuple(responses)))
    if not candidates:
        found = _said(notes) or "no rows"
        raise DataError(f'{path}: holds no candidates; found {found}; expected rows {{"query", "responses", "scores"}}')
    return CandidateData(tuple(candidates), count_candidates(candidates) | notes, places)


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long
        return False


def write_rrhf(path: str | Path, candidates: Iterable[Candidates]) -> int:
    """Write candidates in the official RRHF layout, return how many; ``load_candidates`` gives the same back.

    Candidates that nobody has scored have no ``scores``.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for item in candidates:
            row: dict[str, Any] = {
                "query": item.prompt.text,
                "responses": [response.text for response in item.responses],
            }
            row |= {} if all(response.score is None for response in item.responses) else {"scores": list(item.scores)}
            sources = [response.source for response in item.responses]
            finish = [response.finish for response in item.responses]
            token_ids = [response.token_ids and list(response.token_ids) for response in item.responses]
            logprobs = [response.logprobs and list(response.logprobs) for response in item.responses]
            row |= {"sources": sources} if set(sources) != {"file"} else {}
            row |= {"finish": finish} if set(finish) != {"given"} else {}
            row |= {"token_ids": token_ids} if any(ids is not None for ids in token_ids) else {}
            row |= {"logprobs": logprobs} if any(values is not None for values in logprobs) else {}
            yield row

    return write_jsonl(Path(path), rows())


def count_candidates(candidates: Iterable[Candidates]) -> dict[str, int]:
    """``prompts``, ``responses``, and what ranking cannot use or may count twice: ``duplicate_prompt``,
    ``single_response`` (k = 1), ``all_equal`` (k > 1 and one score for all)."""
    counts = dict.fromkeys(("prompts", "responses", "duplicate_prompt", "single_response", "all_equal"), 0)
    seen: set[Prompt] = set()
    for item in candidates:
        counts["prompts"] += 1
        counts["responses"] += len(item.responses)
        counts["duplicate_prompt"] += item.prompt in seen
        seen.add(item.prompt)
        counts["single_response"] += len(item.responses) == 1
        counts["all_equal"] += len(item.responses) > 1 and len({response.score for response in item.responses}) == 1
    return counts


def _listed(row: Mapping[str, Any], field: str, where: str, length: int | None) -> list[Any]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        found = "nothing" if field not in row else excerpt(value)
        raise DataError(f"{where}: {field}: found {found}; expected a list that is not empty")
    if length is not None and len(value) != length:
        raise DataError(f"{where}: {field}: found {len(value)} of them; expected {length}, one for each response")
    return value


def _number(value: Any, where: str) -> float:
    number = finite_number(value)
    if number is None:
        raise DataError(f"{where}: found {excerpt(value)}; expected a finite number")
    return number


def _finish(value: Any, where: str) -> Finish:
    if value not in get_args(Finish):
        raise DataError(f"{where}: found {excerpt(value)}; expected one of {', '.join(get_args(Finish))}")
    return value


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items() if number)
