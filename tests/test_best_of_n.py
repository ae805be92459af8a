"""Best-of-n: the estimator against its definition."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.best_of_n import BestOfN, best_of_n_kl, expected_best_of_n
from baselines.best_of_n_settings import BestOfNSettings
from rrhf_bench.errors import DataError
from rrhf_bench.records import Candidates, Prompt, Response
from rrhf_bench.sampling.sampler import SamplingSpec


def by_enumeration(scores, n, values):
    """The definition: over all subsets of n samples, the value of the best by score, ties shared equally."""
    total = 0.0
    for subset in combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        winners = [values[i] for i in subset if scores[i] == best]
        total += sum(winners) / len(winners)
    return total / math.comb(len(scores), n)


def test_by_hand():
    # Scores 1, 2, 4; n = 2: the pairs (1,2) (1,4) (2,4) have maxima 2, 4, 4, mean 10/3.
    assert expected_best_of_n([[4.0, 1.0, 2.0]], 2) == pytest.approx([10 / 3])
    # Gold beside it: score 4 has gold 0, score 2 has gold 9: maxima by score carry 9, 0, 0, mean 3.
    assert expected_best_of_n([[4.0, 1.0, 2.0]], 2, value_BN=[[0.0, 5.0, 9.0]]) == pytest.approx([3.0])
    # n = 1 is the mean (7/3), n = N the best.
    assert expected_best_of_n([[4.0, 1.0, 2.0]], 1) == pytest.approx([7 / 3])
    assert expected_best_of_n([[4.0, 1.0, 2.0]], 3) == pytest.approx([4.0])
    # A tie at the top with gold 0 and 6, n = 2 of 3: pairs (tie, tie) 3, (tie, low) 0 and 6: mean 3.
    assert expected_best_of_n([[2.0, 2.0, 1.0]], 2, value_BN=[[0.0, 6.0, 100.0]]) == pytest.approx([3.0])


@settings(deadline=None)  # a busy machine is no fault
@given(
    data=st.data(),
    samples=st.integers(1, 7),
    levels=st.integers(1, 8),  # few levels: many ties; one level: all tied
)
def test_against_all_subsets(data, samples, levels):
    scores = data.draw(st.lists(st.integers(0, levels - 1).map(float), min_size=samples, max_size=samples))
    values = data.draw(st.lists(st.floats(-10, 10), min_size=samples, max_size=samples))
    for n in range(1, samples + 1):
        assert expected_best_of_n([scores], n, value_BN=[values])[0] == pytest.approx(
            by_enumeration(scores, n, values), abs=1e-9
        )


def test_prompts_are_separate_and_the_order_of_samples_is_nothing():
    rng = np.random.default_rng(0)
    score_BN = rng.integers(0, 4, size=(6, 9)).astype(float)
    value_BN = rng.normal(size=(6, 9))
    both = expected_best_of_n(score_BN, 4, value_BN=value_BN)
    assert both.shape == (6,)
    for b in range(6):
        order = rng.permutation(9)
        alone = expected_best_of_n(score_BN[b : b + 1, order], 4, value_BN=value_BN[b : b + 1, order])
        assert alone == pytest.approx(both[b : b + 1])


def test_large_counts_stay_exact():
    """C(1024, 64) overflows no float here. For scores 1..N the expected maximum is n (N + 1) / (n + 1)."""
    score_BN = np.arange(1.0, 1025.0)[None]
    for n in (1, 4, 64, 512, 1024):
        assert expected_best_of_n(score_BN, n) == pytest.approx([n * 1025 / (n + 1)], rel=1e-9)


def test_unbiased():
    """Scores uniform on [0, 1]: the best of 4 has mean 4/5. 4000 prompts x 8 samples; standard error below 0.2 / 63."""
    # 0.01 is three of those standard errors; the best of 3 or of 5 would be 0.033 or more away.
    score_BN = np.random.default_rng(1).uniform(size=(4000, 8))
    assert expected_best_of_n(score_BN, 4).mean() == pytest.approx(0.8, abs=0.01)


def test_input_is_left_alone_and_tensors_are_taken():
    torch = pytest.importorskip("torch")
    score_BN = np.array([[3.0, 1.0, 2.0]])
    before = score_BN.copy()
    assert expected_best_of_n(torch.tensor(score_BN), 2) == pytest.approx(expected_best_of_n(score_BN, 2))
    np.testing.assert_array_equal(score_BN, before)


@pytest.mark.parametrize(
    ("score", "n", "value", "message"),
    [
        ([[1.0, 2.0]], 0, None, "expected 1 to 2"),
        ([[1.0, 2.0]], 3, None, "expected 1 to 2"),
        ([1.0, 2.0], 1, None, r"found shapes \(2,\)"),
        ([[1.0, 2.0]], 1, [[1.0]], r"found shapes \(1, 2\) for score and \(1, 1\)"),
        ([[1.0, math.nan]], 1, None, "in score not finite"),
        ([[1.0, 2.0]], 1, [[1.0, math.inf]], "in value not finite"),
        (np.empty((0, 4)), 1, None, "no values in score"),
    ],
)
def test_what_cannot_be_used(score, n, value, message):
    with pytest.raises(DataError, match=message):
        expected_best_of_n(score, n, value_BN=value)


def test_kl():
    # n = 4: log 4 - 3/4 = 1.386294 - 0.75
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(0.636294, abs=1e-6)
    # methods table: 16 1.835, 64 3.175, 256 4.549, 1024 5.932
    assert [round(best_of_n_kl(n), 3) for n in (16, 64, 256, 1024)] == [1.835, 3.175, 4.549, 5.932]
    with pytest.raises(DataError, match="n = 0"):
        best_of_n_kl(0)


@pytest.mark.parametrize("n", [2, 5])
def test_kl_is_that_of_the_best_of_many_distinct_responses(n):
    """Over M equally likely responses with distinct scores the k-th has probability (k^n - (k-1)^n) / M^n."""
    outcomes = 20_000
    k = np.arange(1.0, outcomes + 1)
    best = (k / outcomes) ** n - ((k - 1) / outcomes) ** n
    kl = (best * np.log(best * outcomes)).sum()
    assert kl == pytest.approx(best_of_n_kl(n), abs=1e-8)  # 20,000 outcomes stand for a continuum: 3e-9 apart
    assert kl <= best_of_n_kl(n)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_is_found_among_rewards_that_float32_would_tie(best):
    rewards = [10.0 + 1e-9 * (i == best) for i in range(3)]
    assert len(set(np.float32(rewards))) == 1

    class Drawn:
        tokenization, identity = None, "drawn"

        def sample(self, prompts, spec):
            assert spec.n == 3
            return [Candidates(prompt, tuple(Response(f" {i}", "model") for i in range(3))) for prompt in prompts]

    class Reward:
        identity = "near ties"

        def score(self, prompts, responses):
            return np.array([rewards[int(response)] for response in responses])

    sampler = BestOfN(BestOfNSettings(n=3)).wrap(Drawn(), Reward())
    (row,) = sampler.sample([Prompt("Human: Hi\n\nAssistant:")], SamplingSpec(1, 1.0, 4, 0, "test"))
    assert [response.text for response in row.responses] == [f" {best}"]
    # The estimator from a pool compares the same numbers: the best of 3 is the one, the best of 1 their mean.
    values = [[float(i == best) for i in range(3)]]
    assert expected_best_of_n([rewards], 3, value_BN=values) == pytest.approx([1.0])
    assert expected_best_of_n([rewards], 1, value_BN=values) == pytest.approx([1 / 3])
