"""Which rows are compared, and the verdict on each primary comparison; tables, sentences and figures read both here.

A family is what is read together: the primary comparisons of one decoding and measure. Holm's adjustment is over a
family. A comparison outside the family is exploratory: its interval is shown and no verdict is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rrhf_bench.evaluation.statistics import Estimate, holm, smallest_detectable_difference
from rrhf_bench.records import Candidates, Decoding
from rrhf_bench.report.table import Missing
from rrhf_bench.report.view import DECODING_WORDS, Found, Measure, View, paired, unmeasured

Verdict = Literal["higher", "lower", "inside noise"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """a - b under one decoding and measure. ``estimate.p`` is the p of this comparison alone, ``p`` is Holm's over its
    family; ``p`` is None if the comparison is in no family: it is exploratory, has one training seed, or could not be
    computed. ``fixed``: neither side is trained, so there are no training seeds to cover."""

    a: str
    b: str
    decoding: Decoding
    measure: Measure
    estimate: Found
    p: float | None = None
    fixed: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """Higher or lower if the adjusted p is below 0.05, else inside noise; None without an adjusted p."""
        if isinstance(self.estimate, Missing) or self.p is None:
            return None
        if not replace(self.estimate, p=self.p).significant:
            return "inside noise"
        return "higher" if self.estimate.value > 0 else "lower"

    @property
    def standing(self) -> str:
        """The verdict, or in one word or two why there is none."""
        if self.verdict is not None or isinstance(self.estimate, Missing):
            return self.verdict or "missing"
        return "one seed" if self.estimate.seeds == 1 and not self.fixed else "exploratory"

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that this comparison alone would have found four times in five."""
        return None if isinstance(self.estimate, Missing) else smallest_detectable_difference(self.estimate)


MANY = 10  # rows of one initial policy; beyond these not every one is compared with the first RRHF row


def comparisons(view: View) -> list[Comparison]:
    """Return the primary and the exploratory comparisons under every decoding and reward, the primary ones first."""
    primary, exploratory = comparison_pairs(view)
    return [*compare(view, primary, view.measures), *compare(view, exploratory, view.measures, primary=False)]


def compare(
    view: View, pairs: Sequence[tuple[str, str]], measures: Sequence[Measure], *, primary: bool = True
) -> list[Comparison]:
    """Return every pair under every decoding and measure; the primary pairs of a decoding and measure are a family."""
    found: list[Comparison] = []
    for decoding in view.decodings:
        for measure in measures:
            family = [
                Comparison(
                    a, b, decoding, measure, view.difference(a, b, decoding, measure),
                    fixed=view.one_model(a) and view.one_model(b),
                )
                for a, b in pairs
            ]  # fmt: skip
            found += adjusted(family) if primary else family
    return found


