"""Intervals, paired tests and correlations over values per training seed (or world and seed) and prompt.

Letters: S training seeds (rows of values), W worlds, P prompts (or items), K clusters of prompts, R bootstrap
replicates, N rows of a table. For best-of-n: B prompts, N samples drawn per prompt.
Functions that draw take their generator; nothing here reads a global random state. Bad input (not finite, empty, shapes
that do not fit) raises DataError, a ValueError.

**One statistic.** The interval of a difference, its p-value and its verdict come from one Student's t statistic. Its
random unit is the highest level that the values repeat: worlds if there are several, else training seeds and clusters.

**One world.** All rows of values share one corpus, one initial policy, one reward model and one set of prompts. Seeds
and clusters of prompts are random and crossed (the two-way cluster-robust variance of Cameron, Gelbach and Miller 2011,
doi 10.1198/jbes.2010.07136):

    variance = between seeds / S  +  max(0, between clusters - seeds within clusters)

* Seeds are paired: the variance between seeds is that of the S differences of seed means, so what two methods share
  (their candidates, their sampling seeds) cancels.
* Every seed answers the same prompts. The share of the prompts is therefore common to all seeds and no number of seeds
  averages it out. Prompts with one cluster label (a topic) are not independent, so the cluster is the random unit.
* The degrees of freedom are Satterthwaite's (doi 10.2307/3002019) for the sum of the two non-negative parts. They are
  never fewer than the smaller of the parts' own, S - 1 or more and K - 1.

One seed says nothing of the spread between seeds; the interval then covers prompts alone and ``method`` says so.

**Several worlds** (``worlds_S`` names the world of each row of values). Every world has its own corpus, models and
prompts, so column p of one world and column p of another are different prompts. Seeds and prompts are nested in worlds:

    variance = between worlds / W,  Student's t with W - 1 degrees of freedom

* The W numbers are the means over the seeds and prompts of a world. What varies below a world (seeds, topics, prompts)
  moves these means and is therefore inside the variance between them; it is not added a second time.
* Rows of a table are paired within a world and seed. The level of the world (how hard its prompts are, the scale of its
  reward model) is common to all rows of the table and cancels in their differences.

**Pooled variance.** Three seeds or worlds leave two degrees of freedom, and Holm's adjustment over eleven comparisons
then finds almost nothing. ``pool_seed_variance`` therefore estimates one variance from all rows of a decoding and
reward (moderated t, Smyth 2004, doi 10.2202/1544-6115.1027) and ``paired_difference(..., pooled=...)`` combines it with
the pair's own. Over worlds the rows are first centred on their mean in each world, which removes the level of the
world. Departure from Smyth: rows differ in their spread (PPO's is several times SFT's), so a pair is never given a
smaller variance than its own seeds or worlds show, and the degrees of freedom of the pooled part are bounded
(``POOLED_FREEDOM``). ``python -m benchmarks.statistics`` simulates the error rates and the power that follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from rrhf_bench.errors import DataError

Floats: TypeAlias = NDArray[np.float64]

# Bounds on the degrees of freedom of the pooled variance. They were fixed on simulated families before any report was
# made with them: with the noise of real runs a higher upper bound finds a little more, and lets one row whose spread is
# ten times the others' raise the rate of families with a false verdict above 7%.
POOLED_FREEDOM = (2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with what is needed to judge it.

    ``low`` and ``high`` bound the interval at ``level``. ``n`` counts the prompts (or items), those of one world if
    there are several; ``clusters`` the groups of prompts that count as independent (None over worlds); ``seeds`` the
    rows of values, which are training seeds, of all worlds together (1 if items have none); ``worlds`` the worlds if
    they are the random unit. ``p`` is two-sided against zero; None if no test was made. ``error`` is the standard error
    and ``freedom`` the degrees of freedom of the t statistic; None for an interval that is not Student's. ``method``
    says how the interval was made.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int
    p: float | None
    method: str
    level: float = 0.95
    error: float | None = None
    freedom: float | None = None
    clusters: int | None = None
    worlds: int | None = None

    @property
    def significant(self) -> bool:
        """Return True if p is below 1 - level or, without a p, if the interval excludes zero.

        For a family of comparisons, replace p by its adjusted value: ``dataclasses.replace(estimate, p=adjusted)``.
        """
        return not self.low <= 0.0 <= self.high if self.p is None else self.p < 1.0 - self.level

    def p_above(self, threshold: float) -> float:
        """Return the one-sided p of the claim that the true value lies above ``threshold``."""
        assert self.error is not None, "only a t statistic has a p against a threshold"
        assert self.freedom is not None
        distance = self.value - threshold
        if self.error == 0.0:  # every difference is the same number
            return float(distance <= 0.0)
        return float(special.stdtr(self.freedom, -distance / self.error))  # Student's t, faster than stats.t

    def p_below(self, threshold: float) -> float:
        """Return the one-sided p of the claim that the true value lies below ``threshold``."""
        return replace(self, value=-self.value).p_above(-threshold)


@dataclass(frozen=True, slots=True)
class SeedVariance:
    """The variance of one row's mean between training seeds, or between worlds with the level of the world removed.

    It is pooled over ``rows`` rows and has ``freedom`` degrees of freedom.
    """

    variance: float
    freedom: float
    rows: int


def pool_seed_variance(
    means_NS: Sequence[ArrayLike], *, worlds_NS: Sequence[Sequence[int]] | None = None
) -> SeedVariance | None:
    """Estimate one variance between seeds from the seed means of several rows (Smyth 2004, section 6.2).

    Each item of ``means_NS`` holds one row's mean per seed; rows may have different numbers of seeds. A row of one
    seed, and a row whose seeds agree exactly, say nothing and are left out. Returns None if fewer than two rows remain.

    The row variances s2 with d degrees of freedom are taken as s2 ~ v chi2_d / d with 1 / v ~ chi2_f / (f v0): their
    logarithms give v0 (the result's ``variance``) and f (``freedom``), which is held within ``POOLED_FREEDOM``.

    ``worlds_NS`` names the world of each seed mean. With two or more worlds the result is the variance between worlds
    of the rows' world means, centred in each world on the mean of all N rows (``_centred``). Pass every row that is
    compared, the initial policy as well: it is another model in each world. Rows that lack a world are left out.
    Returns None for fewer than three rows: two centred rows are one difference, whose variance the pair has itself.

    Over worlds ``freedom`` is at most W - 1, so that the pooled variance never outweighs the pair's own. The initial
    policy differs from trained rows far more between worlds than these among each other, and all its differences share
    its deviation. With freedom up to 4 and three worlds, up to 9% of such families held a false verdict.
    """
    rows = [_finite("pool_seed_variance", "seed means", means_S).ravel() for means_S in means_NS]
    lowest, highest = POOLED_FREEDOM
    if worlds_NS is not None and len({world for worlds_S in worlds_NS for world in worlds_S}) > 1:
        rows = _centred(rows, worlds_NS)
        if len(rows) < 3:
            return None
        own = len(rows[0]) - 1.0
        lowest, highest = min(lowest, own), min(highest, own)
    varying = [row_S for row_S in rows if len(row_S) > 1 and row_S.min() < row_S.max()]
    if len(varying) < 2:
        return None
    half_N = np.array([(len(row_S) - 1) / 2 for row_S in varying])
    # The expectation of log s2 is log v + digamma(d/2) - log(d/2), its variance trigamma(d/2).
    log_N = np.log([row_S.var(ddof=1) for row_S in varying]) - special.digamma(half_N) + np.log(half_N)
    excess = float(log_N.var(ddof=1) - special.polygamma(1, half_N).mean())
    freedom = min(max(2 * _inverse_trigamma(excess), lowest), highest)
    centre = log_N.mean() + special.digamma(freedom / 2) - math.log(freedom / 2)
    return SeedVariance(float(np.exp(centre)), freedom, len(varying))


def bootstrap_mean(
    values_SP: ArrayLike,
    *,
    rng: np.random.Generator,
    replicates: int = 2000,
    level: float = 0.95,
    clusters_P: Sequence[Hashable] | None = None,
    pooled: SeedVariance | None = None,
    worlds_S: Sequence[int] | None = None,
) -> Estimate:
    """Return the mean over seeds and prompts with a bootstrap interval, or over worlds with Student's t interval.

    ``values_SP`` is (seeds, prompts), the same prompts in every row, or (prompts,) for one seed. Seeds and clusters of
    prompts are resampled independently and each replicate takes their product (the crossed bootstrap, doi
    10.1214/07-AOAS122): prompts resampled anew within each seed would count the share that all seeds have in common S
    times. Whole clusters are resampled, not prompts within them again, which would count the spread within a cluster
    twice. Three seeds do not show their own spread to a bootstrap, so the interval of several seeds is never shorter
    than that of the t statistic (see the top of this file). Raises DataError on one prompt.

    ``worlds_S`` names the world of each row of values. Several worlds are too few to resample, so the interval is then
    that of the t statistic over worlds. ``clusters_P`` and ``pooled`` are not used: prompts lie within worlds, and the
    pooled variance leaves out the level of the world, which a single row's mean contains.
    """
    values_SP = _seeds_by_prompts("bootstrap_mean", "values", values_SP)
    if (world_S := _several_worlds("bootstrap_mean", worlds_S, len(values_SP))) is not None:
        return replace(_over_worlds(values_SP, world_S, 1, level, None), p=None)
    cluster_P, clusters = _numbered("bootstrap_mean", clusters_P, values_SP.shape[1])
    error, freedom = _error(values_SP, cluster_P, clusters, _varying([values_SP]), pooled)
    found = _student(values_SP, error, freedom, clusters, level, pooled)
    # A resample of a mean needs only how often each unit was drawn: (R, S) and (R, K) counts, not (R, S, P) values.
    seeds = len(values_SP)
    sum_SK = np.stack([np.bincount(cluster_P, row_P, clusters) for row_P in values_SP])
    count_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates)
    count_RK = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=replicates)
    size_R = count_RK @ np.bincount(cluster_P, minlength=clusters)
    mean_R = np.einsum("rs,rs->r", count_RS, count_RK @ sum_SK.T) / (seeds * size_R)
    low, high = np.quantile(mean_R, [0.5 - level / 2, 0.5 + level / 2])
    units = "prompts" if clusters == found.n else f"{clusters} clusters of prompts"
    method = f"bootstrap over {units}; one seed, so the interval leaves out the variance between seeds"
    if seeds > 1:
        low, high = min(low, found.low), max(high, found.high)
        method = f"bootstrap over seeds and {units}, crossed; at least {found.method}"
    return replace(found, low=float(low), high=float(high), p=None, error=None, freedom=None, method=method)


def paired_difference(
    a_SP: ArrayLike,
    b_SP: ArrayLike,
    *,
    rng: np.random.Generator | None = None,
    level: float = 0.95,
    clusters_P: Sequence[Hashable] | None = None,
    pooled: SeedVariance | None = None,
    worlds_S: Sequence[int] | None = None,
) -> Estimate:
    """Return the mean of a - b, paired on prompts and seeds, with the interval and p of one t statistic.

    Rows are seeds, columns the same prompts in the same order on both sides. A side without training seeds (the base
    model, the data set's replies) has one row, or one dimension, and stands against every row of the other.
    ``clusters_P`` names the cluster of each prompt; None: every prompt is its own. ``pooled`` is the variance between
    seeds of all rows that are read together (``pool_seed_variance``). See the top of this file for the statistic.

    ``worlds_S`` names the world of each row of values. With two or more worlds both sides need as many rows, row s of
    one and row s of the other being of one world and seed; ``clusters_P`` is not used. ``pooled`` then counts once for
    each side that differs between worlds, the initial policy included. A side that is the same number in every world
    (a threshold) has no world's level that could cancel, so ``pooled`` is not used.

    ``rng`` is accepted because every estimator of this file takes it; nothing is drawn. Raises DataError on sides that
    do not pair, and on one prompt.
    """
    a_SP = _seeds_by_prompts("paired_difference", "a", a_SP)
    b_SP = _seeds_by_prompts("paired_difference", "b", b_SP)
    if a_SP.shape[1] != b_SP.shape[1]:
        raise DataError(
            f"paired_difference: found {a_SP.shape[1]} prompts in a and {b_SP.shape[1]} in b; expected the same "
            "prompts in both; keep those that both have answered"
        )
    if a_SP.shape[0] != b_SP.shape[0] and 1 not in (a_SP.shape[0], b_SP.shape[0]):
        raise DataError(
            f"paired_difference: found {a_SP.shape[0]} seeds in a and {b_SP.shape[0]} in b; expected as many in both, "
            "or one in a side without training; keep the seeds that both have"
        )
    if (world_S := _several_worlds("paired_difference", worlds_S, max(len(a_SP), len(b_SP)))) is not None:
        if len(a_SP) != len(b_SP):
            raise DataError(
                f"paired_difference: found {len(a_SP)} rows in a and {len(b_SP)} in b; expected as many in both with "
                "several worlds, a row for each world and seed; repeat the side without seeds within each world"
            )
        sides = _varying([a_SP, b_SP])
        return _over_worlds(a_SP - b_SP, world_S, sides, level, pooled if sides == 2 else None)
    cluster_P, clusters = _numbered("paired_difference", clusters_P, a_SP.shape[1])
    difference_SP = a_SP - b_SP
    error, freedom = _error(difference_SP, cluster_P, clusters, _varying([a_SP, b_SP]), pooled)
    return _student(difference_SP, error, freedom, clusters, level, pooled)


def rank_correlation(
    x_P: ArrayLike, y_P: ArrayLike, *, rng: np.random.Generator, replicates: int = 2000, level: float = 0.95
) -> Estimate:
    """Spearman's correlation, average ranks for ties, with a percentile interval from a bootstrap over items.

    Raises DataError on fewer than 3 items, or where all x or all y are equal: the correlation is then undefined, not 0.
    Replicates that draw a constant side are undefined as well and left out of the interval.
    """
    x_P, y_P = _items("rank_correlation", x_P, y_P, constant_y_allowed=False)

    def spearman(x_RP: Floats, y_RP: Floats) -> Floats:
        return _correlation(stats.rankdata(x_RP, axis=1), stats.rankdata(y_RP, axis=1))

    return _over_items(spearman, x_P, y_P, "Spearman", rng, replicates, level)


def slope(
    x_P: ArrayLike, y_P: ArrayLike, *, rng: np.random.Generator, replicates: int = 2000, level: float = 0.95
) -> Estimate:
    """Least-squares slope of y on x (units of y per unit of x), with a percentile interval from a bootstrap over items.

    Raises DataError on fewer than 3 items or where all x are equal. Replicates that draw a single x have no slope and
    are left out of the interval.
    """
    x_P, y_P = _items("slope", x_P, y_P, constant_y_allowed=True)
    return _over_items(_least_squares_slope, x_P, y_P, "least squares", rng, replicates, level)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjusted p values, in the order given: the k-th smallest of m is multiplied by m - k + 1, made
    monotone and capped at 1. Holds the family-wise error rate whatever the dependence."""
    p_K = _finite("holm", "p_values", p_values)
    if p_K.ndim != 1 or p_K.min() < 0 or p_K.max() > 1:
        raise DataError(
            f"holm: found shape {p_K.shape}, range {p_K.min()} to {p_K.max()}; expected one row of p values in [0, 1]"
        )
    order = np.argsort(p_K, kind="stable")
    adjusted = np.empty_like(p_K)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_K[order] * np.arange(len(p_K), 0, -1)), 1.0)
    return adjusted


