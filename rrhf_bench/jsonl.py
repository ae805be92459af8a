"""Records as JSON lines: one object a line, keys in field order, absent instead of null, exact floats."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import types
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rrhf_bench.errors import DataError
from rrhf_bench.records import Prompt

T = TypeVar("T")


def to_json(record: Any) -> Any:
    """Return a record as a JSON value: dataclasses become objects without their None fields, a Prompt its text."""
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


def read_objects(path: Path, digest: Any = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each object of a file of JSON lines, or of a ``.json`` file that is one array.

    A name that ends with ``.gz`` is unpacked. Blank lines and a byte order mark are skipped. ``digest`` is updated with
    the unpacked bytes. Raises DataError naming file and line.
    """
    name = path.name.lower()
    try:
        with (gzip.open if name.endswith(".gz") else open)(path, "rb") as stream:
            lines: Iterable[bytes] = stream
            if name.endswith(".json"):
                content = stream.read()
                if content.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                    if digest is not None:
                        digest.update(content)
                    yield from _array(content, path)
                    return
                lines = io.BytesIO(content)
            for number, line in enumerate(lines, 1):
                if digest is not None:
                    digest.update(line)
                line = line.removeprefix(BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, parse_line(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); give the path of a JSONL file") from error


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Return the object of a line, which ``where`` names in a message.

    Lines end at LF alone: JSON's text may hold any other mark that ends a line, U+2028 among them. Raises DataError for
    a line that is no object in UTF-8, and for an object that could be read in two ways or could not be written again:
    a key that is there twice, half of a surrogate pair, a number of endless digits.
    """
    with _parse_faults(where, "one JSON object a line"):
        text = line.decode()
        return _object(json.loads(text, object_pairs_hook=unique_object), text, where, "one JSON object a line")


_SPACE = re.compile(r"[ \t\r\n]*")


def _array(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of the line on which it begins, object) of each object of a JSON array."""
    expected = "a JSON array of objects"
    with _parse_faults(str(path), expected, unit="file"):
        text = content.decode("utf-8-sig")
    decoder = json.JSONDecoder(object_pairs_hook=unique_object)
    line, counted = 1, 0
    position = text.index("[")
    ended = _next(text, position + 1)[0] == "]"
    while not ended:
        _, position = _next(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        with _parse_faults(where, expected):
            value, end = decoder.raw_decode(text, position)
            value = _object(value, text[position:end], where, expected)
        yield line, value
        mark, position = _next(text, end)
        if mark not in (",", "]"):
            raise DataError(f"{where}: is not JSON (found {mark!r} after the object); expected ',' or ']'")
        ended = mark == "]"
    rest, _ = _next(text, text.index("]", position) + 1)
    if rest:
        raise DataError(f"{path}: is not JSON (found {rest!r} after the array); expected {expected}")


def _next(text: str, position: int) -> tuple[str, int]:
    """Return (the next character that is not white space, or "" at the end of the text; its position)."""
    found = _SPACE.match(text, position)
    assert found is not None
    return text[found.end() : found.end() + 1], found.end()


def _object(value: Any, text: str, where: str, expected: str) -> dict[str, Any]:
    """Return a value that was parsed from a text if it is an object that can be written again."""
    if "\\u" in text:  # the only way to half of a pair
        json.dumps(value, ensure_ascii=False).encode()
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {excerpt(value)}; expected {expected}")
    return value


@contextmanager
def _parse_faults(where: str, expected: str, unit: str = "line") -> Iterator[None]:
    """Turn the errors of decoding and parsing into a DataError."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text (byte {error.start} of the {unit}); save it as UTF-8") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: holds {half!r}, half of a surrogate pair; mend the text") from error
    except (ValueError, RecursionError) as error:
        reason = "a whole number of too many digits"  # the one ValueError that json itself lets through
        if isinstance(error, json.JSONDecodeError | _DuplicateKey):
            reason = getattr(error, "msg", str(error))
        elif isinstance(error, RecursionError):
            reason = "nested too deeply"
        raise DataError(f"{where}: is not JSON ({reason}); expected {expected}") from error


class _DuplicateKey(ValueError):
    pass


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON parser's pairs (``object_pairs_hook``). Raises ValueError for a duplicate key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


def excerpt(value: Any) -> str:
    """Return the beginning of a JSON value, for a message."""
    try:
        return json.dumps(value)[:60]
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__}"


def finite_number(value: Any) -> float | None:
    """Return a JSON number as a float, or None if the value is no number, not finite or beyond a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def read_jsonl(path: Path, kind: type[T]) -> list[T]:
    """Return all records of one kind. Raises DataError with file, line and field for a value of the wrong shape."""
    return [from_json(kind, value, f"{path}:{number}") for number, value in read_objects(path)]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def from_json(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value as ``kind``, the inverse of ``to_json`` for the types that records use."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (inner,) = (arg for arg in get_args(kind) if arg is not type(None))
        return from_json(inner, value, where)
    if origin is Literal:
        if value in get_args(kind):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(from_json(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {key: from_json(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    elif kind is Prompt:
        if isinstance(value, str):
            return Prompt(value)
    elif is_dataclass(kind):
        if isinstance(value, dict):
            return _record(kind, value, where)
    elif kind is float:
        if (number := finite_number(value)) is not None:
            return number
    elif kind is int:
        if type(value) is int and -(2**63) <= value < 2**63:
            return value
    elif isinstance(value, kind):
        return value
    raise DataError(f"{where}: found {excerpt(value)}; expected {_expectation(kind)}")


def _record(kind: Any, value: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}; allowed are {', '.join(known)}")
    for name, f in known.items():
        if name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise DataError(f"{where}: the field {name!r} is missing; expected {_expectation(_hints(kind)[name])}")
    return kind(**{name: from_json(_hints(kind)[name], item, f"{where}: {name}") for name, item in value.items()})


def _expectation(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    plain = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false", Prompt: "text"}
    return plain.get(kind, str(getattr(kind, "__name__", kind)))
