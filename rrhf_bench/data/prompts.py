"""Prompts from files, and the prompts that fit a model's context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rrhf_bench.data.dialogue import RefusedDialogue, as_prompt, prompt_of_messages
from rrhf_bench.data.rows import (
    DROP_HINT,
    FaultyRow,
    FaultyRows,
    file_rows,
    find_files,
    format_counts,
    text_field,
    text_or_messages,
    usable_rows,
)
from rrhf_bench.errors import DataError
from rrhf_bench.records import Candidates, Preference, Prompt

LongPrompts = Literal["drop", "error"]  # what happens to a prompt that does not fit


@dataclass(frozen=True, slots=True)
class PromptData:
    """Prompts in file order. ``rows`` = ``prompts`` + ``not_a_prompt``; the other counts are of prompts kept."""

    prompts: tuple[Prompt, ...]
    counts: Mapping[str, int]
    places: Mapping[Prompt, str]  # file and line of the first row of each prompt


def load_prompts(path: str | Path, *, verbatim: bool = False, faulty_rows: FaultyRows = "error") -> PromptData:
    """Return the prompts of rows ``{"prompt"}`` of a file, a folder or a glob of ``SUFFIXES``.

    A prompt is a transcript that ends with ``Assistant:``, or a bare question, which becomes one, or a list of messages
    ``{"role", "content"}``. With ``verbatim`` it is any text, which is not changed. Other fields are not read.

    Counts: ``rows``, ``prompts``, ``not_a_prompt`` (dropped, with ``faulty_rows`` "drop" only), ``duplicate_prompt``
    and ``prompt_rewritten``. Raises DataError naming file and line, also for an empty prompt and a file without any.
    """
    counts = dict.fromkeys(("rows", "prompts", "not_a_prompt", "duplicate_prompt", "prompt_rewritten"), 0)
    prompts: list[Prompt] = []
    places: dict[Prompt, str] = {}

    def read(row: Mapping[str, Any], where: str) -> tuple[Prompt, bool]:
        """Return (the prompt, whether it differs from the text of the row)."""
        if verbatim:
            return verbatim_prompt(row, "prompt", where), False
        said = text_or_messages(row, "prompt", where)
        prompt = read_prompt(said, f"{where}: prompt")
        return prompt, isinstance(said, str) and said != prompt.text

    for where, (prompt, rewritten) in usable_rows(file_rows(find_files(path)), read, faulty_rows, counts):
        prompts.append(prompt)
        counts["prompt_rewritten"] += rewritten
        places.setdefault(prompt, where)
    counts |= {"prompts": len(prompts), "duplicate_prompt": len(prompts) - len(places)}
    if not prompts:
        found = format_counts(counts) or "no rows"
        raise DataError(f'{path}: holds no prompts; found {found}; expected rows such as {{"prompt": text}}')
    return PromptData(tuple(prompts), counts, places)


def read_prompt(said: str | Sequence[Mapping[str, Any]], where: str) -> Prompt:
    """Return the prompt that a text or a list of messages means. Raises FaultyRow if it means none."""
    try:
        return as_prompt(said, where) if isinstance(said, str) else prompt_of_messages(said, where)
    except DataError as error:
        raise FaultyRow("not_a_prompt", str(error)) from error


def verbatim_prompt(row: Mapping[str, Any], name: str, where: str) -> Prompt:
    """Return the text of a field as a prompt, unchanged. Raises FaultyRow if it is empty."""
    if text := text_field(row, name, where):
        return Prompt(text)
    raise FaultyRow("not_a_prompt", f"{where}: {name}: is empty; expected text")


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

    ``prompt_length`` raises RefusedDialogue for a prompt that the chat template does not render. ``places`` names file
    and line of a prompt for messages. Raises DataError for the first long prompt if ``long_prompts`` is "error", for
    the first refused dialogue if ``faulty_rows`` is "error", and if none is left.
    """
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
                raise DataError(f"{at}{error}; {DROP_HINT} leaves such rows out and counts them") from error
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
    if not kept and (reason or counts["long_prompt"]):
        first = f"; the first refusal is: {reason}" if reason else "; expected some that fit the context"
        raise DataError(f"no prompt of at most {limit} tokens is left (found {format_counts(counts)}){first}")
    return tuple(kept), counts
