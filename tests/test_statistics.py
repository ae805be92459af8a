"""Statistics equal hand-worked values and slow definitions, and keep their error rates in simulations."""

import math
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy import special, stats

from rrhf_bench.errors import DataError
from rrhf_bench.evaluation import statistics
from rrhf_bench.evaluation.statistics import (
    Estimate,
    SeedVariance,
    bootstrap_mean,
    holm,
    paired_difference,
    pool_seed_variance,
    rank_correlation,
    slope,
    smallest_detectable_difference,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def crossed(generator, *, seeds, prompts, seed_sd=0.0, prompt_sd=1.0, rest_sd=1.0):
    """Values with a seed's, a prompt's and a remaining share, of mean 0."""
    return (
        seed_sd * generator.normal(size=(seeds, 1))
        + prompt_sd * generator.normal(size=(1, prompts))
        + rest_sd * generator.normal(size=(seeds, prompts))
    )


def share(events):
    events = list(events)
    return sum(events) / len(events)


# --- intervals


def test_the_bootstrap_equals_its_enumeration(monkeypatch):
    """2 seeds x 2 prompts: 4 x 4 equally likely resamples, whose means are those of the definition.

    (Without the widening by Student's t, which is far wider on so few.)
    """
    monkeypatch.setattr(statistics, "_error", lambda *_: (0.0, 1.0))
    values = np.array([[0.0, 1.0], [2.0, 7.0]])
    means = [
        np.mean([values[s, p] for s in seeds for p in prompts])
        for seeds in product(range(2), repeat=2)
        for prompts in product(range(2), repeat=2)
    ]
    # means 0 .5 .5 1, 1 2.5 2.5 4 (twice), 2 4.5 4.5 7: the lowest and the highest have probability 1/16 = 6.25% each
    assert sorted(means) == [0, 0.5, 0.5, 1, 1, 1, 2, 2.5, 2.5, 2.5, 2.5, 4, 4, 4.5, 4.5, 7]
    at = {level: bootstrap_mean(values, rng=rng(), replicates=20_000, level=level) for level in (0.95, 0.8, 0.5)}
    assert (at[0.95].low, at[0.95].high) == (0.0, 7.0)
    assert (at[0.8].low, at[0.8].high) == (0.5, 4.5)  # 10% lies above 6.25%, below 18.75%
    assert (at[0.5].low, at[0.5].value, at[0.5].high) == (1.0, 2.5, 4.0)
    assert (at[0.5].n, at[0.5].seeds, at[0.5].p, at[0.5].level) == (2, 2, None, 0.5)


def test_the_width_is_the_standard_error_of_a_crossed_sample(monkeypatch):
    """The variance of a replicate is exactly Va/S + Vb/P + Ve/(SP) for the plain (population) variances Va of the seed
    means, Vb of the prompt means and Ve of the rest: what two independent multinomial draws give."""
    monkeypatch.setattr(statistics, "_error", lambda *_: (0.0, 1.0))
    values = crossed(rng(3), seeds=4, prompts=200, seed_sd=0.1)
    a = values.mean(axis=1) - values.mean()
    b = values.mean(axis=0) - values.mean()
    rest = values - values.mean() - a[:, None] - b
    expected = math.sqrt(a.var() / 4 + b.var() / 200 + (rest**2).mean() / 800)
    found = bootstrap_mean(values, rng=rng(), replicates=20_000)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(expected, rel=0.03)
    assert found.value == pytest.approx(values.mean())


def test_one_seed_is_a_bootstrap_over_prompts():
    values = rng(1).normal(size=50)
    one = bootstrap_mean(values, rng=rng())
    assert one == bootstrap_mean(values[None], rng=rng())
    assert "leaves out the variance between seeds" in one.method
    assert "leaves out" not in bootstrap_mean([values, values + 1], rng=rng()).method
    # the standard error of the mean of 50
    assert (one.high - one.low) / (2 * 1.96) == pytest.approx(values.std() / math.sqrt(50), rel=0.05)


def test_a_copied_seed_adds_no_prompts():
    """Three seeds that agree are one: the prompts they share do not become three times as many."""
    values = rng(1).normal(size=80)
    one = bootstrap_mean(values, rng=rng(), replicates=10_000)
    three = bootstrap_mean([values] * 3, rng=rng(1), replicates=10_000)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)


def nested_interval(values, generator, replicates=300):
    """Return the interval of a scheme that is wrong here: prompts are drawn anew within each drawn seed."""
    seeds, prompts = values.shape
    s = generator.integers(seeds, size=(replicates, seeds, 1))
    p = generator.integers(prompts, size=(replicates, seeds, prompts))
    return np.quantile(values[s, p].mean(axis=(1, 2)), [0.025, 0.975])