def smallest_detectable_difference(estimate: Estimate, *, power: float = 0.8) -> float:
    """Return the smallest true difference that this comparison alone would have found with probability ``power``.

    (t_(1 - alpha/2) + t_power) standard errors, alpha = 1 - level; for an estimate without a standard error, the normal
    quantiles and the error read off the interval's width. With few seeds the error is itself a rough estimate, so the
    result is an order of size. The adjustment for a family of comparisons makes it larger.
    """
    if not 0.0 < power < 1.0:
        raise DataError(f"smallest_detectable_difference: found power {power}; expected between 0 and 1, such as 0.8")
    if estimate.error is not None and estimate.freedom is not None:
        quantiles = (float(special.stdtrit(estimate.freedom, share)) for share in (0.5 + estimate.level / 2, power))
        return estimate.error * sum(quantiles)
    z = stats.norm.ppf(0.5 + estimate.level / 2)
    return float((z + stats.norm.ppf(power)) * (estimate.high - estimate.low) / (2 * z))


def expected_best_of_n(score_BN: ArrayLike, n: int, *, value_BN: ArrayLike | None = None) -> Floats:
    """Expected value of the best of n by ``score``, per prompt, (B,): the unbiased estimate from N >= n samples.

    The mean over all C(N, n) subsets of the ``value`` (the score itself by default, or a gold reward) of the subset's
    best by score: sum_i C(i-1, n-1) / C(N, n) value_(i), the samples sorted by score (arXiv 2112.09332). Tied scores
    share their weight equally, which is the average over all orders of the tied, so the result does not depend on the
    order of the samples. Its variance grows as n nears N: for claims keep n <= N / 4. Takes arrays or CPU tensors.
    Raises DataError on other shapes than (B, N), values that are not finite, n outside 1..N.
    """
    score_BN = _finite("expected_best_of_n", "score", score_BN)
    value_BN = score_BN if value_BN is None else _finite("expected_best_of_n", "value", value_BN)
    if score_BN.ndim != 2 or value_BN.shape != score_BN.shape:
        raise DataError(
            f"expected_best_of_n: found shapes {score_BN.shape} for score and {value_BN.shape} for value; "
            "expected (prompts, samples) for both"
        )
    drawn = score_BN.shape[1]
    if not 1 <= n <= drawn:
        raise DataError(
            f"expected_best_of_n: found n = {n} with {drawn} samples a prompt; expected 1 to {drawn}; draw more samples"
        )
    # The best of a random subset is among the k lowest samples with probability C(k, n) / C(N, n). A sample's weight is
    # the step of that at its score, divided by how many share the score; without ties it is C(i-1, n-1) / C(N, n).
    k = np.arange(n, drawn + 1)
    log_gamma = special.gammaln
    log_below = log_gamma(k + 1) - log_gamma(k - n + 1) - log_gamma(drawn + 1) + log_gamma(drawn - n + 1)
    below = np.concatenate([np.zeros(n), np.exp(log_below)])  # indexed by k = 0..N
    first_BN = stats.rankdata(score_BN, method="min", axis=1).astype(int) - 1  # how many samples score lower
    last_BN = stats.rankdata(score_BN, method="max", axis=1).astype(int)  # how many score no higher
    weight_BN = (below[last_BN] - below[first_BN]) / (last_BN - first_BN)
    return np.asarray((weight_BN * value_BN).sum(axis=1))


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: how far best-of-n is from the policy it draws from, KL(best-of-n || policy).

    Exact where scores have no ties and responses are drawn from a continuum; with ties or few distinct responses it is
    only an upper bound (arXiv 2401.01879), so never read it as a measured KL. Raises DataError on n < 1.
    """
    if n < 1:
        raise DataError(f"best_of_n_kl: found n = {n}; expected at least 1")
    return math.log(n) - (n - 1) / n


def _error(
    values_SP: Floats, cluster_P: NDArray[np.intp], clusters: int, sides: int, pooled: SeedVariance | None
) -> tuple[float, float]:
    """Return (standard error, degrees of freedom) of the mean of ``values_SP``; the formula stands at the top.

    ``sides`` is the number of rows whose seeds differ: 2 for a difference of two trained rows, 1 for one of a trained
    row and a fixed model. The pooled variance is that of one row and counts once for each.
    """
    seeds, prompts = values_SP.shape
    if not values_SP.any():  # a row beside itself, which no other training run would change
        return 0.0, max(seeds, clusters) - 1.0
    seed_S, prompt_P = values_SP.mean(axis=1), values_SP.mean(axis=0)
    of_cluster_K = np.bincount(cluster_P, prompt_P - prompt_P.mean(), clusters) / prompts
    between_clusters = clusters / (clusters - 1) * float((of_cluster_K**2).sum())
    if seeds == 1 or not sides:
        return math.sqrt(between_clusters), clusters - 1.0
    rest_SP = values_SP - seed_S[:, None] - prompt_P + values_SP.mean()
    cell_SK = np.stack([np.bincount(cluster_P, row_P, clusters) for row_P in rest_SP]) / prompts
    within = clusters / (seeds * (seeds - 1) * (clusters - 1)) * float((cell_SK**2).sum())
    variance, freedom = float(seed_S.var(ddof=1)), seeds - 1.0
    if pooled is not None:
        variance, freedom = _moderated(variance, freedom, sides, pooled)
    of_seeds, of_prompts = variance / seeds, max(0.0, between_clusters - within)
    total = of_seeds + of_prompts
    if total == 0.0:
        return 0.0, freedom
    return math.sqrt(total), total**2 / (of_seeds**2 / freedom + of_prompts**2 / (clusters - 1))


def _moderated(variance: float, freedom: float, sides: int, pooled: SeedVariance) -> tuple[float, float]:
    """Return a difference's own variance combined with the pooled one of each side, and the degrees of freedom."""
    both = freedom + pooled.freedom
    return max(variance, (pooled.freedom * sides * pooled.variance + freedom * variance) / both), both


