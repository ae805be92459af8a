"""The paper's claims (arXiv 2304.05302) as hypotheses: each a number theta, a threshold fixed beforehand, a verdict.

Letters: S training seeds, P prompts, R replicates, K rows, N runs (rows x seeds).

What a verdict needs, for claims of three shapes:

* theta > m (superiority; theta > -m where no more is asked than to be no worse by m, non-inferiority). Supported: the
  95% interval lies above the threshold, and Holm's p is below 0.05. Refuted: it lies below, with the same p.
* abs(theta) <= m (equivalence). Supported: the 95% interval lies within [-m, m], the ends included, and Holm's p is
  below 0.05. Refuted: it lies wholly outside, with the same p.
* Compound: every part that must hold, and at least one of two others. Its intervals are of 97.5%. Supported: the
  intervals of the needed parts lie above their thresholds. Refuted: that of a part that must hold lies below, or those
  of both others do (where only one of these was measured, it refutes nothing). Holm's p as before.

Everything else is inconclusive, which is no proof of the contrary. What a run has no numbers for is not tested.

p is two-sided, so that one number serves both verdicts: twice the smaller of p(for) and p(against), each one-sided.
For a mean these come from the sign-flip test of theta minus the threshold: half its p on the side where theta lies, the
rest on the other. Equivalence: p(for) is the larger of the two tests against -m and m, p(against) the smaller.
Compound, with k others: p(for) = max(the parts that must hold, k x the least of the others), which is
intersection-union with Bonferroni inside; p(against) = the number of ways to fail x min(the parts that must hold, the
largest of the others). Correlations and spreads, which are no means, take p from the bootstrap of their interval.
Holm's adjustment is over all claims and decodings of a run that have a p. Interval and p are both asked for because p
takes the trained models as given and the interval does not (statistics.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from scipy import stats

from rrhf_bench.evaluation.claims_settings import (
    BaseBelowChanceSettings,
    BestOfNLearnerSettings,
    BestOfNOverRowsSettings,
    BetterRewardModelSettings,
    ClaimSettings,
    FewerModelsSettings,
    KLRepairsSettings,
    OrderedSettings,
    OveroptimisesSettings,
    RRHFReachesPPOSettings,
    SamplingQualitySettings,
    SpreadShrinksSettings,
)
from rrhf_bench.evaluation.statistics import (
    Estimate,
    Floats,
    holm,
    paired_difference,
    smallest_detectable_difference,
)
from rrhf_bench.records import Decoding
from rrhf_bench.seeding import generator

Measure = Literal["reward", "gold", "nll", "kl"]
Verdict = Literal["supported", "refuted", "inconclusive", "not tested"]
T = TypeVar("T")

ALPHA = 0.05
LEVEL = 1 - ALPHA
COMPOUND_LEVEL = 1 - ALPHA / 2  # Bonferroni over the two ways in which a compound claim can come out
AT_ONCE = 20_000_000  # numbers drawn at a time
FEWEST_ROWS = 5  # with fewer, even a perfect order of the rows comes by chance once in 24 times
DECODING_WORDS: Mapping[Decoding, str] = {"greedy": "greedy", "sample": "sampled", "given": "data set"}
MEASURE_WORDS: Mapping[Measure, str] = {
    "reward": "proxy reward",
    "gold": "gold reward",
    "nll": "NLL per token",
    "kl": "KL",
}


@dataclass(frozen=True, slots=True)
class Grid:
    """Values (S, P) of one row, nan where a reply has none. ``one_model``: its model is the same whatever the seed."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    values_SP: Floats
    one_model: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a row's training candidates: by seed, by prompt, as many as the prompt has."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    scores_SP: tuple[tuple[tuple[float, ...], ...], ...]