def test_the_interval_covers_the_mean_if_all_seeds_share_prompts():
    """300 worlds, 5 seeds, 40 prompts, true mean 0, nominal 95%. In 2000 worlds the crossed bootstrap covers 94%,
    drawing prompts within seeds 73%; here each +- 4 standard errors."""
    generator = rng(5)
    worlds = [crossed(generator, seeds=5, prompts=40, seed_sd=0.05, rest_sd=0.7) for _ in range(300)]
    intervals = [bootstrap_mean(values, rng=generator, replicates=300) for values in worlds]
    assert share(e.low <= 0 <= e.high for e in intervals) >= 0.88
    assert share(low <= 0 <= high for low, high in (nested_interval(v, generator) for v in worlds)) < 0.84


def test_the_interval_is_not_needlessly_wide():
    """Where prompts dominate, its width is that of the true standard error within 10%."""
    generator = rng(6)
    worlds = [crossed(generator, seeds=3, prompts=100, rest_sd=0.3) for _ in range(50)]
    widths = [e.high - e.low for e in (bootstrap_mean(v, rng=generator, replicates=500) for v in worlds)]
    true_error = math.sqrt((1 + 0.3**2 / 3) / 100)
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(true_error, rel=0.1)


def test_the_standard_error_equals_a_hand_worked_one():
    """2 seeds x 4 prompts in 2 clusters (the first and the last two prompts).

    a - b: seed means 1 and 3, mean 2; prompt means 0, 2, 3, 3. Variance of the seed means 2, over 2 seeds 1.
    Cluster sums of (prompt mean - 2) / 4: -1/2 and 1/2; 2 / 1 x (1/4 + 1/4) = 1 between clusters. The rest (value -
    seed mean - prompt mean + 2) is (0, 0, -1, 1) in seed 0 and the opposite in seed 1: its cluster sums are all 0.
    """
    values = np.array([[-1.0, 1.0, 1.0, 3.0], [1.0, 3.0, 5.0, 3.0]])
    assert values.mean(axis=1).tolist() == [1, 3]
    assert values.mean(axis=0).tolist() == [0, 2, 3, 3]
    found = paired_difference(values, np.zeros(4), clusters_P=["x", "x", "y", "y"])
    assert found.error == pytest.approx(math.sqrt(1 + 1))
    # Both parts are 1, with 1 degree of freedom each: 2^2 / (1 + 1) = 2.
    assert found.freedom == pytest.approx(2.0)
    assert (found.value, found.clusters, found.n, found.seeds) == (2.0, 2, 4, 2)
    assert found.high - found.value == pytest.approx(math.sqrt(2) * stats.t.ppf(0.975, 2))
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(2), 2))
    # Each prompt by itself: between prompts 4/3 x (4 + 0 + 1 + 1) / 16 = 1/2; the rest's squares are 4 over both seeds,
    # over 16 cells 1/4, x 4 / (2 x 1 x 3) = 1/6. The prompts' part is 1/2 - 1/6 = 1/3.
    alone = paired_difference(values, np.zeros(4))
    assert alone.error == pytest.approx(math.sqrt(1 + 1 / 3))
    assert alone.freedom == pytest.approx((4 / 3) ** 2 / (1 + (1 / 3) ** 2 / 3))


def test_the_pooled_variance_enters_once_a_trained_side_and_never_lowers_the_own_one():
    """Seed means differ by 2, so their variance is 2, with 1 degree of freedom; no prompt effect is left."""
    values = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    pooled = SeedVariance(variance=6.0, freedom=3.0, rows=4)
    one = paired_difference(values, np.zeros(3), pooled=pooled)
    assert one.error == pytest.approx(math.sqrt((3 * 6 + 1 * 2) / 4 / 2))
    assert one.freedom == pytest.approx(4.0)
    two = paired_difference(values, np.array([[0.0] * 3, [1e-9] * 3]), pooled=pooled)
    assert two.error == pytest.approx(math.sqrt((3 * 12 + 1 * 2) / 4 / 2))
    small = paired_difference(values, np.zeros(3), pooled=SeedVariance(0.1, 3.0, 4))
    assert small.error == pytest.approx(1.0)  # sqrt(2 / 2)
    assert "pooled over 4 rows" in one.method


def test_the_degrees_of_freedom_never_fall_below_the_seeds():
    """Two rows share their randomness. A variance that subtracts mean squares would give this difference the interval
    [-2.8e8, 2.8e8]."""
    draw = np.random.default_rng(1)
    common = draw.normal(size=(3, 300))
    a, b = (0.95 * common + 0.3 * draw.normal(size=(3, 300)) for _ in range(2))
    found = paired_difference(a, b, rng=np.random.default_rng(0))
    assert found.freedom >= 2
    true_error = math.sqrt(2 * 0.09 / 900)
    assert true_error < found.high - found.value < 8 * true_error
    for world in range(200):
        draw = rng(world)
        common = draw.normal(size=(3, 300))
        a, b = (0.9 * common + 0.4 * draw.normal(size=(3, 300)) for _ in range(2))
        assert paired_difference(a, b).freedom >= 2 - 1e-9


