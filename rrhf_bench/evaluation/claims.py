"""Claims as hypotheses: each a number theta, a threshold, and a verdict.

Letters: S training seeds, P prompts, K rows.

Every part of a claim is one statistic with one interval and a one-sided p on either side of its threshold; all come
from the same estimate (statistics.py; for correlations Fisher's z over rows). The claims of a run are one family:
Holm's adjustment is over all claims and decodings that have a p. A claim is supported or refuted if its adjusted
two-sided p is below 0.05, and inconclusive otherwise, which is no proof of the contrary. A claim for which a run has no
numbers is not tested.

The two-sided p is twice the smaller of p(for) and p(against), each one-sided:

* Difference, theta > m (superiority; theta > -m under non-inferiority), and correlation, rho > m: p(for) is that of
  theta above the threshold, p(against) that of theta below it.
* Equivalence, abs(theta) <= m: p(for) is the larger of the two one-sided tests against -m and m, p(against) the
  smaller. Doubling makes it a test at 2.5% on each side: it asks for a 95% interval within [-m, m], stricter than the
  usual 90%.
* Compound, such as over-optimisation (the proxy reward rises, and the gold reward falls or the text grows less likely):
  the needed parts and one decider must all hold. The decider is the gold reward if the run has one, and only without it
  the likelihood of the text. p(for) is the largest of their p (intersection-union); p(against) is their smallest times
  their number, without the likelihood, since a gold reward that was not measured might have held. If gold decides and
  the likelihood goes significantly the other way, the claim is at most inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from scipy import stats

from rrhf_bench.evaluation.grid import Block, Grid, Missing, in_both, pair
from rrhf_bench.evaluation.statistics import (
    Estimate,
    SeedVariance,
    holm,
    paired_difference,
    pool_seed_variance,
    slope,
    smallest_detectable_difference,
)
from rrhf_bench.records import Decoding
from rrhf_bench.seeding import generator
from rrhf_bench.settings.claims import (
    MEASURES,
    ClaimSettings,
    CompoundSettings,
    CorrelationSettings,
    DifferenceSettings,
    EquivalenceSettings,
    Measure,
    rows_of,
)

Verdict = Literal["supported", "refuted", "inconclusive", "not tested"]
T = TypeVar("T")
Scores = Block[tuple[float, ...]]  # of a row's training candidates

ALPHA = 0.05
LEVEL = 1 - ALPHA
FEWEST_ROWS = 5  # with fewer, even a perfect order of the rows comes by chance once in 24 times
UNITS: Mapping[Measure, str] = {
    "reward": "proxy reward",
    "gold": "gold reward",
    "nll": "nats a token",
    "kl": "nats",
    "accuracy": "share of pairs",
    "spread": "proxy reward",
}
COUNTED: Mapping[Measure, str] = {"accuracy": "pairs", "spread": "training prompts"}  # else prompts


class Evidence(Protocol):
    """The measurements of a run, by row, or why there are none."""

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """The decodings of the run, greedy first."""

    @property
    def pooled_rows(self) -> Sequence[str]:
        """The rows over which the variance between seeds, or between worlds, is pooled."""

    def clusters(self, prompts: Sequence[str]) -> Sequence[str]:
        """The cluster of each prompt."""

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Grid | Missing:
        """The values of the replies to the evaluation prompts; "nll" is per token, in nats."""

    def candidates(self, row: str) -> Scores | Missing:
        """The scores of the candidates that a row was trained on."""

    def best_candidates(self, row: str) -> Grid | Missing:
        """The best score among a row's candidates, drawn on the evaluation prompts."""

    def accuracy(self, row: str) -> Grid | Missing:
        """Return the order of p_i on held-out pairs: 1 right, 0.5 tied, 0 wrong."""

    def dev_reward(self, row: str, decoding: Decoding) -> float | Missing:
        """The mean proxy reward on the dev prompts at the end of training."""


