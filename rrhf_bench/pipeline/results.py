"""The records of a finished run, for its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf_bench.records import Candidates, CurvePoint, Evaluated, PairScored, PoolScored
from rrhf_bench.settings.experiment import Experiment

# (row of the tables: a method's name, "base", "chosen" or "rejected"; number of the repetition). The number is the seed
# if the run has one world.
Row = tuple[str, int]
STAGE_PEAK = "stage_peak_mib"  # in timing.json
TUNED = "tuned.json"  # of a tune stage: its trials and the one that was picked
FILTER = "filter.json"  # of an artifact of filtered pairs: what they were before and after
WARNINGS = "warnings.json"  # of an artifact: notes for the reader of the report


@dataclass(frozen=True)
class Timing:
    """Wall-clock and memory of one stage, as measured when it was made; never part of a compared table."""

    stage: str  # such as "sample", "train"
    row: str | None
    seed: int | None
    seconds: float
    # Peak memory of the process while the stage ran: resident, or on a GPU what PyTorch held there. Models and engine
    # that the process keeps for later stages are included. None when the peak could not be reset before the stage.
    peak_mib: float | None


@dataclass(frozen=True)
class Cost:
    """Hold the cost of one row and seed over all stages that its method needs (pipeline/costs.py)."""

    seconds: float
    shared_seconds: float  # of these, in stages that other rows need as well
    sampled_tokens: int
    sampled_replies: int
    reward_calls: int  # replies that the reward model scored for training
    steps: int  # of the optimiser
    train_peak_mib: float | None  # of its own last train stage; None when it was not measured
    flops: float | None = None  # an estimate for training (pipeline/costs.py); None when its tokens were not recorded

    @property
    def tflops(self) -> float | None:
        """Return the FLOPs in units of 10**12."""
        return None if self.flops is None else self.flops / 1e12


@dataclass(frozen=True)
class Trial:
    """Hold one tuning trial of a row: the settings that it changes, and its reward on the dev prompts at its end."""

    changed: Mapping[str, Any]
    reward: float | None  # None: it could not finish
    picked: bool
    world: int | None = None  # of several


@dataclass(frozen=True)
class JudgedReward:
    """Hold what one of [reward_models] says of one training seed: held-out pairs and samples of [policy], scored."""

    name: str
    seed: int
    pairs: tuple[Candidates, ...]
    pool: tuple[PoolScored, ...]
    trained_on: int | None = None  # pairs; None: it was not trained here
    filtered: Mapping[str, Any] | None = None  # the training pairs before and after the filter


@dataclass(frozen=True)
class RunRecords:
    """The records of a run. All sequences are in a fixed order: rows as in the experiment file, then repetitions.

    ``seed`` of a record is the number of its repetition (``Experiment.repetitions``).
    """

    folder: Path
    experiment: Experiment
    arena: str  # id of what judges: two tables with different ids are not comparable
    arena_words: Mapping[str, str]  # what the id stands for, in words
    evaluated: tuple[Evaluated, ...]
    pairs: tuple[PairScored, ...]  # p_i of held-out pairs, by row and seed
    reward_pairs: tuple[PairScored, ...]  # the reward model's own scores of the same pairs (method "reward model")
    curves: tuple[CurvePoint, ...]
    pools: Mapping[int, tuple[PoolScored, ...]]  # by seed: samples of the initial policy on the first prompts
    candidates: Mapping[Row, tuple[Candidates, ...]]  # scored training candidates of the rows that use any
    test_candidates: Mapping[Row, tuple[Candidates, ...]]  # the same candidate policy on the evaluation prompts, scored
    training: Mapping[Row, tuple[Mapping[str, Any], ...]]  # one mapping of metrics a logged step
    counts: Mapping[Row, Mapping[str, int]]  # dropped, truncated, tied, ...: while a row trained
    timings: tuple[Timing, ...]
    curve_seconds: Mapping[Row, tuple[tuple[float, float], ...]]  # (fraction, seconds incl. sampling before step 0)
    notes: tuple[str, ...]  # what the reader must know: a fall-back sampler, a cut run
    command: str  # that reproduces the run
    environment: Mapping[str, str]  # versions, device
    costs: Mapping[Row, Cost] = field(default_factory=dict)  # of the rows that train
    failures: Mapping[Row, str] = field(default_factory=dict)  # rows without records: the stage that failed, and why
    # By world: what reading and splitting the data left out.
    data_counts: Mapping[int | None, Mapping[str, int]] = field(default_factory=dict)
    judge_counts: Mapping[Row, Mapping[str, int]] = field(default_factory=dict)  # the same of the judge of a row
    # By row, of every world; the experiment holds what was picked if all worlds agree.
    tuned: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # ids of the "train", "dev", "test" prompts
    # By row: the cost of all trials of a tuned row together, mean over worlds.
    trials: Mapping[str, Cost] = field(default_factory=dict)
    clusters: Mapping[str, str] = field(default_factory=dict)  # prompt id -> cluster, of the prompts that have one
    # Names of the test prompts on topics that no method was aligned on, as `place` gives them.
    held_out: frozenset[str] = frozenset()
    reward_models: tuple[JudgedReward, ...] = ()  # by name as in the experiment file
    # These hold the world of each repetition, and by world the place of each prompt id; both are empty for one world.
    worlds: Mapping[int, int] = field(default_factory=dict)
    places: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    def place(self, prompt: str, repetition: int) -> str:
        """Return the name under which the prompts of several repetitions meet: the id, or the place in its world."""
        return self.places[self.worlds[repetition]][prompt] if self.worlds else prompt


def rows_in_order(experiment: Experiment) -> list[str]:
    """Return every row that the records of a run may have, in the order of the tables."""
    return ["base", *experiment.policies, *experiment.methods, "chosen", "rejected", "reply", "best"]
