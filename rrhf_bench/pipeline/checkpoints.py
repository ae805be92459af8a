"""Checkpoints of an unfinished training run, in a file that is complete even after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from rrhf_bench.pipeline.store import atomic_file


class Record(Protocol):
    """The notes of a run so far, which can become a JSON value and be restored from it."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


class FileCheckpoints:
    """Checkpoints in a folder, at most one every ``seconds``: tensors and plain values, never code.

    Each holds the trainer's state and the record of the same moment. Its name has the checksum of its content: a
    damaged checkpoint is ignored.
    """

    def __init__(self, folder: Path, seconds: float, record: Record) -> None:
        self.folder = folder
        self.seconds = seconds
        self.record = record
        self._written = time.monotonic()

    def last(self) -> Mapping[str, Any] | None:
        """Restore the record and return the state to continue from, or None if there is no checkpoint."""
        for path in sorted(self.folder.glob("training-*.pt")):
            if path.name == _name(path):
                kept = torch.load(path, map_location="cpu", weights_only=True)
                self.record.load(json.loads(kept["record"]))
                return kept["state"]
        return None

    def offer(self, state: Mapping[str, Any]) -> None:
        """Write the state if the last checkpoint is older than ``seconds``. Raises StoreError if the disk is full."""
        if time.monotonic() - self._written < self.seconds:
            return
        before = list(self.folder.glob("training-*.pt"))
        written = self.folder / "training.pt"
        with atomic_file(written) as path:
            torch.save({"state": dict(state), "record": json.dumps(self.record.state())}, path)
        # The name follows the content, so that a kill in between leaves the checkpoint before.
        name = _name(written)
        written.replace(self.folder / name)
        for path in before:
            if path.name != name:
                path.unlink()
        self._written = time.monotonic()


def _name(path: Path) -> str:
    with path.open("rb") as file:
        return f"training-{hashlib.file_digest(file, 'sha256').hexdigest()}.pt"
