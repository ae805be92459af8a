"""Scored candidates in the file format of RRHF's own code (github.com/GanjinZero/RRHF)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf_bench.data.dialogue import as_prompt, as_reply, prompt_of_messages, starts_inside_turn
from rrhf_bench.data.prompts import verbatim_prompt
from rrhf_bench.data.rows import (
    FaultyRow,
    FaultyRows,
    file_rows,
    find_files,
    format_counts,
    text_or_messages,
    usable_rows,
)
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import excerpt, from_json, write_jsonl
from rrhf_bench.records import Candidates, Finish, Prompt, Response

# The columns of a row beside "query" and "responses": the field of a Response, its type, and the value of a response
# without the column. The official file has the scores alone; the others are written if a response has another value.
_COLUMNS: Mapping[str, tuple[str, Any, Any]] = {
    "scores": ("score", float, None),
    "sources": ("source", str, "file"),
    "finish": ("finish", Finish, "given"),
    "token_ids": ("token_ids", tuple[int, ...] | None, None),
    "logprobs": ("logprobs", tuple[float, ...] | None, None),
}


@dataclass(frozen=True, slots=True)
class CandidateData:
    """Scored candidates in file order, with the counts of what is odd or was changed."""

    candidates: tuple[Candidates, ...]
    counts: Mapping[str, int]
    places: Mapping[Prompt, str] = field(default_factory=dict)  # file and line of the first row of each prompt


def load_candidates(
    path: str | Path, *, scored: bool = True, verbatim: bool = False, faulty_rows: FaultyRows = "error"
) -> CandidateData:
    """Return candidates of rows ``{"query", "responses", "scores"}`` (the file that RRHF's train.py reads).

    The path is one of ``load_prompts``, or a file of JSON lines with any name. Without ``scored`` the scores are not
    read. A query is text or a list of messages. RRHF's own data_generation cuts a long query on its left, so a text may
    begin in the middle of a turn: that turn is then the Human's or the assistant's, as the turn after it requires. With
    ``verbatim`` a query is any text, which is not changed.

    A response's source is "file" and its finish "given" unless the row says otherwise. Counts: those of
    ``count_candidates``, ``prompt_rewritten``, ``cut_on_the_left``, ``not_a_prompt`` (dropped, with ``faulty_rows``
    "drop" only) and ``separator_added``.

    Raises DataError naming file and line for a query that is no prompt (unless ``faulty_rows`` is "drop"), for fields
    of the wrong type or length, for a score that is not finite and for an empty response, unless it was sampled (its
    ``finish`` is not "given"): a policy may say nothing.
    """
    counts = Counter(dict.fromkeys(("prompt_rewritten", "cut_on_the_left", "not_a_prompt", "separator_added"), 0))
    candidates: list[Candidates] = []
    places: dict[Prompt, str] = {}

    def read(row: Mapping[str, Any], where: str) -> tuple[Candidates, Counter[str]]:
        return _read_candidates(row, where, scored, verbatim)

    files = [Path(path)] if _is_file(path) else find_files(path)
    for where, (group, notes) in usable_rows(file_rows(files), read, faulty_rows, counts):
        counts.update(notes)
        places.setdefault(group.prompt, where)
        candidates.append(group)
    del counts["rows"]  # ``prompts`` and ``not_a_prompt`` say how many
    if not candidates:
        found = format_counts(counts) or "no rows"
        raise DataError(f'{path}: holds no candidates; found {found}; expected rows {{"query", "responses", "scores"}}')
    return CandidateData(tuple(candidates), {**count_candidates(candidates), **counts}, places)


def _read_candidates(
    row: Mapping[str, Any], where: str, scored: bool, verbatim: bool
) -> tuple[Candidates, Counter[str]]:
    """Return (the candidates of a row, the counts that the row adds to). Raises FaultyRow if its query is no prompt."""
    notes: Counter[str] = Counter()
    prompt = verbatim_prompt(row, "query", where) if verbatim else _read_query(row, where, notes)
    texts = _list_field(row, "responses", where, None)
    columns = {
        name: [
            from_json(kind, value, f"{where}: {key}[{i}]")
            for i, value in enumerate(_list_field(row, key, where, len(texts)))
        ]
        for key, (name, kind, _) in _COLUMNS.items()
        if (scored if key == "scores" else row.get(key) is not None)
    }
    responses: list[Response] = []
    for i, text in enumerate(texts):
        own = {name: values[i] for name, values in columns.items()}
        given = own.get("finish", "given") == "given"
        if not isinstance(text, str) or (given and not text.strip()):
            raise DataError(f"{where}: responses[{i}]: found {excerpt(text)}; expected text that is not empty")
        if not all(0 <= token < 2**31 for token in own.get("token_ids") or ()):
            raise DataError(f"{where}: token_ids[{i}]: found {excerpt(own['token_ids'])}; expected token ids")
        reply = as_reply(text) if given else text
        notes["separator_added"] += reply != text
        responses.append(Response(reply, **{"source": "file", **own}))
    return Candidates(prompt, tuple(responses)), notes


def _read_query(row: Mapping[str, Any], where: str, notes: Counter[str]) -> Prompt:
    """Return the prompt that a query means, and add to ``notes`` how it was changed."""
    query = text_or_messages(row, "query", where)
    try:
        if not isinstance(query, str):
            return prompt_of_messages(query, f"{where}: query")
        prompt = as_prompt(query, f"{where}: query", cut_on_the_left=True)
    except DataError as error:
        raise FaultyRow("not_a_prompt", str(error)) from error
    notes["prompt_rewritten"] += prompt.text != query
    notes["cut_on_the_left"] += starts_inside_turn(query)
    return prompt


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long
        return False


def write_rrhf(path: str | Path, candidates: Iterable[Candidates]) -> int:
    """Write candidates in the official RRHF layout, and return how many; ``load_candidates`` reads the same back."""

    def rows() -> Iterator[dict[str, Any]]:
        for item in candidates:
            row: dict[str, Any] = {
                "query": item.prompt.text,
                "responses": [response.text for response in item.responses],
            }
            for key, (name, _, default) in _COLUMNS.items():
                values = [getattr(response, name) for response in item.responses]
                if any(value != default for value in values):
                    row[key] = values
            assert None not in row.get("scores", ()), "candidates written before they were scored"
            yield row

    return write_jsonl(Path(path), rows())


def count_candidates(candidates: Iterable[Candidates]) -> dict[str, int]:
    """Return counts of ``prompts``, ``responses``, ``duplicate_prompt`` and of groups that ranking cannot use:
    ``single_response`` (k = 1) and ``all_equal`` (k > 1 and one score for all)."""
    groups = list(candidates)
    return {
        "prompts": len(groups),
        "responses": sum(len(group.responses) for group in groups),
        "duplicate_prompt": len(groups) - len({group.prompt for group in groups}),
        "single_response": sum(len(group.responses) == 1 for group in groups),
        "all_equal": sum(len(group.responses) > 1 == len({r.score for r in group.responses}) for group in groups),
    }


def _list_field(row: Mapping[str, Any], field: str, where: str, length: int | None) -> list[Any]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        found = "nothing" if field not in row else excerpt(value)
        raise DataError(f"{where}: {field}: found {found}; expected a list that is not empty")
    if length is not None and len(value) != length:
        raise DataError(f"{where}: {field}: found {len(value)} of them; expected {length}, one for each response")
    return value
