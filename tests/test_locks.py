"""Processes side by side: one at a time on a run or an artifact, and nothing held by the dead."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Cli

from rrhf_bench.errors import StageError, StoreError
from rrhf_bench.pipeline import scheduler
from rrhf_bench.pipeline.locks import LockHeld, exclusive_lock, holder
from rrhf_bench.pipeline.run_folder import run_lock
from rrhf_bench.pipeline.stage_graph import Stage
from rrhf_bench.pipeline.stages import BODIES
from rrhf_bench.pipeline.store import Store, with_checksum
from rrhf_bench.settings.experiment import RuntimeSettings

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"

HOLD = """
import sys, time
from pathlib import Path
from rrhf_bench.pipeline.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python programs and waits for their first line; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(program: str, *words: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        process.first = process.stdout.readline()  # type: ignore[attr-defined]
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "deep" / ".lock"


# The lock itself


def test_a_lock_is_a_file_for_as_long_as_it_is_held(lock: Path) -> None:
    assert holder(lock) is None
    with exclusive_lock(lock, "it"):
        assert (holder(lock) or "").startswith(f"process {os.getpid()} on ")
    assert holder(lock) is None
    assert list(lock.parent.iterdir()) == []


def test_the_second_is_told_who_and_since_when(lock: Path, start: Start) -> None:
    process = start(HOLD, lock, 60)
    with pytest.raises(LockHeld) as caught, exclusive_lock(lock, "runs/smoke", patience=0.2):
        pytest.fail("the block must not start")
    who = holder(lock)
    assert who is not None
    assert re.fullmatch(rf"process {process.pid} on \S+ since \S+ \S+ \(-c {re.escape(str(lock))} 60\)", who)
    assert str(caught.value) == f"runs/smoke: is held by {who}; wait until it ends, or stop it"


def test_a_lock_ends_with_its_process_and_its_file_means_nothing(lock: Path, start: Start) -> None:
    process = start(HOLD, lock, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock.is_file()
    assert holder(lock) is None
    with exclusive_lock(lock, "it", patience=0.0):
        assert (holder(lock) or "").startswith(f"process {os.getpid()} on ")
    assert not lock.exists()


def test_who_waits_says_for_whom_and_goes_on_when_that_has_ended(lock: Path, start: Start) -> None:
    process = start(HOLD, lock, 1.0)
    told: list[str] = []
    began = time.monotonic()
    with exclusive_lock(lock, "policy", told.append, patience=0.2):
        assert time.monotonic() - began > 0.5
    (words,) = told
    assert words.startswith(f"policy: waits for process {process.pid} on ")


def test_a_look_at_a_lock_keeps_nobody_out(lock: Path) -> None:
    looking = True

    def look() -> None:
        while looking:
            holder(lock)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(200):
            with exclusive_lock(lock, "it"):
                pass
    finally:
        looking = False
        thread.join()


COUNT = """
import sys
from pathlib import Path
from rrhf_bench.pipeline.locks import exclusive_lock
lock, counter = map(Path, sys.argv[1:])
print(flush=True)
for _ in range(50):
    with exclusive_lock(lock, "it", lambda words: None):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_never_two_at_a_time_though_the_file_comes_and_goes(lock: Path, tmp_path: Path, start: Start) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    for process in [start(COUNT, lock, counter) for _ in range(4)]:
        assert process.wait() == 0
    assert counter.read_text() == "200"


def test_a_name_that_is_no_text_is_spelled_out(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rrhf-bench", os.fsdecode(b"caf\xe9.toml")])
    with exclusive_lock(lock, "it"):
        assert r"caf\udce9.toml" in (holder(lock) or "")


def test_a_lock_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = r"file: cannot be written \(.*\); choose another --runs DIR"
    with pytest.raises(StoreError, match=expected), exclusive_lock(tmp_path / "file" / ".lock", "it"):
        pytest.fail("the block must not start")


# Two processes on one run


def test_the_second_process_on_one_run_stops(tmp_path: Path, start: Start, cli: Cli) -> None:
    folder = tmp_path / "smoke"
    process = start(HOLD, folder / ".lock", 60)
    found = cli("run", SMOKE, "--runs", tmp_path)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"error: {folder}: is held by process {process.pid} on ")
    assert found.err.endswith("; wait until it ends, or stop it\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "smoke"]  # the second wrote nothing


def test_a_report_is_not_written_beside_a_run_and_ls_says_who_is_at_work(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "run.json").write_text(json.dumps(with_checksum({"stages": {}})))
    with run_lock(tmp_path / "smoke"):
        found = cli("report", tmp_path / "smoke")
        assert found.code == 2
        assert f"is held by process {os.getpid()} on " in found.err
        (row,) = cli("ls", "--runs", tmp_path, "--json").json
        assert row["held"].startswith(f"process {os.getpid()} on ")
    (row,) = cli("ls", "--runs", tmp_path, "--json").json
    assert row["held"] is None


# Two processes and one artifact. Threads stand for processes: the lock holds between any two that opened the file.


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


STAGE = Stage("greeting", "data", {"text": "hello"}, {}, "")


def make(store: Store, stage: Stage = STAGE, note: Callable[[str], None] = lambda text: None) -> float | None:
    return scheduler.make(stage, store, RuntimeSettings(device="cpu"), "transformers", lambda done, total: None, note)


def test_of_two_that_want_one_artifact_one_makes_it_and_the_other_waits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, notes = [], []

    def body(job: Any) -> None:
        made.append(job)
        time.sleep(1.5)
        job.write_json("a.json", job.settings["text"])

    monkeypatch.setitem(BODIES, "data", body)
    with ThreadPoolExecutor(2) as pool:
        seconds = list(pool.map(lambda _: make(store, note=notes.append), range(2)))
    assert len(made) == 1
    assert sorted(found is None for found in seconds) == [False, True]
    (note,) = notes
    assert note.startswith(f"greeting: waits for process {os.getpid()} on ")
    assert json.loads((store.folder(STAGE.key) / "a.json").read_text()) == "hello"
    assert list(store.root.iterdir()) == [store.folder(STAGE.key)]


def test_who_waited_makes_it_where_the_other_could_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def body(job: Any) -> None:
        tried.append(job)
        if len(tried) == 1:
            time.sleep(0.5)
            raise StageError("the loss is not finite")

    monkeypatch.setitem(BODIES, "data", body)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(make, store) for _ in range(2)]
    failed = [future for future in futures if future.exception() is not None]
    assert [str(future.exception()) for future in failed] == ["greeting: the loss is not finite"]
    assert store.is_intact(STAGE.key)


def test_an_input_that_is_not_what_was_written_is_not_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.new_artifact(STAGE.key, {}) as folder:
        (folder / "a.json").write_text("1")
    (store.folder(STAGE.key) / "a.json").write_text("2")
    monkeypatch.setitem(BODIES, "model", lambda job: pytest.fail("it must not be read"))
    with pytest.raises(StoreError, match=r"^greeting: .*a\.json has changed since it was written; run the experiment"):
        make(store, Stage("reader", "model", {}, {"data": STAGE}, ""))


def test_a_stage_finds_what_it_left_in_its_scratch_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from rrhf_bench.pipeline.store import write_file

    def killed(job: Any) -> None:
        write_file(job.scratch / "step", "7")
        raise KeyboardInterrupt

    monkeypatch.setitem(BODIES, "data", killed)
    with pytest.raises(KeyboardInterrupt):
        make(store)
    monkeypatch.setitem(BODIES, "data", lambda job: job.write_json("a.json", (job.scratch / "step").read_text()))
    make(store)
    assert json.loads((store.folder(STAGE.key) / "a.json").read_text()) == "7"
    assert not store.scratch(STAGE.key).exists()


# A worker and its parent

PARENT = """
import multiprocessing, threading, time
from rrhf_bench.pipeline import scheduler

def work():
    threading.Thread(target=scheduler._end_with_parent, daemon=True).start()
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_worker_ends_with_its_parent_however_that_ends(tmp_path: Path, start: Start) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    process = start(
        "import runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')", program
    )
    worker = psutil.Process(int(process.first))  # type: ignore[attr-defined]
    time.sleep(1.0)
    assert worker.is_running()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
