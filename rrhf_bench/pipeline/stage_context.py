"""Define the context that the body of a stage receives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf_bench.jsonl import read_jsonl
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Preference
from rrhf_bench.rewards.gold import Gold, ReviewsGold
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.sampling.sampler import Sampler


@dataclass(frozen=True)
class Job:
    """One stage at work: its settings, the folders of its inputs, the folder to fill."""

    kind: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    services: Services
    backend: BackendName
    progress: Callable[[int, int], None]
    row: str | None = None
    scratch: Path | None = None  # outlives a kill, for store.atomic_file; need not exist yet
    events: Path | None = None  # the folder of TensorBoard events of this row and seed
    seconds: dict[str, Any] = field(default_factory=dict)  # wall-clock notes, kept beside the artifact's content

    def write_json(self, name: str, value: Any) -> None:
        (self.out / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")

    def read_json(self, role: str, name: str) -> Any:
        return json.loads((self.inputs[role] / name).read_text(encoding="utf-8"))

    def pairs(self, split: str) -> list[Preference]:
        return read_jsonl(self.inputs["prompts"] / f"{split}.jsonl", Preference)

    def candidates(self, role: str) -> list[Candidates]:
        return read_jsonl(self.inputs[role] / "candidates.jsonl", Candidates)

    def ref(self, role: str = "policy") -> ModelRef:
        return ModelRef.read(self.inputs[role])

    def sampler(
        self,
        policy: TransformersPolicy,
        backend: BackendName | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sampler:
        """Return a sampler that holds a policy of this stage.

        The differences of its log-probs from the policy's at each check go to the artifact's timing.json.
        """
        note = self.seconds.setdefault("sampler", []).append
        return self.services.sampler(policy, self.ref(), backend or self.backend, progress, note)

    @property
    def gold(self) -> Gold | None:
        """The true reward of an embedded world."""
        name = self.read_json("prompts", "about.json")["gold"]
        if name is None:
            return None
        return ReviewsGold() if name == "toy-reviews" else Gold()
