"""Eq. 7 of the RRHF paper: the reward of a trained row against the best of its training candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rrhf_bench.evaluation.grid import Missing
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.records import Candidates, Decoding
from rrhf_bench.report.findings import MANY, signed
from rrhf_bench.report.table import DECODING_WORDS, deciding_digits, interval, markdown
from rrhf_bench.report.view import Found, View, difference_of


@dataclass(frozen=True, slots=True)
class BestOfNLearner:
    """2304.05302 Eq. 7: a model trained on ranked samples should score as the mean of their per-prompt maximum.

    ``mean`` and ``maximum`` are of the training candidates, ``test`` the trained model's reward. ``paired_gap`` takes
    the maximum from the same candidate policy on the evaluation prompts and subtracts the model's reward on each.
    """

    row: str
    decoding: Decoding
    mean: Found
    maximum: Found
    test: Found
    paired_gap: Found

    @property
    def gap(self) -> float | Missing:
        """Maximum minus test reward. On different prompts, so it has no interval; ``paired_gap`` has one."""
        if isinstance(self.maximum, Missing):
            return self.maximum
        return self.test if isinstance(self.test, Missing) else self.maximum.value - self.test.value

    @property
    def way(self) -> float | Missing:
        """The share of the way from the candidates' mean to their maximum that the test reward has covered."""
        for part in (self.mean, self.maximum, self.test):
            if isinstance(part, Missing):
                return part
        assert isinstance(self.mean, Estimate)
        assert isinstance(self.maximum, Estimate)
        assert isinstance(self.test, Estimate)
        spread = self.maximum.value - self.mean.value
        return (self.test.value - self.mean.value) / spread if spread else Missing("all candidates score the same")


def best_of_n_learners(view: View) -> list[BestOfNLearner]:
    """One a decoding for each row that was trained on candidates."""
    found = []
    for row in view.rewarded:
        mean, maximum = candidate_mean(view, row), candidate_maximum(view, row)
        for decoding in view.decodings:
            test = view.mean(row, decoding, "reward")
            gap = _paired_gap(view, row, decoding)
            found.append(BestOfNLearner(row, decoding, mean, maximum, test, gap))
    return found


def candidate_mean(view: View, row: str) -> Found:
    return view.mean_of(view.candidates[row].grid(_mean), "candidates", "mean", row)


def candidate_maximum(view: View, row: str) -> Found:
    return view.mean_of(view.candidates[row].grid(_maximum), "candidates", "maximum", row)


def _mean(candidates: Candidates) -> float:
    return sum(candidates.scores) / len(candidates.scores)


def _maximum(candidates: Candidates) -> float:
    return max(candidates.scores)


def _paired_gap(view: View, row: str, decoding: Decoding) -> Found:
    drawn = view.test_candidates.get(row)
    if drawn is None:
        return Missing("its candidate policy was not drawn on the evaluation prompts")
    rewards, pooled = view.values(row, decoding, "reward"), view.pooled(decoding, "reward")
    return difference_of(drawn.grid(_maximum), rewards, view.clusters, pooled)


def learner_sentences(view: View, learners: Sequence[BestOfNLearner]) -> Iterator[str]:
    """Yield a sentence for each row, or for many rows one per decoding. Eq. 7 is tested by a claim alone
    (``best_of_n_learner``, an equivalence test), so these sentences give intervals and no verdict."""
    found = [learner for learner in learners if isinstance(learner.paired_gap, Estimate)]
    if len({learner.row for learner in found}) <= MANY:
        yield from map(_learner, found)
        return
    for decoding in view.decodings:
        some = [learner for learner in found if learner.decoding == decoding]
        some.sort(key=lambda learner: _gap(learner).value)
        if some:
            yield (
                f"Eq. 7 ({DECODING_WORDS[decoding]}, exploratory): the best candidate on the same evaluation prompts "
                f"minus the row's reward runs, over {len(some)} rows, from {_gap_words(some[0])} "
                f"({markdown(some[0].row)}) to {_gap_words(some[-1])} ({markdown(some[-1].row)})."
            )


def _gap(learner: BestOfNLearner) -> Estimate:
    assert isinstance(learner.paired_gap, Estimate)
    return learner.paired_gap


def _gap_words(learner: BestOfNLearner) -> str:
    gap = _gap(learner)
    digits = deciding_digits((gap.value, gap.low, gap.high), 2, 0.0)
    return f"{signed(gap.value, digits)} {interval(gap.low, gap.high, digits)}"


def _learner(learner: BestOfNLearner) -> str:
    way = learner.way
    head = f"Eq. 7: **{markdown(learner.row)}** ({DECODING_WORDS[learner.decoding]}, exploratory)"
    if not isinstance(way, Missing):
        head += f" stands at {100 * way:.0f}% of the way from the mean to the maximum of its training candidates"
    return f"{head}. The best candidate on the same evaluation prompts minus its reward is {_gap_words(learner)}."