def _over_worlds(
    values_SP: Floats, world_S: NDArray[np.intp], sides: int, level: float, pooled: SeedVariance | None
) -> Estimate:
    """Return the mean over worlds with the interval and the p of Student's t over the worlds' means."""
    _check_level(level)
    mean_W = _world_means(values_SP.mean(axis=1), world_S)
    worlds = len(mean_W)
    variance, freedom = float(mean_W.var(ddof=1)), worlds - 1.0
    method = f"Student's t over {worlds} worlds, with seeds and prompts inside the variance between worlds"
    if pooled is not None and values_SP.any():  # a row beside itself is the same in every other world too
        variance, freedom = _moderated(variance, freedom, sides, pooled)
        method += f", which is pooled over {pooled.rows} rows"
    value, error = float(mean_W.mean()), math.sqrt(variance / worlds)
    seeds, prompts = values_SP.shape
    return _with_interval(
        Estimate(value, value, value, prompts, seeds, None, method, level, error, freedom, worlds=worlds)
    )


def _with_interval(found: Estimate) -> Estimate:
    """Return the estimate with the interval and the p (against zero) of its standard error and freedom."""
    assert found.error is not None
    assert found.freedom is not None
    margin = found.error * float(special.stdtrit(found.freedom, 0.5 + found.level / 2))
    p = min(1.0, 2 * min(found.p_above(0.0), found.p_below(0.0)))
    return replace(found, low=found.value - margin, high=found.value + margin, p=p)


