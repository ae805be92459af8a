"""Scored candidates in the file format of RRHF's own code (github.com/GanjinZero/RRHF)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from rrhf_bench.data.dialogue import as_prompt, as_reply, prompt_of_messages, starts_inside_turn
from rrhf_bench.data.rows import (
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
from rrhf_bench.jsonl import excerpt, finite_number, write_jsonl
from rrhf_bench.records import Candidates, Finish, Prompt, Response

# The official file of github.com/GanjinZero/RRHF has "query", "responses" and "scores". The other keys are ours,
# written where they say more than their default, so that candidates survive the way through a file.
_OWN_KEYS = ("sources", "finish", "token_ids", "logprobs")


@dataclass(frozen=True, slots=True)
class CandidateData:
    """Scored candidates in file order, with the counts of what is odd or was changed."""

    candidates: tuple[Candidates, ...]
    counts: Mapping[str, int]
    places: Mapping[Prompt, str] = field(default_factory=dict)  # file and line of the first row of each prompt


def load_candidates(path: str | Path, *, scored: bool = True, faulty_rows: FaultyRows = "error") -> CandidateData:
    """Return candidates of rows ``{"query", "responses", "scores"}`` (the file that RRHF's train.py reads).

    The path is one of ``load_prompts``, or a file of JSON lines with any name. Without ``scored`` the scores may be
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
    counts = Counter(dict.fromkeys(("prompt_rewritten", "cut_on_the_left", "not_a_prompt", "separator_added"), 0))
    candidates: list[Candidates] = []
    places: dict[Prompt, str] = {}

    def read(row: Mapping[str, Any], where: str) -> tuple[Candidates, Counter[str]]:
        return _read_candidates(row, where, scored)

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


def _read_candidates(row: Mapping[str, Any], where: str, scored: bool) -> tuple[Candidates, Counter[str]]:
    """Return (the candidates of a row, the counts that the row adds to). Raises FaultyRow if its query is no prompt."""
    notes: Counter[str] = Counter()
    query = text_or_messages(row, "query", where)
    try:
        if isinstance(query, str):
            prompt = as_prompt(query, f"{where}: query", cut_on_the_left=True)
            notes["prompt_rewritten"] += prompt.text != query
            notes["cut_on_the_left"] += starts_inside_turn(query)
        else:
            prompt = prompt_of_messages(query, f"{where}: query")
    except DataError as error:
        raise FaultyRow("not_a_prompt", str(error)) from error
    texts = _list_field(row, "responses", where, None)
    scores = _list_field(row, "scores", where, len(texts)) if scored else None
    sources, finish, token_ids, logprobs = (
        _list_field(row, key, where, len(texts)) if key in row else None for key in _OWN_KEYS
    )
    responses: list[Response] = []
    for i, text in enumerate(texts):
        end = _finish(finish[i], f"{where}: finish[{i}]") if finish else "given"
        if not isinstance(text, str) or not (text.strip() or end != "given"):
            raise DataError(f"{where}: responses[{i}]: found {excerpt(text)}; expected text that is not empty")
        reply = as_reply(text) if end == "given" else text
        notes["separator_added"] += reply != text
        response = Response(reply, "file", end)
        if scores:
            response = replace(response, score=_number(scores[i], f"{where}: scores[{i}]"))
        if sources:
            response = replace(response, source=text_field({"": sources[i]}, "", f"{where}: sources[{i}]"))
        if token_ids and token_ids[i] is not None:
            ids = token_ids[i]
            if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
                raise DataError(f"{where}: token_ids[{i}]: found {excerpt(ids)}; expected a list of token ids")
            response = replace(response, token_ids=tuple(ids))
        if logprobs and logprobs[i] is not None:
            values = logprobs[i]
            if not isinstance(values, list):
                raise DataError(f"{where}: logprobs[{i}]: found {excerpt(values)}; expected a list of numbers")
            response = replace(response, logprobs=tuple(_number(value, f"{where}: logprobs[{i}]") for value in values))
        responses.append(response)
    return Candidates(prompt, tuple(responses)), notes


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long
        return False


def write_rrhf(path: str | Path, candidates: Iterable[Candidates]) -> int:
    """Write candidates in the official RRHF layout, and return how many; ``load_candidates`` reads the same back.

    Unscored candidates have no ``scores``.
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
    """Return counts of ``prompts``, ``responses``, ``duplicate_prompt`` and of groups that ranking cannot use:
    ``single_response`` (k = 1) and ``all_equal`` (k > 1 and one score for all)."""
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


def _list_field(row: Mapping[str, Any], field: str, where: str, length: int | None) -> list[Any]:
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
