"""TensorBoard event files show each value of a training log once, after a resumed training too."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rrhf_bench.pipeline.training_record import TrainingRecord
from rrhf_bench.records import CurvePoint


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of each tag, as TensorBoard reads a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def record(folder: Path | None) -> TrainingRecord:
    job, unread = SimpleNamespace(events=folder), Any
    return TrainingRecord(job, unread)  # type: ignore[arg-type]


def test_a_resumed_training_shows_each_step_once(tmp_path: Path) -> None:
    first = record(tmp_path)
    first.add_point(CurvePoint("sft", 0, "greedy", 0.0, 0, 0, (1.0, 2.0), (0.0, 1.0)))
    for step in (1, 2):
        first.add({"step": step, "loss": 10.0 * step})
    kept = json.loads(json.dumps(first.state()))  # as a checkpoint keeps it
    for step in (3, 4):  # after the checkpoint, and not made again with the same numbers
        first.add({"step": step, "loss": -1.0})
    first.close()
    time.sleep(1.1)  # TensorBoard orders the files of a folder by their second and then, as text, by a counter
    for place in (tmp_path, tmp_path / "another run"):  # which may resume what the first one began
        again = record(place)
        again.load(kept)
        again.add({"step": 3, "loss": 30.0})
        again.close()
        assert read_events(place) == {
            "loss": [(1, 10.0), (2, 20.0), (3, 30.0)],
            "dev/reward/greedy": [(0, 1.5)],
            "dev/gold/greedy": [(0, 0.5)],
        }


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = record(None)
    made.add({"step": 1, "loss": 1.0})
    made.close()
    assert list(tmp_path.iterdir()) == []
    assert made.log == [{"step": 1, "loss": 1.0}]
