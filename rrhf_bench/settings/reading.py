"""Reading an experiment file: TOML to a complete Experiment, every fault found at once, before torch is imported."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag, TypeAdapter, ValidationError

from rrhf_bench.errors import SIGNED_URL, ConfigError, nearest, visible
from rrhf_bench.registry import METHODS, settings_class
from rrhf_bench.settings.candidates import (
    CANDIDATE_KEYS,
    GIVEN,
    STRATEGY_KEYS,
    CandidateDefaults,
    CandidateSettings,
    SampledCandidates,
    merge,
)
from rrhf_bench.settings.claims import CLAIMS, EARLIER_KINDS, ClaimSettings
from rrhf_bench.settings.experiment import FILE, NAME, Experiment, ModelSource, SamplingSettings
from rrhf_bench.settings.methods import MethodSettings
from rrhf_bench.settings.reward import RewardTrainingSettings
from rrhf_bench.settings.validation import contradictions

DEEPEST = 16  # tables and lists inside each other; an experiment has four


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, with ``key.path=value`` overrides applied. Raises ConfigError listing every fault."""
    table = _read(path, ())
    faults: list[str] = []
    for override in overrides:
        fault = _override(table, override)
        if fault:
            faults.append(fault)
    table.setdefault("name", path.stem)
    # A path in a file is relative to where the command runs, as on the command line: the two can override each other.
    experiment = _validate(table, faults)
    if faults:
        raise ConfigError("\n".join(visible(f"{path}: {fault}") for fault in faults))
    assert experiment is not None
    return experiment


def parse_method(kind: str, assignments: Sequence[str]) -> MethodSettings:
    """A method's settings from ``key=value`` words alone, for the plain-file steps. Raises ConfigError."""
    table: dict[str, Any] = {"method": {"kind": kind}}
    faults = [fault for word in assignments if (fault := _override(table, f"method.{word}"))]
    method = None if faults else _method("method", table["method"], _defaults({}), faults)
    if faults or method is None:
        raise ConfigError("\n".join(map(visible, faults)))
    return method


def parse_reward_training(assignments: Sequence[str]) -> RewardTrainingSettings:
    """How a reward model is trained, from ``key=value`` words alone. Raises ConfigError."""
    table: dict[str, Any] = {"method": {}}
    faults = [fault for word in assignments if (fault := _override(table, f"method.{word}"))]
    if not faults:
        try:
            return RewardTrainingSettings.model_validate(table["method"])
        except ValidationError as error:
            faults += _faults(error, RewardTrainingSettings, "method")
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
    """The table of a file. Raises ConfigError naming the line."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    if text.startswith("\ufeff"):
        raise ConfigError(f"{path}: line 1: starts with a byte-order mark; save the file as UTF-8 without one")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    except (RecursionError, ValueError) as error:  # the second: a whole number of thousands of digits
        deep = isinstance(error, RecursionError)
        lines = text.split("\n")
        worst = max(lines, key=lambda line: sum(map(line.count, "[{" if deep else "0123456789")))
        what = "values nested too deeply" if deep else "a whole number of too many digits"
        raise ConfigError(f"{path}: is not TOML: {what} (about line {lines.index(worst) + 1})") from error


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


def _validate(table: dict[str, Any], faults: list[str]) -> Experiment | None:
    table = dict(table)
    defaults = dict(_tables(table.pop("defaults", {}), "defaults", "[defaults.rrhf]", faults))
    shared = _defaults(table.get("candidates", {}))
    for kind in list(defaults):
        if not _default(kind, defaults[kind], shared, faults):
            del defaults[kind]
    methods: dict[str, MethodSettings] = {}
    for name, of_row in _tables(table.get("methods", {}), "methods", "[methods.rrhf]", faults).items():
        if isinstance(of_row, dict):
            of_row = _merged(defaults.get(str(of_row.get("kind", name)), {}), of_row, "methods", name)
        method = _method(f"methods.{name}", of_row, shared, faults) if _nameable("methods", name, faults) else None
        if method is not None:
            methods[name] = method
    claims: dict[str, ClaimSettings] = {}
    for name, of_claim in _tables(table.get("claims", {}), "claims", "[claims.difference]", faults).items():
        claim = _claim(f"claims.{name}", of_claim, faults) if _nameable("claims", name, faults) else None
        if claim is not None:
            claims[name] = claim
    written = dict(table)
    table |= {"methods": methods, "claims": claims}
    if isinstance(sources := table.get("sources"), dict):
        table["sources"] = {name: _source(source, shared) for name, source in sources.items()}
    faulty: set[str] = set()  # tables with a faulty key
    try:
        experiment = Experiment.model_validate(table)
    except ValidationError as error:
        faults.extend(_faults(error, Experiment, ""))
        faulty = {str(fault["loc"][0]) for fault in error.errors()}
        try:  # the sound tables, for the faults that only several keys together show
            experiment = Experiment.model_validate({key: value for key, value in table.items() if key not in faulty})
        except ValidationError:
            return None
    # What a faulty table holds is named elsewhere, and cannot be looked at.
    unread = {
        str(name)
        for key in ("policies", "sources", "methods")
        if isinstance(of_key := written.get(key), dict)
        for name in set(of_key) - set(getattr(experiment, key))
    } | faulty
    found = contradictions(experiment, unread)
    faults.extend(fault for fault in found if faulty.isdisjoint(re.split(r"[.:]", fault)[:1]))
    return experiment


def _tables(found: Any, where: str, example: str, faults: list[str]) -> dict[str, Any]:
    if isinstance(found, dict):
        return found
    faults.append(f"{where}: found {found!r}; expected tables such as {example}")
    return {}


def _nameable(where: str, name: str, faults: list[str]) -> bool:
    """Return True if a table's name can be one of a row: it stands in tables, figures, logs and names of files."""
    if not re.fullmatch(NAME, name):
        faults.append(f"{where}.{name}: a name is letters, digits, - and _, at most 100; choose another")
        return False
    return True