def _several_worlds(where: str, worlds_S: Sequence[int] | None, rows: int) -> NDArray[np.intp] | None:
    """Return the number of each row's world in order of first appearance, or None if all rows are of one world."""
    if worlds_S is None:
        return None
    if len(worlds_S) != rows:
        raise DataError(f"{where}: found {len(worlds_S)} worlds of {rows} rows of values; expected one of each row")
    number = {name: w for w, name in enumerate(dict.fromkeys(worlds_S))}
    return np.array([number[name] for name in worlds_S]) if len(number) > 1 else None


def _world_means(mean_S: Floats, world_S: NDArray[np.intp]) -> Floats:
    """Return the mean over the rows of each world, (W,); a world with more seeds weighs no more in what follows."""
    return np.bincount(world_S, mean_S) / np.bincount(world_S)


def _centred(rows: Sequence[Floats], worlds_NS: Sequence[Sequence[int]]) -> list[Floats]:
    """Return the world means, without the level of the world, of each row that has all worlds.

    The level of a world is the mean of the N rows in it. If the rows' own deviations are independent with variance v,
    a row less this mean has variance v (N - 1) / N. The centred rows are therefore multiplied by sqrt(N / (N - 1)), so
    that their variances have expectation v. Rounding leaves rows that differ by the level alone not quite constant;
    deviations below 1e-12 of the largest value are set to 0.
    """
    names = sorted({world for worlds_S in worlds_NS for world in worlds_S})
    means = []
    for mean_S, worlds_S in zip(rows, worlds_NS, strict=True):
        if len(mean_S) != len(worlds_S):
            raise DataError(
                f"pool_seed_variance: found {len(worlds_S)} worlds of {len(mean_S)} seed means; expected one of each"
            )
        if set(worlds_S) == set(names):
            means.append(_world_means(mean_S, np.array([names.index(name) for name in worlds_S])))
    if len(means) < 2:
        return []
    mean_NW = np.stack(means)
    deviation_NW = mean_NW - mean_NW.mean(axis=0)
    deviation_NW -= deviation_NW.mean(axis=1, keepdims=True)
    deviation_NW[np.abs(deviation_NW) < 1e-12 * np.abs(mean_NW).max()] = 0.0
    return list(deviation_NW * math.sqrt(len(means) / (len(means) - 1)))


