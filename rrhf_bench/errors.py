"""Errors a user can mend. Each message says, in one line, where, what was found, what is expected, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BenchError(ValueError):
    """Base of every error that is the input's fault; the command line prints it as one line and exits with 2."""


class ConfigError(BenchError):
    """An experiment file, an override or an option that cannot be used; may hold several faults, one a line."""


class DataError(BenchError):
    """Prompts, transcripts, candidates, scores or a model folder that cannot be used as they are."""


class StoreError(BenchError):
    """An artifact or a run folder that is missing, damaged, held by another process or not writable."""


class StageError(BenchError):
    """A stage that could not finish: a loss that is not finite, a sampler that failed."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of a message: what of the allowed words was meant, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