def _defaults(table: Any) -> dict[str, Any] | None:
    """Return [candidates] with every key filled in, or None if it has a fault, which is found elsewhere."""
    adapter: TypeAdapter[SampledCandidates] = TypeAdapter(CandidateDefaults)
    try:
        return adapter.validate_python(table).model_dump()
    except ValidationError:
        return None


def _source(table: Any, shared: Mapping[str, Any] | None) -> Any:
    """Return a table of [sources] over the keys of [candidates] that say how a model is sampled."""
    if not isinstance(table, dict) or FILE in table:
        return table
    if shared is None:
        return {key: value for key, value in table.items() if key == "model"}
    return merge({key: value for key, value in shared.items() if key in STRATEGY_KEYS}, table, row=False)


def _default(kind: str, table: Any, shared: Mapping[str, Any] | None, faults: list[str]) -> bool:
    """Return True if the defaults of a kind can be used; add the faults of those that cannot."""
    before = len(faults)
    where = f"defaults.{kind}"
    if (fault := _unknown_kind(kind)) is not None:
        faults.append(f"{where}: {fault}")
    elif isinstance(table, dict) and "kind" in table:
        faults.append(f"{where}.kind: found {table['kind']!r}; the table's name is the kind; remove the key")
    else:
        _method(where, {**table, "kind": kind} if isinstance(table, dict) else table, shared, faults)
    return len(faults) == before


def _unknown_kind(kind: Any) -> str | None:
    """Return the fault of a ``kind`` that names no method, or None."""
    if isinstance(kind, str):
        try:
            settings_class(kind)
            return None
        except LookupError as error:
            if ":" in kind:
                return f"found {kind!r}, which {error}"
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            return f"found {kind!r}, whose settings cannot be imported ({error}); mend the address or the module"
    return f"found {kind!r}; allowed are {', '.join(METHODS)}{nearest(str(kind), METHODS)}, or package.module:OBJECT"


def _claim(where: str, table: Any, faults: list[str]) -> ClaimSettings | None:
    name = where.rpartition(".")[2]
    if not isinstance(table, dict):
        faults.append(f"{where}: found {table!r}; expected a table of the claim's rows and margin")
        return None
    kind = table.get("kind", name)
    if not isinstance(kind, str) or kind not in CLAIMS:
        form = EARLIER_KINDS.get(kind) if isinstance(kind, str) else None
        hint = f"; write {form}" if form else nearest(str(kind), CLAIMS)
        faults.append(f"{where}.kind: found {kind!r}; allowed are {', '.join(CLAIMS)}{hint}")
        return None
    try:
        return CLAIMS[kind].model_validate({**table, "kind": kind})
    except ValidationError as error:
        faults.extend(_faults(error, CLAIMS[kind], where))
        return None


