"""Measure time in rounds in which the sides take turns, and peak memory in a process of its own; write the record."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from unittest.mock import patch

import numpy as np
import psutil
import torch
import typer

from rrhf_bench.errors import BenchError, ConfigError, StageError, StoreError
from rrhf_bench.pipeline.memory import peak_bytes, reset_peak
from rrhf_bench.pipeline.run_folder import environment as versions

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

# glibc in a process whose memory is measured: one arena, and every tensor of 64 KiB or more mapped on its own, so that
# what is freed goes back to the system at once and the resident set is what is alive. It costs time: such a process is
# never timed.
MEMORY_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
}
# glibc in a process that keeps what is freed, so that a step finds its memory mapped.
KEEPING_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}


# --- time -----------------------------------------------------------------------------------------------------


class Side(Protocol):
    """One way to do the work. ``prepare`` is called before every ``run`` and is not timed."""

    def prepare(self) -> None: ...

    def run(self) -> None: ...


class Spread(NamedTuple):
    """The median of some rounds with the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles (linear interpolation). Raises ValueError for no values."""
    if not values:
        raise ValueError("no rounds were measured")
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Spread(median, low, high)


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Return round by round one side over another: what slows a whole round down slows both and cancels."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def order(sides: Sequence[T], round_: int) -> list[T]:
    """Return the sides in the order of a round: each begins in its turn, and every other round runs backwards.

    No side then always comes after the same neighbour, whose freed memory and warm caches it would inherit.
    """
    start = round_ % len(sides)
    turned = [*sides[start:], *sides[:start]]
    return turned[::-1] if round_ % 2 else turned


def measure_rounds(name: str, sides: Mapping[K, Side], rounds: int) -> dict[K, list[float]]:
    """Return the seconds of every side, one number a round, after a round that does not count."""
    seconds: dict[K, list[float]] = {side: [] for side in sides}
    gc.collect()
    gc.freeze()  # what is there stays: collecting what a run leaves behind is quick then
    try:
        for round_ in range(-1, rounds):
            say(f"{name}: {'warm-up' if round_ < 0 else f'round {round_ + 1} of {rounds}'}")
            for side in order(list(sides), round_):
                sides[side].prepare()
                took = timed(sides[side].run)
                if round_ >= 0:
                    seconds[side].append(took)
    finally:
        gc.unfreeze()
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one call, earlier garbage collected before it and a GPU's queue empty at both ends."""
    gc.collect()
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


# --- memory ---------------------------------------------------------------------------------------------------


def peak_above(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes by which memory in use during the call exceeds, at its peak, the memory in use before it.

    Returns None when the system cannot reset its peak (no Linux, no GPU). The process needs MEMORY_ENVIRONMENT: without
    it, freed memory counts as used.
    """
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    if not reset_peak(device):
        return None
    before = torch.cuda.memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    run()
    return peak_bytes(device) - before


def in_own_process(
    function: Callable[..., T], *arguments: Any, environment: Mapping[str, str] = MEMORY_ENVIRONMENT
) -> T:
    """Call a function of a module in a new process with these environment variables on top.

    The function is found by its name, so it may not be a lambda, and a module run with ``-m`` should not hold it.
    Raises StageError where the process dies, as it does when the machine's memory ends.
    """
    with (
        patch.dict(os.environ, environment),  # while the child is started: the C library reads it before Python runs
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise StageError(
                f"{function.__module__}.{function.__name__}{arguments}: its process died, most likely for want of "
                "memory; leave this workload out with --rows"
            ) from error


def device_of(name: str) -> torch.device:
    """Return the device of that name; "auto" is the GPU if there is one. Raises ConfigError for a missing GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: found 'cuda', but PyTorch sees no GPU here; allowed are auto and cpu")
    return torch.device(name)


# --- the record -----------------------------------------------------------------------------------------------


def say(words: str = "") -> None:
    """Show on one line of the terminal what is going on; no words clear it."""
    print(f"\r{words:<70}", end="" if words else "\r", file=sys.stderr, flush=True)


def begin(benchmark: str, device: torch.device, threads: int | None) -> dict[str, Any]:
    """Set the CPU's threads, and return the head of a record: the command, versions, hardware and how busy it is."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # which vLLM reads
        torch.set_num_threads(threads)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    machine: dict[str, Any] = {
        **versions(),
        "commit": _commit(),
        "processor": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": round(psutil.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    command = ["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]
    return {"benchmark": benchmark, "command": command, "machine": machine}


def _commit() -> str:
    """Return the commit of the tree, with a plus if files differ from it."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        said = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    except OSError:
        said = ""
    return said.strip() or "unknown"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder of a file that is written in here. Raises StoreError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record. Raises StoreError if the file cannot be written."""
    with writing(path):
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, benchmark: str) -> dict[str, Any]:
    """Return the record that a benchmark wrote. Raises StoreError for a file that is none of its own."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: is no record of a benchmark ({error}); give a file written with --out") from error
    found = record.get("benchmark") if isinstance(record, dict) else None
    if found != benchmark:
        raise StoreError(f"{path}: holds {found!r}; expected a record of {benchmark!r}, as written with --out")
    return record


def main(app: typer.Typer) -> None:
    """Run a benchmark's command line: a BenchError is one line and exit code 2."""
    try:
        app()
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