@dataclass(frozen=True)
class Finding:
    """A statistic, and where it lies to the threshold of a claim.

    ``p_for`` and ``p_against`` are one-sided, nan if no test was made. ``margin`` of a compound claim is the threshold
    of the part that decides, which ``estimate`` is of as well. ``counted`` names what ``estimate.n`` counts.
    """

    statistic: str = ""
    unit: str = ""
    estimate: Estimate | None = None
    margin: float = 0.0
    where: str = ""  # how the interval lies to the threshold, in words
    p_for: float = math.nan
    p_against: float = math.nan
    counted: str = "prompts"
    against: str = ""  # a part that goes significantly the other way, in words: the claim cannot be supported
    picked: tuple[str, ...] = ()  # rows chosen among several, on the dev prompts
    parts: tuple[str, ...] = ()  # of a compound claim, in words
    beside: tuple[str, ...] = ()  # further numbers, in words; the verdict does not depend on them

    @property
    def p(self) -> float | None:
        """Return the two-sided p before Holm's adjustment."""
        return None if math.isnan(self.p_for) else min(1.0, 2 * min(self.p_for, self.p_against))

    @property
    def detectable(self) -> float | None:
        """Return the distance from the threshold that this claim alone would have found four times in five."""
        return None if self.estimate is None else smallest_detectable_difference(self.estimate)

    @property
    def words(self) -> str:
        assert self.estimate is not None
        return f"{self.statistic} {_interval(self.estimate)}"


@dataclass(frozen=True, kw_only=True)
class ClaimResult(Finding):
    """One claim under one decoding, and its verdict from ``p_holm``, the p after Holm's adjustment."""

    name: str
    sentence: str
    decoding: Decoding | None  # None if no replies enter
    verdict: Verdict
    reason: str
    p_holm: float | None = None

    @property
    def outcome(self) -> str:
        """Return the result in one form, whatever the verdict."""
        if self.estimate is None:
            return f"Not tested: {self.reason}."
        unit = "seed" if self.estimate.worlds is None else "world"
        units = self.estimate.worlds or self.estimate.seeds
        sizes = [f"{self.estimate.n} {self.counted}", f"{units} {unit}{'s' if units > 1 else ''}"]
        sizes.append(f"detectable {self.detectable:.3f}")
        if self.p_holm is not None:
            sizes.insert(0, f"p {_p(self.p_holm)} after Holm")
        found = f"{self.verdict.capitalize()}: {self.statistic} is {_interval(self.estimate)}; {self.reason}"
        more = {"Picked on dev prompts": self.picked, "Its parts": self.parts, "Beside it": self.beside}
        further = (f" {about}: {'; '.join(words)}." for about, words in more.items() if words)
        return f"{found} ({', '.join(sizes)}).{''.join(further)}"


def evaluate_claims(
    claims: Mapping[str, ClaimSettings], evidence: Evidence, *, rng_name: Sequence[str | int] = ("claims",)
) -> list[ClaimResult]:
    """Return every claim in the order given, under every decoding if replies enter. The rules are at the top.

    A claim without the numbers it needs is "not tested", with the reason; nothing is raised for it. ``rng_name`` names
    the draws of the one bootstrap that is printed beside a correlation; no verdict depends on a draw.
    """
    found: list[ClaimResult] = []
    pools: dict[tuple[str, Decoding | None], SeedVariance | None] = {}
    for name, claim in claims.items():
        for decoding in evidence.decodings if claim.decoded else (None,):
            test = _Test(evidence, decoding, (*rng_name, name, decoding or ""), pools)
            about: dict[str, Any] = {"name": name, "sentence": claim.sentence, "decoding": decoding}
            try:
                finding = _tested(test, claim)
                found.append(ClaimResult(**vars(finding), **about, verdict="inconclusive", reason=finding.where))
            except _Untested as error:
                found.append(ClaimResult(margin=claim.margin, **about, verdict="not tested", reason=str(error)))
    ps = [result.p for result in found if result.p is not None]
    adjusted: Iterator[float] = iter(holm(ps).tolist() if ps else [])
    return [result if result.p is None else _decide(result, next(adjusted)) for result in found]


