"""The content-addressed store: an artifact is complete or absent. Free of torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf_bench.errors import StoreError

MANIFEST = "manifest.json"
TIMING = "timing.json"  # wall-clock and memory of a stage: beside its content, never compared


def canonical(value: Any) -> str:
    """Canonical JSON: the same value is the same text on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: Any) -> str:
    """sha256 of canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """Folders named by the key of what made them. One store serves every experiment under ``runs/``."""

    root: Path

    def folder(self, key: str) -> Path:
        return self.root / key[:32]

    def has(self, key: str) -> bool:
        """Whether the artifact is complete: its manifest, which is written last, is there and names the key."""
        try:
            return json.loads((self.folder(key) / MANIFEST).read_text())["key"] == key
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.folder(key) / MANIFEST}: cannot be read ({error}); remove that folder") from error

    @contextmanager
    def writing(self, key: str, about: Mapping[str, Any]) -> Iterator[Path]:
        """A temporary folder that becomes the artifact when the block ends well, and vanishes when it does not."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=self.root))
        except OSError as error:
            raise StoreError(f"{self.root}: cannot be written ({error.strerror}); choose another --runs DIR") from error
        try:
            yield temporary
            (temporary / MANIFEST).write_text(json.dumps({"key": key, **about}, indent=1, ensure_ascii=False))
            final = self.folder(key)
            if final.exists():  # an earlier attempt without a manifest
                shutil.rmtree(final)
            os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def about(self, key: str) -> dict[str, Any]:
        """The manifest of a complete artifact."""
        return json.loads((self.folder(key) / MANIFEST).read_text())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file or folder to; it takes the name when the block ends well, or vanishes.

    Raises StoreError where ``path`` is a folder that holds anything, or cannot be written.
    """
    if path.is_dir() and any(path.iterdir()):
        raise StoreError(f"{path}: is a folder that is not empty; name a new one, nothing is overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}); name another place") from error
    try:
        yield temporary / path.name
        if path.is_dir():
            path.rmdir()
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_identity(folder: Path) -> str:
    """What a model folder holds: small files by content, large ones by size and modification time.

    Hashing tens of gigabytes of weights at every `plan` would take minutes; a weight file that is replaced gets a new
    time. Raises StoreError where there is no such folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise StoreError(f"{folder}: is empty; expected a model folder in transformers' layout")
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        small = status.st_size < 1 << 24
        what = hashlib.sha256(path.read_bytes()).hexdigest() if small else f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{path.relative_to(folder)} {what}\n".encode())
    return f"folder:{digest.hexdigest()[:32]}"
