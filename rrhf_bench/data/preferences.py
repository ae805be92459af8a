"""Preference pairs from the hub or from files: a prompt with two replies, or two whole dialogues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from rrhf_bench.data.dialogue import (
    ASSISTANT,
    Turn,
    as_reply,
    prompt_of,
    repair_transcript,
    transcript_of,
    turns,
    turns_of_messages,
)
from rrhf_bench.data.prompts import read_prompt
from rrhf_bench.data.rows import (
    FaultyRow,
    FaultyRows,
    cluster_field,
    file_rows,
    find_files,
    format_counts,
    open_rows,
    text_or_messages,
    usable_rows,
)
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import excerpt, finite_number
from rrhf_bench.records import Preference, Prompt

Diverging = Literal["drop", "common-prefix"]  # what happens to a pair of dialogues that differ before the last turn

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
class PreferenceData:
    """Pairs in file order. ``rows`` = ``kept`` + every count of ``DROPPED``; the other counts are of rows kept."""

    preferences: tuple[Preference, ...]
    counts: Mapping[str, int]
    identity: str  # what decides the rows: the hub's commit, or the sha256 of the contents
    places: Mapping[Prompt, str] = field(default_factory=dict)  # file and line of the first row of each prompt


def load_preferences(
    source: str,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    diverging: Diverging = "drop",
    faulty_rows: FaultyRows = "error",
    margins_and_ties: bool = False,
) -> PreferenceData:
    """Return preference pairs of files or of a hub data set, which is read through ``datasets``.

    ``source`` is ``"hub:<dataset>"`` (``data_dir`` and ``revision`` as for ``datasets.load_dataset``, ``split``
    "train" unless named) or ``"files"`` with ``path`` alone: a file, a folder or a glob of ``SUFFIXES``.

    Rows are ``{"prompt", "chosen", "rejected"}`` (Dahoas/rm-static) or two whole dialogues ``{"chosen", "rejected"}``
    (Anthropic/hh-rlhf). Each field is text or a list of messages ``{"role", "content"}``. Whole dialogues in messages
    may stand beside their own prompt (UltraFeedback). A row may name the ``cluster`` of its prompt (text or a whole
    number: its topic, document or user); prompts of one cluster are not independent. A row may say that neither
    reply is better (``tie``, true); ties are kept and counted. With ``margins_and_ties`` it may also say how much
    better its chosen reply is (``margin``, a number of at least 0). Other fields are not read.

    Counts: ``rows``, ``kept``, those of ``DROPPED``; of all rows ``diverging`` (dialogues that part before the last
    turn); of the rows kept ``duplicate_prompt``, ``prompt_rewritten`` (a bare question became a transcript, or line
    ends or white space were changed), ``transcript_repaired`` (the same change in a whole transcript) and
    ``separator_added`` (a pair with a reply that needed its leading space).

    Raises DataError naming the row for a source that cannot be read, for a missing field or a field of another type,
    for a row that cannot be a pair (unless ``faulty_rows`` is "drop"), and if no row is left.
    """
    rows = open_rows(source, path, split, revision, data_dir)
    counts: Counter[str] = Counter(dict.fromkeys(("rows", "kept", "diverging", *DROPPED), 0))
    counts.update(dict.fromkeys(("duplicate_prompt", "prompt_rewritten", "transcript_repaired", "separator_added"), 0))
    places: dict[Prompt, str] = {}
    kept: list[Preference] = []
    for where, (preference, notes) in usable_rows(
        rows.rows, lambda row, where: _read_row(row, where, diverging, margins_and_ties), faulty_rows, counts
    ):
        counts.update(notes)
        if preference is not None:
            kept.append(preference)
            places.setdefault(preference.prompt, where)
    counts.update(kept=len(kept), duplicate_prompt=len(kept) - len(places))
    if not kept:
        raise DataError(f"{path or source}: no usable pair is left; found {format_counts(counts) or 'no rows'}")
    return PreferenceData(tuple(kept), dict(counts), rows.identity(), places)


def load_pairs(
    path: str | Path, *, faulty_rows: FaultyRows = "error", margins_and_ties: bool = False
) -> PreferenceData:
    """Return the pairs of one's own file, by the default rules of ``load_preferences``."""
    return load_preferences("files", path, faulty_rows=faulty_rows, margins_and_ties=margins_and_ties)


def holds_pairs(path: str | Path) -> bool:
    """Return True if the first row of a file, folder or glob has a "chosen" reply."""
    return "chosen" in next((row for _, row in file_rows(find_files(path))), {})


