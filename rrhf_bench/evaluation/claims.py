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
from typing import Literal, Protocol, TypeVar

import numpy as np
from scipy import stats

from rrhf_bench.evaluation.statistics import (
    Estimate,
    Floats,
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


@dataclass(frozen=True, slots=True)
class Grid:
    """Values (S, P) of one row, nan if a reply has none. ``one_model``: every seed evaluates the same model."""

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
    """The measurements of a run, by row. In place of a number there may be a reason, in words, why there is none."""

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """The decodings of the run, greedy first."""

    @property
    def trained(self) -> Sequence[str]:
        """The rows that are trained once per seed, over which the variance between seeds is pooled."""

    def clusters(self, prompts: Sequence[str]) -> Sequence[str]:
        """The cluster of each prompt."""

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Grid | str:
        """The values of the replies to the evaluation prompts; "nll" is per token, in nats."""

    def candidates(self, row: str) -> Scores | str:
        """The scores of the candidates that a row was trained on."""

    def best_candidates(self, row: str) -> Grid | str:
        """The best score among a row's candidates, drawn on the evaluation prompts."""

    def accuracy(self, row: str) -> Grid | str:
        """Return the order of p_i on held-out pairs: 1 right, 0.5 tied, 0 wrong."""

    def dev_reward(self, row: str, decoding: Decoding) -> float | str:
        """The mean proxy reward on the dev prompts at the end of training."""


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """One claim under one decoding. ``p`` before Holm's adjustment and ``p_holm`` after it are None if no test was
    made; ``estimate`` of a compound claim is of the part that decides. ``detectable`` is the distance from the
    threshold that this claim alone would have found four times in five. ``counted`` names what ``estimate.n`` counts.
    """

    name: str
    sentence: str
    decoding: Decoding | None  # None if no replies enter
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
        """Return the result in one form, whatever the verdict."""
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
        further = (f" {about}: {'; '.join(words)}." for about, words in more.items() if words)
        return f"{found} ({', '.join(sizes)}).{''.join(further)}"


def evaluate_claims(
    claims: Mapping[str, ClaimSettings], evidence: Evidence, *, rng_name: Sequence[str | int] = ("claims",)
) -> list[ClaimResult]:
    """Return every claim in the order given, under every decoding if replies enter. The rules are at the top.

    A claim without the numbers it needs is "not tested", with the reason; nothing is raised for it. ``rng_name`` names
    the draws of the one bootstrap that is printed beside a correlation; no verdict depends on a draw.
    """
    found: list[tuple[str, ClaimSettings, Decoding | None, _Finding | str]] = []
    pools: dict[tuple[str, Decoding | None], SeedVariance | None] = {}
    for name, claim in claims.items():
        for decoding in evidence.decodings if claim.decoded else (None,):
            test = _Test(evidence, decoding, (*rng_name, name, decoding or ""), pools)
            try:
                finding: _Finding | str = _tested(test, claim)
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
                smallest_detectable_difference(finding.estimate),
                finding.picked,
                finding.parts,
                finding.beside,
            )
        )
    return results


# -- from a test to its verdict -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Finding:
    """A claim before its family is known."""

    statistic: str
    unit: str
    estimate: Estimate
    margin: float
    where: str  # how the interval lies to the threshold, in words
    p_for: float | None = None  # one-sided; None if no test was made
    p_against: float | None = None
    against: str = ""  # a part that goes significantly the other way, in words: the claim cannot be supported
    counted: str = "prompts"
    picked: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def p(self) -> float | None:
        if self.p_for is None or self.p_against is None:
            return None
        return min(1.0, 2 * min(self.p_for, self.p_against))


def _verdict(finding: _Finding, p_holm: float | None) -> tuple[Verdict, str]:
    if p_holm is None or finding.p is None:
        return "inconclusive", finding.where
    assert finding.p_for is not None
    assert finding.p_against is not None
    supported = finding.p_for <= finding.p_against
    if p_holm >= ALPHA:
        alone = f", but p is {_p(p_holm)} after Holm's adjustment" if finding.p < ALPHA else ""
        return "inconclusive", finding.where + alone
    if supported and finding.against:
        return "inconclusive", f"{finding.where}, but {finding.against}"
    return "supported" if supported else "refuted", finding.where


