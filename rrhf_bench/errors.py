"""Errors a user can mend. Each message says, in one line, where, what was found, what is expected, what to do next.

Messages quote what others wrote: names and values of files, paths, texts of libraries and servers. So every message is
made inert when it is raised: it cannot break its line, act on a terminal, or hold a secret of this process.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

# What could end a line, move the cursor, reorder text or fail to encode: controls, formats, surrogates, separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)  # variables that hold one, such as HF_TOKEN
SIGNED_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")  # user and password of a URL
_SHORTEST = 8  # characters of a secret; what is shorter is an ordinary word, and would be blanked out everywhere


class BenchError(ValueError):
    """Base of every error that is the input's fault; the command line prints it as one line and exits with 2."""

    keep: ClassVar[str] = ""  # unseen characters that the message may hold

    def __init__(self, message: str = "") -> None:
        super().__init__(visible(redacted(message), self.keep))


class ConfigError(BenchError):
    """An experiment file, an override or an option that cannot be used; may hold several faults, one a line."""

    keep = "\n"


class DataError(BenchError):
    """Prompts, transcripts, candidates, scores or a model folder that cannot be used as they are."""


class StoreError(BenchError):
    """An artifact or a run folder that is missing, damaged, held by another process or not writable."""


class StageError(BenchError):
    """A stage that could not finish: a loss that is not finite, a sampler that failed."""


class Diverged(StageError):
    """A policy that diverged: a loss, gradient, weight or reward is not finite, or the policy generates no text.

    ``evidence`` holds the batch of the failure as JSON objects. If the stage belongs to a row of [methods], only that
    row fails and the others go on. If other rows share the stage, the run stops.
    """

    def __init__(self, message: str = "", evidence: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.evidence = tuple(evidence)


_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation failed, in main memory or on a GPU.

    PyTorch has a class of its own for its GPU allocator only. A CPU tensor, a CUDA library or the driver raises a
    RuntimeError, which nothing but its text tells from others.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def visible(text: str, keep: str = "") -> str:
    """``text`` with characters that cannot be seen spelled out, such as ``\\x1b``; those in ``keep`` stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in keep or unicodedata.category(c) not in _UNSEEN else c.encode("unicode_escape").decode() for c in text
    )


def redacted(text: str) -> str:
    """``text`` without the secrets of this process's environment and without user and password of a URL."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET.search(name):
            text = text.replace(value, "***")
    return SIGNED_URL.sub("***@", text)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of a message: what of the allowed words was meant, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