class Evidence(Protocol):
    """What a run has measured, by row. In place of a number there may be a reason, in words, why there is none."""

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """Those of the run, greedy first."""

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Grid | str:
        """Of the replies to the evaluation prompts; "nll": per token, in nats."""

    def candidates(self, row: str) -> Scores | str: ...

    def best_candidates(self, row: str) -> Grid | str:
        """The best score among a row's candidates, drawn on the evaluation prompts."""

    def accuracy(self, row: str) -> Grid | str:
        """Of p_i on held-out pairs: 1 right, 0.5 tied, 0 wrong."""

    def dev_reward(self, row: str, decoding: Decoding) -> float | str:
        """Mean proxy reward on the dev prompts at the end of training."""

    def models(self, row: str) -> tuple[str, ...] | str:
        """Those in memory while the row trains."""


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """One claim under one decoding. ``p`` before Holm's adjustment and ``p_holm`` after it are None where no test was
    made; ``estimate`` of a compound claim is of the part that decides. ``detectable``: the distance from the threshold
    that would have been found four times in five, were this the only claim. ``counted``: what ``estimate.n`` counts."""

    name: str
    sentence: str
    decoding: Decoding | None  # None: no replies enter
    margin: float
    verdict: Verdict
    reason: str
    statistic: str = ""
    unit: str = ""
    estimate: Estimate | None = None
    counted: str = "prompts"
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    picked: tuple[str, ...] = ()  # rows chosen among several, on the dev prompts
    parts: tuple[str, ...] = ()  # of a compound claim, in words
    beside: tuple[str, ...] = ()  # further numbers, in words; the verdict does not depend on them

    @property
    def outcome(self) -> str:
        """What came out, in one form whatever the verdict."""
        if self.estimate is None:
            return f"Not tested: {self.reason}."
        value, sizes = f"{self.estimate.value:g}", [f"{self.estimate.n} {self.counted}"]
        if self.detectable is not None:
            value = _interval(self.estimate)
            sizes += [
                f"{self.estimate.seeds} {_plural('seed', self.estimate.seeds)}",
                f"detectable {self.detectable:.3f}",
            ]
        if self.p_holm is not None:
            sizes.insert(0, f"p {_p(self.p_holm)} after Holm")
        found = f"{self.verdict.capitalize()}: {self.statistic} is {value}; {self.reason}"
        more = {"Picked on dev prompts": self.picked, "Its parts": self.parts, "Beside it": self.beside}
        told = (f" {about}: {'; '.join(words)}." for about, words in more.items() if words)
        return f"{found} ({', '.join(sizes)}).{''.join(told)}"


def evaluate_claims(
    claims: Mapping[str, ClaimSettings],
    evidence: Evidence,
    *,
    rng_name: Sequence[str | int] = ("claims",),
    replicates: int = 10_000,
) -> list[ClaimResult]:
    """Every claim in the order given, under every decoding where replies enter. The rules are at the top of this file.

    Draws are named by ``rng_name``, claim and decoding, so that no result depends on the other claims but for Holm's
    adjustment. A claim without the numbers it needs is "not tested", with the reason; nothing is raised for it.
    """
    found: list[tuple[str, ClaimSettings, Decoding | None, _Finding | str]] = []
    for name, claim in claims.items():
        for decoding in evidence.decodings if claim.decoded else (None,):
            test = _Test(evidence, decoding, (*rng_name, name, decoding or ""), replicates)
            try:
                finding: _Finding | str = _TESTS[claim.kind](test, claim)
            except _Untested as error:
                finding = str(error)
            found.append((name, claim, decoding, finding))
    ps = [f.p for *_, f in found if isinstance(f, _Finding) and f.p is not None]
    adjusted: Iterator[float] = iter(holm(ps).tolist() if ps else [])
    results = []
    for name, claim, decoding, finding in found:
        if isinstance(finding, str):
            results.append(ClaimResult(name, claim.sentence, decoding, claim.margin, "not tested", finding))
            continue
        p_holm = next(adjusted) if finding.p is not None else None
        verdict, reason = _verdict(finding, p_holm)
        results.append(
            ClaimResult(
                name,
                claim.sentence,
                decoding,
                finding.margin,
                verdict,
                reason,
                finding.statistic,
                finding.unit,
                finding.estimate,
                finding.counted,
                finding.p,
                p_holm,
                smallest_detectable_difference(finding.estimate) if finding.drawn else None,
                finding.picked,
                finding.parts,
                finding.beside,
            )
        )
    return results


# -- from a test to its verdict -------------------------------------------------------------------------------------

Lean: TypeAlias = Literal["supported", "refuted", "inconclusive"]