@dataclass(frozen=True, slots=True)
class _Part:
    """One statistic against its threshold, with the one-sided p of lying above and below it."""

    statistic: str
    unit: str
    estimate: Estimate
    threshold: float
    p_above: float
    p_below: float
    counted: str = "prompts"

    @property
    def words(self) -> str:
        return f"{self.statistic} {_interval(self.estimate)} against {_signed(self.threshold)}"


def _directional(part: _Part, margin: float) -> _Finding:
    """The claim that theta lies above the part's threshold."""
    low, high = part.estimate.low, part.estimate.high
    lies = "above" if low > part.threshold else "below" if high < part.threshold else "on both sides of"
    where = f"its interval lies {lies} {_signed(part.threshold)}"
    return _Finding(
        part.statistic, part.unit, part.estimate, margin, where, part.p_above, part.p_below, counted=part.counted
    )


def _equivalent(lower: _Part, upper: _Part, margin: float) -> _Finding:
    """The claim that |theta| <= margin: two one-sided tests, ``lower`` against -margin and ``upper`` against margin."""
    low, high = lower.estimate.low, lower.estimate.high
    lies = "lies within" if -margin <= low and high <= margin else "reaches over an end of"
    if low > margin or high < -margin:
        lies = "lies outside"
    p_for, p_against = max(lower.p_above, upper.p_below), min(lower.p_below, upper.p_above)
    where = f"its interval {lies} ±{margin:.3f}"
    return _Finding(lower.statistic, lower.unit, lower.estimate, margin, where, p_for, p_against, counted=lower.counted)


def _decided(must: Sequence[_Part], gold: _Part | None, nll: _Part | None) -> _Finding:
    """The claim that all of ``must`` hold, and the decider: the gold reward, or without one the likelihood."""
    decider = gold or nll
    assert decider is not None
    needed = [*must, decider]
    refuting = [*must, gold] if gold is not None else [*must]  # a gold reward that was not measured might have held
    p_for = max(part.p_above for part in needed)
    p_against = min(1.0, len(refuting) * min(part.p_below for part in refuting)) if refuting else 1.0
    if p_for <= p_against:
        shown = max(needed, key=lambda part: part.p_above)
    else:
        shown = min(refuting, key=lambda part: part.p_below)
    against = ""
    if gold is not None and nll is not None and 2 * nll.p_below < ALPHA:
        against = f"the likelihood of the text goes the other way ({nll.words})"
    finding = _directional(shown, shown.threshold)
    parts = tuple(part.words for part in (*must, *filter(None, (gold, nll))))
    return replace(
        finding,
        p_for=p_for,
        p_against=p_against,
        against=against,
        where=f"of its parts, that of the {shown.unit} decides: {finding.where}",
        parts=parts,
    )


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

    def grid(self, row: str, measure: Measure) -> Grid | str:
        """Return the values of a row in a measure, or why there are none."""
        if measure == "accuracy":
            return self.evidence.accuracy(row)
        if measure == "spread":
            scores = self.evidence.candidates(row)
            return scores if isinstance(scores, str) else _linear_std(scores)
        assert self.decoding is not None
        return self.evidence.values(row, self.decoding, measure)

    def values(self, row: str, measure: Measure) -> Grid:
        return _known(row, self.grid(row, measure))

    def pooled(self, measure: Measure) -> SeedVariance | None:
        """Return the variance between seeds of a measure over the trained rows of the run, computed once."""
        key = measure, self.decoding
        if key not in self.pools:
            grids = [found for row in self.evidence.trained if not isinstance(found := self.grid(row, measure), str)]
            self.pools[key] = pool_seed_variance([np.nanmean(found.values_SP, axis=1) for found in grids])
        return self.pools[key]

    def difference(self, a: str | float, b: str | float, measure: Measure, threshold: float) -> _Part:
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
        return self.part(*sides, measure, words, threshold)

    def part(self, a: Grid, b: Grid, measure: Measure, statistic: str, threshold: float) -> _Part:
        """Return the mean of a - b in a measure against a threshold, paired on seeds and prompts."""
        a_SP, b_SP, prompts = _paired(a, b)
        if len(a_SP) == len(b_SP) == 1 and not (a.one_model and b.one_model):
            raise _Untested("one training seed does not show how far another training run would differ")
        pooled = self.pooled(measure)
        found = paired_difference(a_SP, b_SP, level=LEVEL, clusters_P=self.evidence.clusters(prompts), pooled=pooled)
        p_above, p_below = found.p_above(threshold), found.p_below(threshold)
        counted = COUNTED.get(measure, "prompts")
        return _Part(statistic, UNITS[measure], found, threshold, p_above, p_below, counted)

    def spreads(self, a: str, b: str) -> tuple[Grid, Grid]:
        """Return the standard deviations of all responses pooled, paired on seeds and training prompts."""
        one, other = (_known(row, self.evidence.candidates(row)) for row in (a, b))
        seeds, prompts = _common(one.seeds, other.seeds), _common(one.prompts, other.prompts)
        if not seeds or len(prompts) < 2:
            raise _Untested("the two rows have no seed or fewer than 2 training prompts in common")
        return _linear_std(_restricted(one, seeds, prompts)), _linear_std(_restricted(other, seeds, prompts))

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


