"""A run's records, arranged for tables and figures: a block of replies per row and decoding, seeds by prompts.

Letters: S seeds, P prompts. Prompts are sorted by id, so nothing here depends on the order of the records.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from rrhf_bench.evaluation.statistics import (
    Estimate,
    Floats,
    SeedVariance,
    bootstrap_mean,
    paired_difference,
    pool_seed_variance,
)
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.records import Candidates, CurvePoint, Decoding, Evaluated, PairScored, PoolScored, Prompt
from rrhf_bench.registry import Method, find
from rrhf_bench.report.table import DECODING_WORDS, Missing
from rrhf_bench.seeding import generator
from rrhf_bench.settings.candidates import recipe_of
from rrhf_bench.settings.methods import MethodSettings, candidates_of

Measure = Literal["reward", "gold", "kl", "tokens"]
Found: TypeAlias = Estimate | Missing

BASE = "base"
GIVEN = ("chosen", "rejected")
PAPER_FIRST: tuple[Decoding, ...] = ("greedy", "sample")
REWARDS: tuple[Measure, ...] = ("reward", "gold")
ABSENT = Missing("the run holds no such records of this row")
MEASURE_WORDS: Mapping[str, str] = {
    "reward": "proxy reward",
    "gold": "gold reward",
    "kl": "KL",
    "tokens": "length",
}


class _Prompted(Protocol):
    @property
    def prompt(self) -> Prompt: ...


T = TypeVar("T", bound=_Prompted)


@dataclass(frozen=True)
class Block(Generic[T]):
    """Records as seeds x prompts, the same prompts in every seed. ``dropped`` counts those that some seed lacks."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]  # ids, sorted
    items_SP: tuple[tuple[T, ...], ...]
    dropped: int

    @property
    def items(self) -> list[T]:
        return [item for items_P in self.items_SP for item in items_P]

    def array(self, value: Callable[[T], float]) -> Floats:
        """(S, P)"""
        return np.array([[value(item) for item in items_P] for items_P in self.items_SP], dtype=np.float64)

    def only(self, seeds: Sequence[int], prompts: Sequence[str]) -> Block[T]:
        """The part with these seeds and prompts, in their order; all of them must be there."""
        columns = [self.prompts.index(prompt) for prompt in prompts] if prompts != self.prompts else None
        chosen = [self.items_SP[self.seeds.index(seed)] for seed in seeds]
        rows = tuple(items_P if columns is None else tuple(items_P[c] for c in columns) for items_P in chosen)
        return Block(tuple(seeds), tuple(prompts), rows, self.dropped)


def align(by_seed: Mapping[int, Iterable[T]]) -> Block[T] | None:
    """The records of each seed on the prompts that every seed has; None where there is none."""
    keyed = {seed: _keyed(items) for seed, items in by_seed.items()}
    common = set.intersection(*(set(items) for items in keyed.values())) if keyed else set()
    if not common:
        return None
    seeds, keys = sorted(keyed), sorted(common)
    dropped = len(set().union(*keyed.values())) - len(common)
    rows = tuple(tuple(keyed[seed][key] for key in keys) for seed in seeds)
    return Block(tuple(seeds), tuple(f"{prompt}/{k}" if k else prompt for prompt, k in keys), rows, dropped)


def _keyed(items: Iterable[T]) -> dict[tuple[str, int], T]:
    """By prompt id and, where a prompt comes more than once, which time it is."""
    times: dict[str, int] = defaultdict(int)
    keyed = {}
    for item in items:
        prompt = item.prompt.id
        keyed[prompt, times[prompt]] = item
        times[prompt] += 1
    return keyed