def _decide(result: ClaimResult, p_holm: float) -> ClaimResult:
    """Return a result with its verdict."""
    assert result.p is not None
    verdict: Verdict = "supported" if result.p_for <= result.p_against else "refuted"
    reason = result.where
    if p_holm >= ALPHA:
        verdict = "inconclusive"
        reason += f", but p is {_p(p_holm)} after Holm's adjustment" if result.p < ALPHA else ""
    elif verdict == "supported" and result.against:
        verdict, reason = "inconclusive", f"{reason}, but {result.against}"
    return replace(result, p_holm=p_holm, verdict=verdict, reason=reason)


def _above(found: Estimate, threshold: float, p_above: float, p_below: float, **about: Any) -> Finding:
    """Return the finding on the claim that theta lies above a threshold."""
    lies = "above" if found.low > threshold else "below" if found.high < threshold else "on both sides of"
    where = f"its interval lies {lies} {_signed(threshold)}"
    return Finding(estimate=found, margin=threshold, where=where, p_for=p_above, p_against=p_below, **about)


def _equivalent(lower: Finding, upper: Finding, margin: float) -> Finding:
    """The claim that |theta| <= margin: two one-sided tests, ``lower`` against -margin and ``upper`` against margin."""
    assert lower.estimate is not None
    low, high = lower.estimate.low, lower.estimate.high
    lies = "lies within" if -margin <= low and high <= margin else "reaches over an end of"
    if low > margin or high < -margin:
        lies = "lies outside"
    p_for, p_against = max(lower.p_for, upper.p_against), min(lower.p_against, upper.p_for)
    where = f"its interval {lies} ±{margin:.3f}"
    return replace(lower, margin=margin, where=where, p_for=p_for, p_against=p_against)


def _decided(must: Sequence[Finding], gold: Finding | None, nll: Finding | None) -> Finding:
    """The claim that all of ``must`` hold, and the decider: the gold reward, or without one the likelihood."""

    decider = gold or nll
    assert decider is not None
    needed = [*must, decider]
    refuting = [*must, gold] if gold is not None else [*must]  # a gold reward that was not measured might have held
    p_for = max(part.p_for for part in needed)
    p_against = min(1.0, len(refuting) * min(part.p_against for part in refuting)) if refuting else 1.0
    if p_for <= p_against:
        shown = max(needed, key=lambda part: part.p_for)
    else:
        shown = min(refuting, key=lambda part: part.p_against)
    against = ""
    if gold is not None and nll is not None and 2 * nll.p_against < ALPHA:
        against = f"the likelihood of the text goes the other way ({_against(nll)})"
    where = f"of its parts, that of the {shown.unit} decides: {shown.where}"
    parts = tuple(_against(part) for part in (*must, gold, nll) if part is not None)
    return replace(shown, p_for=p_for, p_against=p_against, against=against, where=where, parts=parts)


def _against(part: Finding) -> str:
    return f"{part.words} against {_signed(part.margin)}"


# -- the tests ------------------------------------------------------------------------------------------------------


class _Untested(Exception):
    """The reason, in words."""


