"""Locks between processes; a lock ends with its holder, however that process ends. Free of torch."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from rrhf_bench.errors import StoreError, visible

RETRY_SECONDS = 0.1


class LockHeld(StoreError):
    """A lock that another process holds."""


def holder(path: Path) -> str | None:
    """Return the words of a lock's holder, or None if the lock is free, even if a killed process left its file.

    A worker names the process that started it.
    """
    with suppress(OSError), path.open("r", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or "another process"  # that is about to write its name
    return None


@contextmanager
def exclusive_lock(
    path: Path,
    what: Path | str,
    waiting: Callable[[str], None] | None = None,
    patience: float = 1.0,
    instead: str = "choose another --runs DIR",
) -> Iterator[None]:
    """Hold the exclusive lock of ``path``, a file that exists for the duration of the block.

    If another process holds the lock, raise LockHeld, which names that process; with ``waiting``, pass one line that
    names the process to ``waiting`` and retry until the lock is free. ``what`` names the locked object in messages.
    ``patience``: seconds to retry first, so that a process probing the lock is not mistaken for its holder. Raises
    StoreError if the file cannot be written; ``instead`` says what to do then.
    """
    deadline = time.monotonic() + patience
    announced = False
    while (file := _acquire(path, instead)) is None:
        if time.monotonic() > deadline and not announced:
            who = holder(path)
            if waiting is None and who is not None:
                raise LockHeld(f"{what}: is held by {who}; wait until it ends, or stop it")
            if waiting is not None and who is not None:
                waiting(f"{what}: waits for {who}")
                announced = True
        time.sleep(RETRY_SECONDS)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _acquire(path: Path, instead: str) -> int | None:
    """Return a descriptor of the locked file, or None if another process holds the lock."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StoreError(f"{path.parent}: cannot be written ({error.strerror}); {instead}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if isinstance(error, BlockingIOError):
                return None
            raise StoreError(f"{path}: cannot be locked ({error.strerror}); {instead}") from error
        # A holder removes its file before it unlocks: a lock on a removed file excludes nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                break
        os.close(file)
    parent = multiprocessing.parent_process()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    pid = os.getpid() if parent is None or parent.pid is None else parent.pid
    command = visible(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    with suppress(OSError):  # a lock without a name holds as well, on a full disk
        os.ftruncate(file, 0)
        os.write(file, f"process {pid} on {platform.node()} since {since} ({command})".encode())
    return file
