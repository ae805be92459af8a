"""The record of a training run: its log, its rewards on the dev prompts, TensorBoard events, checkpoints."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from rrhf_bench.jsonl import from_json, to_json
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.stage_context import Job
from rrhf_bench.pipeline.store import atomic_file
from rrhf_bench.policy.policy import Policy, TransformersPolicy
from rrhf_bench.records import Candidates, CurvePoint
from rrhf_bench.rewards.reward import require_finite
from rrhf_bench.training.method import Progress


class TrainingRecord:
    """The notes of a training run: its log, what it made, and its rewards on the dev prompts at fixed fractions.

    They are also written as TensorBoard events, if the job has a folder for these. A run that resumes adds all that its
    checkpoint recorded again. The first event of a writer hides the events of earlier writers in the same folder, so
    each step is shown once, whichever run began the training.
    """

    def __init__(self, job: Job, policy: TransformersPolicy, initial: Policy | None = None) -> None:
        """Note the training of ``policy``; with ``initial`` also its distance from there at each point of the curve."""
        self.job = job
        self.policy = policy
        self.initial = initial
        self.log: list[Mapping[str, float]] = []
        self.parts: list[Mapping[str, float]] = []  # seconds of each iteration
        self.made: list[Candidates] = []  # while training
        self.points: list[CurvePoint] = []
        self.seconds: list[tuple[float, float]] = []  # (fraction, training seconds so far)
        self._before = 0.0  # training seconds of what was resumed
        self._watching = 0.0  # seconds of evaluation, which are not the method's
        self._due = 0
        self._started = time.monotonic()
        self._writer: Any = None

    @property
    def trained(self) -> float:
        """Return the seconds that the method has trained so far."""
        return self._before + time.monotonic() - self._started - self._watching

    def add(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        self.log.append(metrics)
        self._show(int(metrics["step"]), {name: value for name, value in metrics.items() if name != "step"})

    def add_point(self, point: CurvePoint) -> None:
        """Record the rewards on the dev prompts under one decoding."""
        self.points.append(point)
        means = {"reward": sum(point.rewards) / len(point.rewards)}
        if point.golds is not None:
            means["gold"] = sum(point.golds) / len(point.golds)
        self._show(point.step, {f"dev/{name}/{point.decoding}": mean for name, mean in means.items()})

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """Write values of one step as TensorBoard events."""
        if self.job.events is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, needed by few stages

            self._writer = SummaryWriter(str(self.job.events), purge_step=0, flush_secs=5)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the events that are still in the queue."""
        if self._writer is not None:
            self._writer.close()

    def state(self) -> dict[str, Any]:
        points, made = to_json(self.points), to_json(self.made)
        curve = {"points": points, "seconds": self.seconds, "due": self._due, "trained": self.trained}
        return {"log": self.log, "parts": self.parts, "made": made, "curve": curve}

    def load(self, state: Mapping[str, Any]) -> None:
        curve = state["curve"]
        self.log.clear()
        for metrics in state["log"]:
            self.add(metrics)
        self.points.clear()
        for point in curve["points"]:
            self.add_point(from_json(CurvePoint, point, "checkpoint"))
        self.parts[:] = state["parts"]
        self.made[:] = [from_json(Candidates, group, "checkpoint") for group in state["made"]]
        self.seconds[:] = [(fraction, seconds) for fraction, seconds in curve["seconds"]]
        self._due, self._before = curve["due"], curve["trained"]

    def watch(self, progress: Progress, policy: Policy) -> None:
        """Add a point to the curve if one is due. Raises Diverged if the reward of a reply is not finite."""
        job, s = self.job, self.job.settings
        job.progress(round(1000 * progress.fraction), 1000)
        passed = progress.fraction * s["curve_points"]
        if passed < self._due - 1e-9:
            return
        self._due = int(passed + 1e-9) + 1
        began = time.monotonic()
        self.seconds.append((progress.fraction, self.trained))
        prompts = [pair.prompt for pair in job.pairs("dev")]
        sampler = job.sampler(self.policy)
        reward, gold = job.services.reward(job.ref("reward model")), job.gold
        for decoding, spec in stage_helpers.decodings(s["evaluation"], s["seed"], "curve").items():
            rows = [(row.prompt, row.responses[0]) for row in sampler.sample(prompts, spec)]
            texts = [reply.text for _, reply in rows]
            place = f"step {progress.step}, {decoding} replies to the dev prompts"
            rewards = tuple(require_finite(reward.score(prompts, texts), prompts, place, texts).tolist())
            golds = None if gold is None else tuple(gold.score(prompts, texts).tolist())
            where = (progress.fraction, progress.step, progress.sampled_tokens)
            kls = None
            if self.initial is not None and not (spec.greedy or spec.truncated):
                batch = job.services.runtime.score_batch
                ratios = stage_helpers.log_ratios(self.policy, self.initial, rows, spec.temperature, batch)
                kls = tuple(ratios)
            self.add_point(CurvePoint(job.row or "", s["seed"], decoding, *where, rewards, golds, kls))
        self._watching += time.monotonic() - began


class Record(Protocol):
    """The notes of a run so far, which can become a JSON value and be restored from it."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


class FileCheckpoints:
    """Checkpoints in a folder, at most one every ``seconds``: tensors and plain values, never code.

    Each holds the trainer's state and the record of the same moment. Its name has the checksum of its content: a
    damaged checkpoint is ignored.
    """

    def __init__(self, folder: Path, seconds: float, record: Record) -> None:
        self.folder = folder
        self.seconds = seconds
        self.record = record
        self._written = time.monotonic()

    def last(self) -> Mapping[str, Any] | None:
        """Restore the record and return the state to continue from, or None if there is no checkpoint."""
        for path in sorted(self.folder.glob("training-*.pt")):
            if path.name == _name(path):
                kept = torch.load(path, map_location="cpu", weights_only=True)
                self.record.load(json.loads(kept["record"]))
                return kept["state"]
        return None

    def offer(self, state: Mapping[str, Any]) -> None:
        """Write the state if the last checkpoint is older than ``seconds``. Raises StoreError if the disk is full."""
        if time.monotonic() - self._written < self.seconds:
            return
        before = list(self.folder.glob("training-*.pt"))
        written = self.folder / "training.pt"
        with atomic_file(written) as path:
            torch.save({"state": dict(state), "record": json.dumps(self.record.state())}, path)
        # The name follows the content, so that a kill in between leaves the checkpoint before.
        name = _name(written)
        written.replace(self.folder / name)
        for path in before:
            if path.name != name:
                path.unlink()
        self._written = time.monotonic()


def _name(path: Path) -> str:
    with path.open("rb") as file:
        return f"training-{hashlib.file_digest(file, 'sha256').hexdigest()}.pt"
