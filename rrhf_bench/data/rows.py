"""Read the rows of files and hub data sets, and their fields. Faulty rows are refused or counted."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rrhf_bench.data.dialogue import is_message
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import excerpt, read_objects

FaultyRows = Literal["error", "drop"]  # what happens to a row whose text is not what its reader expects

# The suffixes of data files, compared in lower case. A folder of ``datasets.save_to_disk`` holds .arrow files.
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", *TABLE_SUFFIXES)
# Files that ``datasets`` puts beside its data: descriptions, and results of functions that it has cached.
_BESIDE_DATA = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow")

T = TypeVar("T")
Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages, and its fields

DROP_HINT = 'faulty_rows = "drop" (--faulty-rows drop)'


class FaultyRow(DataError):
    """A row of the right shape whose text is not what its reader expects; ``kind`` names the count of such rows."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{message}; mend the row, or drop and count such rows with {DROP_HINT}")
        self.kind = kind


def usable_rows(
    rows: Iterable[Row],
    read: Callable[[Mapping[str, Any], str], T],
    faulty_rows: FaultyRows,
    counts: MutableMapping[str, int],
) -> Iterator[tuple[str, T]]:
    """Yield (place, what ``read`` returns) for each row, and count the rows.

    A faulty row raises DataError; if ``faulty_rows`` is "drop", it is left out and counted under its kind.
    """
    for where, row in rows:
        counts["rows"] += 1
        try:
            found = read(row, where)
        except FaultyRow as fault:
            if faulty_rows == "error":
                raise DataError(str(fault)) from fault
            counts[fault.kind] += 1
            continue
        yield where, found


@dataclass(frozen=True)
class Rows:
    rows: Iterator[Row]
    identity: Callable[[], str]  # to be called after every row has been read: its digest is of the contents


def open_rows(
    source: str, path: str | Path | None, split: str | None, revision: str | None, data_dir: str | None
) -> Rows:
    """Return the rows of a source. Raises DataError if the source is neither files nor a hub set."""
    digest = hashlib.sha256()
    commit: str | None = None
    if source == "files":
        if path is None:
            raise DataError("source 'files': path is missing; give a file, a folder or a glob")
        rows = file_rows(find_files(path), digest)
        name = source
    elif source.startswith("hub:") and path is None:
        rows, commit = _hub_rows(source, data_dir, split or "train", revision, digest)
        name = "/".join(filter(None, (source, data_dir))) + f":{split or 'train'}"
    else:
        what = f"source {source!r} with path {str(path)!r}" if path is not None else f"source {source!r}"
        raise DataError(f"{what}: expected 'files' with a path, or 'hub:<data set>' without one")
    return Rows(rows, lambda: f"{name}@{commit or 'sha256:' + digest.hexdigest()}")


def find_files(path: str | Path) -> list[Path]:
    """Return the data files of a file, folder or glob in the order of their names.

    Raises DataError for a missing path, for a named file of another kind, and if nothing is left.
    """
    given = Path(path)
    try:
        if given.is_dir():
            found = (file for file in given.rglob("*") if file.is_file() and not _BESIDE_DATA.fullmatch(file.name))
            files = [file for file in found if file.name.lower().endswith(SUFFIXES)]
        elif given.is_file():
            files = [given]
        else:
            files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file, a folder or a glob") from error
    expected = ", ".join("*" + suffix for suffix in SUFFIXES)
    if not files:
        fault = "holds no data file" if given.is_dir() else "is missing"
        raise DataError(f"{path}: {fault}; expected a file, a folder or a glob of {expected}")
    for file in files:
        if not file.name.lower().endswith(SUFFIXES):
            raise DataError(f"{file}: found a {file.suffix or 'nameless'} file; expected {expected}")
    return sorted(files)


def file_rows(files: Sequence[Path], digest: Any = None) -> Iterator[Row]:
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
    from pyarrow.parquet import read_metadata

    kind = file.suffix.lower().removeprefix(".")
    # Streamed: a user's file is not copied into a cache, and no progress bar is drawn.
    try:
        if kind == "parquet" and read_metadata(file).num_rows == 0:
            return  # ``datasets`` fails on a shard without rows
        table = load_dataset(kind, data_files=[glob.escape(str(file))], split="train", streaming=True)
        for index, row in enumerate(table):
            yield f"{file} row {index}", row
    except Exception as error:  # whatever the format's own reader raises
        raise DataError(f"{file}: cannot be read as {kind.capitalize()} ({_one_line(error)})") from error


def _hub_rows(
    source: str, data_dir: str | None, split: str, revision: str | None, digest: Any
) -> tuple[Iterator[Row], str | None]:
    """Return (rows, their commit or None). Offline the commit is read from the cached data set."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    name = source.removeprefix("hub:")
    commit: str | None = None
    # Offline, or not there: load_dataset then finds it in the cache, or says why not.
    with suppress(*hub_errors()):
        commit = HfApi().dataset_info(name, revision=revision).sha
    try:
        table = load_dataset(name, data_dir=data_dir, split=split, revision=commit or revision)
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


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a call to the hub without a network, or for a repository or file that is not there."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are OSError and the error of the HTTP library of that version, which a lost connection raises bare.
    return (ValueError, *HfHubHTTPError.__bases__)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    if value is None:
        raise DataError(f"{where}: {field}: is missing; expected text (found the fields {', '.join(row) or 'none'})")
    raise DataError(f"{where}: {field}: found {excerpt(value)}; expected text")


def cluster_field(row: Mapping[str, Any], where: str) -> str | None:
    """Return the name of the row's cluster, or None if the row names none. Raises DataError for any other value."""
    value = row.get("cluster")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{where}: cluster: found {excerpt(value)}; expected text or a whole number")
    return str(value)


def text_or_messages(row: Mapping[str, Any], name: str, where: str) -> str | list[Mapping[str, Any]]:
    """Return the text or the messages of a field. Raises DataError for any other value."""
    value = row.get(name)
    if not isinstance(value, list):
        return text_field(row, name, where)
    if not value or not all(map(is_message, value)):
        raise DataError(
            f'{where}: {name}: found {excerpt(value)}; expected text, or a list of messages {{"role", "content"}} with '
            "the roles system, user and assistant and text as content"
        )
    return value


def format_counts(counts: Mapping[str, int]) -> str:
    """Return the counts that are not zero, in words."""
    return ", ".join(f"{name} {number}" for name, number in counts.items() if number)
