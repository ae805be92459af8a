"""The content-addressed store: an artifact is complete or absent, and unchanged since it was written. Torch-free."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rrhf_bench.errors import BenchError, StoreError
from rrhf_bench.pipeline.locks import LockHeld, exclusive_lock

MANIFEST = "manifest.json"
TIMING = "timing.json"  # wall-clock and memory of a stage; equal artifacts differ in it, so it has its own checksum
SMALL_BYTES = 1 << 24  # smaller files are compared by content, larger ones by size and time
SCRATCH = ".scratch"

Depth = Literal["sizes", "contents", "all"]
"""The depth of a comparison: sizes; contents of small files and of those modified since; all contents."""


def canonical(value: Any, *, finite: bool = True) -> str:
    """Return canonical JSON: equal values give equal text. Raises ValueError for a non-finite number if ``finite``."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=not finite)


def content_key(value: Any) -> str:
    """Return the sha256 of canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own checksum; its numbers may be non-finite."""
    return {**value, "sha256": hashlib.sha256(canonical(value, finite=False).encode()).hexdigest()}


def is_unchanged(value: Any) -> bool:
    """Return True if a value from JSON is an object that ``with_checksum`` made."""
    if not isinstance(value, dict):
        return False
    rest = {name: item for name, item in value.items() if name != "sha256"}
    return value.get("sha256") == with_checksum(rest)["sha256"]


@dataclass(frozen=True)
class Store:
    """Artifacts in folders named by their keys. One store serves every experiment under ``runs/``.

    Names with a leading dot are temporary folders and locks of artifacts in the making, and ``.scratch``.
    """

    root: Path

    def folder(self, key: str) -> Path:
        return self.root / key[:32]

    def has(self, key: str) -> bool:
        """Return True if the artifact is complete: its manifest, written last, has the key and the sizes of its files.

        Raises StoreError if the manifest cannot be read.
        """
        return self.is_intact(key, "sizes")

    def is_intact(self, key: str, depth: Depth = "contents") -> bool:
        """Return True if the artifact is complete and unchanged."""
        return self.manifest(key) is not None and self.damage(key, depth) is None

    def damage(self, key: str, depth: Depth = "contents") -> str | None:
        """Return one line about a change in a complete artifact, or None if there is no change or no artifact."""
        manifest = self.manifest(key)
        return None if manifest is None else next(self._faults(key, manifest, depth), None)

    def require(self, key: str, name: str) -> Path:
        """Return the folder of an intact artifact. Raises StoreError if there is none."""
        if (damage := self.damage(key)) is not None:
            raise StoreError(f"{name}: {damage}; run the experiment again, which makes it again")
        if self.manifest(key) is None:
            raise StoreError(f"{name} is not complete in {self.root}; run the experiment again")
        return self.folder(key)

    def lock_path(self, key: str) -> Path:
        return self.root / f".{key[:32]}.lock"

    def exclusive_lock(
        self, key: str, name: str = "", waiting: Callable[[str], None] | None = None, patience: float = 1.0
    ) -> AbstractContextManager[None]:
        """Return the lock that a process holds while it makes this artifact: see ``locks.exclusive_lock``."""
        return exclusive_lock(self.lock_path(key), name or self.folder(key), waiting, patience)

    def registration_lock(self) -> AbstractContextManager[None]:
        """Return the lock that serialises the registration of runs and pruning."""
        return exclusive_lock(self.root / ".gate.lock", self.root, lambda _: None)

    @contextmanager
    def new_artifact(self, key: str, about: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a temporary folder that becomes the artifact if the block ends without an error; else it is removed.

        The caller holds ``exclusive_lock`` if other processes may make the same artifact or sweep the store. The
        scratch folder of an artifact is removed when the artifact is complete.
        """
        temporary = _temporary_folder(self.root, f".{key[:32]}-", self.root, "choose another --runs DIR")
        replaced = temporary.with_name(f"{temporary.name}.old")
        try:
            yield temporary
            files = {
                name: None if name == TIMING else {"size": path.stat().st_size, "sha256": _sha256(path)}
                for name, path in _files(temporary)
            }
            manifest = {"key": key, **about, "files": files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
            _sync_all(temporary)
            final = self.folder(key)
            if final.exists():  # damaged, or an earlier attempt without a manifest
                os.replace(final, replaced)
            os.replace(temporary, final)
            _sync(self.root)
            shutil.rmtree(self.scratch(key), ignore_errors=True)
            shutil.rmtree(self.failure_folder(key), ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)

    def scratch(self, key: str) -> Path:
        """Return the folder for what a stage needs after it was killed, which it writes with ``atomic_file``.

        The folder need not exist; it is removed when the artifact is complete.
        """
        return self.root / SCRATCH / key[:32]

    def failure_folder(self, key: str) -> Path:
        """Return the folder that describes a failed stage: ``failed.json`` (stage, reason), ``batch.jsonl`` (evidence).

        It is not an artifact: the next run tries the stage again, and success removes the folder.
        """
        return self.root / "failed" / key[:32]

    def note_failure(self, key: str, stage: str, reason: str, evidence: Iterable[Mapping[str, Any]]) -> None:
        folder = self.failure_folder(key)
        write_file(folder / "batch.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evidence))
        write_file(folder / "failed.json", json.dumps({"key": key, "stage": stage, "reason": reason}, indent=1))

    def failure(self, key: str) -> str | None:
        """Return the reason for which a stage failed, or None if it is complete or did not fail."""
        path = self.failure_folder(key) / "failed.json"
        if self.has(key) or not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))["reason"]

    def sweep(self) -> None:
        """Remove the temporary folders of killed processes, and the scratch folders of complete artifacts."""
        if not self.root.is_dir():
            return
        leftovers = [(m[1], path) for path in self.root.iterdir() if (m := _LEFTOVER.fullmatch(path.name))]
        scratch = ((path.name, path) for path in (self.root / SCRATCH).glob("*"))
        finished = [(key, path) for key, path in scratch if (self.root / key / MANIFEST).is_file()]
        for key, path in (*leftovers, *finished):
            with suppress(LockHeld), self.exclusive_lock(key, patience=0.0):
                shutil.rmtree(path, ignore_errors=True)

    def manifest(self, key: str) -> dict[str, Any] | None:
        """Return the manifest, None if there is none, or an empty one if it is no JSON object."""
        path = self.folder(key) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from error
        except (ValueError, RecursionError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def _faults(self, key: str, manifest: Mapping[str, Any], depth: Depth) -> Iterator[str]:
        """Yield one line a change, the cheapest comparisons first."""
        folder, changed = self.folder(key), "{} has changed since it was written".format
        path = folder / MANIFEST
        try:
            missing = {name: want and (want["size"], want["sha256"]) for name, want in manifest["files"].items()}
        except (AttributeError, KeyError, TypeError):
            missing = None
        if missing is None or manifest.get("key") != key:
            yield changed(path)
            return
        written = path.stat().st_mtime_ns
        for name, file in _files(folder):
            if name not in missing:
                if not name.startswith("."):  # a file manager's own
                    yield f"{file} is not part of it"
                continue
            wanted, status = missing.pop(name), file.stat()
            if wanted is None:
                if not _has_checksum(file):
                    yield changed(file)
            elif status.st_size != wanted[0]:
                yield f"{file} has {status.st_size} bytes and was written with {wanted[0]}"
            elif depth != "sizes":
                compare = depth == "all" or status.st_size < SMALL_BYTES or status.st_mtime_ns > written
                if compare and _sha256(file) != wanted[1]:
                    yield changed(file)
        yield from (f"{folder / name} is missing" for name in missing)


def _has_checksum(file: Path) -> bool:
    """Return True if a JSON file holds an unchanged object that ``with_checksum`` made."""
    try:
        return is_unchanged(json.loads(file.read_text(encoding="utf-8")))
    except ValueError:
        return False


_LEFTOVER = re.compile(r"\.([0-9a-f]{32})(?:-.*|\.lock)")


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Return (name within the folder, path) of the files that a manifest lists, in a fixed order."""
    found = ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(name, path) for name, path in found if name != MANIFEST]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know it for files only
            raise
    finally:
        os.close(handle)


