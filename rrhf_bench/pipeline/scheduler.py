"""Runs a plan: what is in the store is reused, the rest is made, several stages at a time where that is faster."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from rrhf_bench.errors import BenchError, Diverged, StageError
from rrhf_bench.pipeline.results import STAGE_PEAK
from rrhf_bench.pipeline.stage_graph import Plan, Stage
from rrhf_bench.pipeline.store import TIMING, Store, disk_errors, with_checksum
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.settings.experiment import RuntimeSettings


class Reporter(Protocol):
    """Show the progress of a plan. ``seconds`` is None if another process made the stage."""

    def reused(self, stage: Stage) -> None: ...
    def started(self, stage: Stage) -> None: ...
    def progress(self, name: str, done: int, total: int) -> None: ...
    def finished(self, stage: Stage, seconds: float | None) -> None: ...
    def note(self, text: str) -> None: ...


def run_plan(plan: Plan, store: Store, reporter: Reporter, events: Path | None = None) -> int:
    """Make every stage that the store does not hold intact, and return how many were made here.

    If a stage of a row of [methods] raises Diverged, the store notes the failure, the stages that need the failed
    stage are left out, and the other rows go on. Any other error is raised after the stages in flight have ended.

    What killed runs left is removed, and an artifact that is no longer what was written is made again, with a note.
    Each training that is done here writes TensorBoard event files into a subfolder of ``events``.
    """
    store.sweep()
    runtime, rows = plan.experiment.runtime, plan.experiment.methods
    waiting = []
    for stage in plan.stages:
        if store.is_intact(stage.key):
            reporter.reused(stage)
        else:
            waiting.append(stage)
            if (damage := store.damage(stage.key)) is not None:
                reporter.note(f"{stage.name} is made again: {damage}")
    # Fewer than two stages need no second process, nor the look for a GPU, which imports torch.
    workers = min(worker_count(runtime), len(waiting)) if len(waiting) > 1 else 1
    done = {stage.key for stage in plan.stages} - {stage.key for stage in waiting}
    running = dict[Future[float | None], Stage]()
    lost: set[str] = set()  # keys of stages that failed, and of those that need them
    made = 0
    failure: BaseException | None = None
    with _pool(workers, reporter) as submit:
        while waiting or running:
            for stage in [s for s in waiting if _is_lost(s, lost)]:
                waiting.remove(stage)
                lost.add(stage.key)
            ended_well_or_not = done | lost  # of a stage that is not lost and needs one input, the others may be lost
            ready = [s for s in waiting if {needed.key for needed in s.inputs.values()} <= ended_well_or_not]
            for stage in ready[: workers - len(running)] if failure is None else ():
                waiting.remove(stage)
                reporter.started(stage)
                running[submit(stage, store, runtime, plan.backend.name, events)] = stage
            if not running:
                break
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(ended)
                try:
                    seconds = ended.result()
                    reporter.finished(stage, seconds)
                    made += seconds is not None
                    done.add(stage.key)
                except BrokenProcessPool:
                    advice = "run again with --set runtime.workers=1"
                    failure = failure or StageError(f"{stage.name}: its process died (out of memory?); {advice}")
                except BaseException as error:
                    if isinstance(error, Diverged) and stage.row in rows:
                        lost.add(stage.key)
                        evidence = store.failure_folder(stage.key) / "batch.jsonl"
                        reporter.note(f"failed: {error} (what it failed on: {evidence})")
                    else:
                        failure = failure or error
    if failure is not None:
        raise failure
    return made


def _is_lost(stage: Stage, lost: Collection[str]) -> bool:
    """Return True if a stage cannot be made: it lacks an input or, of tuning trials, all of them."""
    missing = [needed.key in lost for needed in stage.inputs.values()]
    return any(missing) if stage.kind != "tune" else all(missing)


def worker_count(runtime: RuntimeSettings) -> int:
    """Return the number of processes that share the stages: one on a GPU, which they would have to share as well."""
    if runtime.workers is not None:
        return runtime.workers
    on_gpu = runtime.device == "cuda"
    if runtime.device == "auto":
        import torch

        on_gpu = torch.cuda.is_available()
    return 1 if on_gpu else min(4, cores())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make(
    stage: Stage,
    store: Store,
    runtime: RuntimeSettings,
    backend: BackendName,
    progress: Callable[[int, int], None],
    note: Callable[[str], None] = lambda text: None,
    events: Path | None = None,
) -> float | None:
    """Make one artifact in this process and return the seconds that it took. Any BenchError names the stage.

    When another process is making the artifact, ``note`` receives the name of that process, and the return value is
    None. Seconds and peak memory of the stage go to timing.json; the peak is null when the system cannot reset it.
    """
    import torch

    from rrhf_bench.pipeline.memory import out_of_memory_named, peak_bytes, reset_peak, what_to_lower
    from rrhf_bench.pipeline.stage_context import Job
    from rrhf_bench.pipeline.stages import BODIES

    started = time.monotonic()
    about = {"name": stage.name, "kind": stage.kind, "settings": stage.settings, "inputs": stage.input_keys}
    with store.exclusive_lock(stage.key, stage.name, note):
        if store.is_intact(stage.key):
            return None
        inputs = {
            role: store.require(needed.key, needed.name)
            for role, needed in stage.inputs.items()
            if stage.kind != "tune" or store.is_intact(needed.key)  # a trial may have failed
        }
        settings = {**stage.settings, **stage.recorded}
        scratch = store.scratch(stage.key)
        with (
            _failure_noted(store, stage),
            disk_errors(store.root),
            store.new_artifact(stage.key, about) as folder,
        ):
            services = _services(runtime)
            services.begin_stage()
            trial = f"-trial{stage.trial}" if stage.trial else ""
            world = "" if stage.world is None else f"-world{stage.world}"
            shown = events / f"{stage.row}{world}-seed{stage.seed}{trial}" if events is not None else None
            job = Job(stage.kind, settings, inputs, folder, services, backend, progress, stage.row, scratch, shown)
            device = torch.device(services.device)
            measured = reset_peak(device)  # else a stage would report the peak of a stage before it
            with quiet(), out_of_memory_named(services, what_to_lower(stage.kind, services.device)):
                BODIES[stage.kind](job)
            seconds = time.monotonic() - started
            peak_mib = peak_bytes(device) / 2**20 if measured else None
            timing = {"seconds": seconds, STAGE_PEAK: peak_mib, **job.seconds}
            (folder / TIMING).write_text(json.dumps(with_checksum(timing)))
    return seconds


@contextmanager
def _failure_noted(store: Store, stage: Stage) -> Iterator[None]:
    """Name the stage in any BenchError, and write a Diverged into the store."""
    try:
        yield
    except BenchError as error:
        named = type(error)(f"{stage.name}: {error}")
        if isinstance(error, Diverged):
            store.note_failure(stage.key, stage.name, str(named), error.evidence)
        raise named from error


_worker: dict[str, Any] = {}  # in a worker: the queue that progress goes to


@lru_cache(maxsize=1)
def _services(runtime: RuntimeSettings) -> Any:
    """Return the services of this process."""
    from rrhf_bench.pipeline.services import Services

    return Services(runtime)


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and warnings of the libraries below us; our own reporter says what is going on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _pool(workers: int, reporter: Reporter) -> Iterator[Callable[..., Future[float | None]]]:
    """Yield a function that has one of several processes make a stage, or this process if ``workers`` is 1."""
    if workers == 1:
        yield partial(_make_here, reporter)
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported
    context = multiprocessing.get_context("spawn")  # a fork would copy a torch whose threads are gone
    queue: Any = context.Queue()
    threads = max(1, cores() // workers)
    with (
        _thread_limit(threads),
        _listening(queue, reporter),
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(queue, threads)) as pool,
    ):
        yield lambda *arguments: pool.submit(_make_in_worker, *arguments)


def _make_here(
    reporter: Reporter, stage: Stage, store: Store, runtime: RuntimeSettings, backend: BackendName, events: Path | None
) -> Future[float | None]:
    """Make a stage in this process and return a future that is done."""
    future: Future[float | None] = Future()
    try:
        progress = partial(reporter.progress, stage.name)
        future.set_result(make(stage, store, runtime, backend, progress, reporter.note, events))
    except BaseException as error:
        future.set_exception(error)
    return future


def _start_worker(queue: Any, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    _worker["queue"] = queue


def _end_with_parent() -> None:
    """End this worker when its parent ends: it would wait for work for ever, or go on with an unwanted stage."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(
    stage: Stage, store: Store, runtime: RuntimeSettings, backend: BackendName, events: Path | None
) -> float | None:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            _worker["queue"].put(("progress", stage.name, done, total))

    def note(text: str) -> None:
        _worker["queue"].put(("note", text))

    return make(stage, store, runtime, backend, progress, note, events)


@contextmanager
def _thread_limit(threads: int) -> Iterator[None]:
    """Set the number of threads that workers read when they start: their share of the cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _listening(queue: Any, reporter: Reporter) -> Iterator[None]:
    def listen() -> None:
        while (item := queue.get()) is not None:
            name, *words = item
            getattr(reporter, name)(*words)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        queue.put(None)
        thread.join(timeout=5)
