"""The points of a training's reward curve, and its TensorBoard events, after a resumed training too."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rrhf_bench.pipeline.training_record import TrainingRecord
from rrhf_bench.records import CurvePoint, Preference
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.transformers import TransformersSampler
from rrhf_bench.testing import CONTEXT, PROMPTS, FunctionReward, share_of_d, tiny_policy
from rrhf_bench.training.method import Progress


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


@pytest.mark.parametrize(
    ("points", "steps", "expected"),
    [
        (3, 8, [0, 3, 6, 8]),  # 3/8 is the first fraction of at least 1/3, 6/8 of at least 2/3
        (5, 2, [0, 1, 2]),  # a step passes several fractions, and the curve has one point
        (100, 200, [*range(0, 201, 2)]),  # 100 x (58 / 200) is a little less than 29
    ],
)
def test_the_curve_has_a_point_at_the_first_step_of_each_fraction(points: int, steps: int, expected: list[int]) -> None:
    """The training is resumed after half of its steps."""
    policy = tiny_policy()
    sampler, reward = TransformersSampler(policy, max_model_len=CONTEXT), FunctionReward(share_of_d)
    evaluation = {"decoding": ["sample"], "temperature": 1.0, "top_k": 0, "max_new_tokens": 8, "stop": ()}
    job: Any = SimpleNamespace(
        events=None,
        row="sft",
        gold=None,
        settings={"curve_points": points, "seed": 7, "evaluation": evaluation},
        progress=lambda done, total: None,
        pairs=lambda split: {"dev": [Preference(prompt, " a", " b") for prompt in PROMPTS[:2]]}[split],
        ref=lambda role: role,
        sampler=lambda policy: sampler,
        services=SimpleNamespace(reward=lambda role: {"reward model": reward}[role]),
    )
    made = TrainingRecord(job, policy)
    for step in range(steps + 1):
        if step == steps // 2:
            kept = json.loads(json.dumps(made.state()))
            made = TrainingRecord(job, policy)
            made.load(kept)
        made.watch(Progress(step / steps, step, 10 * step), policy)
    spec = SamplingSpec(1, 1.0, 8, 7, "curve/sample")
    rewards = tuple(share_of_d(row.responses[0].text) for row in sampler.sample(PROMPTS[:2], spec))
    assert rewards[0] != rewards[1]
    assert made.points == [CurvePoint("sft", 7, "sample", i / steps, i, 10 * i, rewards) for i in expected]
    assert [fraction for fraction, _ in made.seconds] == [i / steps for i in expected]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = record(None)
    made.add({"step": 1, "loss": 1.0})
    made.close()
    assert list(tmp_path.iterdir()) == []
    assert made.log == [{"step": 1, "loss": 1.0}]