@dataclass(frozen=True, slots=True)
class _Finding:
    """A claim before its family is known. ``lean``: where its interval points; ``toward``: where its p does."""

    statistic: str
    unit: str
    estimate: Estimate
    margin: float
    lean: Lean
    where: str  # the interval lies, in words
    p_for: float | None = None  # one-sided
    p_against: float | None = None
    counted: str = "prompts"
    drawn: bool = True  # False: counted, so that nothing is uncertain
    picked: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def p(self) -> float | None:
        if self.p_for is None or self.p_against is None:
            return None
        return min(1.0, 2 * min(self.p_for, self.p_against))

    @property
    def toward(self) -> Lean:
        if self.p_for is None or self.p_against is None:
            return self.lean
        return "supported" if self.p_for <= self.p_against else "refuted"


def _verdict(finding: _Finding, p_holm: float | None) -> tuple[Verdict, str]:
    if finding.lean == "inconclusive" or p_holm is None:
        return finding.lean, finding.where
    if finding.toward == finding.lean and p_holm < ALPHA:
        return finding.lean, finding.where
    return "inconclusive", f"{finding.where}, but p is {_p(p_holm)} after Holm's adjustment"


@dataclass(frozen=True, slots=True)
class _Part:
    """One statistic against its threshold, with one-sided p of its being above and below."""

    statistic: str
    unit: str
    estimate: Estimate
    threshold: float
    p_above: float
    p_below: float
    counted: str = "prompts"

    @property
    def above(self) -> bool:
        return self.estimate.low > self.threshold

    @property
    def below(self) -> bool:
        return self.estimate.high < self.threshold

    @property
    def words(self) -> str:
        return f"{self.statistic} {_interval(self.estimate)} against {_signed(self.threshold)}"


def _directional(part: _Part, margin: float) -> _Finding:
    """theta above the part's threshold."""
    lean: Lean = "supported" if part.above else "refuted" if part.below else "inconclusive"
    where = {"supported": "lies above", "refuted": "lies below", "inconclusive": "does not lie to one side of"}[lean]
    return _Finding(
        part.statistic,
        part.unit,
        part.estimate,
        margin,
        lean,
        f"its interval {where} {_signed(part.threshold)}",
        part.p_above,
        part.p_below,
        part.counted,
    )


def _equivalent(lower: _Part, upper: _Part, margin: float) -> _Finding:
    """|theta| <= margin: two one-sided tests, ``lower`` against -margin and ``upper`` against margin."""
    low, high = lower.estimate.low, lower.estimate.high
    within, outside = -margin <= low and high <= margin, low > margin or high < -margin
    lean: Lean = "supported" if within else "refuted" if outside else "inconclusive"
    where = {"supported": "lies within", "refuted": "lies outside", "inconclusive": "reaches over an end of"}[lean]
    return _Finding(
        lower.statistic,
        lower.unit,
        lower.estimate,
        margin,
        lean,
        f"its interval {where} ±{margin:.3f}",
        max(lower.p_above, upper.p_below),
        min(lower.p_below, upper.p_above),
        lower.counted,
    )


def _compound(must: Sequence[_Part], others: Sequence[_Part], of: int) -> _Finding:
    """All of ``must``, and one at least of ``others``, of which the claim names ``of``."""
    whole = len(others) == of  # an unmeasured part might have held
    other_for = min(1.0, len(others) * min(part.p_above for part in others))
    other_against = max(part.p_below for part in others) if whole else 1.0
    p_for = max([other_for, *(part.p_above for part in must)])
    ways = [other_against, *(part.p_below for part in must)]
    p_against = min(1.0, len(ways) * min(ways))
    holds = all(part.above for part in must) and any(part.above for part in others)
    fails = any(part.below for part in must) or (whole and all(part.below for part in others))
    lean: Lean = "supported" if holds else "refuted" if fails else "inconclusive"
    if p_for <= p_against:
        shown = max([min(others, key=lambda part: part.p_above), *must], key=lambda part: part.p_above)
    else:
        failing = [max(others, key=lambda part: part.p_below)] if whole else []
        shown = min([*must, *failing], key=lambda part: part.p_below)
    where = {
        "supported": "the intervals of the parts that it needs lie above their thresholds",
        "refuted": "the interval of what it needs lies below its threshold",
        "inconclusive": "the intervals of its parts do not decide",
    }[lean]
    return _Finding(
        shown.statistic,
        shown.unit,
        shown.estimate,
        shown.threshold,
        lean,
        where,
        p_for,
        p_against,
        parts=tuple(part.words for part in (*must, *others)),
    )