def _read_row(
    row: Mapping[str, Any], where: str, diverging: Diverging, margins_and_ties: bool
) -> tuple[Preference | None, list[str]]:
    """Return (the pair, or None if a rule drops the row; the counts that the row adds to)."""
    replies = {name: text_or_messages(row, name, where) for name in ("chosen", "rejected")}
    notes: list[str] = []
    if row.get("prompt") is not None:
        said = text_or_messages(row, "prompt", where)
        prompt = read_prompt(said, f"{where}: prompt")
        chosen, rejected = (_reply(reply, prompt, f"{where}: {name}") for name, reply in replies.items())
        changed = ["prompt_rewritten"] if isinstance(said, str) and prompt.text != said else []
    else:
        chosen_turns, rejected_turns = (_whole(reply, f"{where}: {name}") for name, reply in replies.items())
        repaired = any(isinstance(reply, str) and repair_transcript(reply) != reply for reply in replies.values())
        changed = ["transcript_repaired"] if repaired else []
        if chosen_turns[:-1] != rejected_turns[:-1]:
            notes.append("diverging")
        parts = _fork(chosen_turns, rejected_turns, diverging)
        if parts is None:
            return None, [*notes, "diverging_dropped"]
        prompt, chosen, rejected = parts
    if not (chosen.strip() and rejected.strip()):
        return None, [*notes, "empty_reply"]
    preference = Preference(prompt, as_reply(chosen), as_reply(rejected), cluster=cluster_field(row, where))
    if preference.chosen == preference.rejected:
        return None, [*notes, "identical_replies"]
    preference = replace(preference, **_strength(row, where, margins_and_ties))
    notes += ["ties"] if preference.tie else []
    if (preference.chosen, preference.rejected) != (chosen, rejected):
        changed.append("separator_added")
    return preference, notes + changed


def _strength(row: Mapping[str, Any], where: str, margins: bool) -> dict[str, Any]:
    """Return the tie of a row, and its margin if ``margins``. Raises DataError for a value that cannot be used."""
    margin, tie = row.get("margin") if margins else None, row.get("tie")
    if margin is not None and ((number := finite_number(margin)) is None or number < 0):
        raise DataError(f"{where}: margin: found {excerpt(margin)}; expected a finite number of at least 0, or none")
    if tie is not None and not isinstance(tie, bool):
        raise DataError(f"{where}: tie: found {excerpt(tie)}; expected true or false, or none")
    if tie and margin:
        raise DataError(
            f"{where}: margin: found {excerpt(margin)} of a tie; expected 0 or none, or a row that is no tie"
        )
    return {"margin": None if margin is None else float(margin), "tie": tie or None}


def _reply(said: str | Sequence[Mapping[str, Any]], prompt: Prompt, where: str) -> str:
    """Return the reply to a prompt: a text, one message, or the last message of a whole dialogue with this prompt."""
    if isinstance(said, str):
        # A reply of HH may begin with "Human:" and still be one: whoever wrote it imitated the other side.
        text = repair_transcript(said)
        if text.lstrip().startswith(("Human:", "System:")) and ASSISTANT in text:
            fault = f"{where}: found a transcript beside a prompt; expected the reply alone"
            raise FaultyRow("reply_is_a_transcript", fault)
        return said
    dialogue = _dialogue(said, where)
    if len(dialogue) > 1 and prompt_of(dialogue[:-1]) != prompt:
        fault = f"{where}: the messages before the last differ from the prompt; expected the reply alone"
        raise FaultyRow("prompt_differs", fault)
    return dialogue[-1].text


def _whole(said: str | Sequence[Mapping[str, Any]], where: str) -> tuple[Turn, ...]:
    """Return the turns of a dialogue that includes its prompt. Raises FaultyRow for a single message."""
    if not isinstance(said, str) and len(said) == 1:
        raise FaultyRow("not_a_transcript", f"{where}: found one message and no prompt; expected the whole dialogue")
    return _dialogue(said, where)


def _dialogue(said: str | Sequence[Mapping[str, Any]], where: str) -> tuple[Turn, ...]:
    """Return the turns of a transcript or of messages, the assistant's last. Raises FaultyRow for anything else."""
    try:
        dialogue = turns(repair_transcript(said), where) if isinstance(said, str) else turns_of_messages(said, where)
    except DataError as error:
        raise FaultyRow("not_a_transcript", str(error)) from error
    if dialogue[-1].role != "assistant":
        ends = "ends with a Human turn" if dialogue[-1].role == "user" else "holds a System turn alone"
        raise FaultyRow("not_ending_with_assistant", f"{where}: {ends}; expected the last turn to be the assistant's")
    return dialogue


def _fork(chosen: Sequence[Turn], rejected: Sequence[Turn], diverging: Diverging) -> tuple[Prompt, str, str] | None:
    """Return (common prompt, rest of each), or None if the rule drops the pair or the dialogues share no turn.

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
