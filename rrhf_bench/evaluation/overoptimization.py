"""The two forms of reward-model over-optimisation of Gao et al. 2210.10760, fitted to measured points.

The gain R of the gold reward over the initial policy is a function of the distance d = sqrt(KL(policy || initial)):

    "quadratic":    R(d) = d (alpha - beta d),      peak at d* = alpha / (2 beta),        for best-of-n
    "logarithmic":  R(d) = d (alpha - beta log d),  peak at d* = exp(alpha / beta - 1),   for trained policies

Both are linear in alpha and beta, so least squares has one solution. Letters: M measured points. A repetition is a
world or a training seed with its own points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rrhf_bench.errors import DataError
from rrhf_bench.evaluation.statistics import Floats

Form: TypeAlias = Literal["quadratic", "logarithmic"]
MIN_POINTS = 3  # two points fix alpha and beta and leave nothing that could contradict the form


@dataclass(frozen=True, slots=True)
class Parameter:
    """A fitted number and its interval, which is None if it cannot be estimated."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Overoptimization:
    """A form fitted to the points of one or more repetitions.

    ``alpha`` and ``beta`` are means over repetitions. ``peak`` is d* of these means, None if the gain does not fall
    again (beta <= 0) or never rises (a quadratic form with alpha <= 0). ``peak_measured`` tells if d* lies within
    ``measured``, the smallest and the largest d of the points; a peak beyond them is an extrapolation. ``error`` is the
    root mean square of what the fits leave over, ``method`` says how the intervals were made.
    """

    form: Form
    alpha: Parameter
    beta: Parameter
    peak: float | None
    peak_measured: bool
    measured: tuple[float, float]
    error: float
    points: int
    repetitions: int
    method: str

    def gain(self, distance_M: ArrayLike) -> Floats:
        """Return the gold gain that the form predicts at these distances, (M,)."""
        distance_M = np.asarray(distance_M, dtype=np.float64)
        return np.asarray(_design(self.form, distance_M) @ np.array([self.alpha.value, self.beta.value]))


def fit_overoptimization(
    form: Form,
    points: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    rng: np.random.Generator,
    replicates: int = 2000,
    level: float = 0.95,
) -> Overoptimization:
    """Fit alpha and beta by least squares to the (distance_M, gain_M) of each repetition.

    With several repetitions each is fitted by itself and the intervals are Student's t over the fitted values. With one
    repetition the intervals come from a bootstrap over its points; they then leave out the variance between
    repetitions, and resamples that do not determine alpha and beta are left out.

    Points need d > 0: both forms are 0 at d = 0, where the slope of the logarithmic form is infinite. Raises DataError
    on points that are not finite, on a d that is not positive and on fewer than three different d in a repetition.
    """
    if not 0.0 < level < 1.0:
        raise DataError(f"fit_overoptimization: found level {level}; expected a share between 0 and 1, such as 0.95")
    if not points:
        raise DataError("fit_overoptimization: found no repetition; expected the points of at least one")
    known = [_points(i, *pair) for i, pair in enumerate(points)]
    fitted_R2 = np.stack([_least_squares(form, *pair) for pair in known])
    repetitions = len(known)
    value_2 = fitted_R2.mean(axis=0)
    if repetitions > 1:
        margin_2 = special.stdtrit(repetitions - 1, 0.5 + level / 2) * fitted_R2.std(axis=0, ddof=1)
        margin_2 = margin_2 / np.sqrt(repetitions)
        low_2, high_2 = value_2 - margin_2, value_2 + margin_2
        method = f"least squares in each repetition, Student's t over {repetitions} repetitions"
    else:
        low_2, high_2 = _bootstrap(form, *known[0], rng, replicates, level)
        method = "least squares, bootstrap over points; one repetition, so the interval leaves out the others' variance"
    rest = [
        gain_M - _design(form, distance_M) @ fit_2 for (distance_M, gain_M), fit_2 in zip(known, fitted_R2, strict=True)
    ]
    distances = np.concatenate([distance_M for distance_M, _ in known])
    measured = float(distances.min()), float(distances.max())
    peak = predict_peak(form, float(value_2[0]), float(value_2[1]))
    alpha, beta = (
        Parameter(float(value), (float(low), float(high)) if np.isfinite([low, high]).all() else None)
        for value, low, high in zip(value_2, low_2, high_2, strict=True)
    )
    return Overoptimization(
        form, alpha, beta, peak, peak is not None and measured[0] <= peak <= measured[1], measured,
        float(np.sqrt(np.mean(np.concatenate(rest) ** 2))), len(distances), repetitions, method,
    )  # fmt: skip


def predict_peak(form: Form, alpha: float, beta: float) -> float | None:
    """Return the distance d* > 0 at which the form is largest, or None if it has no such maximum."""
    if beta <= 0.0:
        return None
    if form == "quadratic":
        return alpha / (2 * beta) if alpha > 0.0 else None
    exponent = alpha / beta - 1
    return float(np.exp(exponent)) if exponent < np.log(np.finfo(np.float64).max) else None


def _design(form: Form, distance_M: Floats) -> Floats:
    """Return the columns (M, 2) that alpha and beta multiply."""
    bend_M = distance_M if form == "quadratic" else np.log(distance_M)
    return np.stack([distance_M, -distance_M * bend_M], axis=-1)


def _least_squares(form: Form, distance_M: Floats, gain_M: Floats) -> Floats:
    return np.asarray(np.linalg.lstsq(_design(form, distance_M), gain_M)[0])


def _bootstrap(
    form: Form, distance_M: Floats, gain_M: Floats, rng: np.random.Generator, replicates: int, level: float
) -> tuple[Floats, Floats]:
    """Return the lower and upper bounds of (alpha, beta)."""
    draw_RM = rng.integers(len(distance_M), size=(replicates, len(distance_M)))
    fits = [
        _least_squares(form, distance_M[draw_M], gain_M[draw_M])
        for draw_M in draw_RM
        if len(np.unique(distance_M[draw_M])) > 1
    ]
    low_2, high_2 = np.quantile(np.stack(fits), [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return low_2, high_2


def _points(repetition: int, distance: ArrayLike, gain: ArrayLike) -> tuple[Floats, Floats]:
    distance_M, gain_M = np.asarray(distance, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    where = f"fit_overoptimization: repetition {repetition}"
    if distance_M.ndim != 1 or distance_M.shape != gain_M.shape:
        raise DataError(
            f"{where}: found shapes {distance_M.shape} and {gain_M.shape}; expected two rows of equal length"
        )
    if not (np.isfinite(distance_M).all() and np.isfinite(gain_M).all()):
        raise DataError(f"{where}: found values that are not finite; expected numbers; leave such points out")
    if (distance_M <= 0.0).any():
        raise DataError(f"{where}: found a distance of {distance_M.min()}; expected more than 0; leave such points out")
    if (different := len(np.unique(distance_M))) < MIN_POINTS:
        raise DataError(f"{where}: found {different} different distances; expected at least {MIN_POINTS}")
    return distance_M, gain_M