def _student(
    values_SP: Floats, error: float, freedom: float, clusters: int, level: float, pooled: SeedVariance | None
) -> Estimate:
    """Return the mean of ``values_SP`` with the interval and the p (against zero) of Student's t."""
    _check_level(level)
    seeds, prompts = values_SP.shape
    value = float(values_SP.mean())
    units = "prompts" if clusters == prompts else f"{clusters} clusters of prompts"
    method = f"Student's t over {units}; one seed, so the interval leaves out the variance between seeds"
    if seeds > 1:
        method = f"Student's t over seeds and {units}"
        if pooled is not None:
            method += f", variance between seeds pooled over {pooled.rows} rows"
    return _with_interval(Estimate(value, value, value, prompts, seeds, None, method, level, error, freedom, clusters))


def _varying(sides: Sequence[Floats]) -> int:
    """Return how many of the (S, P) sides differ between seeds."""
    return sum(bool((side_SP != side_SP[:1]).any()) for side_SP in sides)


def _numbered(where: str, clusters_P: Sequence[Hashable] | None, prompts: int) -> tuple[NDArray[np.intp], int]:
    """Return (the number of each prompt's cluster, how many clusters there are).

    A single cluster has no spread between clusters; the prompts then count one by one, as without labels.
    """
    if prompts < 2:
        raise DataError("statistics: found 1 prompt; expected at least 2 for an interval; evaluate on more prompts")
    if clusters_P is not None and len(clusters_P) != prompts:
        raise DataError(f"{where}: found {len(clusters_P)} clusters of {prompts} prompts; expected one of each prompt")
    number = {name: k for k, name in enumerate(dict.fromkeys(clusters_P or ()))}
    if clusters_P is None or len(number) < 2:
        return np.arange(prompts), prompts
    return np.array([number[name] for name in clusters_P]), len(number)


