"""Records to and from JSON lines: one object a line, keys in field order, absent instead of null, floats exact."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rrhf_bench.errors import DataError
from rrhf_bench.records import Prompt

T = TypeVar("T")


def to_json(record: Any) -> Any:
    """The JSON value of a record: dataclasses become objects without their None fields, a Prompt becomes its text."""
    if isinstance(record, Prompt):
        return record.text
    if is_dataclass(record):
        pairs = ((f.name, getattr(record, f.name)) for f in fields(record))
        return {name: to_json(value) for name, value in pairs if value is not None}
    if isinstance(record, tuple | list):
        return [to_json(item) for item in record]
    if isinstance(record, Mapping):
        return {key: to_json(value) for key, value in record.items()}
    return record


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write records (dataclasses or plain objects), return how many. A number that is not finite raises ValueError."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(to_json(record), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each non-blank line. Raises DataError naming file and line."""
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of a JSONL file") from error
    with file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(path, number, line)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); expected one JSON object a line"
            ) from error


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{path}:{number}: is not JSON ({reason}); expected one JSON object a line") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: found a JSON {type(value).__name__}; expected an object")
    return value


def read_jsonl(path: Path, kind: type[T]) -> list[T]:
    """All records of one kind. Raises DataError naming file, line and field on anything of the wrong shape."""
    return [_build(kind, value, f"{path}:{number}") for number, value in read_objects(path)]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as `kind`; the inverse of to_json for the types the records use."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (inner,) = (arg for arg in get_args(kind) if arg is not type(None))
        return _build(inner, value, where)
    if origin is Literal:
        if value in get_args(kind):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_build(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {key: _build(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    elif kind is Prompt:
        if isinstance(value, str):
            return Prompt(value)
    elif is_dataclass(kind):
        if isinstance(value, dict):
            return _record(kind, value, where)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise DataError(f"{where}: found {json.dumps(value)[:60]}; expected {_words(kind)}")


def _record(kind: Any, value: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}; allowed are {', '.join(known)}")
    for name, f in known.items():
        if name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise DataError(f"{where}: the field {name!r} is missing; expected {_words(_hints(kind)[name])}")
    return kind(**{name: _build(_hints(kind)[name], item, f"{where}: {name}") for name, item in value.items()})


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    plain = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false", Prompt: "text"}
    return plain.get(kind, str(getattr(kind, "__name__", kind)))