@dataclass(frozen=True)
class _Test:
    """One claim under one decoding: the evidence, the names of its draws, and the pooled variances of the run."""

    evidence: Evidence
    decoding: Decoding | None
    name: tuple[str | int, ...]
    pools: dict[tuple[str, Decoding | None], SeedVariance | None]

    def grid(self, row: str, measure: Measure) -> Grid | Missing:
        """Return the values of a row in a measure, or why there are none."""
        if measure == "accuracy":
            return self.evidence.accuracy(row)
        if measure == "spread":
            scores = self.evidence.candidates(row)
            return scores if isinstance(scores, Missing) else _linear_std(scores)
        assert self.decoding is not None
        return self.evidence.values(row, self.decoding, measure)

    def values(self, row: str, measure: Measure) -> Grid:
        return _known(row, self.grid(row, measure))

    def pooled(self, measure: Measure) -> SeedVariance | None:
        """Return the variance between seeds of a measure over the trained rows of the run, computed once."""
        key = measure, self.decoding
        if key not in self.pools:
            grids = [found for row in self.evidence.pooled_rows if isinstance(found := self.grid(row, measure), Grid)]
            means_NS = [np.nanmean(found.values_SP, axis=1) for found in grids]
            several = [found.worlds for found in grids if found.worlds is not None]
            self.pools[key] = pool_seed_variance(means_NS, worlds_NS=several or None)
        return self.pools[key]

    def difference(self, a: str | float, b: str | float, measure: Measure, threshold: float) -> Finding:
        """Return a - b in a measure against a threshold. A number stands for a row that has it everywhere."""
        words = f"{MEASURES[measure]} of {a} minus {b}"
        if isinstance(a, float) or isinstance(b, float):
            row, value = (a, b) if isinstance(b, float) else (b, a)
            shown = "one half" if value == 0.5 else f"{value:g}"
            of_row = f"{MEASURES[measure]} of {row}"
            words = f"{of_row} minus {shown}" if isinstance(b, float) else f"{shown} minus the {of_row}"
            found = self.values(str(row), measure)
            constant = replace(found, values_SP=np.full_like(found.values_SP, value))
            sides = (found, constant) if isinstance(b, float) else (constant, found)
        elif measure == "spread":
            sides = self.spreads(a, b)
        else:
            sides = self.values(a, measure), self.values(b, measure)
        return self.above(*sides, measure, words, threshold)

    def above(self, a: Grid, b: Grid, measure: Measure, statistic: str, threshold: float) -> Finding:
        """Return the mean of a - b in a measure against a threshold, paired on seeds and prompts."""
        paired = pair(a, b)
        if isinstance(paired, Missing):
            raise _Untested(paired.reason)
        a_SP, b_SP, prompts = paired.a_SP, paired.b_SP, paired.prompts
        finite_P = np.isfinite(np.concatenate([a_SP, b_SP])).all(axis=0)  # a text without tokens has no NLL
        if finite_P.sum() < 2:
            raise _Untested("fewer than 2 prompts in common")
        a_SP, b_SP = a_SP[:, finite_P], b_SP[:, finite_P]
        if len(a_SP) == len(b_SP) == 1 and not (a.one_model and b.one_model):
            raise _Untested("one training seed does not show how far another training run would differ")
        clusters = self.evidence.clusters([prompt for prompt, finite in zip(prompts, finite_P, strict=True) if finite])
        pooled = self.pooled(measure)
        found = paired_difference(a_SP, b_SP, level=LEVEL, clusters_P=clusters, pooled=pooled, worlds_S=paired.worlds)
        about = {"statistic": statistic, "unit": UNITS[measure], "counted": COUNTED.get(measure, "prompts")}
        return _above(found, threshold, found.p_above(threshold), found.p_below(threshold), **about)

    def spreads(self, a: str, b: str) -> tuple[Grid, Grid]:
        """Return the standard deviations of all responses pooled, paired on seeds and training prompts."""
        one, other = (_known(row, self.evidence.candidates(row)) for row in (a, b))
        seeds, prompts = in_both(one.seeds, other.seeds), in_both(one.prompts, other.prompts)
        if not seeds or len(prompts) < 2:
            raise _Untested("the two rows have no seed or fewer than 2 training prompts in common")
        return _linear_std(one.only(seeds, prompts)), _linear_std(other.only(seeds, prompts))

    def best_on_dev(self, side: str | float | tuple[str, ...]) -> tuple[str | float, tuple[str, ...]]:
        """Return the row of a side with the highest reward on the dev prompts, and a note if there was a choice.

        Of equals it is the first. A number stands for itself. The evaluation prompts do not enter.
        """
        rows = rows_of(side)
        if isinstance(side, float) or len(rows) == 1:
            return side if isinstance(side, float) else rows[0], ()
        assert self.decoding is not None
        rewards = {row: _known(row, self.evidence.dev_reward(row, self.decoding)) for row in rows}
        best = max(rewards, key=rewards.__getitem__)
        return best, (f"{best} (of {', '.join(rows)})",)