class View:
    """The records of one run, indexed. Estimates are made once; their random draws are named by what they estimate."""

    def __init__(self, records: RunRecords) -> None:
        self.records = records
        self.experiment = records.experiment
        self.methods: Mapping[str, MethodSettings] = records.experiment.methods
        self._found: dict[tuple[str, ...], Found] = {}
        self._pooled: dict[tuple[Decoding, Measure], SeedVariance | None] = {}

    @cached_property
    def blocks(self) -> dict[tuple[str, Decoding], Block[Evaluated]]:
        groups: dict[tuple[str, Decoding], dict[int, list[Evaluated]]] = defaultdict(lambda: defaultdict(list))
        for reply in self.records.evaluated:
            groups[reply.method, reply.decoding][reply.seed].append(reply)
        aligned = {key: align(by_seed) for key, by_seed in groups.items()}
        return {key: block for key, block in aligned.items() if block is not None}

    @cached_property
    def pairs(self) -> dict[str, Block[PairScored]]:
        """p_i of the held-out pairs by row, and the reward model's own scores under "reward model"."""
        groups: dict[str, dict[int, list[PairScored]]] = defaultdict(lambda: defaultdict(list))
        for pair in self.records.pairs:
            groups[pair.method][pair.seed].append(pair)
        for pair in self.records.reward_pairs:
            groups["reward model"][pair.seed].append(pair)
        aligned = {row: align(by_seed) for row, by_seed in groups.items()}
        return {row: block for row, block in aligned.items() if block is not None}

    @cached_property
    def failures(self) -> dict[str, dict[int, str]]:
        """The rows that could not finish, by seed: which stage, where and why."""
        found: dict[str, dict[int, str]] = defaultdict(dict)
        for (row, seed), reason in self.records.failures.items():
            found[row][seed] = reason
        return dict(found)

    def failed_words(self, row: str) -> str:
        """Return the seed, stage, place and reason of each failure of a row."""
        return "; ".join(f"seed {seed} ({reason})" for seed, reason in self.failures[row].items())

    def absent(self, row: str) -> Missing:
        """Why a row has no records."""
        return Missing(f"{row} failed: {self.failed_words(row)}") if row in self.failures else ABSENT

    @cached_property
    def candidates(self) -> dict[str, Block[Candidates]]:
        """Scored training candidates by row."""
        return self._candidates(self.records.candidates)

    @cached_property
    def rewarded(self) -> dict[str, Block[Candidates]]:
        """The candidates that the reward model scored: other scores are on another scale than rewards."""
        scored_by = {row: getattr(candidates_of(self.methods[row]), "scored_by", None) for row in self.methods}
        return {row: block for row, block in self.candidates.items() if scored_by.get(row) == "reward model"}

    @cached_property
    def test_candidates(self) -> dict[str, Block[Candidates]]:
        """The same candidate policy on the evaluation prompts."""
        return self._candidates(self.records.test_candidates)

    def _candidates(self, rows: Mapping[tuple[str, int], Sequence[Candidates]]) -> dict[str, Block[Candidates]]:
        found = {}
        for row in self.rows:
            block = align({seed: groups for (name, seed), groups in rows.items() if name == row})
            if block is not None:
                found[row] = block
        return found

    @cached_property
    def pool(self) -> Block[PoolScored] | None:
        """Samples of the initial policy on the first prompts."""
        return align({seed: pool for seed, pool in self.records.pools.items() if pool})

    @property
    def rows(self) -> tuple[str, ...]:
        """base, the other initial policies and the methods, as in the experiment file."""
        return (*self.policies, *self.methods)

    @property
    def policies(self) -> tuple[str, ...]:
        """The initial policies: base, which is [policy], and the tables of [policies]."""
        return (BASE, *self.experiment.policies)

    def initial(self, row: str) -> str:
        """The initial policy that a row starts from; an initial policy's is itself."""
        return self.methods[row].initial or BASE if row in self.methods else row

    def rows_from(self, initial: str, kind: str | None = None) -> list[str]:
        """The methods that start from an initial policy, in the file's order; of one kind, if it is given."""
        rows = [row for row in self.methods if self.initial(row) == initial]
        return [row for row in rows if kind in (None, self.kind(row))]

    def sampling_policy(self, row: str) -> str | None:
        """The paper's name for where a row's candidates come from, where it has one."""
        candidates = candidates_of(self.methods[row]) if row in self.methods else None
        return None if candidates is None else recipe_of(candidates)

    def plain_row(self, rows: Iterable[str]) -> str | None:
        """The row with the fewest settings that differ from their defaults; of equals, the first."""
        return min(rows, key=lambda row: len(changed(self.methods[row])) if row in self.methods else 0, default=None)

    @cached_property
    def _ways(self) -> dict[str, list[str]]:
        """The methods by initial policy, kind and way to come to candidates."""
        groups: dict[str, list[str]] = defaultdict(list)
        for row in self.methods:
            groups[self._way(row)].append(row)
        return groups

    def _way(self, row: str) -> str:
        return repr((self.initial(row), self.kind(row), candidates_of(self.methods[row])))

    def same_way(self, row: str) -> list[str]:
        """The rows that differ from this one in hyper-parameters alone, itself among them."""
        return self._ways[self._way(row)]

    @cached_property
    def main_rows(self) -> tuple[str, ...]:
        """The methods that figures show where all would be too many: the plain one of those that differ in
        hyper-parameters alone."""
        plain = {self.plain_row(rows) for rows in self._ways.values()}
        return tuple(row for row in self.methods if row in plain)

    def rows_differing_only_in(self, *keys: str) -> list[list[str]]:
        """Return the rows of one kind that differ in no setting except ``keys``, in groups, each in the file's order.

        Rows whose kind lacks one of the keys are left out.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for row, settings in self.methods.items():
            if set(keys) <= type(settings).model_fields.keys():
                groups[repr(settings.model_dump(exclude=set(keys)))].append(row)
        return [rows for rows in groups.values() if len(rows) > 1]

    def dev_reward(self, row: str, decoding: Decoding) -> float | None:
        """Mean over seeds of the reward on the dev prompts at the end of training: what rows are picked by."""
        last: dict[int, CurvePoint] = {}
        for point in self.records.curves:
            if (point.method, point.decoding) == (row, decoding) and (
                point.seed not in last or point.fraction > last[point.seed].fraction
            ):
                last[point.seed] = point
        means = [math.fsum(last[seed].rewards) / len(last[seed].rewards) for seed in sorted(last)]
        return math.fsum(means) / len(means) if means else None

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """Greedy first: it is the paper's."""
        asked = self.experiment.evaluation.decoding
        return tuple(d for d in PAPER_FIRST if d in asked)

    @property
    def all_decodings(self) -> tuple[Decoding, ...]:
        """The decodings, and "given" for the data set's replies, which nobody decoded."""
        return (*self.decodings, "given")

    @property
    def blocks_in_order(self) -> list[tuple[str, Decoding]]:
        """Every (row, decoding) that a table of all rows shows, whether or not it was measured."""
        return [
            *((row, decoding) for decoding in self.decodings for row in self.rows),
            *((row, "given") for row in GIVEN),
        ]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The rewards there are: the gold one only where some reply has it."""
        return REWARDS if any(reply.gold is not None for reply in self.records.evaluated) else REWARDS[:1]

    def kind(self, row: str) -> str:
        """The method's kind in the registry; the row's own name where it is no method."""
        return self.methods[row].kind if row in self.methods else row

    def method(self, row: str) -> Method:
        """Return the traits of a row's method in the registry: label, colour, marker, family."""
        return find(self.methods[row].kind)

    def reranked(self, row: str) -> int | None:
        """Return n if the row picks the best of n samples of its initial policy by reward, or None."""
        settings = self.methods.get(row)
        if settings is None or settings.family != "inference" or "reward" not in settings.requires:
            return None
        return int(getattr(settings, "n", 1))

    def one_model(self, row: str) -> bool:
        """An initial policy is one model whatever the training seed: a single row of it stands against all of them."""
        return row in self.policies

    def block(self, row: str, decoding: Decoding) -> Block[Evaluated] | None:
        return self.blocks.get((row, decoding))

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Floats | Missing:
        """Return the (S, P) values of a measure, or why there are none."""
        block = self.block(row, decoding)
        if block is None:
            return self.absent(row)
        return self.unmeasured(measure, decoding, block.items) or block.array(lambda reply: getattr(reply, measure))

    def unmeasured(self, field: str, decoding: Decoding, replies: Sequence[Evaluated]) -> Missing | None:
        """Return why a row has no number for a field of its replies, or None if it has one."""
        if field == "kl" and decoding == "sample" and self.kl_missing is not None:
            return self.kl_missing  # whatever the records hold: older ones have log-ratios of truncated draws there
        return unmeasured(field, replies)

    @property
    def kl_missing(self) -> Missing | None:
        """Return why the run's sampled replies estimate no KL, or None if they do."""
        top_k = self.experiment.evaluation.top_k
        return Missing(f"replies were drawn with top-k {top_k}: their log-ratio estimates no KL") if top_k else None

    @property
    def trained(self) -> list[str]:
        """The rows that are trained once per seed."""
        return [row for row, settings in self.methods.items() if settings.family != "inference"]

    def pooled(self, decoding: Decoding, measure: Measure) -> SeedVariance | None:
        """Return the variance between seeds over all trained rows; None if fewer than two rows have one."""
        key = decoding, measure
        if key not in self._pooled:
            self._pooled[key] = pool(decoding, measure, self)
        return self._pooled[key]

    def clusters(self, prompts: Sequence[str]) -> list[str]:
        """Return the cluster of each prompt of a block; a prompt without a label is a cluster of its own."""
        named = self.records.clusters
        return [named.get(prompt.partition("/")[0], prompt) for prompt in prompts]

    def mean(self, row: str, decoding: Decoding, measure: Measure) -> Found:
        """Return the mean over seeds and prompts, with its interval."""
        return self.once(("mean", row, decoding, measure), lambda: self._mean(row, decoding, measure))

    def _mean(self, row: str, decoding: Decoding, measure: Measure) -> Found:
        values, block = self.values(row, decoding, measure), self.block(row, decoding)
        if isinstance(values, Missing):
            return values
        assert block is not None
        pooled = self.pooled(decoding, measure) if row in self.trained else None
        return self.mean_of(values, block.prompts, "mean", row, decoding, measure, pooled=pooled)

    def mean_of(
        self, values_SP: Floats, prompts: Sequence[str], *name: str, pooled: SeedVariance | None = None
    ) -> Found:
        """Return the mean of values (seeds, prompts) with its interval; its draws are named by ``name``."""
        if values_SP.shape[1] < 2:
            return Missing("one prompt only: its mean has no interval")
        rng = generator("report", *name)
        return bootstrap_mean(values_SP, rng=rng, clusters_P=self.clusters(prompts), pooled=pooled)

    def difference(self, a: str, b: str, decoding: Decoding, measure: Measure) -> Found:
        """Mean of a - b on the prompts and seeds that both have."""
        return self.once(("difference", a, b, decoding, measure), lambda: self._difference(a, b, decoding, measure))

    def _difference(self, a: str, b: str, decoding: Decoding, measure: Measure) -> Found:
        return difference_between(self, a, self, b, decoding, measure, self.pooled(decoding, measure))

    def once(self, key: tuple[str, ...], make: Callable[[], Found]) -> Found:
        """Return the value of ``make``, computed once for each ``key``."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]


def pool(decoding: Decoding, measure: Measure, *views: View) -> SeedVariance | None:
    """Return the variance between seeds over the trained rows of one or more runs."""
    found = [view.values(row, decoding, measure) for view in views for row in view.trained]
    return pool_seed_variance([values.mean(axis=1) for values in found if not isinstance(values, Missing)])


def difference_between(
    one: View, a: str, other: View, b: str, decoding: Decoding, measure: Measure, pooled: SeedVariance | None
) -> Found:
    """Return the mean of row ``a`` of one run minus row ``b`` of another, or of the same, on the prompts and seeds that
    both have. Both runs must be of one arena. ``pooled``: the variance between seeds of the rows read together."""
    blocks = [one.block(a, decoding), other.block(b, decoding)]
    for view, row, block in zip((one, other), (a, b), blocks, strict=True):
        if block is None and row in view.failures:
            return view.absent(row)
        if block is None:
            return Missing(f"the run holds no {DECODING_WORDS[decoding]} replies of {row}")
        reason = view.unmeasured(measure, decoding, block.items)
        if reason:
            return Missing(f"{row}: {reason.reason}")
    first, second = (block for block in blocks if block is not None)

    def value(reply: Evaluated) -> float:
        return float(getattr(reply, measure))

    alone = (one.one_model(a) and len(first.seeds) == 1) or (other.one_model(b) and len(second.seeds) == 1)
    return paired(first, value, second, value, one.clusters, every_seed=alone, pooled=pooled)


def changed(settings: MethodSettings) -> dict[str, object]:
    """The settings of a row's method, candidates aside, that differ from their defaults."""
    where_from = {"kind", "initial", "candidates"}  # which is not what a method does with its candidates
    fields = {key: field for key, field in type(settings).model_fields.items() if key not in where_from}
    found = {key: getattr(settings, key) for key in fields}
    return {key: value for key, value in found.items() if value != fields[key].default}