# -- the tests ------------------------------------------------------------------------------------------------------


class _Untested(Exception):
    """The reason, in words."""


@dataclass(frozen=True)
class _Test:
    """One claim under one decoding: the evidence, and draws that are named by the claim and what is drawn."""

    evidence: Evidence
    decoding: Decoding | None
    name: tuple[str | int, ...]
    replicates: int

    def draw(self, *what: str) -> np.random.Generator:
        return generator(*self.name, *what)

    def draws(self, units: int) -> int:
        """Replicates over that many prompts: fewer where they are many, for memory's sake, yet 2,000 at least."""
        return min(self.replicates, max(2000, AT_ONCE // units))

    def values(self, row: str, measure: Measure) -> Grid:
        assert self.decoding is not None
        return _known(row, self.evidence.values(row, self.decoding, measure))

    def difference(
        self, a: str, b: str, measure: Measure, threshold: float, *, level: float = LEVEL, words: str = ""
    ) -> _Part:
        """a - b on the evaluation prompts."""
        pair = self.values(a, measure), self.values(b, measure)
        statistic = words or f"{MEASURE_WORDS[measure]} of {a} minus {b}"
        unit = "nats a token" if measure == "nll" else "nats" if measure == "kl" else MEASURE_WORDS[measure]
        return self.part(*pair, f"{a}, {b}, {measure}", statistic, unit, threshold, level=level)

    def part(
        self,
        a: Grid,
        b: Grid,
        drawn: str,
        statistic: str,
        unit: str,
        threshold: float,
        *,
        level: float = LEVEL,
        counted: str = "prompts",
    ) -> _Part:
        """Mean of a - b against a threshold, paired on seeds and prompts."""
        a_SP, b_SP = _paired(a, b)
        # The sign-flip test is of zero: taking the threshold off one side makes it a test of the threshold.
        shifted = paired_difference(
            a_SP - threshold, b_SP, rng=self.draw(drawn), replicates=self.draws(a_SP.shape[1]), level=level
        )
        assert shifted.p is not None
        near, far = shifted.p / 2, 1 - shifted.p / 2
        p_above, p_below = (near, far) if shifted.value >= 0 else (far, near)
        moved = {key: getattr(shifted, key) + threshold for key in ("value", "low", "high")}
        return _Part(statistic, unit, replace(shifted, p=None, **moved), threshold, p_above, p_below, counted)

    def best_on_dev(self, rows: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """The row of the highest reward on the dev prompts, the first of equals, and a note where there was a choice.
        Nothing of the evaluation prompts is looked at."""
        if len(rows) == 1:
            return rows[0], ()
        assert self.decoding is not None
        rewards = {row: _known(row, self.evidence.dev_reward(row, self.decoding)) for row in rows}
        best = max(rewards, key=rewards.__getitem__)
        return best, (f"{best} (of {', '.join(rows)})",)


def _rrhf_reaches_ppo(test: _Test, claim: RRHFReachesPPOSettings) -> _Finding:
    rrhf, picked_rrhf = test.best_on_dev(claim.rrhf)
    ppo, picked_ppo = test.best_on_dev(claim.ppo)
    finding = _directional(test.difference(rrhf, ppo, "reward", -claim.margin), claim.margin)
    return replace(finding, picked=(*picked_rrhf, *picked_ppo), beside=_beside(test, rrhf, ppo, "gold"))


def _best_of_n_learner(test: _Test, claim: BestOfNLearnerSettings) -> _Finding:
    reward = test.values(claim.row, "reward")
    best = _known(claim.row, test.evidence.best_candidates(claim.row))
    words = f"proxy reward of {claim.row} minus the best of its candidates on the same prompts"

    def against(threshold: float) -> _Part:
        return test.part(reward, best, "best candidate", words, MEASURE_WORDS["reward"], threshold)

    return _equivalent(against(-claim.margin), against(claim.margin), claim.margin)


def _best_of_n_over_rows(test: _Test, claim: BestOfNOverRowsSettings) -> _Finding:
    return _over_rows(test, claim.over, claim.margin, max, "mean of the best candidate")


def _rises_with_sampling_quality(test: _Test, claim: SamplingQualitySettings) -> _Finding:
    return _over_rows(test, claim.over, claim.margin, lambda scores: sum(scores) / len(scores), "candidate mean")


def _ordered(test: _Test, claim: OrderedSettings) -> _Finding:
    return _directional(test.difference(claim.higher, claim.lower, claim.measure, claim.margin), claim.margin)


def _overoptimises(test: _Test, claim: OveroptimisesSettings) -> _Finding:
    row, reference, level = claim.row, claim.reference, COMPOUND_LEVEL
    proxy = test.difference(row, reference, "reward", claim.margin, level=level)
    others = _measured(
        lambda: test.difference(reference, row, "gold", claim.margin, level=level),
        lambda: test.difference(row, reference, "nll", claim.nll_margin, level=level),
    )
    finding = _compound([proxy], others, of=2)
    return replace(finding, beside=_beside(test, row, reference, "kl"))


def _kl_repairs(test: _Test, claim: KLRepairsSettings) -> _Finding:
    row, reference, level = claim.row, claim.reference, COMPOUND_LEVEL
    others = _measured(
        lambda: test.difference(row, reference, "gold", claim.margin, level=level),
        lambda: test.difference(reference, row, "nll", claim.nll_margin, level=level),
    )
    finding = _compound([], others, of=2)
    return replace(finding, beside=_beside(test, row, reference, "kl"))


def _better_reward_model(test: _Test, claim: BetterRewardModelSettings) -> _Finding:
    row, reference = (_known(name, test.evidence.accuracy(name)) for name in (claim.row, claim.reference))
    words = f"accuracy of p_i of {claim.row} minus {claim.reference}"
    part = test.part(row, reference, "accuracy", words, "share of pairs", claim.margin, counted="pairs")
    return _directional(part, claim.margin)


def _base_below_chance(test: _Test, claim: BaseBelowChanceSettings) -> _Finding:
    row = _known(claim.row, test.evidence.accuracy(claim.row))
    chance = replace(row, values_SP=np.full_like(row.values_SP, 0.5))
    words = f"one half minus the accuracy of p_i of {claim.row}"
    part = test.part(chance, row, "accuracy", words, "share of pairs", claim.margin, counted="pairs")
    return _directional(part, claim.margin)


def _fewer_models(test: _Test, claim: FewerModelsSettings) -> _Finding:
    """Counted, not estimated: RRHF's rows have at most 2 models, and PPO's more than those by over the margin."""
    models = {row: _known(row, test.evidence.models(row)) for row in claim.rows()}
    most, least = max(len(models[row]) for row in claim.rrhf), min(len(models[row]) for row in claim.ppo)
    value = float(least - most)
    estimate = Estimate(value, value, value, len(models), 1, None, "counted")
    lean: Lean = "supported" if most <= 2 and value > claim.margin else "refuted"
    counts = [f"{row} {len(names)} ({', '.join(names)})" for row, names in models.items()]
    paper = (
        "the paper counts 1 to 2 for RRHF, and for PPO 4, with a value model of its own; a value head on the policy "
        "makes PPO's 3, and low-rank adapters, whose base is the reference, 2"
    )
    words = "models in memory of the leanest PPO row minus the largest RRHF row"
    where = f"RRHF has {most} at most and PPO {least} at least"
    return _Finding(
        words, "models", estimate, claim.margin, lean, where, counted="rows", drawn=False, beside=(*counts, paper)
    )


def _spread_shrinks(test: _Test, claim: SpreadShrinksSettings) -> _Finding:
    """Standard deviations of all responses pooled, as in Table 6; seeds and prompts are resampled crossed, together in
    both rows, because all seeds and both rows share the training prompts."""
    row, reference = (_known(name, test.evidence.candidates(name)) for name in (claim.row, claim.reference))
    seeds, prompts = _common(row.seeds, reference.seeds), _common(row.prompts, reference.prompts)
    if not seeds or len(prompts) < 2:
        raise _Untested("the two rows have no seed or fewer than 2 training prompts in common")
    wide, narrow = (_moments(scores, seeds, prompts) for scores in (reference, row))

    def theta(weights_RS: Floats, weights_RP: Floats) -> Floats:
        return _pooled_std(wide, weights_RS, weights_RP) - _pooled_std(narrow, weights_RS, weights_RP)

    rng, R, at_once = test.draw("spread"), test.draws(len(prompts)), max(1, AT_ONCE // len(prompts))
    sizes = [min(at_once, R - made) for made in range(0, R, at_once)]
    theta_R = np.concatenate([theta(_counts(rng, len(seeds), n), _counts(rng, len(prompts), n)) for n in sizes])
    value = theta(np.ones((1, len(seeds))), np.ones((1, len(prompts))))[0]
    words = f"standard deviation of the training scores of {claim.reference} minus {claim.row}"
    method = "bootstrap over seeds and prompts, crossed"
    estimate = _percentile(value, theta_R, len(prompts), len(seeds), method)
    above, below = _tails(theta_R, claim.margin)
    part = _Part(words, MEASURE_WORDS["reward"], estimate, claim.margin, above, below, "training prompts")
    return _directional(part, claim.margin)


def _over_rows(
    test: _Test, rows: Sequence[str], margin: float, of: Callable[[tuple[float, ...]], float], words: str
) -> _Finding:
    """Rank correlation of test reward with candidates over runs; rows are resampled whole, with all their seeds.

    Runs of a row are not independent and rows are few, so with fewer than five no test is made, and p is the larger of
    two. Above: of the bootstrap's, and of a permutation test over row means (against no correlation at all). Below: of
    the bootstrap's, and of Fisher's z over row means (standard error sqrt(1.06 / (K - 3))), 1 / K! at least.
    """
    x_N, y_N, row_N = _runs(test, rows, of)
    K = len(rows)
    if x_N.min() == x_N.max() or y_N.min() == y_N.max():
        raise _Untested("every run has the same candidates or the same reward, so that there is nothing to correlate")
    once, drawn = np.ones((1, len(x_N))), _counts(test.draw("rows"), K, test.replicates)[:, row_N]
    rho_R = _weighted_spearman(x_N, y_N, drawn)
    seeds = max(np.bincount(row_N).tolist())
    method = "bootstrap over rows, each with all its seeds"
    estimate = _percentile(_weighted_spearman(x_N, y_N, once)[0], rho_R, len(x_N), seeds, method)
    slope = _percentile(_weighted_slope(x_N, y_N, once)[0], _weighted_slope(x_N, y_N, drawn), len(x_N), seeds, method)
    statistic = f"rank correlation of test reward with the {words}, over runs"
    beside = (
        f"least-squares slope {_interval(slope)}",
        f"{len(x_N)} runs are of {K} rows, which are few and not independent: the interval is a rough one",
    )
    above, below = _tails(rho_R, margin)
    if K < FEWEST_ROWS:
        where = f"{K} rows are too few to test a correlation; {FEWEST_ROWS} are the fewest"
        lean: Lean = "inconclusive"
        return _Finding(statistic, "correlation", estimate, margin, lean, where, counted="runs", beside=beside)
    x_K, y_K = (np.bincount(row_N, values) / np.bincount(row_N) for values in (x_N, y_N))
    above = max(above, _permutation_p(x_K, y_K, test.draw("permutation"), test.replicates))
    below = max(below, _fisher_below(x_K, y_K, margin), 1 / math.factorial(K))
    part = _Part(statistic, "correlation", estimate, margin, above, below, "runs")
    return replace(_directional(part, margin), beside=beside)


_TESTS: Mapping[str, Callable[[_Test, Any], _Finding]] = {
    "rrhf_reaches_ppo": _rrhf_reaches_ppo,
    "fewer_models": _fewer_models,
    "best_of_n_learner": _best_of_n_learner,
    "best_of_n_over_rows": _best_of_n_over_rows,
    "reward_rises_with_sampling_quality": _rises_with_sampling_quality,
    "ordered": _ordered,
    "overoptimises": _overoptimises,
    "kl_repairs": _kl_repairs,
    "spread_shrinks": _spread_shrinks,
    "better_reward_model": _better_reward_model,
    "base_below_chance": _base_below_chance,
}


# -- arrays ---------------------------------------------------------------------------------------------------------


def _known(row: str, found: T | str) -> T:
    if isinstance(found, str):
        raise _Untested(f"{row}: {found}")
    return found


def _measured(*parts: Callable[[], _Part]) -> list[_Part]:
    """Those that could be computed; where none could, the reasons of all."""
    found, reasons = [], []
    for part in parts:
        try:
            found.append(part())
        except _Untested as error:
            reasons.append(str(error))
    if not found:
        raise _Untested("; ".join(reasons))
    return found


def _beside(test: _Test, a: str, b: str, measure: Measure) -> tuple[str, ...]:
    """A further difference, in words; nothing where it was not measured."""
    try:
        part = test.difference(a, b, measure, 0.0)
    except _Untested:
        return ()
    return (f"{part.statistic} {_interval(part.estimate)}",)


def _paired(a: Grid, b: Grid) -> tuple[Floats, Floats]:
    """Both on the prompts that every seed of both has a number for; one model stands against every seed."""
    alone = any(grid.one_model and len(grid.seeds) == 1 for grid in (a, b))
    seeds = _common(a.seeds, b.seeds)
    if not (seeds or alone):
        raise _Untested("the two rows have no seed in common")
    prompts = _common(a.prompts, b.prompts)
    a_SP, b_SP = (_part_of(grid, grid.seeds if alone else seeds, prompts) for grid in (a, b))
    finite_P = np.isfinite(a_SP).all(axis=0) & np.isfinite(b_SP).all(axis=0)
    if finite_P.sum() < 2:
        raise _Untested("the two rows have fewer than 2 prompts in common")
    return a_SP[:, finite_P], b_SP[:, finite_P]


def _part_of(grid: Grid, seeds: Sequence[int], prompts: Sequence[str]) -> Floats:
    columns = {prompt: p for p, prompt in enumerate(grid.prompts)}
    rows = [grid.seeds.index(seed) for seed in seeds]
    return grid.values_SP[np.ix_(rows, [columns[prompt] for prompt in prompts])]


def _common(a: Sequence[T], b: Sequence[T]) -> tuple[T, ...]:
    """In the order of ``a``."""
    known = set(b)
    return tuple(item for item in a if item in known)


def _counts(rng: np.random.Generator, units: int, replicates: int) -> Floats:
    """(R, units): how often each unit was drawn."""
    return rng.multinomial(units, np.full(units, 1 / units), size=replicates).astype(np.float64)


def _moments(scores: Scores, seeds: Sequence[int], prompts: Sequence[str]) -> Floats:
    """(3, S, P): number, sum and sum of squares of each prompt's scores, less the mean of all, which cancels."""
    columns = {prompt: p for p, prompt in enumerate(scores.prompts)}
    chosen_SP = [
        [np.array(scores.scores_SP[scores.seeds.index(seed)][columns[prompt]]) for prompt in prompts] for seed in seeds
    ]
    centre = np.concatenate([part for part_P in chosen_SP for part in part_P]).mean()
    return np.array([
        [[f(part - centre) for part in part_P] for part_P in chosen_SP] for f in (len, np.sum, lambda x: (x**2).sum())
    ])  # fmt: skip


def _pooled_std(moments_3SP: Floats, weights_RS: Floats, weights_RP: Floats) -> Floats:
    count_R, sum_R, square_R = (np.einsum("rs,rs->r", weights_RS, weights_RP @ m_SP.T) for m_SP in moments_3SP)
    return np.sqrt(np.maximum(square_R / count_R - (sum_R / count_R) ** 2, 0.0))


def _runs(
    test: _Test, rows: Sequence[str], of: Callable[[tuple[float, ...]], float]
) -> tuple[Floats, Floats, np.ndarray]:
    """Of each run: its candidates' mean of ``of`` over prompts, its test reward, and the number of its row."""
    x, y, row_of = [], [], []
    for k, row in enumerate(rows):
        candidates, reward = _known(row, test.evidence.candidates(row)), test.values(row, "reward")
        seeds = _common(candidates.seeds, reward.seeds)
        if not seeds:
            raise _Untested(f"{row}: no seed has both candidates and replies")
        for seed in seeds:
            scores_P = candidates.scores_SP[candidates.seeds.index(seed)]
            x.append(math.fsum(map(of, scores_P)) / len(scores_P))
            y.append(float(np.nanmean(reward.values_SP[reward.seeds.index(seed)])))
            row_of.append(k)
    return np.array(x), np.array(y), np.array(row_of)


def _weighted_spearman(x_N: Floats, y_N: Floats, weights_RN: Floats) -> Floats:
    """Of samples in which item n stands weights_RN times: average ranks, then Pearson; nan where a side is constant."""

    def ranks(values_N: Floats) -> Floats:
        below_NN = (values_N[:, None] > values_N) + 0.5 * (values_N[:, None] == values_N)
        return weights_RN @ below_NN.T

    a_RN, b_RN = (_centred(ranks(values), weights_RN) for values in (x_N, y_N))
    spread_R = np.sqrt((weights_RN * a_RN**2).sum(axis=1) * (weights_RN * b_RN**2).sum(axis=1))
    return _ratio((weights_RN * a_RN * b_RN).sum(axis=1), spread_R)


def _weighted_slope(x_N: Floats, y_N: Floats, weights_RN: Floats) -> Floats:
    a_RN, b_RN = (_centred(np.broadcast_to(values, weights_RN.shape), weights_RN) for values in (x_N, y_N))
    return _ratio((weights_RN * a_RN * b_RN).sum(axis=1), (weights_RN * a_RN**2).sum(axis=1))


def _centred(values_RN: Floats, weights_RN: Floats) -> Floats:
    return values_RN - (weights_RN * values_RN).sum(axis=1, keepdims=True) / weights_RN.sum(axis=1, keepdims=True)


def _ratio(above_R: Floats, below_R: Floats) -> Floats:
    # Spreads that are rounding alone count as none.
    return np.divide(above_R, below_R, out=np.full_like(above_R, np.nan), where=below_R > 1e-20)


def _permutation_p(x_K: Floats, y_K: Floats, rng: np.random.Generator, replicates: int) -> float:
    """One-sided, of a positive rank correlation: all K! orders up to 7 rows, else drawn ones and the observed."""
    a_K, b_K = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (x_K, y_K))
    K = len(a_K)
    if K <= 7:
        order_RK = np.array(list(itertools.permutations(range(K))))
    else:
        order_RK = np.vstack([np.arange(K), rng.permuted(np.tile(np.arange(K), (replicates, 1)), axis=1)])
    return float(np.mean(b_K[order_RK] @ a_K >= a_K @ b_K - 1e-9))


def _fisher_below(x_K: Floats, y_K: Floats, rho: float) -> float:
    """One-sided, of a rank correlation below ``rho``, by Fisher's z."""
    found = float(_weighted_spearman(x_K, y_K, np.ones((1, len(x_K))))[0])
    if math.isnan(found):  # all rows alike on one side
        return 1.0
    found = min(max(found, -1 + 1e-12), 1 - 1e-12)
    return float(stats.norm.cdf((math.atanh(found) - math.atanh(rho)) / math.sqrt(1.06 / (len(x_K) - 3))))


def _tails(theta_R: Floats, threshold: float) -> tuple[float, float]:
    """One-sided p of lying above and below, by the same replicates as the interval; undefined ones are left out."""
    theta_R = theta_R[np.isfinite(theta_R)]
    size = 1 + len(theta_R)
    return (1 + int((theta_R <= threshold).sum())) / size, (1 + int((theta_R >= threshold).sum())) / size


def _percentile(value: float, theta_R: Floats, n: int, seeds: int, method: str) -> Estimate:
    low, high = np.nanquantile(theta_R, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(float(value), float(low), float(high), n, seeds, None, method, LEVEL)


# -- words ----------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    return f"{value:+.3f}" if round(value, 3) else "0.000"


def _interval(estimate: Estimate) -> str:
    return f"{_signed(estimate.value)} [{_signed(estimate.low)}, {_signed(estimate.high)}]"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
