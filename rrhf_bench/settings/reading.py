"""Reading an experiment file: TOML to a complete Experiment, every fault found at once, before torch is imported."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rrhf_bench.errors import SIGNED_URL, ConfigError, visible
from rrhf_bench.settings.candidates import merge
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import MethodSettings
from rrhf_bench.settings.reward import RewardTrainingSettings
from rrhf_bench.settings.validation import contradictions

DEEPEST = 16  # tables and lists inside each other; an experiment has four


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a file under ``key.path=value`` overrides. Raises ConfigError listing every fault."""
    table = _read(path, ())
    faults = [fault for override in overrides if (fault := _override(table, override))]
    table.setdefault("name", path.stem)
    # A path in a file is relative to where the command runs, as on the command line: the two can override each other.
    experiment = _validate(table, faults)
    if faults:
        raise ConfigError("\n".join(visible(f"{path}: {fault}") for fault in faults))
    assert experiment is not None
    return experiment


def parse_method(kind: str, assignments: Sequence[str]) -> MethodSettings:
    """Return a method's settings from ``key=value`` words alone, for the plain-file steps. Raises ConfigError."""
    table: dict[str, Any] = {"method": {"kind": kind}}
    faults = [fault for word in assignments if (fault := _override(table, f"method.{word}"))]
    faults = faults or _row_faults("method", table["method"], {})
    if faults:
        raise ConfigError("\n".join(map(visible, faults)))
    return Experiment.model_validate({"name": "x", "methods": table}).methods["method"]


def parse_reward_training(assignments: Sequence[str]) -> RewardTrainingSettings:
    """How a reward model is trained, from ``key=value`` words alone. Raises ConfigError."""
    table: dict[str, Any] = {"method": {}}
    faults = [fault for word in assignments if (fault := _override(table, f"method.{word}"))]
    if not faults:
        try:
            return RewardTrainingSettings.model_validate(table["method"])
        except ValidationError as error:
            faults += [f"method.{fault}" for fault in _faults(error)]
    raise ConfigError("\n".join(map(visible, faults)))


def _read(path: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """A file's table merged over the file it extends, which may lie anywhere: it is read, and nothing else."""
    here = os.path.realpath(path)  # unlike Path.resolve it bears links that lead in a circle
    name, above = visible(str(path)), visible(f"{seen[-1]}: extends: ") if seen else ""
    if here in seen:
        raise ConfigError(f"{name}: extends: comes back to itself through {visible(seen[-1])}; remove one of the two")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{above}{name}: cannot be read ({error.strerror}); give the path of an experiment file"
        ) from error
    table = _parsed(name, content)
    faults = list(_unusable(table))
    if faults:
        raise ConfigError("\n".join(visible(f"{name}: {fault}") for fault in faults))
    bases = table.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{name}: extends: found {bases!r}; expected paths of other files, relative to this one")
    merged: dict[str, Any] = {}
    for base in bases:  # each over those before it
        below = _read(path.parent / base, (*seen, here))
        below.pop("name", None)  # a file that extends another is another experiment: its own name or its file's
        merged = _merged(merged, below)
    return _merged(merged, table)


def _parsed(path: str, content: bytes) -> dict[str, Any]:
    """Return the table of a file. Raises ConfigError naming the line."""
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    except (RecursionError, ValueError) as error:  # the second: a whole number of thousands of digits
        what = "values nested too deeply" if isinstance(error, RecursionError) else "a whole number of too many digits"
        raise ConfigError(f"{path}: is not TOML: {what}; remove them") from error