def test_three_seeds_that_agree_decide():
    """Seeds of -0.096, -0.104 and -0.095 are significantly lower, not within noise on 1.41 degrees of freedom."""
    of_seed = np.array([-0.096, -0.104, -0.095])
    share = crossed(rng(4), seeds=1, prompts=300, prompt_sd=0.0, rest_sd=0.5)
    rest = rng(5).normal(size=(3, 300))
    a = share + of_seed[:, None] + 0.1 * (rest - rest.mean(axis=1, keepdims=True) - rest.mean(axis=0) + rest.mean())
    found = paired_difference(a, np.broadcast_to(share, (3, 300)))
    assert found.high < 0
    assert found.significant


def test_pooling_equals_a_hand_worked_one():
    """Equal variances leave no excess over chi-square, so the degrees of freedom stand at their upper bound, and the
    pooled variance is the rows' own times exp(digamma(f/2) - log(f/2) - digamma(d/2) + log(d/2))."""
    lowest, highest = statistics.POOLED_FREEDOM
    same = pool_seed_variance([[0.0, 1.0, 2.0], [5.0, 4.0, 6.0], [1.0, 0.0, -1.0]])
    shift = special.digamma(highest / 2) - math.log(highest / 2) - special.digamma(1.0) + math.log(1.0)
    assert same is not None
    assert (same.freedom, same.rows) == (highest, 3)
    assert same.variance == pytest.approx(math.exp(shift))
    apart = pool_seed_variance([[0.0, 1e-3, 2e-3], [0.0, 1.0, 2.0], [0.0, 1e3, 2e3]])
    assert apart is not None
    assert apart.freedom == lowest  # rows this far apart tell little of each other
    # Rows of one seed and rows that do not vary say nothing; one row alone cannot be pooled.
    assert pool_seed_variance([[0.0, 1.0, 2.0], [3.0], [4.0, 4.0, 4.0]]) is None
    assert pool_seed_variance([]) is None


def test_the_inverse_of_the_trigamma_function_inverts_it():
    for y in (0.01, 0.3, 1.0, 7.0, 500.0):
        assert statistics._inverse_trigamma(float(special.polygamma(1, y))) == pytest.approx(y, rel=1e-6)
    assert statistics._inverse_trigamma(0.0) == statistics._inverse_trigamma(-1.0) == math.inf


# --- clusters of prompts


def topical(generator, *, topics=40, each=8, seeds=3, topic_sd=0.3, rest_sd=0.3):
    """Differences of mean 0 whose prompts share an effect of their topic: (values, the topic of each prompt)."""
    effect = np.repeat(topic_sd * generator.normal(size=topics), each)
    return effect + rest_sd * generator.normal(size=(seeds, topics * each)), [
        f"t{p // each}" for p in range(len(effect))
    ]


def test_prompts_of_one_topic_do_not_count_as_independent():
    """Draw 400 worlds of 320 prompts in 40 topics. Prompts taken as independent miss the truth 3 to 10 times as
    often as the 5% that the interval promises; with the topics as clusters it is 5% +- 4 standard errors."""
    generator = rng(13)
    worlds = [topical(generator) for _ in range(400)]
    zero = np.zeros(320)
    of_topics = [paired_difference(values, zero, clusters_P=topics) for values, topics in worlds]
    of_prompts = [paired_difference(values, zero) for values, _ in worlds]
    # 4 standard errors of sqrt(0.05 x 0.95 / 400) = 0.011.
    assert share(not e.low <= 0 <= e.high for e in of_topics) == pytest.approx(0.05, abs=0.044)
    assert share(not e.low <= 0 <= e.high for e in of_prompts) > 0.15
    means = [bootstrap_mean(values, rng=generator, replicates=300, clusters_P=topics) for values, topics in worlds]
    assert share(not e.low <= 0 <= e.high for e in means) <= 0.094
    assert (means[0].clusters, means[0].n) == (40, 320)


def test_the_bootstrap_resamples_whole_clusters():
    """One seed: the standard error is that of 40 topic means, not of 320 prompts."""
    values, topics = topical(rng(14), seeds=1, topic_sd=1.0)
    found = bootstrap_mean(values, rng=rng(), replicates=10_000, clusters_P=topics)
    of_topic = values.reshape(40, 8).mean(axis=1)
    # The ends of 10,000 replicates are known to about 2%, and 40 topics are not quite normal.
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(of_topic.std() / math.sqrt(40), rel=0.05)


