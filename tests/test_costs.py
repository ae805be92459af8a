"""What a row costs: every stage that its trained policy needs, each once; and the peak memory of each stage alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rrhf_bench.experiment import RuntimeSettings
from rrhf_bench.pipeline import memory, runner, stages
from rrhf_bench.pipeline.job import Job
from rrhf_bench.pipeline.plan import Stage
from rrhf_bench.pipeline.results import STAGE_PEAK
from rrhf_bench.pipeline.store import TIMING, Store

CPU = torch.device("cpu")
MIB = 2**20


def peak_of(name: str, body: Callable[[Job], None], store: Store, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """Make a stage in this process and return the peak that its timing.json holds."""
    monkeypatch.setitem(stages.BODIES, "data", body)
    stage = Stage(name, "data", {"name": name}, {}, "")
    assert runner.make(stage, store, RuntimeSettings(device="cpu"), "transformers", lambda *_: None) is not None
    return json.loads((store.folder(stage.key) / TIMING).read_text())[STAGE_PEAK]


def allocate_300_mib(job: Job) -> None:
    np.ones(300 * MIB, dtype=np.uint8)  # written, so resident; freed when the stage ends


@pytest.mark.skipif(not memory.reset_peak(CPU), reason="this system cannot reset the peak of a process")
def test_a_small_stage_after_a_large_one_has_its_own_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak that is never reset would give both stages the 300 MiB of the first."""
    store = Store(tmp_path)
    large = peak_of("large", allocate_300_mib, store, monkeypatch)
    small = peak_of("small", lambda job: None, store, monkeypatch)
    assert large is not None
    assert small is not None
    assert 250 < large - small < 350
    assert small > 0


def test_a_peak_that_cannot_be_reset_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert not memory.reset_peak(CPU)
    assert peak_of("stage", lambda job: None, Store(tmp_path), monkeypatch) is None


def test_a_status_without_a_peak_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 1024 kB\n")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert not memory.reset_peak(CPU)