def _tested(test: _Test, claim: ClaimSettings) -> _Finding:
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


def _difference(test: _Test, claim: DifferenceSettings) -> _Finding:
    (higher, picked), (lower, picked_lower) = test.best_on_dev(claim.higher), test.best_on_dev(claim.lower)
    finding = _directional(test.difference(higher, lower, claim.measure, claim.threshold), claim.margin)
    # A row that is level in the proxy reward may have paid for it in the gold reward.
    level = claim.test == "non-inferiority" and claim.measure == "reward"
    beside = _beside(test, higher, lower, "gold") if level else ()
    return replace(finding, picked=(*picked, *picked_lower), beside=beside)


def _equivalence(test: _Test, claim: EquivalenceSettings) -> _Finding:
    reward = test.values(claim.row, "reward")
    if claim.reference is None:
        reference = _known(claim.row, test.evidence.best_candidates(claim.row))
        words = f"proxy reward of {claim.row} minus the best of its candidates on the same prompts"
    else:
        reference = test.values(claim.reference, "reward")
        words = f"proxy reward of {claim.row} minus {claim.reference}"
    lower, upper = (test.part(reward, reference, "reward", words, sign * claim.margin) for sign in (-1, 1))
    return _equivalent(lower, upper, claim.margin)


def _compound(test: _Test, claim: CompoundSettings) -> _Finding:
    def rise(measure: Measure, margin: float, up: bool) -> _Part:
        sides = (claim.row, claim.reference) if up else (claim.reference, claim.row)
        return test.difference(*sides, measure, margin)

    better = claim.quality == "rises"
    must = [] if claim.proxy is None else [rise("reward", claim.margin, claim.proxy == "rises")]
    gold, nll = _measured(
        lambda: rise("gold", claim.margin, better),
        lambda: rise("nll", claim.nll_margin, not better),
    )
    return replace(_decided(must, gold, nll), beside=_beside(test, claim.row, claim.reference, "kl"))


def _restricted(scores: Scores, seeds: Sequence[int], prompts: Sequence[str]) -> Scores:
    """Return the scores of these seeds and prompts, in their order."""
    columns = {prompt: p for p, prompt in enumerate(scores.prompts)}
    rows = (scores.scores_SP[scores.seeds.index(seed)] for seed in seeds)
    return Scores(tuple(seeds), tuple(prompts), tuple(tuple(row[columns[p]] for p in prompts) for row in rows))


def _linear_std(scores: Scores) -> Grid:
    """Return values (S, P) whose mean is the standard deviation of all scores pooled, linearised per seed and prompt.

    A standard deviation s = sqrt(v) is no mean, but near its value it moves as one: a score x moves it by
    ((x - mean)^2 - v) / (2 s N). The sum of that over a prompt's scores, times S P, plus s is the prompt's value, so
    that the t statistic of means gives s its standard error (the infinitesimal jackknife, or delta method).
    """
    seeds, prompts = len(scores.seeds), len(scores.prompts)
    every = np.concatenate([np.asarray(scores_P) for row in scores.scores_SP for scores_P in row])
    mean, variance = every.mean(), every.var()
    spread = math.sqrt(variance)
    if spread == 0.0:
        return Grid(scores.seeds, scores.prompts, np.zeros((seeds, prompts)))
    excess_SP = np.array(
        [[((np.asarray(scores_P) - mean) ** 2 - variance).sum() for scores_P in row] for row in scores.scores_SP]
    )
    return Grid(scores.seeds, scores.prompts, spread + excess_SP * (seeds * prompts) / (2 * spread * len(every)))


