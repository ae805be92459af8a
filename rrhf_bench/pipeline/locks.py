"""Locks between processes that vanish with their holder, however it ends. Free of torch."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rrhf_bench.errors import StoreError

_LOOK = 0.1  # seconds between two tries


@dataclass(frozen=True)
class Holder:
    """The process behind a lock; of a worker, the process that started it."""

    pid: int
    host: str
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


class Held(StoreError):
    """A lock that another process holds."""


def holder(path: Path) -> Holder | str | None:
    """Who holds the lock, in words at least; None where nobody does, whatever file a killed process left."""
    try:
        file = path.open("r", encoding="utf-8")
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        except OSError:
            return None
        with suppress(OSError, ValueError, TypeError):
            return Holder(**json.load(file))
        return "another process"  # that is about to write its name


@contextmanager
def alone(
    path: Path, what: Path | str, waiting: Callable[[str], None] | None = None, patience: float = 1.0
) -> Iterator[None]:
    """Hold the lock of ``path``, a file that is there as long as the block.

    Where another process holds it: raises Held, which says who and since when; with ``waiting``, tells that who it is
    and waits for as long as it takes. ``what`` is the thing that is locked, for messages. ``patience`` (seconds) rides
    over somebody who only looks who holds it. Raises StoreError where the file cannot be written.
    """
    deadline = time.monotonic() + patience
    told = False
    while (file := _acquire(path)) is None:
        if time.monotonic() > deadline and not told:
            who = holder(path)
            if waiting is None and who is not None:
                raise Held(f"{what}: is held by {who}; wait until it ends, or stop it")
            if waiting is not None and who is not None:
                waiting(f"{what}: waits for {who}")
                told = True
        time.sleep(_LOOK)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _acquire(path: Path) -> int | None:
    """A descriptor of the locked file with our name in it, or None where another process holds it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StoreError(
                f"{path.parent}: cannot be written ({error.strerror}); choose another --runs DIR"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if isinstance(error, BlockingIOError):
                return None
            raise StoreError(f"{path}: cannot be locked ({error.strerror}); choose another --runs DIR") from error
        # A holder removes its file before it lets go: a lock on a removed file keeps nobody out.
        if _is(path, file):
            _sign(file)
            return file
        os.close(file)


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _sign(file: int) -> None:
    parent = multiprocessing.parent_process()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    pid = os.getpid() if parent is None or parent.pid is None else parent.pid
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with suppress(OSError):  # a lock without a name holds as well, on a full disk
        os.ftruncate(file, 0)
        os.write(file, json.dumps(asdict(Holder(pid, platform.node(), since, command))).encode())