def _sync_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write one file to; rename it to ``path`` if the block ends without an error.

    An existing file is unchanged until then. Two processes must not write to one path at a time; the next write
    replaces ``.<name>.part`` of a killed process. Raises StoreError if the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file, or leave the existing one: see ``atomic_file``."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def link_or_copy(source: str, target: str) -> None:
    """Link a file of an artifact, which does not change once it is made, or copy it if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}  # of a file of ours


@contextmanager
def disk_errors(place: Path, instead: str = "choose another --runs DIR") -> Iterator[None]:
    """Turn what a full or read-only disk raises, here or in a library, into a StoreError of one line."""
    try:
        yield
    except BenchError:
        raise
    except Exception as error:
        code, name = _disk_fault(error)
        where = place if name is None else Path(name)
        ours = name is not None and (where.is_relative_to(place) or place.is_relative_to(where))
        if code in FULL:
            words = f"{where}: there is no room to write ({os.strerror(code)}); make room or {instead}, and repeat the "
            raise StoreError(words + "command: it goes on from what is complete") from error
        if code == errno.EROFS or (code in _DENIED and ours):
            raise StoreError(f"{where}: cannot be written ({os.strerror(code)}); {instead}") from error
        raise


def _disk_fault(error: BaseException | None) -> tuple[int, str | None]:
    """Return (errno, file or None) of an error or of its cause; errno 0 if there is none.

    safetensors and tokenizers, written in Rust, raise errors that end in "(os error 28)".
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno, os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found:
            return int(found[1]), None
        error = error.__cause__ or error.__context__
    return 0, None


@contextmanager
def replace_path(path: Path, *, over: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write a file or folder to; rename it to ``path`` if the block ends without an error.

    With ``over``, a folder that is already there stays until the new one is complete. Without it, StoreError is raised
    if ``path`` is a folder that is not empty. Raises StoreError also if ``path`` cannot be written.
    """
    if not over and path.is_dir() and any(path.iterdir()):
        raise StoreError(f"{path}: is a folder that is not empty; name a new one, nothing is overwritten")
    temporary = _temporary_folder(path.parent, f".{path.name}-", path, "name another place")
    earlier = temporary / f"{path.name}.earlier"
    try:
        with disk_errors(path.parent, "name another place"):
            yield temporary / path.name
            _sync_all(temporary)
            if path.is_dir():
                os.rename(path, earlier)  # no folder can take the name of one that is not empty
            try:
                os.replace(temporary / path.name, path)
            except OSError:
                if earlier.is_dir():
                    os.rename(earlier, path)
                raise
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_folder(parent: Path, prefix: str, place: Path, instead: str) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise StoreError(f"{place}: cannot be written ({error.strerror}); {instead}") from error


def folder_identity(folder: Path) -> str:
    """Return an identity of a model folder: small files by content, large ones by size and modification time.

    Hashing tens of gigabytes of weights at every `plan` would take minutes; a weight file that is replaced gets a new
    time. Raises StoreError for an empty or missing folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise StoreError(f"{folder}: is empty; expected a model folder in transformers' layout")
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        small = status.st_size < SMALL_BYTES
        what = hashlib.sha256(path.read_bytes()).hexdigest() if small else f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{path.relative_to(folder)} {what}\n".encode())
    return f"folder:{digest.hexdigest()[:32]}"