def _inverse_trigamma(value: float) -> float:
    """Return y with trigamma(y) = value, infinity for values that are not positive (Smyth 2004, appendix)."""
    if value <= 0.0:
        return math.inf
    y = 0.5 + 1 / value
    for _ in range(50):  # Newton's method, which converges monotonically from this start
        trigamma = float(special.polygamma(1, y))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, y))
        y += step
        if -step < 1e-10 * y:
            break
    return y


def _correlation(x_RP: Floats, y_RP: Floats) -> Floats:
    """Pearson's correlation of each row; nan where a side is constant."""
    x_RP = x_RP - x_RP.mean(axis=1, keepdims=True)
    y_RP = y_RP - y_RP.mean(axis=1, keepdims=True)
    return _ratio((x_RP * y_RP).sum(axis=1), np.sqrt((x_RP**2).sum(axis=1) * (y_RP**2).sum(axis=1)))


def _least_squares_slope(x_RP: Floats, y_RP: Floats) -> Floats:
    constant_R = x_RP.min(axis=1) == x_RP.max(axis=1)  # exact, where a rounded spread need not be 0
    x_RP = x_RP - x_RP.mean(axis=1, keepdims=True)
    return _ratio((x_RP * y_RP).sum(axis=1), np.where(constant_R, 0.0, (x_RP**2).sum(axis=1)))