def _correlation(test: _Test, claim: CorrelationSettings) -> _Finding:
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
    if K < FEWEST_ROWS:
        where = f"{K} rows are too few to test a correlation; {FEWEST_ROWS} are the fewest"
        return _Finding(statistic, "correlation", estimate, margin, where, counted="rows", beside=beside)
    distance = (z - math.atanh(margin)) / error
    above, below = float(stats.norm.sf(distance)), float(stats.norm.cdf(distance))
    part = _Part(statistic, "correlation", estimate, margin, above, below, "rows")
    return replace(_directional(part, margin), beside=beside)


def _mean(scores: tuple[float, ...]) -> float:
    return sum(scores) / len(scores)


def _largest(rows: int) -> float:
    """Return what a perfect rank correlation of so many rows counts as: 1 less half its smallest step."""
    return 1 - 6 / (rows**3 - rows)


def _row_means(test: _Test, row: str, of: Callable[[tuple[float, ...]], float]) -> tuple[float, float]:
    """Return (mean of ``of`` over a row's candidates, its test reward), over the seeds that have both."""
    candidates, reward = _known(row, test.evidence.candidates(row)), test.values(row, "reward")
    seeds = _common(candidates.seeds, reward.seeds)
    if not seeds:
        raise _Untested(f"{row}: no seed has both candidates and replies")
    x = [np.mean([of(scores) for scores in candidates.scores_SP[candidates.seeds.index(seed)]]) for seed in seeds]
    y = [np.nanmean(reward.values_SP[reward.seeds.index(seed)]) for seed in seeds]
    return float(np.mean(x)), float(np.mean(y))


# -- arrays ---------------------------------------------------------------------------------------------------------


def _known(row: str, found: T | str) -> T:
    if isinstance(found, str):
        raise _Untested(f"{row}: {found}")
    return found


def _measured(*parts: Callable[[], _Part]) -> list[_Part | None]:
    """Return each part, None for one that was not measured. Raises _Untested with all reasons if none was."""
    found: list[_Part | None] = []
    reasons = []
    for part in parts:
        try:
            found.append(part())
        except _Untested as error:
            found.append(None)
            reasons.append(str(error))
    if len(reasons) == len(parts):
        raise _Untested("; ".join(reasons))
    return found


def _beside(test: _Test, a: str | float, b: str | float, measure: Measure) -> tuple[str, ...]:
    """Return a further difference in words, or nothing if it was not measured."""
    try:
        part = test.difference(a, b, measure, 0.0)
    except _Untested:
        return ()
    return (f"{part.statistic} {_interval(part.estimate)}",)


def _paired(a: Grid, b: Grid) -> tuple[Floats, Floats, list[str]]:
    """Return both sides and their prompts: those for which every seed of both has a number. One model stands against
    every seed."""
    alone = any(grid.one_model and len(grid.seeds) == 1 for grid in (a, b))
    seeds = _common(a.seeds, b.seeds)
    if not (seeds or alone):
        raise _Untested("the two rows have no seed in common")
    prompts = _common(a.prompts, b.prompts)
    a_SP, b_SP = (_part_of(grid, grid.seeds if alone else seeds, prompts) for grid in (a, b))
    finite_P = np.isfinite(np.concatenate([a_SP, b_SP])).all(axis=0)
    if finite_P.sum() < 2:
        raise _Untested("the two rows have fewer than 2 prompts in common")
    kept = [prompt for prompt, finite in zip(prompts, finite_P.tolist(), strict=True) if finite]
    return a_SP[:, finite_P], b_SP[:, finite_P], kept


def _part_of(grid: Grid, seeds: Sequence[int], prompts: Sequence[str]) -> Floats:
    columns = {prompt: p for p, prompt in enumerate(grid.prompts)}
    rows = [grid.seeds.index(seed) for seed in seeds]
    return grid.values_SP[np.ix_(rows, [columns[prompt] for prompt in prompts])]


def _common(a: Sequence[T], b: Sequence[T]) -> tuple[T, ...]:
    """Return the items that both have, in the order of ``a``."""
    known = set(b)
    return tuple(item for item in a if item in known)


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


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
