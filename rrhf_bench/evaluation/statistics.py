"""Is the difference real: intervals, paired tests and correlations over per-prompt values.

Letters: S training seeds, P prompts (or items), R replicates. Every function that draws takes its generator; nothing
here reads a global random state. Bad input (not finite, empty, shapes that do not fit) raises DataError, a ValueError.

Why the bootstrap is crossed. Every seed answers the same evaluation prompts, so a value is mean + seed + prompt + rest,
and the prompt's share is common to all seeds. Resampling prompts anew *within* each seed (the usual two-level scheme,
right where each run has its own test set) averages that common share over the seeds and makes it S times too small in
variance: simulated with 3 or 5 seeds, such 95% intervals covered 77 to 88%. So seeds and prompts are resampled
independently and each replicate takes their product (the "pigeonhole" bootstrap, doi 10.1214/07-AOAS122; arXiv
1106.2125). It errs on the safe side: the variance of the rest counts three times.

Why that is not all. Where the spread between seeds dominates, no resampling of three of them knows it: on the greedy
replies of real runs seeds have two to five times the prompts' share of the standard error, and the bootstrap alone
called two copies of one method different 8 to 19 times in 100. So an interval of several seeds is never shorter than
Student's t makes it from the variance between seeds and the few degrees of freedom of that (``_seeds_margin``): then it
is 0 to 5 times in 100. One seed tells nothing of the spread; its interval says so. Print the per-seed values beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rrhf_bench.errors import DataError

Floats: TypeAlias = NDArray[np.float64]

_ONE_SEED = "bootstrap over prompts; one seed, so the interval leaves out the variance between seeds"
_CROSSED = "bootstrap over seeds and prompts, crossed; at least Student's t on the seeds' spread"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with what is needed to judge it.

    ``low`` and ``high`` bound the percentile interval at ``level``; ``n`` counts the prompts (or items), ``seeds`` the
    training seeds (1 where items have none); ``p`` is two-sided, None where no test was made; ``method`` says how.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int
    p: float | None
    method: str
    level: float = 0.95

    @property
    def significant(self) -> bool:
        """The interval excludes zero and p, where there is one, is below 1 - level.

        Both, because p speaks of the models as trained and the interval also of training them again. For a family of
        comparisons put Holm's p in first: ``dataclasses.replace(estimate, p=adjusted)``.
        """
        return not self.low <= 0.0 <= self.high and (self.p is None or self.p < 1.0 - self.level)


def bootstrap_mean(
    values_SP: ArrayLike, *, rng: np.random.Generator, replicates: int = 2000, level: float = 0.95
) -> Estimate:
    """Mean over seeds and prompts with an interval of the crossed bootstrap, widened where seeds spread (see the top).

    ``values_SP`` is (seeds, prompts), the same prompts in every row, or (prompts,) for one seed; the interval of one
    seed is over prompts alone, and ``method`` says so. Raises DataError on one prompt: the spread is unknown.
    """
    values_SP = _seeds_by_prompts("bootstrap_mean", "values", values_SP)
    return _mean(values_SP, [values_SP], None, rng, replicates, level)


def paired_difference(
    a_SP: ArrayLike,
    b_SP: ArrayLike,
    *,
    rng: np.random.Generator,
    replicates: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Mean of a - b, paired on prompts and seeds: crossed bootstrap interval and the p of a sign-flip permutation test.

    Rows are seeds, columns the same prompts in the same order in both; a side without training seeds (the base model,
    the data set's replies) comes as one row, or one-dimensional, and stands against every row of the other.

    p flips the sign of each prompt's difference, averaged over seeds; it enumerates all 2^P flips where they are at
    most ``replicates``, and else counts the observed one in: (1 + hits) / (1 + replicates). It takes the trained models
    as given: that another training run would differ shows in the interval alone (where seeds spread as much as prompts,
    p alone calls two identical methods different 15% of the time), so read both: ``Estimate.significant``.
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
    difference_SP = a_SP - b_SP
    p = _sign_flip_p(difference_SP.mean(axis=0), rng, replicates)
    return _mean(difference_SP, [a_SP, b_SP], p, rng, replicates, level)


def rank_correlation(
    x_P: ArrayLike, y_P: ArrayLike, *, rng: np.random.Generator, replicates: int = 2000, level: float = 0.95
) -> Estimate:
    """Spearman's correlation, average ranks for ties, with a percentile interval from a bootstrap over items.

    Raises DataError on fewer than 3 items, or where all x or all y are equal: the correlation is then undefined, not 0.
    Replicates that draw a constant side are undefined as well and left out of the interval.
    """
    x_P, y_P = _items("rank_correlation", x_P, y_P, constant_y_allowed=False)
    draw_RP = rng.integers(len(x_P), size=(replicates, len(x_P)))
    rho_R = _correlation(stats.rankdata(x_P[draw_RP], axis=1), stats.rankdata(y_P[draw_RP], axis=1))
    value = _correlation(stats.rankdata(x_P)[None], stats.rankdata(y_P)[None])[0]
    return _percentiles(value, rho_R, len(x_P), 1, None, "Spearman, bootstrap over items", level)


def slope(
    x_P: ArrayLike, y_P: ArrayLike, *, rng: np.random.Generator, replicates: int = 2000, level: float = 0.95
) -> Estimate:
    """Least-squares slope of y on x (units of y per unit of x), with a percentile interval from a bootstrap over items.

    Raises DataError on fewer than 3 items or where all x are equal. Replicates that draw a single x have no slope and
    are left out of the interval.
    """
    x_P, y_P = _items("slope", x_P, y_P, constant_y_allowed=True)
    draw_RP = rng.integers(len(x_P), size=(replicates, len(x_P)))
    value = _least_squares_slope(x_P[None], y_P[None])[0]
    slope_R = _least_squares_slope(x_P[draw_RP], y_P[draw_RP])
    return _percentiles(value, slope_R, len(x_P), 1, None, "least squares, bootstrap over items", level)


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of what is left of the flattened values when the floor(n / 4) smallest and as many largest are dropped.

    As in rliable (arXiv 2108.13264). Raises DataError on empty or non-finite values.
    """
    array = _finite("interquartile_mean", "values", values).ravel()
    return float(stats.trim_mean(array, 0.25))


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


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test on decided pairs: p of wins against losses at one half. Report the ties beside it.

    No decided pair at all gives 1. Raises DataError on negative counts.
    """
    if wins < 0 or losses < 0:
        raise DataError(f"sign_test: found {wins} wins and {losses} losses; expected counts of decided pairs")
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def smallest_detectable_difference(estimate: Estimate, *, power: float = 0.8) -> float:
    """The smallest true difference that this comparison would have found with probability ``power``.

    (z_(1 - alpha/2) + z_power) standard errors, alpha = 1 - level, the standard error read off the width of the
    estimate's own interval: what made the verdict also says how fine it is. At 95% and 80% power that is 0.715 interval
    widths. It is an order of size, exact only for a normal interval; a row "no difference" is to be read with it.
    """
    if not 0.0 < power < 1.0:
        raise DataError(f"smallest_detectable_difference: found power {power}; expected between 0 and 1, such as 0.8")
    z = stats.norm.ppf(0.5 + estimate.level / 2)
    return float((z + stats.norm.ppf(power)) * (estimate.high - estimate.low) / (2 * z))


def _mean(
    values_SP: Floats,
    sides: Sequence[Floats],
    p: float | None,
    rng: np.random.Generator,
    replicates: int,
    level: float,
) -> Estimate:
    """``sides``: what ``values_SP`` is the difference of, or itself; each (S, P)."""
    seeds, prompts = values_SP.shape
    if prompts < 2:
        raise DataError("statistics: found 1 prompt; expected at least 2 for an interval; evaluate on more prompts")
    # A resample of a mean needs only how often each unit was drawn: (R, S) and (R, P) counts, not (R, S, P) values.
    count_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates)
    count_RP = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=replicates)
    mean_R = np.einsum("rs,rs->r", count_RS, count_RP @ values_SP.T) / (seeds * prompts)
    method = _CROSSED if seeds > 1 else _ONE_SEED
    found = _percentiles(float(values_SP.mean()), mean_R, prompts, seeds, p, method, level)
    margin = _seeds_margin(values_SP, sides, level)
    return replace(found, low=min(found.low, found.value - margin), high=max(found.high, found.value + margin))


def _seeds_margin(values_SP: Floats, sides: Sequence[Floats], level: float) -> float:
    """Half an interval by Student's t that knows how little few seeds tell of their spread; 0 where none has several.

    The variance of the mean is that between the seeds of each side, found from the mean squares of a two-way layout
    (nothing, where they spread no more than their prompts explain), plus that of the prompts. Its degrees of freedom
    are Satterthwaite's (doi 10.2307/3002019): S - 1 a side where seeds are all that spreads. Sides are taken as trained
    independently: a seed that two methods share makes their difference spread less, never more.
    """
    seeds, prompts = values_SP.shape
    between = [(_mean_squares(side_SP), len(side_SP)) for side_SP in sides if len(side_SP) > 1]
    if not between or not values_SP.any():  # the second: a side against itself
        return 0.0
    excess = [(s, s - rest, prompts * n, n - 1) for (s, _, rest), n in between if s > rest]
    _, of_prompts, rest = _mean_squares(values_SP)
    within = max(of_prompts, rest) / (seeds * prompts)
    variance = within + sum(more / size for _, more, size, _ in excess)
    if variance == 0.0:  # every value is the same
        return 0.0
    spread = within**2 / (prompts - 1) + sum((s / size) ** 2 / free for s, _, size, free in excess)
    return float(stats.t.ppf(0.5 + level / 2, variance**2 / spread) * np.sqrt(variance))


def _mean_squares(values_SP: Floats) -> tuple[float, float, float]:
    """(between seeds, between prompts, rest) of a two-way layout with one value a cell."""
    seeds, prompts = values_SP.shape
    mean = values_SP.mean()
    of_seed_S, of_prompt_P = values_SP.mean(axis=1) - mean, values_SP.mean(axis=0) - mean
    rest_SP = values_SP - mean - of_seed_S[:, None] - of_prompt_P
    freedom = seeds - 1, prompts - 1
    return (
        prompts * float((of_seed_S**2).sum()) / freedom[0],
        seeds * float((of_prompt_P**2).sum()) / freedom[1],
        float((rest_SP**2).sum()) / (freedom[0] * freedom[1]),
    )


def _sign_flip_p(difference_P: Floats, rng: np.random.Generator, replicates: int) -> float:
    prompts = len(difference_P)
    exact = prompts <= 30 and 2**prompts <= replicates
    if exact:
        flip_RP = np.arange(2**prompts)[:, None] >> np.arange(prompts) & 1
    else:
        flip_RP = rng.integers(2, size=(replicates, prompts))
    sum_R = np.abs((1 - 2 * flip_RP) @ difference_P)
    # Flips that tie with the observed sum must count, and float sums of the same terms differ in their last digits.
    hits = int(np.count_nonzero(sum_R >= abs(difference_P.sum()) - 1e-10 * np.abs(difference_P).sum()))
    return hits / 2**prompts if exact else (1 + hits) / (1 + replicates)


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


def _percentiles(
    value: float, replicate_R: Floats, n: int, seeds: int, p: float | None, method: str, level: float
) -> Estimate:
    if not 0.0 < level < 1.0:
        raise DataError(f"statistics: found level {level}; expected a share between 0 and 1, such as 0.95")
    low, high = np.nanquantile(replicate_R, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(float(value), float(low), float(high), n, seeds, p, method, level)


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