def _method(where: str, table: Any, shared: Mapping[str, Any] | None, faults: list[str]) -> MethodSettings | None:
    """Return the settings of a row. ``shared``: [candidates], which its own candidates lie over; None is faulty."""
    name = where.rpartition(".")[2]
    if not isinstance(table, dict):
        faults.append(f"{where}: found {table!r}; expected a table of the method's settings")
        return None
    kind = table.get("kind", name)
    if (fault := _unknown_kind(kind)) is not None:
        faults.append(f"{where}.kind: {fault}")
        return None
    settings = settings_class(kind)
    candidates = table.get("candidates", {})
    reads = "candidates" in settings.requires or ("candidates" in table and "candidates" in settings.model_fields)
    if reads and isinstance(candidates, dict):
        merged = {} if shared is None else merge(shared, candidates, row=True)
        table = {**table, "candidates": merged}
    try:
        return settings.model_validate({**table, "kind": kind})
    except ValidationError as error:
        faults.extend(_faults(error, settings, where))
        return None


def _faults(error: ValidationError, model: type[BaseModel], prefix: str) -> Iterator[str]:
    """pydantic's findings as one line each: where, what was found, what is allowed, the nearest valid key."""
    found_at = [fault["loc"] for fault in error.errors()]
    for fault in error.errors():
        if fault["type"] == "too_short" and any(loc[:-1] == fault["loc"] for loc in found_at):
            continue  # pydantic counts the valid items of a list only; the invalid ones are faults already
        table, keys, tag = _table_at(model, fault["loc"])
        where = ".".join(filter(None, [prefix, *keys]))
        found = _shown(fault["input"])
        if where.startswith("judge"):  # a key put into the wrong field must not come back in the message about it
            found = "what is not shown here"
        if fault["type"] == "extra_forbidden":
            allowed, above = list(table.model_fields), where.rpartition(".")[0]
            if moved := _moved(table, above, keys[-1]):
                yield f"{where}: unknown key; it is {moved} now"
            else:
                which = _OF_TAG.get(tag, "")
                yield f"{where}: unknown key{which}; allowed are {', '.join(allowed)}{nearest(keys[-1], allowed)}"
        elif fault["type"] == "missing":
            yield f"{where}: missing"
        elif fault["type"] == "value_error":
            # A message of a whole table starts with the key at fault.
            message = str(fault["ctx"]["error"])
            yield f"{where}.{message}" if re.match(r"\w+: ", message) else f"{where}: {message}"
        else:
            message = fault["msg"]
            yield f"{where}: found {found}; {message[0].lower()}{message[1:]}"


# Which of several tables it is that has no such key.
_OF_TAG: Mapping[str | None, str] = {
    GIVEN: ' without "model" in sources',
    "sample": ' with strategy = "sample"',
    "beam": ' with strategy = "beam"',
    "diverse-beam": ' with strategy = "diverse-beam"',
    FILE: " of responses from a file",
}


def _moved(table: type[BaseModel], above: str, key: str) -> str | None:
    """Return where a key of candidates is, if it stands in the table that candidates belong to."""
    new = "recipe" if key == "policy" else key
    if issubclass(table, CandidateSettings | ModelSource):
        return f"{above}.{new}" if new != key else None
    if new not in (*CANDIDATE_KEYS, "recipe"):
        return None
    if issubclass(table, SamplingSettings):
        return f"candidates.{new}"
    return f"{above}.candidates.{new}" if "candidates" in table.model_fields and table is not Experiment else None


def _shown(value: Any) -> str:
    """Return a value as one short piece of a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _table_at(model: type[BaseModel], place: Sequence[int | str]) -> tuple[type[BaseModel], list[str], str | None]:
    """Return the table that holds a place of pydantic's, the keys of the place, and the table's tag in a union."""
    keys: list[str] = []
    tag: str | None = None
    path = list(place)
    while path:
        keys.append(str(path.pop(0)))
        field = model.model_fields.get(keys[-1])
        if field is None:
            break
        if get_origin(field.annotation) is Mapping and path:
            keys.append(str(path.pop(0)))  # the table's own name
        tables = dict(_tables_of(field.annotation))
        tag = str(path.pop(0)) if path and path[0] in tables else None
        if not path or tag not in tables:
            break
        model = tables[tag]
    return model, keys + [str(key) for key in path], tag


def _tables_of(annotation: Any, tag: str | None = None) -> Iterator[tuple[str | None, type[BaseModel]]]:
    """Yield (tag, class) of the tables that a key may hold."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        tag = next((data.tag for data in metadata if isinstance(data, Tag)), tag)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag, annotation
    for inner in get_args(annotation):
        yield from _tables_of(inner, tag)