def _tested(test: _Test, claim: ClaimSettings) -> Finding:
    """Return what a claim comes to. Raises _Untested if the run lacks its numbers."""
    match claim:
        case DifferenceSettings():
            return _difference(test, claim)
        case EquivalenceSettings():
            return _equivalence(test, claim)
        case CorrelationSettings():
            return _correlation(test, claim)
        case CompoundSettings():
            return _compound(test, claim)
    raise AssertionError(f"{claim.kind}: a kind of claim without a test")


def _difference(test: _Test, claim: DifferenceSettings) -> Finding:
    (higher, picked), (lower, picked_lower) = test.best_on_dev(claim.higher), test.best_on_dev(claim.lower)
    finding = test.difference(higher, lower, claim.measure, claim.threshold)
    # A row that is level in the proxy reward may have paid for it in the gold reward.
    level = claim.test == "non-inferiority" and claim.measure == "reward"
    beside = _beside(test, higher, lower, "gold") if level else ()
    return replace(finding, margin=claim.margin, picked=(*picked, *picked_lower), beside=beside)


def _equivalence(test: _Test, claim: EquivalenceSettings) -> Finding:
    reward = test.values(claim.row, "reward")
    reference, words = claim.reference, f"proxy reward of {claim.row} minus {claim.reference}"
    if reference is None:
        against = _known(claim.row, test.evidence.best_candidates(claim.row))
        words = f"proxy reward of {claim.row} minus the best of its candidates on the same prompts"
    else:
        against = test.values(reference, "reward")
    lower, upper = (test.above(reward, against, "reward", words, sign * claim.margin) for sign in (-1, 1))
    return _equivalent(lower, upper, claim.margin)


def _compound(test: _Test, claim: CompoundSettings) -> Finding:
    def rise(measure: Measure, margin: float, up: bool) -> Finding:
        sides = (claim.row, claim.reference) if up else (claim.reference, claim.row)
        return test.difference(*sides, measure, margin)

    better = claim.quality == "rises"
    must = [] if claim.proxy is None else [rise("reward", claim.margin, claim.proxy == "rises")]
    tried: Sequence[tuple[Measure, float, bool]] = (
        ("gold", claim.margin, better),
        ("nll", claim.nll_margin, not better),
    )
    deciders: list[Finding | None] = []
    reasons = []
    for decider in tried:
        try:
            deciders.append(rise(*decider))
        except _Untested as error:
            deciders.append(None)
            reasons.append(str(error))
    if len(reasons) == len(deciders):
        raise _Untested("; ".join(reasons))
    return replace(_decided(must, *deciders), beside=_beside(test, claim.row, claim.reference, "kl"))


def _linear_std(scores: Scores) -> Grid:
    """Return values (S, P) whose mean is the standard deviation of all scores pooled, linearised per seed and prompt.

    A standard deviation s = sqrt(v) is no mean, but near its value it moves as one: a score x moves it by
    ((x - mean)^2 - v) / (2 s N). The sum of that over a prompt's scores, times S P, plus s is the prompt's value, so
    that the t statistic of means gives s its standard error (the infinitesimal jackknife, or delta method). Over worlds
    the t statistic reads one number a world, so each row of values is the standard deviation within its repetition.
    """
    if scores.worlds is not None:
        of_S = [np.concatenate([np.asarray(own) for own in items_P]).std() for items_P in scores.items_SP]
        return replace(scores.grid(lambda _: 0.0), values_SP=np.repeat(np.array(of_S)[:, None], len(scores.prompts), 1))
    every = np.concatenate([np.asarray(of_prompt) for of_prompt in scores.items])
    mean, variance = every.mean(), every.var()
    spread = math.sqrt(variance)
    if spread == 0.0:
        return scores.grid(lambda _: 0.0)
    excess = scores.grid(lambda of_prompt: ((np.asarray(of_prompt) - mean) ** 2 - variance).sum())
    size = len(scores.seeds) * len(scores.prompts)
    return replace(excess, values_SP=spread + excess.values_SP * size / (2 * spread * len(every)))


