"""What an unfinished training run has written down, in a file that a kill leaves whole."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from rrhf_bench.pipeline.store import atomically


class Record(Protocol):
    """What was noted of a run so far, as a JSON value and from it."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


class FileCheckpoints:
    """Checkpoints in a folder, at most one every ``seconds``: tensors and plain values, never code.

    Each holds the trainer's state and the record of what was noted up to that moment, so both go on together. Its name
    has the checksum of its content: a damaged one is as good as none.
    """

    def __init__(self, folder: Path, seconds: float, record: Record) -> None:
        self.folder = folder
        self.seconds = seconds
        self.record = record
        self._written = time.monotonic()

    def last(self) -> Mapping[str, Any] | None:
        """The state to go on from, and the record put back as it then was; None where a run starts."""
        for path in sorted(self.folder.glob("training-*.pt")):
            if path.name == _name(path):
                kept = torch.load(path, map_location="cpu", weights_only=True)
                self.record.load(json.loads(kept["record"]))
                return kept["state"]
        return None

    def offer(self, state: Mapping[str, Any]) -> None:
        """Write the state down if the last time was long enough ago. Raises StoreError where the disk is full."""
        if time.monotonic() - self._written < self.seconds:
            return
        before = list(self.folder.glob("training-*.pt"))
        written = self.folder / "training.pt"
        with atomically(written) as path:
            torch.save({"state": dict(state), "record": json.dumps(self.record.state())}, path)
        # Named after its content only now: were it killed in between, the one before would still be there.
        name = _name(written)
        written.replace(self.folder / name)
        for path in before:
            if path.name != name:
                path.unlink()
        self._written = time.monotonic()


def _name(path: Path) -> str:
    with path.open("rb") as file:
        return f"training-{hashlib.file_digest(file, 'sha256').hexdigest()}.pt"
