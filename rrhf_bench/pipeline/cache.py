"""List the store's artifacts by run, and prune those that no run refers to. Free of torch."""

from __future__ import annotations

import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf_bench.errors import StoreError
from rrhf_bench.pipeline.judging import JOURNALS
from rrhf_bench.pipeline.locks import LockHeld, holder
from rrhf_bench.pipeline.run_folder import read_run
from rrhf_bench.pipeline.store import SCRATCH, Store, disk_errors

_ARTIFACT = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\.([0-9a-f]{32})-.*")
UNFINISHED, LEFT_OVER = "unfinished", "left over"


@dataclass(frozen=True)
class Item:
    """A folder of the store."""

    path: Path
    id: str  # the first 32 digits of the key
    what: str  # the kind of its stage; UNFINISHED or LEFT_OVER if it is no artifact
    name: str  # of the stage
    bytes: int
    runs: tuple[str, ...]  # that refer to it


@dataclass(frozen=True)
class Cache:
    items: tuple[Item, ...]
    journals: int  # bytes of the verdicts of judges, which are never pruned

    @property
    def unused(self) -> tuple[Item, ...]:
        """Return the items that no run refers to, and those that killed processes left."""
        return tuple(item for item in self.items if not item.runs or item.what == LEFT_OVER)

    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Return (number, bytes) by kind of stage, largest first."""
        by_kind: dict[str, list[int]] = defaultdict(list)
        for item in self.items:
            by_kind[item.what].append(item.bytes)
        sizes = {kind: (len(found), sum(found)) for kind, found in by_kind.items()}
        return dict(sorted(sizes.items(), key=lambda entry: (-entry[1][1], entry[0])))

    def by_run(self) -> Mapping[str, tuple[int, int, int]]:
        """Return (number, bytes, bytes that no other run refers to) by run."""
        by_run: dict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            for run in item.runs:
                by_run[run].append(item)
        return {
            run: (len(items), sum(i.bytes for i in items), sum(i.bytes for i in items if len(i.runs) == 1))
            for run, items in sorted(by_run.items())
        }


def list_store(runs: Path) -> Cache:
    """Return the content of the store of a folder of runs. Raises StoreError for a run whose run.json is damaged."""
    store, users = Store(runs / "store"), _users(runs)
    return Cache(tuple(_items(store, users)), _bytes(store.root / JOURNALS))


def prune(runs: Path) -> tuple[Item, ...]:
    """Remove items that no run folder refers to or that killed processes left, and return them.

    Items that a process is making or removing stay, and no run is registered meanwhile. Raises StoreError.
    """
    store = Store(runs / "store")
    if not store.root.is_dir():
        return ()
    removed = []
    with disk_errors(store.root), store.registration_lock():
        for item in list_store(runs).unused:
            with suppress(LockHeld), store.exclusive_lock(item.id, patience=0.0):
                if item.what in (UNFINISHED, LEFT_OVER):
                    shutil.rmtree(item.path)
                else:  # rename first: no reader ever sees half of it
                    gone = item.path.rename(item.path.with_name(f".{item.id}-pruned"))
                    shutil.rmtree(gone)
                removed.append(item)
        store.sweep()  # locks of dead processes
    return tuple(removed)


def damages(runs: Path) -> Mapping[str, str]:
    """Return by stage the changes in artifacts, of which every byte is read."""
    store = Store(runs / "store")
    found = {}
    for path in sorted(store.root.glob("*")):
        manifest = _manifest(store, path.name)
        key = manifest.get("key")
        if key is not None and (damage := store.damage(key, "all")) is not None:
            found[manifest.get("name", path.name)] = damage
    return found


def _users(runs: Path) -> Mapping[str, Mapping[str, str]]:
    """Return by id of an artifact the runs that refer to it, each with its name for the stage."""
    users: dict[str, dict[str, str]] = {}
    for path in sorted(runs.glob("*/run.json")):
        for key, stage in read_run(path.parent)["stages"].items():
            users.setdefault(key[:32], {})[path.parent.name] = stage["name"]
    return users


def _items(store: Store, users: Mapping[str, Mapping[str, str]]) -> Iterator[Item]:
    for path in sorted(store.root.glob("*")):
        used = tuple(users.get(path.name, ()))
        if _ARTIFACT.fullmatch(path.name):
            manifest = _manifest(store, path.name)
            kind = manifest.get("kind", "unknown") if manifest else LEFT_OVER
            yield Item(path, path.name, kind, manifest.get("name", ""), _bytes(path), used)
        elif (found := _TEMPORARY.fullmatch(path.name)) and holder(store.lock_path(found[1])) is None:
            yield Item(path, found[1], LEFT_OVER, "", _bytes(path), ())
    for path in sorted((store.root / SCRATCH).glob("*")):
        wanted = users.get(path.name, {})
        yield Item(path, path.name, UNFINISHED, next(iter(wanted.values()), ""), _bytes(path), tuple(wanted))


def _manifest(store: Store, name: str) -> dict[str, Any]:
    """Return the manifest of an artifact, or an empty one if it cannot be read: the others are listed all the same."""
    with suppress(StoreError):
        return store.manifest(name) or {}
    return {}


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process may remove it
            status = path.stat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total
