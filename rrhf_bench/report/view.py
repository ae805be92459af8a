"""A run's records, arranged for tables and figures: a block of replies per row and decoding, seeds by prompts.

Letters: S repetitions (training seeds; in several worlds the seeds of each), P prompts. Prompts are sorted by name, so
nothing here depends on the order of the records.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from rrhf_bench.evaluation.grid import Block, Grid, Missing, pair
from rrhf_bench.evaluation.statistics import (
    Estimate,
    SeedVariance,
    bootstrap_mean,
    paired_difference,
    pool_seed_variance,
)
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.records import Candidates, Decoding, Evaluated, PairScored, PoolScored, Prompt
from rrhf_bench.registry import Method, find
from rrhf_bench.report.table import DECODING_WORDS
from rrhf_bench.seeding import generator
from rrhf_bench.settings.candidates import recipe_of
from rrhf_bench.settings.methods import MethodSettings, candidates_of

Measure = Literal["reward", "gold", "kl", "entropy", "tokens", "nll"]
Found: TypeAlias = Estimate | Missing

BASE = "base"
BEST = "best"  # the best replies that the embedded world can write
GIVEN = ("chosen", "rejected", BEST)  # rows of replies that no model wrote
PAPER_FIRST: tuple[Decoding, ...] = ("greedy", "sample")
REWARDS: tuple[Measure, ...] = ("reward", "gold")
ABSENT = Missing("the run holds no such records of this row")
MEASURE_WORDS: Mapping[str, str] = {
    "reward": "proxy reward",
    "gold": "gold reward",
    "kl": "KL",
    "entropy": "entropy",
    "tokens": "length",
}


class _Prompted(Protocol):
    @property
    def prompt(self) -> Prompt: ...


K = TypeVar("K")
U = TypeVar("U")
T = TypeVar("T", bound=_Prompted)


def _aligned(items: Iterable[tuple[K, int, T]], records: RunRecords) -> dict[K, Block[T]]:
    """Return the records of each key by repetition, on the prompts that all have. A key with none is left out."""
    groups: dict[K, dict[int, list[T]]] = defaultdict(lambda: defaultdict(list))
    for key, number, item in items:
        groups[key][number].append(item)
    found = {}
    for key, by_number in groups.items():
        keyed = {number: _keyed(own, records, number) for number, own in sorted(by_number.items())}
        every = set().union(*keyed.values())
        common = sorted(every.intersection(*keyed.values()))
        if common:
            prompts = tuple(f"{prompt}/{k}" if k else prompt for prompt, k in common)
            rows = tuple(tuple(own[place] for place in common) for own in keyed.values())
            worlds = tuple(records.worlds[number] for number in keyed) if records.worlds else None
            found[key] = Block(tuple(keyed), prompts, rows, len(every) - len(common), worlds)
    return found


def _keyed(items: Iterable[T], records: RunRecords, number: int) -> dict[tuple[str, int], T]:
    """Return records by the name of the prompt and, where a prompt comes more than once, which time it is."""
    times: dict[str, int] = defaultdict(int)
    keyed = {}
    for item in items:
        prompt = records.place(item.prompt.id, number)
        keyed[prompt, times[prompt]] = item
        times[prompt] += 1
    return keyed


class View:
    """The records of one run, indexed. Estimates are made once; their random draws are named by what they estimate."""

    def __init__(self, records: RunRecords) -> None:
        self.records = records
        self.experiment = records.experiment
        self.methods: Mapping[str, MethodSettings] = records.experiment.methods
        self._found: dict[tuple[str, ...], Any] = {}
        self._pooled: dict[tuple[Decoding, Measure, View | None], SeedVariance | None] = {}

    @cached_property
    def blocks(self) -> dict[tuple[str, Decoding], Block[Evaluated]]:
        """The replies by row and decoding."""
        replies = (((reply.method, reply.decoding), reply.seed, reply) for reply in self.records.evaluated)
        return _aligned(replies, self.records)

    @cached_property
    def pairs(self) -> dict[str, Block[PairScored]]:
        """p_i of the held-out pairs by row, and the reward model's own scores under "reward model"."""
        own = (("reward model", scored.seed, scored) for scored in self.records.reward_pairs)
        of_rows = ((scored.method, scored.seed, scored) for scored in self.records.pairs)
        return _aligned(chain(of_rows, own), self.records)

    @cached_property
    def failures(self) -> dict[str, dict[int, str]]:
        """The rows that could not finish, by repetition: which stage, where and why."""
        found: dict[str, dict[int, str]] = defaultdict(dict)
        for (row, seed), reason in self.records.failures.items():
            found[row][seed] = reason
        return dict(found)

    def failed_words(self, row: str) -> str:
        """Return the repetition, stage, place and reason of each failure of a row."""
        words = self.experiment.repetition_words
        return "; ".join(f"{words(number)} ({reason})" for number, reason in self.failures[row].items())

    def absent(self, row: str, decoding: Decoding | None = None) -> Missing:
        """Return why a row has no records, or no replies under a decoding."""
        if decoding == "greedy" and row in self.methods and self.methods[row].family == "inference":
            nothing = "greedy decoding has one reply, that of the initial policy, which leaves"
            return Missing(f"{nothing} {self.method(row).label} nothing to change")
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
        every = ((row, seed, group) for (row, seed), groups in rows.items() for group in groups)
        found = _aligned(every, self.records)
        return {row: found[row] for row in self.rows if row in found}

    @cached_property
    def pool(self) -> Block[PoolScored] | None:
        """Samples of the initial policy on the first prompts."""
        every = ((None, seed, scored) for seed, pool in self.records.pools.items() for scored in pool)
        return _aligned(every, self.records).get(None)

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
        """The methods by initial policy, kind, settings in words (such as a variant) and way to come to candidates."""
        groups: dict[str, list[str]] = defaultdict(list)
        for row in self.methods:
            groups[self._way(row)].append(row)
        return groups

    def _way(self, row: str) -> str:
        settings = self.methods[row]
        words = {key: value for key in type(settings).model_fields if isinstance(value := getattr(settings, key), str)}
        return repr((self.initial(row), words, candidates_of(settings)))

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
        points = [point for point in self.records.curves if (point.method, point.decoding) == (row, decoding)]
        last = {point.seed: point for point in sorted(points, key=lambda point: point.fraction)}
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
            *((row, "given") for row in self.given),
        ]

    @property
    def given(self) -> tuple[str, ...]:
        """The rows of replies that no model wrote; the best ones only where a world has written them."""
        return tuple(row for row in GIVEN if row != BEST or (row, "given") in self.blocks)

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
        """An initial policy, or a data set's reply, is the same for every training seed of a world."""
        return row not in self.methods

    def block(self, row: str, decoding: Decoding) -> Block[Evaluated] | None:
        return self.blocks.get((row, decoding))

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Grid | Missing:
        """Return the values of a measure, or why there are none; "nll" is per token, nan for a text without tokens."""
        block = self.block(row, decoding)
        if block is None:
            return self.absent(row, decoding)
        for field in ("nll", "nll_tokens") if measure == "nll" else (measure,):
            if missing := self.unmeasured(field, decoding, block.items):
                return missing
        value = _nll_per_token if measure == "nll" else attrgetter(measure)
        return block.grid(value, one_model=self.one_model(row))

    def unmeasured(self, field: str, decoding: Decoding, replies: Sequence[Evaluated]) -> Missing | None:
        """Return why a row has no number for a field of its replies, or None if it has one."""
        if field == "kl" and decoding == "sample" and self.kl_missing is not None:
            return self.kl_missing  # whatever the records hold: older ones have log-ratios of truncated draws there
        if field == "entropy" and decoding == "sample" and self.kl_missing is not None:
            top_k = self.experiment.evaluation.top_k
            return Missing(f"replies were drawn with top-k {top_k}: their log-probs estimate no entropy")
        return unmeasured(field, replies)

    @property
    def kl_missing(self) -> Missing | None:
        """Return why the run's sampled replies estimate no KL, or None if they do."""
        top_k = self.experiment.evaluation.top_k
        return Missing(f"replies were drawn with top-k {top_k}: their log-ratio estimates no KL") if top_k else None

    @property
    def random_units(self) -> str:
        """Return what the intervals and tests take as random, in words."""
        if self.experiment.several_worlds:
            return "worlds"
        several = len(self.experiment.seeds) > 1
        return "training seeds and clusters of prompts" if several else "clusters of prompts"

    @property
    def repetition(self) -> str:
        """Return what a row is repeated over, in one word."""
        return "world" if self.experiment.several_worlds else "seed"

    @property
    def trained(self) -> list[str]:
        """The rows that are trained once per seed."""
        return [row for row, settings in self.methods.items() if settings.family != "inference"]

    @property
    def pooled_rows(self) -> list[str]:
        """Return the rows over which the variance between seeds, or between worlds, is pooled.

        In each world the initial policies are other models as well.
        """
        return [*self.policies, *self.trained] if self.experiment.several_worlds else self.trained

    def pooled(self, decoding: Decoding, measure: Measure, other: View | None = None) -> SeedVariance | None:
        """Return the variance between seeds over all trained rows, of ``other`` as well if it is given; None if fewer
        than two rows have one."""
        key = decoding, measure, other
        if key not in self._pooled:
            views = (self,) if other is None else (self, other)
            found = [view.values(row, decoding, measure) for view in views for row in view.pooled_rows]
            self._pooled[key] = pool_grids(found)
        return self._pooled[key]

    def clusters(self, prompts: Sequence[str]) -> list[str]:
        """Return the cluster of each prompt of a block; a prompt without a label is a cluster of its own.

        So is every prompt of a run over several worlds, where a name stands for another prompt in each world.
        """
        named = self.records.clusters
        return [named.get(prompt.partition("/")[0], prompt) for prompt in prompts]

    def mean(self, row: str, decoding: Decoding, measure: Measure) -> Found:
        """Return the mean over seeds and prompts, with its interval."""
        pooled = self.pooled(decoding, measure) if row in self.trained else None
        return self.mean_of(self.values(row, decoding, measure), "mean", row, decoding, measure, pooled=pooled)

    def mean_of(self, grid: Grid | Missing, *name: str, pooled: SeedVariance | None = None) -> Found:
        """Return the mean of values with its interval, computed once for each ``name``, which names its draws."""
        if isinstance(grid, Missing):
            return grid
        if len(grid.prompts) < 2:
            return Missing("one prompt only: its mean has no interval")
        if grid.worlds is not None and len(set(grid.worlds)) < 2:
            return Missing("one world only: its mean has no interval over worlds")
        clusters, rng = self.clusters(grid.prompts), generator("report", *name)
        return self.once(
            name,
            lambda: bootstrap_mean(grid.values_SP, rng=rng, clusters_P=clusters, pooled=pooled, worlds_S=grid.worlds),
        )

    def difference(self, a: str, b: str, decoding: Decoding, measure: Measure, other: View | None = None) -> Found:
        """Return the mean of row ``a`` minus row ``b`` on the prompts and seeds that both have.

        ``b`` is a row of ``other``, a run of the same arena, if one is given.
        """
        sides = []
        for view, row in ((self, a), (other or self, b)):
            found = view.values(row, decoding, measure)
            if isinstance(found, Missing) and view.block(row, decoding) is not None:
                return Missing(f"{row}: {found.reason}")
            if isinstance(found, Missing):
                words = DECODING_WORDS[decoding]
                return found if row in view.failures else Missing(f"the run holds no {words} replies of {row}")
            sides.append(found)
        return difference_of(sides[0], sides[1], self.clusters, self.pooled(decoding, measure, other))

    def once(self, key: tuple[str, ...], make: Callable[[], U]) -> U:
        """Return what ``make`` returns; it is called once for each key, which names all that it depends on."""
        if key not in self._found:
            self._found[key] = make()
        found: U = self._found[key]
        return found