A = TypeVar("A", bound=_Prompted)
B = TypeVar("B", bound=_Prompted)


def paired(
    a: Block[A],
    a_value: Callable[[A], float],
    b: Block[B],
    b_value: Callable[[B], float],
    clusters: Callable[[Sequence[str]], list[str]],
    *,
    every_seed: bool = False,
    pooled: SeedVariance | None = None,
) -> Found:
    """Return the mean of a - b on the prompts and seeds that both have. ``clusters`` gives the cluster of each prompt.
    With ``every_seed``, the side with one seed stands against all seeds of the other."""
    prompts = tuple(sorted(set(a.prompts) & set(b.prompts)))
    if len(prompts) < 2:
        return Missing("fewer than 2 prompts in common")
    seeds = tuple(seed for seed in a.seeds if seed in b.seeds)
    if not (seeds or every_seed):
        return Missing("no seed in common")
    a_seeds, b_seeds = (a.seeds, b.seeds) if every_seed else (seeds, seeds)
    return paired_difference(
        a.only(a_seeds, prompts).array(a_value),
        b.only(b_seeds, prompts).array(b_value),
        clusters_P=clusters(prompts),
        pooled=pooled,
    )


def unmeasured(field: str, replies: Sequence[Evaluated]) -> Missing | None:
    """Return why a row has no number for a field that not every reply holds, or None if every reply holds it."""
    missing = sum(getattr(reply, field) is None for reply in replies)
    if not missing:
        return None
    if missing == len(replies) and field == "kl":
        return Missing("no KL was measured here: only draws of a policy with the initial policy's vocabulary have one")
    if missing == len(replies):
        return Missing(f"no {MEASURE_WORDS.get(field, field)} was measured here")
    return Missing(f"{missing} of {len(replies)} replies have no {MEASURE_WORDS.get(field, field)}")
