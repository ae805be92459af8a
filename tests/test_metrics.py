"""Metrics over records, worked by hand."""

import math
from dataclasses import replace

import pytest

from rrhf_bench.errors import DataError
from rrhf_bench.evaluation import metrics
from rrhf_bench.records import Candidates, Evaluated, Prompt, Response

PROMPT = Prompt("\n\nHuman: Hello\n\nAssistant:")
REPLY = Evaluated("rrhf", 0, "greedy", PROMPT, " Hi there", "eos", tokens=3, reward=-1.0)


def replies(**columns):
    """One reply per entry of the columns."""
    length = len(next(iter(columns.values())))
    return [replace(REPLY, **{name: column[i] for name, column in columns.items()}) for i in range(length)]


def candidates(*scores, texts=None):
    texts = texts or [f" reply {i}" for i in range(len(scores))]
    return Candidates(PROMPT, tuple(Response(t, "model", score=s) for t, s in zip(texts, scores, strict=True)))


def test_distinct_n():
    # Bigrams: aa, ab, ba and aa: 3 distinct of 4 (none runs over from one text to the next). Words: a and b, of 6.
    assert metrics.distinct_n(["a a b a", "a a"]) == 3 / 4
    assert metrics.distinct_n(["a a b a", "a a"], n=1) == 2 / 6
    assert metrics.distinct_n(["a", "b"]) is None
    assert metrics.distinct_n([]) is None
    assert metrics.distinct_n(iter(["a b c"]), n=3) == 1.0
    with pytest.raises(DataError, match="n = 0"):
        metrics.distinct_n(["a"], n=0)


def test_perplexity_pools_tokens_not_texts():
    # log 2 nats over 1 token, 3 log 8 over 3 tokens: pooled exp((log 2 + 9 log 2) / 4) = 2^2.5; per text (2 + 8) / 2.
    measured = replies(nll=[math.log(2), 3 * math.log(8)], nll_tokens=[1, 3])
    result = metrics.perplexity(measured)
    assert result.pooled == pytest.approx(2**2.5)
    assert result.per_text == pytest.approx(5.0)
    assert result.empty == 0


def test_an_empty_reply_has_no_perplexity_of_its_own():
    with_empty = metrics.perplexity(replies(nll=[math.log(2), 0.0], nll_tokens=[1, 0]))
    assert with_empty.pooled == pytest.approx(2.0)
    assert with_empty.per_text == pytest.approx(2.0)  # exp(0 / 0) is not 1
    assert with_empty.empty == 1
    assert metrics.perplexity(replies(nll=[0.0], nll_tokens=[0])) is None


def test_missing_is_not_zero():
    assert metrics.perplexity([REPLY]) is None
    assert metrics.mean_kl([REPLY]) is None
    assert metrics.feature_means([REPLY]) == {}


def test_half_measured_is_refused():
    with pytest.raises(DataError, match="nll: found 1 of 2"):
        metrics.perplexity(replies(nll=[1.0, None], nll_tokens=[1, 1]))
    with pytest.raises(DataError, match="kl: found 1 of 3"):
        metrics.mean_kl(replies(kl=[0.5, None, 0.0]))
    with pytest.raises(DataError, match="features: found 1 of 2"):
        metrics.feature_means(replies(features=[None, {"greeting": 1}]))
    with pytest.raises(DataError, match="greeting"):
        metrics.feature_means(replies(features=[{"thanks": 1}, {"greeting": 1}]))


def test_shares_lengths_and_means():
    rows = replies(
        finish=["stop", "length", "eos", "stop", "given"],
        tokens=[1, 2, 3, 4, 10],
        kl=[0.5, -0.5, 1.0, 0.0, 0.0],
        features=[{"thanks": t, "greeting": 1} for t in (0, 1, 2, 0, 0)],
    )
    assert metrics.fake_turn_share(rows) == 2 / 5
    assert metrics.length_share(rows) == 1 / 5
    assert metrics.mean_length(rows) == 20 / 5
    assert metrics.mean_kl(rows) == pytest.approx(1.0 / 5)
    assert metrics.feature_means(rows) == {"thanks": 3 / 5, "greeting": 1.0}


def test_candidate_statistics_by_hand():
    pool = [
        candidates(1.0, 3.0),  # max 3, std 1
        candidates(2.0, 2.0, 2.0),  # max 2, std 0, 3 tied pairs
        candidates(0.0, 4.0, 4.0, 0.0, texts=[" a", " b", " a", " a"]),  # max 4, std 2, 2 tied pairs, 2 duplicates
        candidates(0.0),  # a group of one: nothing to rank
    ]
    found = metrics.candidate_statistics(pool)
    # Pooled: 1 3 2 2 2 0 4 4 0 0: sum 18 over 10; squares 1+9+4+4+4+16+16 = 54, variance 5.4 - 1.8^2 = 2.16.
    assert found.mean == pytest.approx(1.8)
    assert found.std == pytest.approx(math.sqrt(2.16))
    assert found.max == pytest.approx((3 + 2 + 4 + 0) / 4)
    assert found.within_std == pytest.approx((1 + 0 + 2 + 0) / 4)
    assert (found.prompts, found.responses) == (4, 10)
    assert (found.pairs, found.ties) == (1 + 3 + 6 + 0, 0 + 3 + 2 + 0)
    assert found.all_equal == 2  # the second and the group of one
    assert found.duplicates == 2
    assert metrics.candidate_statistics(pool[:1]).all_equal == 0


def test_the_same_text_under_another_prompt_is_no_duplicate():
    assert metrics.candidate_statistics([candidates(1.0, texts=[" a"]), candidates(2.0, texts=[" a"])]).duplicates == 0


@pytest.mark.parametrize(
    "function",
    [
        metrics.perplexity,
        metrics.fake_turn_share,
        metrics.length_share,
        metrics.mean_length,
        metrics.mean_kl,
        metrics.feature_means,
        metrics.candidate_statistics,
    ],
)
def test_nothing_to_measure_is_an_error_not_a_zero(function):
    with pytest.raises(DataError, match="found no"):
        function([])


def test_a_prompt_without_responses_is_named():
    with pytest.raises(DataError, match=r"no response to the prompt that ends '.*Hello"):
        metrics.candidate_statistics([Candidates(PROMPT, ())])
