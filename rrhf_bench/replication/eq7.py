"""Eq. 7 of the RRHF paper: a model trained on ranked samples should score as the mean of their per-prompt maximum."""

from __future__ import annotations

from collections.abc import Iterator

from rrhf_bench.evaluation.grid import Missing
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.records import Candidates, Decoding
from rrhf_bench.report.findings import MANY, signed
from rrhf_bench.report.table import DECODING_WORDS, deciding_digits, interval, markdown
from rrhf_bench.report.view import Found, View, difference_of


def learners(view: View) -> list[tuple[str, Decoding]]:
    """Return the rows that were trained on candidates with rewards, under every decoding."""
    return [(row, decoding) for row in view.rewarded for decoding in view.decodings]


def candidate_mean(view: View, row: str) -> Found:
    """Return the mean reward of a row's training candidates."""
    return view.mean_of(view.candidates[row].grid(_mean), "candidates", "mean", row)


def candidate_maximum(view: View, row: str) -> Found:
    """Return the mean over the training prompts of the best candidate's reward."""
    return view.mean_of(view.candidates[row].grid(_maximum), "candidates", "maximum", row)


def _mean(candidates: Candidates) -> float:
    return sum(candidates.scores) / len(candidates.scores)


def _maximum(candidates: Candidates) -> float:
    return max(candidates.scores)


def unpaired_gap(view: View, row: str, decoding: Decoding) -> float | Missing:
    """Return maximum minus test reward. They are of different prompts, so there is no interval."""
    known = _values(candidate_maximum(view, row), view.mean(row, decoding, "reward"))
    return known if isinstance(known, Missing) else known[0] - known[1]


def way(view: View, row: str, decoding: Decoding, of: str | None = None) -> float | Missing:
    """Return the share of the way from the candidates' mean to their maximum that the test reward has covered.

    The test reward is that of the row, or ``of`` another one.
    """
    test_reward = view.mean(of or row, decoding, "reward")
    known = _values(candidate_mean(view, row), candidate_maximum(view, row), test_reward)
    if isinstance(known, Missing):
        return known
    mean, maximum, test = known
    return (test - mean) / (maximum - mean) if maximum > mean else Missing("all candidates score the same")


def untrained_way(view: View, row: str, decoding: Decoding) -> float | Missing:
    """Return the same share for the policy that the row started from: what the decoding gives without training."""
    return way(view, row, decoding, view.initial(row))


def _values(*found: Found) -> list[float] | Missing:
    """Return the values of estimates, or the first reason why one is missing."""
    missing = [part for part in found if isinstance(part, Missing)]
    return missing[0] if missing else [part.value for part in found if isinstance(part, Estimate)]


def paired_gap(view: View, row: str, decoding: Decoding) -> Found:
    """Return the best candidate's reward minus the row's, the same candidate policy drawn on the evaluation prompts."""
    drawn = view.test_candidates.get(row)
    if drawn is None:
        return Missing("its candidate policy was not drawn on the evaluation prompts")
    rewards, pooled = view.values(row, decoding, "reward"), view.pooled(decoding, "reward")
    return difference_of(drawn.grid(_maximum), rewards, view.clusters, pooled)


def learner_sentences(view: View) -> Iterator[str]:
    """Yield a sentence for each row, or for many rows one per decoding. Eq. 7 is tested by a claim alone
    (``best_of_n_learner``, an equivalence test), so these sentences give intervals and no verdict."""
    gaps = {learner: gap for learner in learners(view) if isinstance(gap := paired_gap(view, *learner), Estimate)}
    if len({row for row, _ in gaps}) <= MANY:
        for (row, decoding), gap in gaps.items():
            head = f"Eq. 7: **{markdown(row)}** ({DECODING_WORDS[decoding]}, exploratory)"
            share, untrained = way(view, row, decoding), untrained_way(view, row, decoding)
            if not isinstance(share, Missing):
                head += (
                    f" stands at {100 * share:.0f}% of the way from the mean to the maximum of its training candidates"
                )
            if not isinstance(untrained, Missing):
                head += f"; untrained, its policy stands at {100 * untrained:.0f}%"
            yield f"{head}. The best candidate on the same evaluation prompts minus its reward is {_words(gap)}."
        return
    for decoding in view.decodings:
        some = sorted(((row, gap) for (row, d), gap in gaps.items() if d == decoding), key=lambda item: item[1].value)
        if some:
            (low, least), (high, most) = some[0], some[-1]
            yield (
                f"Eq. 7 ({DECODING_WORDS[decoding]}, exploratory): the best candidate on the same evaluation prompts "
                f"minus the row's reward runs, over {len(some)} rows, from {_words(least)} ({markdown(low)}) to "
                f"{_words(most)} ({markdown(high)})."
            )


def _words(gap: Estimate) -> str:
    digits = deciding_digits((gap.value, gap.low, gap.high), 2, 0.0)
    return f"{signed(gap.value, digits)} {interval(gap.low, gap.high, digits)}"
