"""TensorBoard event files of a training run, in the run folder; the artifact holds the same values as records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Events:
    """Scalars of one row and seed, written as they are logged; without a folder nothing is written.

    A run that resumes adds all that its checkpoint recorded again. The first event of a writer hides the events of
    earlier writers in the same folder, so each step is shown once, whichever run began the training.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: Any = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write values of one step."""
        if self.folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, needed by few stages

            self._writer = SummaryWriter(str(self.folder), purge_step=0, flush_secs=5)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in the queue."""
        if self._writer is not None:
            self._writer.close()