def test_the_names_and_order_of_unequal_clusters_do_not_count():
    values, topics = topical(rng(15))
    keep = [p for p in range(320) if p % 8 < 1 + p // 8 % 5]  # one to five prompts of each topic
    a, names = values[:, keep], [topics[p] for p in keep]
    found = paired_difference(a, np.zeros(len(keep)), clusters_P=names)
    order = rng(1).permutation(len(keep))
    shuffled = paired_difference(a[:, order], np.zeros(len(keep)), clusters_P=[f"x{names[p]}" for p in order])
    assert shuffled.error == pytest.approx(found.error)
    assert shuffled.clusters == found.clusters == 40
    single = paired_difference(a, np.zeros(len(keep)), clusters_P=["one"] * len(keep))
    assert single == paired_difference(a, np.zeros(len(keep)))  # one cluster shows no spread between clusters
    with pytest.raises(DataError, match="found 3 clusters"):
        paired_difference(a, np.zeros(len(keep)), clusters_P=["x"] * 3)


# --- worlds as the random unit


def test_three_worlds_equal_a_hand_worked_result():
    """3 worlds of 2, 1 and 1 seeds, 2 prompts. a - b by row: (1, 3), (3, 5); (5, 7); (0, 2).

    World means: (2 + 4) / 2 = 3, 6 and 1; their mean 10/3 counts the world of two seeds once. Variance over worlds:
    ((-1/3)^2 + (8/3)^2 + (-7/3)^2) / 2 = (1 + 64 + 49) / 18 = 19/3; standard error sqrt(19/9), 2 degrees of freedom.
    """
    difference = np.array([[1.0, 3.0], [3.0, 5.0], [5.0, 7.0], [0.0, 2.0]])
    b = rng(1).normal(size=(4, 2))
    found = paired_difference(b + difference, b, worlds_S=[7, 7, 3, 5], clusters_P=["x", "x"])
    error = math.sqrt(19) / 3
    assert (found.value, found.error, found.freedom) == pytest.approx((10 / 3, error, 2.0))
    assert found.high - found.value == pytest.approx(4.302653 * error)  # t(0.975, 2)
    assert found.p == pytest.approx(2 * stats.t.sf(10 / 3 / error, 2))
    assert (found.n, found.seeds, found.worlds, found.clusters) == (2, 4, 3, None)
    mean = bootstrap_mean(difference, rng=rng(), worlds_S=[7, 7, 3, 5], pooled=SeedVariance(99.0, 4.0, 5))
    assert (mean.value, mean.low, mean.high) == pytest.approx((found.value, found.low, found.high))
    assert (mean.p, mean.freedom, mean.worlds) == (None, 2.0, 3)


def test_the_pooled_variance_over_worlds_counts_for_both_sides_and_cancels_only_between_two_models():
    """World differences 1, 2, 6: mean 3, variance 7, 2 degrees of freedom; pooled 5 with 2 of its own."""
    a, base = np.array([[1.0] * 2, [4.0] * 2, [9.0] * 2]), np.array([[0.0] * 2, [2.0] * 2, [3.0] * 2])
    pooled = SeedVariance(variance=5.0, freedom=2.0, rows=4)
    found = paired_difference(a, base, worlds_S=[0, 1, 2], pooled=pooled)
    assert found.error == pytest.approx(math.sqrt((2 * 2 * 5 + 2 * 7) / 4 / 3))
    assert found.freedom == 4.0
    small = paired_difference(a, base, worlds_S=[0, 1, 2], pooled=SeedVariance(0.1, 2.0, 4))
    assert small.error == pytest.approx(math.sqrt(7 / 3))  # never less than its own worlds show
    number = paired_difference(a, np.full((3, 2), 4.0), worlds_S=[0, 1, 2], pooled=pooled)
    assert number == paired_difference(a, np.full((3, 2), 4.0), worlds_S=[0, 1, 2])
    itself = paired_difference(a, a, worlds_S=[0, 1, 2], pooled=pooled)
    assert (itself.value, itself.low, itself.high, itself.p) == (0.0, 0.0, 0.0, 1.0)


def test_one_world_is_bit_for_bit_what_it_is_without_worlds():
    values, other = crossed(rng(1), seeds=3, prompts=40), crossed(rng(2), seeds=3, prompts=40)
    topics = [p // 4 for p in range(40)]
    means = [crossed(rng(i), seeds=3, prompts=5).mean(axis=1) for i in range(4)]
    pooled = pool_seed_variance(means)
    assert pool_seed_variance(means, worlds_NS=[[2] * 3] * 4) == pooled
    for b in (other, other[0]):
        expected = paired_difference(values, b, clusters_P=topics, pooled=pooled)
        assert paired_difference(values, b, clusters_P=topics, pooled=pooled, worlds_S=[2] * 3) == expected
    expected = bootstrap_mean(values, rng=rng(), clusters_P=topics, pooled=pooled)
    assert bootstrap_mean(values, rng=rng(), clusters_P=topics, pooled=pooled, worlds_S=[2] * 3) == expected
    assert expected.worlds is None


def several_worlds(seed, rows=2, worlds=3, prompts=60):
    """Values (N, W, P) of rows on worlds that differ by far more than the rows in any of them."""
    generator = rng(seed)
    level = 10 * generator.normal(size=(worlds, 1)) + 2 * generator.normal(size=(worlds, prompts))
    return level + 0.1 * generator.normal(size=(rows, worlds, 1)) + 0.1 * generator.normal(size=(rows, worlds, prompts))


def test_prompts_pair_within_their_world_and_in_no_other():
    """Columns of one world in another order on both sides change nothing; rows paired across worlds are seen."""
    a, b = several_worlds(1)
    found = paired_difference(a, b, worlds_S=[0, 1, 2])
    a_moved, b_moved = a.copy(), b.copy()
    order = rng(2).permutation(60)
    a_moved[1], b_moved[1] = a[1, order], b[1, order]
    moved = paired_difference(a_moved, b_moved, worlds_S=[0, 1, 2])
    assert (moved.value, moved.error, moved.p) == pytest.approx((found.value, found.error, found.p))
    # Without worlds column p of one world would stand beside column p of another, whose order would then count.
    crossed_found = paired_difference(a, b).error, paired_difference(a_moved, b_moved).error
    assert crossed_found[0] != pytest.approx(crossed_found[1], rel=1e-6)
    assert paired_difference(a, b[[1, 2, 0]], worlds_S=[0, 1, 2]).error > 20 * found.error
    together = paired_difference(a[[2, 0, 1]], b[[2, 0, 1]], worlds_S=[2, 0, 1])
    assert (together.value, together.error) == pytest.approx((found.value, found.error))


def test_pooling_over_worlds_equals_a_hand_worked_one():
    """Rows (0, 0, 0), (0, 3, 0), (0, 0, 3) on 3 worlds; the mean of the rows is (0, 1, 1) and the rows less this mean
    (0, -1, -1), (0, 2, -1), (0, -1, 2), of variance 1/3, 7/3, 7/3, times N / (N - 1) = 3/2: 1/2, 7/2, 7/2.

    log: mean (log(1/2) + 2 log(7/2)) / 3. With d = W - 1 = 2 degrees of freedom and f = 2, its bound at three worlds,
    digamma(d/2) - log(d/2) and digamma(f/2) - log(f/2) cancel: v = (1/2 x 49/4)^(1/3).
    """
    rows = [[0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]
    found = pool_seed_variance(rows, worlds_NS=[[0, 1, 2]] * 3)
    assert found is not None
    assert (found.variance, found.freedom, found.rows) == (pytest.approx((49 / 8) ** (1 / 3)), 2.0, 3)
    # Two seeds of one world are one mean, in whatever order; a row that lacks a world is left out.
    split = [[0.5, 3.0, 0.0, -0.5] if row == rows[1] else [row[0], row[1], row[2], row[0]] for row in rows]
    assert pool_seed_variance([*split, [9.0, 1.0]], worlds_NS=[[0, 1, 2, 0]] * 3 + [[0, 1]]) == found


def test_the_level_of_a_world_leaves_the_pooled_variance():
    rows = rng(3).normal(size=(5, 4))
    worlds = [[0, 1, 2, 3]] * 5
    found = pool_seed_variance(list(rows), worlds_NS=worlds)
    moved = pool_seed_variance(list(rows + np.array([100.0, -30.0, 0.0, 7.0])), worlds_NS=worlds)
    assert found is not None
    assert moved is not None
    assert (moved.variance, moved.freedom) == pytest.approx((found.variance, found.freedom))
    # Rows that differ by the level alone do not vary, although rounding leaves 0.1 + 0.2 beside 0.3.
    level = [0.1, 1 / 3, 0.7, 0.3]
    assert pool_seed_variance([np.add(level, row) for row in (0.1, 0.2, 0.7)], worlds_NS=worlds[:3]) is None
    # Two centred rows are one difference, of which nobody learns more.
    assert pool_seed_variance(list(rows[:2]), worlds_NS=worlds[:2]) is None


def test_the_pooled_variance_over_worlds_is_that_of_one_row():
    """300 families of 6 rows on 5 worlds, deviations of variance 4; without N / (N - 1) = 6/5 it would be 3.3."""
    generator, found = rng(4), []
    for _ in range(300):
        means_NW = 9 * generator.normal(size=5) + 2 * generator.normal(size=(6, 5))
        found.append(pool_seed_variance(list(means_NW), worlds_NS=[range(5)] * 6))
    # Rows that vary alike have f at its bound, 4; v0 is then below their variance by this factor, as in Smyth's model.
    below = math.exp(special.digamma(2.0) - math.log(2.0))
    # Over twelve other seeds the median had a standard deviation of 2.5% and lay 3.5% above 4 on average: the factor is
    # near, not exact. Without N / (N - 1) it would be 17% lower.
    assert np.median([e.variance for e in found if e.freedom == 4.0]) / below == pytest.approx(4.0, rel=0.05)


def test_equal_rows_of_several_worlds_are_told_apart_at_the_nominal_rate():
    """400 draws of 3 worlds: 5% +- 4 standard errors. Three seeds of one world tell them apart far more often."""
    generator, found, of_one = rng(20), [], []
    for _ in range(400):
        level = 3 * generator.normal(size=(3, 1))
        a, b = (level + crossed(generator, seeds=3, prompts=40, seed_sd=0.3, prompt_sd=0.0) for _ in range(2))
        found.append(paired_difference(a, b, worlds_S=range(3)))
        of_one.append(paired_difference(a[0] - b[0] + 0.05 * generator.normal(size=(3, 40)), np.zeros(40)))
    # 4 standard errors of sqrt(0.05 x 0.95 / 400) = 0.011.
    assert share(e.p <= 0.05 for e in found) == pytest.approx(0.05, abs=0.044)
    assert share(e.p <= 0.05 for e in of_one) > 0.2


# --- paired differences


def test_one_seed_is_the_paired_t_test_of_scipy():
    a, b = rng(2).normal(0.5, 1.0, size=40), rng(3).normal(size=40)
    found = paired_difference(a, b)
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert "leaves out the variance between seeds" in found.method


def test_interval_and_p_are_one_statistic():
    """p against a threshold is below 5% if and only if the threshold lies outside the 95% interval."""
    for world in range(100):
        draw = rng(world)
        a, b = (crossed(draw, seeds=3, prompts=40, seed_sd=0.2) for _ in range(2))
        found = paired_difference(a, b)
        for threshold in (-0.3, 0.0, 0.3):
            two_sided = 2 * min(found.p_above(threshold), found.p_below(threshold))
            assert (two_sided < 0.05) == (not found.low <= threshold <= found.high)
            assert found.p_above(threshold) + found.p_below(threshold) == pytest.approx(1.0)
        assert found.p == pytest.approx(2 * min(found.p_above(0.0), found.p_below(0.0)))


def test_a_difference_that_is_the_same_number_everywhere_is_certain():
    found = paired_difference(np.full((3, 9), 5.0), np.full((3, 9), 4.0))
    assert (found.value, found.low, found.high, found.p) == (1.0, 1.0, 1.0, 0.0)
    assert (found.p_above(1.0), found.p_below(1.0)) == (1.0, 1.0)  # it is neither above nor below


def test_pairing_takes_the_prompts_own_level_out():
    """Prompts differ by 10, methods by 0.1: seen paired, and not when one side's prompts are in another order."""
    level = 10 * rng(1).normal(size=200)
    a, b = level + 0.1 + 0.2 * rng(2).normal(size=200), level + 0.2 * rng(3).normal(size=200)
    assert paired_difference(a, b, rng=rng()).significant
    assert not paired_difference(a, rng(4).permutation(b), rng=rng()).significant


def test_a_side_without_seeds_pairs_with_every_seed():
    a, b = crossed(rng(1), seeds=3, prompts=30), rng(2).normal(size=30)
    expected = paired_difference(a, np.array([b, b, b]), rng=rng())
    assert paired_difference(a, b, rng=rng()) == expected
    assert paired_difference(a, b[None], rng=rng()) == expected
    assert expected.seeds == 3
    assert expected.n == 30
    reverse = paired_difference(b, a, rng=rng())
    assert (reverse.value, reverse.seeds) == (pytest.approx(-expected.value), 3)


def test_a_method_against_itself_is_no_difference():
    values = crossed(rng(1), seeds=3, prompts=30)
    found = paired_difference(values, values, rng=rng())
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert not found.significant


def differences(generator, worlds, *, effect=0.0, seed_sd=0.0):
    """Two methods on 60 shared prompts, 3 seeds each, apart by the effect."""
    for _ in range(worlds):
        level = 2 * generator.normal(size=60)
        a = level + effect + crossed(generator, seeds=3, prompts=60, seed_sd=seed_sd)
        b = level + crossed(generator, seeds=3, prompts=60, seed_sd=seed_sd)
        yield paired_difference(a, b)


@pytest.mark.parametrize("seed_sd", [0.0, 0.05, 0.25])
def test_two_copies_of_a_method_are_called_different_at_the_nominal_rate(seed_sd):
    """A/A, 600 worlds: p <= 0.05 in 5% +- 4 standard errors of 0.9%, however far seeds spread, and p is as likely below
    one half as above."""
    found = list(differences(rng(7), 600, seed_sd=seed_sd))
    # 4 standard errors of sqrt(0.05 x 0.95 / 600) = 0.009.
    assert share(e.p <= 0.05 for e in found) == pytest.approx(0.05, abs=0.036)
    assert share(e.p <= 0.5 for e in found) == pytest.approx(0.5, abs=0.1)
    assert [e.significant for e in found] == [e.p < 0.05 for e in found]


@pytest.mark.parametrize("correlation", [0.6, 0.9])
def test_rows_that_share_their_randomness_keep_the_rate(correlation):
    """Same candidates and sampling seeds: 600 worlds, 5% +- 4 standard errors, and no interval is of any width."""
    generator, found = rng(16), []
    for _ in range(600):
        common = crossed(generator, seeds=3, prompts=60, seed_sd=0.1)
        sides = [
            math.sqrt(correlation) * common + math.sqrt(1 - correlation) * crossed(generator, seeds=3, prompts=60)
            for _ in range(2)
        ]
        found.append(paired_difference(*sides))
    # 4 standard errors of sqrt(0.05 x 0.95 / 600) = 0.009.
    assert share(not e.low <= 0 <= e.high for e in found) == pytest.approx(0.05, abs=0.036)
    widths = np.array([e.high - e.low for e in found])
    assert widths.max() < 8 * np.median(widths)


def test_a_planted_difference_is_found():
    """Standard error of the difference: prompts sqrt(2/60), rest sqrt(2/180), together 0.21; 0.9 is 4.3 of them."""
    assert share(e.significant for e in differences(rng(9), 100, effect=0.9)) >= 0.9


def test_significance_is_read_from_p_or_else_from_the_interval():
    found = Estimate(0.2, 0.1, 0.3, n=9, seeds=1, p=0.04, method="")
    assert found.significant
    assert not replace(found, p=0.06).significant
    assert not replace(found, level=0.99).significant
    assert replace(found, p=None).significant
    assert not replace(found, p=None, low=-0.1).significant
    assert not replace(found, p=None, low=0.0).significant


def test_the_smallest_detectable_difference_equals_a_hand_worked_one():
    # Half width 1.96 is one standard error: (1.960 + 0.842) x 1 = 2.80.
    one = Estimate(0.0, -1.959964, 1.959964, n=9, seeds=1, p=None, method="")
    assert smallest_detectable_difference(one) == pytest.approx(2.8016, abs=1e-4)
    assert smallest_detectable_difference(one, power=0.5) == pytest.approx(1.959964)
    # With a standard error and its degrees of freedom: t quantiles, 2.776 + 0.941 at 4 degrees.
    two = Estimate(0.0, -9.0, 9.0, n=9, seeds=3, p=None, method="", error=0.5, freedom=4.0)
    assert smallest_detectable_difference(two) == pytest.approx(0.5 * (2.7764 + 0.9410), abs=1e-4)
    with pytest.raises(DataError, match="power 80"):
        smallest_detectable_difference(one, power=80)


def test_a_difference_of_that_size_is_found_four_times_in_five():
    """300 worlds of one seed and 100 prompts; 0.8 +- 4 standard errors of 0.023."""
    generator = rng(10)

    def found(effect):
        return paired_difference(effect + generator.normal(size=100), np.zeros(100))

    size = np.mean([smallest_detectable_difference(found(0.0)) for _ in range(50)])
    assert share(found(size).significant for _ in range(300)) == pytest.approx(0.8, abs=0.1)


# --- correlation, slope, other tests


def test_the_rank_correlation_with_ties_equals_a_hand_worked_one():
    # x ranks 1, 2.5, 2.5, 4; y ranks 1, 3, 2, 4. Centred x: -1.5 0 0 1.5, y: -1.5 .5 -.5 1.5.
    # Sum of products 4.5; squares 4.5 and 5: 4.5 / sqrt(22.5) = 0.948683.
    found = rank_correlation([0, 1, 1, 9], [0, 6, 5, 7], rng=rng())
    assert found.value == pytest.approx(0.948683, abs=1e-6)
    assert (found.n, found.p) == (4, None)


def test_the_rank_correlation_is_that_of_scipy():
    generator = rng(4)
    x = generator.integers(0, 6, size=40)
    y = x + generator.integers(0, 6, size=40)
    found = rank_correlation(x, y, rng=generator)
    assert found.value == pytest.approx(stats.spearmanr(x, y)[0])
    assert found.low < found.value < found.high
    assert rank_correlation(np.exp(x), y**3, rng=rng()).value == pytest.approx(found.value)
    assert rank_correlation(-x, y, rng=rng()).value == pytest.approx(-found.value)
    slow = [stats.spearmanr(x[i], y[i])[0] for i in generator.integers(40, size=(500, 40))]
    assert (found.low, found.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.05)


def test_undefined_replicates_leave_the_interval_finite():
    """Three items: one draw in nine is a single item three times over, or leaves one side constant."""
    for found in (rank_correlation([1, 2, 3], [1, 3, 2], rng=rng()), slope([0.1, 0.2, 0.3], [1, 3, 2], rng=rng())):
        assert math.isfinite(found.low)
        assert math.isfinite(found.high)
    # Every slope that exists here is 6 / 0.6; 8 of 27 draws are three times x = 0.1, whose float mean is not 0.1.
    found = slope([0.1, 0.1, 0.7], [0, 0, 6], rng=rng())
    assert (found.value, found.low, found.high) == pytest.approx((10.0, 10.0, 10.0))


def test_the_slope_equals_a_hand_worked_one():
    # x 0 1 2 3, centred -1.5 -.5 .5 1.5 (squares 5); y 1 0 4 3: 1.5 (3 - 1) + .5 (4 - 0) = 5: slope 1.
    assert slope([0, 1, 2, 3], [1, 0, 4, 3], rng=rng()).value == pytest.approx(1.0)
    exact = slope([0.1, 0.2, 0.3, 0.7], [1.2, 1.4, 1.6, 2.4], rng=rng())  # y = 1 + 2 x
    assert (exact.value, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    flat = slope([0, 1, 2, 3], [5, 5, 5, 5], rng=rng())
    assert (flat.value, flat.low, flat.high) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_slope_covers_it():
    """300 lines of slope 2 through 40 noisy points: nominal 95%, at least 0.89 (under-coverage of a percentile interval
    at n = 40 included)."""
    generator = rng(11)
    x = np.arange(40.0)
    intervals = [slope(x, 2 * x + generator.normal(0, 5, 40), rng=generator, replicates=300) for _ in range(300)]
    assert 0.89 <= share(e.low <= 2 <= e.high for e in intervals) <= 0.99


def test_holm_equals_a_hand_worked_one():
    # Sorted .01 .03 .04 x 3 2 1 = .03 .06 .04, made monotone: .03 .06 .06.
    assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    with pytest.raises(DataError, match=r"range -0\.1 to 0\.5"):
        holm([0.5, -0.1])


# --- what every function promises


DRAWN = {
    "bootstrap_mean": lambda generator: bootstrap_mean(crossed(rng(1), seeds=2, prompts=20), rng=generator),
    "rank_correlation": lambda generator: rank_correlation(np.arange(9.0), np.arange(9.0) % 4, rng=generator),
    "slope": lambda generator: slope(np.arange(9.0), np.arange(9.0) % 4, rng=generator),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_the_generator_decides_and_nothing_global(draw):
    first = draw(rng(3))
    np.random.seed(0)
    np.random.random(17)
    assert draw(rng(3)) == first
    assert draw(rng(4)) != first


def test_arguments_are_left_alone():
    a, b = crossed(rng(1), seeds=2, prompts=20), rng(2).normal(size=20)
    before = a.copy(), b.copy()
    paired_difference(a, b, rng=rng())
    rank_correlation(a[0], b, rng=rng())
    slope(a[0], b, rng=rng())
    holm_input = np.array([0.3, 0.01])
    holm(holm_input)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])
    np.testing.assert_array_equal(holm_input, [0.3, 0.01])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([1.0, math.nan, 2.0], rng=rng()), "found 1 of 3 values in values not finite"),
        (lambda: bootstrap_mean([], rng=rng()), "found no values"),
        (lambda: bootstrap_mean([1.0], rng=rng()), "found 1 prompt; expected at least 2"),
        (lambda: bootstrap_mean(np.zeros((2, 2, 2)), rng=rng()), r"expected \(seeds, prompts\)"),
        (lambda: bootstrap_mean([[1.0, 2.0], [1.0]], rng=rng()), "no array of numbers"),  # type: ignore[list-item]
        (lambda: bootstrap_mean([1.0, 2.0], rng=rng(), level=95), "found level 95"),
        (lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], rng=rng()), "found 2 prompts in a and 3 in b"),
        (lambda: paired_difference(np.ones((2, 4)), np.ones((3, 4)), rng=rng()), "found 2 seeds in a and 3 in b"),
        (lambda: paired_difference(np.ones((2, 4)), np.ones((2, 4)), worlds_S=[0, 1, 2]), "3 worlds of 2 rows"),
        (lambda: paired_difference(np.ones((2, 4)), np.ones(4), worlds_S=[0, 1]), "found 2 rows in a and 1 in b"),
        (lambda: bootstrap_mean(np.ones((2, 4)), rng=rng(), worlds_S=[0]), "found 1 worlds of 2 rows"),
        (lambda: pool_seed_variance([[1.0, 2.0]] * 3, worlds_NS=[[0, 1, 2]] * 3), "found 3 worlds of 2 seed means"),
        (lambda: paired_difference([1.0, math.inf], [1.0, 2.0], rng=rng()), "values in a not finite"),
        (lambda: rank_correlation([1, 2], [1, 2], rng=rng()), "found 2 items"),
        (lambda: rank_correlation([1, 2, 3], [1, 2], rng=rng()), "expected two rows of equal length"),
        (lambda: rank_correlation([1, 2, 3], [4, 4, 4], rng=rng()), "every y equal to 4"),
        (lambda: slope([2, 2, 2], [1, 2, 3], rng=rng()), "every x equal to 2"),
        (lambda: holm([]), "found no values"),
    ],
)
def test_values_that_cannot_be_used_are_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_the_statistics_of_a_report_take_seconds():
    """30 means of 3 seeds x 300 prompts at 2000 replicates and as many differences: under 5 s (about 1 s alone)."""
    a, b = crossed(rng(1), seeds=3, prompts=300), crossed(rng(2), seeds=3, prompts=300)
    generator = rng()
    start = time.process_time()
    for _ in range(30):
        paired_difference(a, b)
        bootstrap_mean(a, rng=generator)
    assert time.process_time() - start < 5