def _correlation(test: _Test, claim: CorrelationSettings) -> Finding:
    """Spearman's correlation of test reward with candidates over rows, each the mean over its seeds.

    Rows are the random unit. Interval and p come from Fisher's z with the standard error sqrt(1.06 / (K - 3)) (Fieller,
    Hartley and Pearson 1957, doi 10.1093/biomet/44.3-4.470), so with fewer than five rows no test is made. Rows of one
    run share prompts and candidates, which this takes as independent.
    """
    best = claim.measure == "best_candidate"
    words = "mean of the best candidate" if best else "candidate mean"
    x_K, y_K = np.array([_row_means(test, row, max if best else _mean) for row in claim.over]).T
    K, margin = len(claim.over), claim.margin
    if x_K.min() == x_K.max() or y_K.min() == y_K.max():
        raise _Untested("every row has the same candidates or the same reward, so that there is nothing to correlate")
    rho = float(stats.spearmanr(x_K, y_K)[0])
    line = slope(x_K, y_K, rng=generator(*test.name, "slope"))
    statistic = f"rank correlation of test reward with the {words}, over rows"
    beside = (
        f"least-squares slope {_interval(line)} (bootstrap over rows)",
        f"{K} rows, which are few and share prompts and candidates: the interval is a rough one",
    )
    # A perfect order has an infinite z; it counts as half the step to the order that differs from it least.
    z, error = math.atanh(max(-_largest(K), min(_largest(K), rho))), math.sqrt(1.06 / max(K - 3, 1))
    reach = error * float(stats.norm.ppf(0.5 + LEVEL / 2))
    low, high = min(rho, math.tanh(z - reach)), max(rho, math.tanh(z + reach))
    estimate = Estimate(rho, low, high, K, 1, None, "Spearman, Fisher's z over rows", LEVEL)
    about: dict[str, Any] = {"statistic": statistic, "unit": "correlation", "counted": "rows", "beside": beside}
    if K < FEWEST_ROWS:
        where = f"{K} rows are too few to test a correlation; {FEWEST_ROWS} are the fewest"
        return Finding(estimate=estimate, margin=margin, where=where, **about)
    distance = (z - math.atanh(margin)) / error
    return _above(estimate, margin, float(stats.norm.sf(distance)), float(stats.norm.cdf(distance)), **about)


def _mean(scores: tuple[float, ...]) -> float:
    return sum(scores) / len(scores)


def _largest(rows: int) -> float:
    """Return what a perfect rank correlation of so many rows counts as: 1 less half its smallest step."""
    return 1 - 6 / (rows**3 - rows)


def _row_means(test: _Test, row: str, of: Callable[[tuple[float, ...]], float]) -> tuple[float, float]:
    """Return (mean of ``of`` over a row's candidates, its test reward), over the seeds that have both."""
    candidates, reward = _known(row, test.evidence.candidates(row)), test.values(row, "reward")
    seeds = in_both(candidates.seeds, reward.seeds)
    if not seeds:
        raise _Untested(f"{row}: no seed has both candidates and replies")
    x_S = candidates.only(seeds, candidates.prompts).grid(of).mean_S
    y_S = np.nanmean(reward.only(seeds, reward.prompts).values_SP, axis=1)
    return float(x_S.mean()), float(y_S.mean())


def _known(row: str, found: T | Missing) -> T:
    if isinstance(found, Missing):
        raise _Untested(f"{row}: {found.reason}")
    return found


def _beside(test: _Test, a: str | float, b: str | float, measure: Measure) -> tuple[str, ...]:
    """Return a further difference in words, or nothing if it was not measured."""
    try:
        part = test.difference(a, b, measure, 0.0)
    except _Untested:
        return ()
    return (part.words,)


# -- words ----------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    return f"{value:+.3f}" if round(value, 3) else "0.000"


def _interval(estimate: Estimate) -> str:
    return f"{_signed(estimate.value)} [{_signed(estimate.low)}, {_signed(estimate.high)}]"


def _p(value: float) -> str:
    """Return p with the digit that decides whether it is below the level."""
    if value < 0.001:
        return "below 0.001"
    return f"{value:.3f}" if round(value, 3) != ALPHA else f"{value:.5f}"