def adjusted(family: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of one family with Holm's p.

    A comparison of one training seed gets none: its p takes the trained models as given, and with the seed noise of
    real runs two copies of one method would be called different in a third or more of all runs.
    """
    ps = [p for c in family if (p := _own_p(c)) is not None]
    found: Iterator[float] = iter(holm(ps).tolist() if ps else [])
    return [c if _own_p(c) is None else replace(c, p=next(found)) for c in family]


def _own_p(c: Comparison) -> float | None:
    return c.estimate.p if isinstance(c.estimate, Estimate) and (c.estimate.seeds > 1 or c.fixed) else None


Pairs = list[tuple[str, str]]


def comparison_pairs(view: View) -> tuple[Pairs, Pairs]:
    """Return (primary, exploratory) pairs of rows.

    ``[report] primary`` names the primary ones. By default they are, for each initial policy, each trained row against
    the first RRHF row (of more than MANY rows only RRHF's best on the dev prompts against PPO's) and against the
    initial policy itself. The default pairs that are not primary, and those of a row that is not trained, are
    exploratory.
    """
    against_rrhf: Pairs = []
    for initial in view.policies:
        rows = view.rows_from(initial)
        if len(rows) > MANY:
            best = [_best(view, initial, kind) for kind in ("ppo", "rrhf")]
            against_rrhf += [(a, b) for a, b in [best] if a is not None and b is not None]
        elif rrhf := view.rows_from(initial, "rrhf"):
            others = [row for row in rows if row != rrhf[0]]
            others.sort(key=lambda row: view.kind(row) != "ppo")  # stable: the rest stays in the file's order
            against_rrhf += [(row, rrhf[0]) for row in others]
    against_initial = [(row, initial) for initial in view.policies for row in view.rows_from(initial)]
    pairs = [*against_rrhf, *against_initial]
    named = view.experiment.report.primary
    primary = [pair for pair in pairs if pair[0] in view.trained] if named is None else list(named)
    return primary, [pair for pair in pairs if pair not in primary and (pair[1], pair[0]) not in primary]


def comparison_words(view: View) -> str:
    """Say which comparisons are primary and which are exploratory, for a note."""
    if view.experiment.report.primary is not None:
        return "Primary: the comparisons that the experiment file names ([report] primary). All others are exploratory."
    many = [initial for initial in view.policies if len(view.rows_from(initial)) > MANY]
    words = "Primary: each trained row against the initial policy that it started from"
    if len(many) < len(view.policies):
        words += ", and against the first RRHF row that started there"
    if many:
        words += (
            f"; if more than {MANY} rows start from one policy ({', '.join(many)}), only one RRHF and one PPO row are "
            "compared with each other: of the plain row and those that differ from it in hyper-parameters alone, that "
            f"with the highest {DECODING_WORDS[view.decodings[0]]} reward on the dev prompts"
        )
    return words + ". Comparisons of rows that are not trained are exploratory."


def _best(view: View, initial: str, kind: str) -> str | None:
    """Of a kind's plain row and those that differ from it in hyper-parameters alone, the one with the most reward on
    the dev prompts; the plain one where that was not measured."""
    plain = view.plain_row(view.rows_from(initial, kind))
    rows = [] if plain is None else view.same_way(plain)
    found = {row: reward for row in rows if (reward := view.dev_reward(row, view.decodings[0])) is not None}
    return max(found, key=lambda row: found[row]) if found else plain


@dataclass(frozen=True, slots=True)
class BestOfNLearner:
    """2304.05302 Eq. 7: a model trained on ranked samples should score as the mean of their per-prompt maximum.

    ``mean`` and ``maximum`` are of the training candidates, ``test`` the trained model's reward. ``paired_gap`` takes
    the maximum from the same candidate policy on the evaluation prompts and subtracts the model's reward on each.
    """

    row: str
    decoding: Decoding
    mean: Found
    maximum: Found
    test: Found
    paired_gap: Found

    @property
    def gap(self) -> float | Missing:
        """Maximum minus test reward. On different prompts, so it has no interval; ``paired_gap`` has one."""
        if isinstance(self.maximum, Missing):
            return self.maximum
        return self.test if isinstance(self.test, Missing) else self.maximum.value - self.test.value

    @property
    def way(self) -> float | Missing:
        """The share of the way from the candidates' mean to their maximum that the test reward has covered."""
        for part in (self.mean, self.maximum, self.test):
            if isinstance(part, Missing):
                return part
        assert isinstance(self.mean, Estimate)
        assert isinstance(self.maximum, Estimate)
        assert isinstance(self.test, Estimate)
        spread = self.maximum.value - self.mean.value
        return (self.test.value - self.mean.value) / spread if spread else Missing("all candidates score the same")


def best_of_n_learners(view: View) -> list[BestOfNLearner]:
    """One a decoding for each row that was trained on candidates."""
    found = []
    for row in view.rewarded:
        mean, maximum = candidate_mean(view, row), candidate_maximum(view, row)
        for decoding in view.decodings:
            test = view.mean(row, decoding, "reward")
            gap = view.once(("eq7", row, decoding), partial(_paired_gap, view, row, decoding))
            found.append(BestOfNLearner(row, decoding, mean, maximum, test, gap))
    return found


def candidate_mean(view: View, row: str) -> Found:
    key = ("candidates", "mean", row)
    block = view.candidates[row]
    return view.once(key, lambda: view.mean_of(block.array(_mean), block.prompts, *key))


def candidate_maximum(view: View, row: str) -> Found:
    key = ("candidates", "maximum", row)
    block = view.candidates[row]
    return view.once(key, lambda: view.mean_of(block.array(_maximum), block.prompts, *key))


def _mean(candidates: Candidates) -> float:
    return sum(candidates.scores) / len(candidates.scores)


def _maximum(candidates: Candidates) -> float:
    return max(candidates.scores)


def _paired_gap(view: View, row: str, decoding: Decoding) -> Found:
    drawn, replies = view.test_candidates.get(row), view.block(row, decoding)
    if drawn is None:
        return Missing("its candidate policy was not drawn on the evaluation prompts")
    if replies is None:
        return view.absent(row)
    reason = unmeasured("reward", replies.items)
    pooled = view.pooled(decoding, "reward")
    return reason or paired(drawn, _maximum, replies, lambda reply: reply.reward, view.clusters, pooled=pooled)