def _ratio(above_R: Floats, below_R: Floats) -> Floats:
    return np.divide(above_R, below_R, out=np.full_like(above_R, np.nan), where=below_R > 0)


def _over_items(
    statistic: Callable[[Floats, Floats], Floats],
    x_P: Floats,
    y_P: Floats,
    name: str,
    rng: np.random.Generator,
    replicates: int,
    level: float,
) -> Estimate:
    """Return a statistic of pairs with a bootstrap interval over them. Undefined replicates are left out."""
    _check_level(level)
    draw_RP = rng.integers(len(x_P), size=(replicates, len(x_P)))
    value = float(statistic(x_P[None], y_P[None])[0])
    low, high = np.nanquantile(statistic(x_P[draw_RP], y_P[draw_RP]), [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(value, float(low), float(high), len(x_P), 1, None, f"{name}, bootstrap over items", level)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise DataError(f"statistics: found level {level}; expected a share between 0 and 1, such as 0.95")


def _finite(where: str, name: str, values: ArrayLike) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name} is no array of numbers ({error}); expected rows of equal length") from error
    if array.size == 0:
        raise DataError(f"{where}: found no values in {name} (shape {array.shape}); expected at least one")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise DataError(
            f"{where}: found {bad} of {array.size} values in {name} not finite; expected numbers; mend their source"
        )
    return array


def _seeds_by_prompts(where: str, name: str, values: ArrayLike) -> Floats:
    array = _finite(where, name, values)
    if array.ndim not in (1, 2):
        raise DataError(f"{where}: found shape {array.shape} in {name}; expected (seeds, prompts) or (prompts,)")
    return np.atleast_2d(array)


def _items(where: str, x: ArrayLike, y: ArrayLike, *, constant_y_allowed: bool) -> tuple[Floats, Floats]:
    x_P, y_P = _finite(where, "x", x), _finite(where, "y", y)
    if x_P.ndim != 1 or x_P.shape != y_P.shape:
        raise DataError(f"{where}: found shapes {x_P.shape} and {y_P.shape}; expected two rows of equal length")
    if len(x_P) < 3:
        raise DataError(f"{where}: found {len(x_P)} items; expected at least 3")
    sides: Sequence[tuple[str, Floats]] = [("x", x_P)] if constant_y_allowed else [("x", x_P), ("y", y_P)]
    for name, side_P in sides:
        if side_P.min() == side_P.max():
            raise DataError(f"{where}: found every {name} equal to {side_P[0]}; expected values that differ")
    return x_P, y_P