def pool_grids(found: Iterable[Grid | Missing]) -> SeedVariance | None:
    """Return the variance between seeds or worlds over the rows that have values; None if fewer than two have one."""
    grids = [grid for grid in found if isinstance(grid, Grid)]
    worlds_NS = [grid.worlds for grid in grids if grid.worlds is not None]
    return pool_seed_variance([grid.mean_S for grid in grids], worlds_NS=worlds_NS or None)


def difference_of(
    a: Grid | Missing,
    b: Grid | Missing,
    clusters: Callable[[Sequence[str]], list[str]],
    pooled: SeedVariance | None = None,
) -> Found:
    """Return the mean of a - b on the prompts and seeds of both. ``clusters`` gives the cluster of each prompt."""
    if isinstance(a, Missing):
        return a
    if isinstance(b, Missing):
        return b
    found = pair(a, b)
    if isinstance(found, Missing):
        return found
    return paired_difference(
        found.a_SP, found.b_SP, clusters_P=clusters(found.prompts), pooled=pooled, worlds_S=found.worlds
    )


def changed(settings: MethodSettings) -> dict[str, object]:
    """The settings of a row's method, candidates aside, that differ from their defaults."""
    where_from = {"kind", "initial", "candidates"}  # which is not what a method does with its candidates
    fields = {key: field for key, field in type(settings).model_fields.items() if key not in where_from}
    found = {key: getattr(settings, key) for key in fields}
    return {key: value for key, value in found.items() if value != fields[key].default}


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


def _nll_per_token(reply: Evaluated) -> float:
    assert reply.nll is not None
    return reply.nll / reply.nll_tokens if reply.nll_tokens else math.nan
