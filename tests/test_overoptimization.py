"""The forms of Gao et al. 2210.10760: planted values, peaks by hand, intervals over repetitions."""

import math

import numpy as np
import pytest
from scipy import stats

from rrhf_bench.errors import DataError
from rrhf_bench.evaluation.overoptimization import fit_overoptimization, predict_peak

DISTANCE = np.linspace(0.4, 6.0, 12)


def rng(seed=0):
    return np.random.default_rng(seed)


def planted(form, alpha, beta, distance=DISTANCE):
    return distance * (alpha - beta * (distance if form == "quadratic" else np.log(distance)))


@pytest.mark.parametrize("form", ["quadratic", "logarithmic"])
def test_exact_points_give_the_planted_values(form):
    found = fit_overoptimization(form, [(DISTANCE, planted(form, 0.9, 0.4))], rng=rng())
    assert (found.alpha.value, found.beta.value) == pytest.approx((0.9, 0.4))
    assert found.alpha.interval == pytest.approx((0.9, 0.9))
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert (found.points, found.repetitions, found.measured) == (12, 1, (0.4, 6.0))
    np.testing.assert_allclose(found.gain(DISTANCE), planted(form, 0.9, 0.4))


def test_the_peaks_by_hand_and_on_the_curve():
    # 0.9 / (2 x 0.3) = 1.5, where the gain is 1.5 x (0.9 - 0.45) = 0.675; exp(0.9 / 0.3 - 1) = e^2.
    assert predict_peak("quadratic", 0.9, 0.3) == pytest.approx(1.5)
    assert predict_peak("logarithmic", 0.9, 0.3) == pytest.approx(math.e**2)
    for form in ("quadratic", "logarithmic"):
        peak = predict_peak(form, 0.9, 0.3)
        around = planted(form, 0.9, 0.3, np.array([0.99, 1.0, 1.01]) * peak)
        assert around.argmax() == 1
    # A gain that goes on rising has no peak, and one that falls from the start has none beyond 0.
    assert predict_peak("quadratic", 0.9, 0.0) is None
    assert predict_peak("logarithmic", 0.9, -0.1) is None
    assert predict_peak("quadratic", -0.1, 0.3) is None
    assert predict_peak("logarithmic", 1.0, 1e-9) is None  # beyond the largest float


@pytest.mark.parametrize(("beta", "measured"), [(0.3, True), (0.05, False)])
def test_a_peak_beyond_the_points_is_an_extrapolation(beta, measured):
    """d* is 0.9 / 0.6 = 1.5 within 0.4 to 6.0, and 0.9 / 0.1 = 9 beyond."""
    found = fit_overoptimization("quadratic", [(DISTANCE, planted("quadratic", 0.9, beta))], rng=rng())
    assert found.peak == pytest.approx(0.9 / (2 * beta))
    assert found.peak_measured is measured


def test_repetitions_are_fitted_one_by_one_with_t_over_their_values():
    """Alpha 0.8, 0.9, 1.3: mean 1, variance (0.04 + 0.01 + 0.09) / 2 = 0.07, margin t(0.975, 2) sqrt(0.07 / 3)."""
    distances = DISTANCE, DISTANCE[:5], DISTANCE[3:]
    fits = [(d, planted("logarithmic", alpha, 0.4, d)) for d, alpha in zip(distances, (0.8, 0.9, 1.3), strict=True)]
    found = fit_overoptimization("logarithmic", fits, rng=rng())
    margin = stats.t.ppf(0.975, 2) * math.sqrt(0.07 / 3)
    assert found.alpha.value == pytest.approx(1.0)
    assert found.alpha.interval == pytest.approx((1 - margin, 1 + margin))
    assert found.beta.interval == pytest.approx((0.4, 0.4))
    assert (found.points, found.repetitions) == (12 + 5 + 9, 3)
    assert found.peak == pytest.approx(math.exp(1.0 / 0.4 - 1))


@pytest.mark.parametrize("repetitions", [1, 4])
def test_intervals_cover_the_truth_and_the_other_form_fits_worse(repetitions):
    """100 draws with noise: 95% nominal; a bootstrap over 12 points covers somewhat less."""
    generator, covered = rng(1), 0
    for _ in range(100):
        noise = generator.normal(0, 0.1, size=(repetitions, 12))
        points = [(DISTANCE, planted("logarithmic", 1.0, 0.6) + noise_M) for noise_M in noise]
        found = fit_overoptimization("logarithmic", points, rng=generator, replicates=200)
        low, high = found.beta.interval
        covered += low <= 0.6 <= high
        assert fit_overoptimization("quadratic", points, rng=generator, replicates=2).error > found.error
    assert covered >= (80 if repetitions == 1 else 88)


def test_one_repetition_says_that_its_interval_leaves_the_others_out():
    points = DISTANCE, planted("logarithmic", 1.0, 0.6) + rng(3).normal(0, 0.1, 12)
    one = fit_overoptimization("logarithmic", [points], rng=rng())
    assert "one repetition" in one.method
    assert fit_overoptimization("logarithmic", [points], rng=rng()) == one
    assert "one repetition" not in fit_overoptimization("logarithmic", [points, points], rng=rng()).method


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "no repetition"),
        ([([1.0, 2.0, 3.0], [1.0, 2.0])], r"shapes \(3,\) and \(2,\)"),
        ([([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])], "a distance of 0.0"),
        ([([1.0, math.nan, 2.0], [0.0, 1.0, 2.0])], "not finite"),
        ([([1.0, 1.0, 2.0], [0.0, 1.0, 2.0])], "repetition 0: found 2 different distances"),
    ],
)
def test_what_cannot_be_fitted(points, message):
    with pytest.raises(DataError, match=message):
        fit_overoptimization("logarithmic", points, rng=rng())
