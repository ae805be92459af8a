"""Kills runs at random moments, runs them again to the end, and compares with a run that nobody touched.

    python -m tests.kill_harness --kills 40

One cycle: a fresh folder; the experiment is started and killed with SIGKILL at a moment drawn uniformly from the
duration of a cold run; it is started again on what was left, and killed again, until a run ends before its moment. Then
its tables and every artifact must be, to the byte, those of the untouched run, and nothing else may lie about. Two of
three kills take the whole process group, every third the parent alone: its workers must end by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "experiments" / "smoke.toml"
GRACE = 15.0  # seconds in which orphans must have gone: a worker may sit in one long call of a library


@dataclass
class Outcome:
    """What a harness did and what went wrong."""

    kills: int = 0
    parents_alone: int = 0
    cycles: int = 0
    cold_seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        equal = "all equal" if not self.faults else f"{len(self.faults)} faults"
        alone = f"{self.parents_alone} of the parent alone"
        return f"{self.kills} kills ({alone}) in {self.cycles} runs, {self.cold_seconds:.0f} s when cold: {equal}"


@dataclass(frozen=True)
class Harness:
    experiment: Path
    overrides: Sequence[str]
    place: Path  # for the folders of runs
    workers: int = 2

    def start(self, runs: Path) -> subprocess.Popen[bytes]:
        """The experiment in a process group of its own; what it prints goes to a file beside the runs."""
        overrides = [*self.overrides, f"runtime.workers={self.workers}"]
        words = [word for override in overrides for word in ("--set", override)]
        with runs.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "rrhf_bench.cli", "run", str(self.experiment), "--runs", str(runs), *words],
                cwd=ROOT,
                # Sums of floats depend on how many threads share them.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, kills: int, seed: int, max_minutes: float) -> Outcome:
        """Cycles until there were that many kills, or the time is over."""
        outcome, draw = Outcome(), random.Random(seed)
        began = time.monotonic()
        untouched = self.place / "untouched"
        if (code := self.start(untouched).wait()) != 0:
            outcome.faults.append(f"{untouched}: the untouched run ended with {code}, see {untouched}.log")
            return outcome
        outcome.cold_seconds = time.monotonic() - began
        expected = contents(untouched)
        while outcome.kills < kills and time.monotonic() - began < 60 * max_minutes:
            self._cycle(self.place / f"cycle{outcome.cycles}", kills, draw, outcome, expected)
            outcome.cycles += 1
        if outcome.kills < kills:
            outcome.faults.append(f"{max_minutes:g} minutes were over after {outcome.kills} of {kills} kills")
        return outcome

    def _cycle(self, runs: Path, kills: int, draw: random.Random, outcome: Outcome, expected: dict[str, bytes]) -> None:
        moments: list[str] = []
        while True:
            process = self.start(runs)
            moment = draw.uniform(0.0, outcome.cold_seconds) if outcome.kills < kills else None
            try:
                code = process.wait(moment)
                break
            except subprocess.TimeoutExpired:
                outcome.kills += 1
                alone = outcome.kills % 3 == 0
                outcome.parents_alone += alone
                moments.append(f"{moment:.1f} s{' (parent)' if alone else ''}")
                orphans = kill(process, alone)
                outcome.faults += [f"{runs}: killed after {', '.join(moments)}: {fault}" for fault in orphans]
        found = contents(runs) if code == 0 else {}
        faults = [f"the last run ended with {code}, see {runs}.log"] if code else differences(expected, found)
        print(
            f"{runs.name}: killed after {', '.join(moments) or 'no time'}: {'; '.join(faults) or 'equal'}", flush=True
        )
        outcome.faults += [f"{runs}: killed after {', '.join(moments)}: {fault}" for fault in faults]


def kill(process: subprocess.Popen[bytes], alone: bool) -> list[str]:
    """SIGKILL to the group, or to the parent ``alone``; what of the group outlives that by too much."""
    group = [p for p in psutil.process_iter() if _group(p) == process.pid and p.pid != process.pid]
    if alone:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not alone:
        return []
    deadline = time.monotonic() + GRACE
    while (left := [p for p in group if _alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for orphan in left:
        orphan.kill()
    return [f"process {orphan.pid} outlived its parent by {GRACE:.0f} s" for orphan in left]


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except (OSError, psutil.Error):
        return None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def contents(runs: Path) -> dict[str, bytes]:
    """What must be equal: tables, artifacts without wall-clock, the log of training. The rest by name only."""
    found = {}
    for path in sorted(runs.rglob("*")):
        name = path.relative_to(runs).as_posix()
        if path.is_file() and (name.startswith("store/") or "/report/tables/" in name or path.suffix == ".jsonl"):
            found[name] = b"" if path.name == "timing.json" else path.read_bytes()
        elif path.name.startswith(".") and not path.match(".scratch"):
            found[name] = b""
    return found


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """In words."""
    stages = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    stages += [f"{name} should not be there" for name in sorted(found.keys() - expected.keys())]
    return stages + [
        f"{name} differs" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-minutes", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--experiment", type=Path, default=SMOKE)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--place", type=Path, help="an empty folder for the runs, which stay; else a temporary one")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        harness = Harness(words.experiment, words.overrides, words.place or Path(temporary), words.workers)
        harness.place.mkdir(parents=True, exist_ok=True)
        outcome = harness.run(words.kills, words.seed, words.max_minutes)
    print(outcome)
    print(json.dumps({**outcome.__dict__}, indent=1))
    sys.exit(1 if outcome.faults else 0)


if __name__ == "__main__":
    main()