def _unusable(value: Any, where: tuple[str, ...] = ()) -> Iterator[str]:
    """Faults that no key can mean, whichever it is: numbers that are not finite or too large, text that is no text."""
    name = ".".join(where)
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        if len(where) >= DEEPEST:
            yield f"{'.'.join(where[:4])}...: tables or lists inside each other, more than {DEEPEST} deep; remove them"
            return
        for key, item in inside:
            yield from _unusable(item, (*where, str(key)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: found {value}; expected a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{name}: found a whole number of more than 64 bits; expected one that fits"
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        yield f"{name}: found {value[:60]!r}; expected text without NUL and without bytes that are no UTF-8"
    elif isinstance(value, str) and SIGNED_URL.search(value):
        yield f"{name}: found a URL with a user or password, which would be written down with the run; remove them"


def _merged(below: Any, above: Any, *where: str) -> Any:
    """Return one value over another; ``where`` holds the keys of the tables."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = {key: _merged(below[key], value, *where, key) if key in below else value for key, value in above.items()}
    if where[-1:] == ("candidates",) or (len(where) == 2 and where[0] == "sources"):
        return merge(below, merged, row=where[0] in ("defaults", "methods", "method"))
    return below | merged


def _override(table: dict[str, Any], override: str) -> str | None:
    """Apply one ``key.path=value``; the fault, if there is one."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        return f"--set {override}: expected KEY=VALUE, such as methods.rrhf.lr=1e-5"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # TOMLDecodeError is the first kind
        value = text  # a bare word is text: --set policy.source=gpt2
    keys = [part.strip() for part in key.split(".")]
    for fault in _unusable(value, tuple(keys)):
        return fault
    inner: Any = table
    for parent in keys[:-1]:
        inner = inner.get(parent, {})
        if not isinstance(inner, dict):
            return f"--set {override}: {parent} is a value, not a table"
    if isinstance(value, dict):  # takes the place of a table, unlike one in a file that extends another
        inner.pop(keys[-1], None)
    for part in reversed(keys):
        value = {part: value}
    table.update(_merged(table, value))  # as in a file that extends another
    return None


OF_ROWS = ("policies", "sources", "methods", "claims")  # tables of tables, each of which has a name of its own


def _validate(table: dict[str, Any], faults: list[str]) -> Experiment | None:
    """Return the experiment of a file's table, or None; add its faults."""
    table = _named_rows(table, faults)
    faulty: set[tuple[str, ...]] = set()  # keys and rows with a fault
    try:
        experiment = Experiment.model_validate(table)
    except ValidationError as error:
        faults.extend(_faults(error))
        faulty = {tuple(map(str, f["loc"][: 2 if f["loc"][0] in OF_ROWS else 1])) for f in error.errors()}
        sound = {key: value for key, value in table.items() if (key,) not in faulty}
        for key in set(OF_ROWS) & set(sound):
            sound[key] = {name: row for name, row in sound[key].items() if (key, name) not in faulty}
        try:  # the sound ones, for the faults that only several keys together show
            experiment = Experiment.model_validate(sound)
        except ValidationError:
            return None
    # Faulty tables are already reported, so rules that need them are skipped.
    unread = {name for place in faulty for name in place[-1:]}
    found = contradictions(experiment, unread)
    faults.extend(fault for fault in found if (re.split(r"[.:]", fault)[0],) not in faulty)
    return experiment


def _named_rows(table: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """Return a table whose rows and claims have their kinds, each row over [defaults] of its kind; add the faults."""
    defaults = table.get("defaults", {})
    if not isinstance(defaults, dict):
        faults.append(f"defaults: found {defaults!r}; expected tables such as [defaults.rrhf]")
        defaults = {}
    usable: dict[str, Any] = {}
    for kind, of_kind in defaults.items():
        where = f"defaults.{kind}"
        if isinstance(of_kind, dict) and "kind" in of_kind:
            found = [f"{where}.kind: found {of_kind['kind']!r}; the table's name is the kind; remove the key"]
        else:
            named = {**of_kind, "kind": kind} if isinstance(of_kind, dict) else of_kind
            found = _row_faults(where, named, table.get("candidates", {}))
            found = [fault.replace(f"{where}.kind: ", f"{where}: ", 1) for fault in found]
        usable |= {} if found else {kind: of_kind}
        faults += found
    table = {key: value for key, value in table.items() if key != "defaults"}
    for key, below in {"methods": usable, "claims": {}}.items():
        if isinstance(rows := table.get(key), dict):
            table[key] = {
                name: _merged(below.get(str(row.get("kind", name)), {}), {"kind": name, **row}, key, name)
                if isinstance(row, dict)
                else row
                for name, row in rows.items()
            }
    return table


def _row_faults(where: str, row: Any, candidates: Any) -> list[str]:
    """Return the faults of a row alone, whatever is wrong with [candidates]."""
    try:
        Experiment.model_validate({"name": "x", "candidates": candidates, "methods": {"row": row}})
        return []
    except ValidationError as error:
        start = "methods.row"
        return [where + fault.removeprefix(start) for fault in _faults(error) if fault.startswith(start)]


def _faults(error: ValidationError) -> Iterator[str]:
    """Yield pydantic's findings as one line each: where, what was found, what is allowed."""
    places = [fault["loc"] for fault in error.errors()]
    for fault in error.errors():
        if fault["type"] == "too_short" and any(loc[:-1] == fault["loc"] for loc in places):
            continue  # pydantic counts the valid items of a list only; the invalid ones are faults already
        where = ".".join(str(key) for key in fault["loc"] if key != "[key]")  # pydantic's mark of a name of a row
        message = fault["msg"]
        if fault["type"] == "value_error":
            # A message of a whole table starts with the key at fault.
            message = str(fault["ctx"]["error"])
            yield ".".join(filter(None, [where, message])) if re.match(r"\w+: ", message) else f"{where}: {message}"
        elif fault["type"] == "missing":
            yield f"{where}: missing"
        else:
            found = repr(fault["input"])
            found = found if len(found) <= 60 else found[:57] + "..."
            if where.startswith("judge"):  # a key put into the wrong field must not come back in the message about it
                found = "what is not shown here"
            yield f"{where}: found {found}; {message[0].lower()}{message[1:]}"
