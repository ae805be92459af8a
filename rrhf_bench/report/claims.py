"""Claims in the report: a run's records as evidence, one table, a sentence a claim, a word on power."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from rrhf_bench.evaluation.claims import ClaimResult, Scores, evaluate_claims
from rrhf_bench.evaluation.grid import Grid, Missing
from rrhf_bench.evaluation.statistics import Estimate, smallest_detectable_difference
from rrhf_bench.records import Decoding
from rrhf_bench.report.table import DECODING_WORDS, Field, Table, Value, build_table, markdown, number
from rrhf_bench.report.tables import orders
from rrhf_bench.report.view import View
from rrhf_bench.settings.claims import Measure


class RunEvidence:
    """The records of a run, as its claims ask for them (``evaluation.claims.Evidence``)."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.decodings: tuple[Decoding, ...] = view.decodings
        self.pooled_rows: Sequence[str] = view.pooled_rows
        self.clusters = view.clusters

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Grid | Missing:
        if self.view.block(row, decoding) is None:
            return Missing(f"the run holds no {DECODING_WORDS[decoding]} replies of this row")
        assert measure != "accuracy"
        assert measure != "spread"
        return self.view.values(row, decoding, measure)

    def candidates(self, row: str) -> Scores | Missing:
        block = self.view.candidates.get(row)
        if block is None:
            return Missing("the run holds no training candidates of this row")
        if row not in self.view.rewarded:
            return Missing("its candidates were not scored by the reward model, and other scores are on another scale")
        scores_SP = tuple(tuple(group.scores for group in groups_P) for groups_P in block.items_SP)
        return Scores(block.seeds, block.prompts, scores_SP, worlds=block.worlds)

    def best_candidates(self, row: str) -> Grid | Missing:
        block = self.view.test_candidates.get(row)
        if block is None:
            return Missing("its candidate policy was not drawn on the evaluation prompts")
        return block.grid(lambda group: max(group.scores), one_model=self.view.one_model(row))

    def accuracy(self, row: str) -> Grid | Missing:
        return orders(self.view, row)

    def dev_reward(self, row: str, decoding: Decoding) -> float | Missing:
        """Mean over seeds of the last point of the row's curve."""
        found = self.view.dev_reward(row, decoding)
        if found is None:
            return Missing(
                f"it has no {DECODING_WORDS[decoding]} reward on the dev prompts, by which it would be picked"
            )
        return found


def claim_results(view: View) -> list[ClaimResult]:
    """Every claim of the experiment file, in its order."""
    return evaluate_claims(view.experiment.claims, RunEvidence(view), rng_name=("report", "claims"))


def claims_table(results: Sequence[ClaimResult], arena: str) -> Table:
    few = Missing("too few rows to test")
    worlds = any(r.estimate is not None and r.estimate.worlds for r in results)

    def tested(value: Callable[[ClaimResult, Estimate], Value]) -> Callable[[ClaimResult], Value]:
        """Return the reason why a claim was not tested in place of the value."""
        return lambda r: Missing(r.reason) if r.estimate is None else value(r, r.estimate)

    fields: Sequence[Field[ClaimResult]] = (
        Field("claim", lambda r: r.name),
        Field("decoding", lambda r: DECODING_WORDS[r.decoding] if r.decoding else "none"),
        Field("statistic", tested(lambda r, _: r.statistic)),
        Field("estimate", tested(lambda _, estimate: estimate), 3, interval=True),
        Field("margin", lambda r: r.margin, 3),
        Field("p", tested(lambda r, _: few if r.p is None else r.p), 4, decides=0.05),
        Field("p (Holm)", tested(lambda r, _: few if r.p_holm is None else r.p_holm), 4, decides=0.05),
        Field("verdict", lambda r: r.verdict),
        Field("detectable", tested(lambda _, estimate: smallest_detectable_difference(estimate)), 3),
        Field("prompts", tested(lambda _, estimate: estimate.n), 0),
        Field(
            "worlds" if worlds else "seeds",
            tested(lambda _, estimate: (estimate.worlds or 1) if worlds else estimate.seeds),
            0,
        ),
    )
    notes = (
        "Supported or refuted: Holm's p is below 0.05 and theta lies on the claimed or on the other side of the "
        "threshold; all else is inconclusive, which is no proof of the contrary. To reach a method is to be no worse "
        "by the margin; to come to a value is to lie within the margin on both sides of it (two one-sided tests).",
        "p: two-sided, of the distance to the threshold, from the statistic of the interval (t over "
        f"{'worlds' if worlds else 'training seeds and clusters of prompts'}; for correlations Fisher's z over rows). "
        "Holm: over all claims and decodings of this "
        "table that have a p. Intervals are at 95%, each by itself.",
        "Claims of several parts (over-optimisation and its repair) show the part that decides; the sentences have "
        "all parts. If the run has a gold reward, it decides, and not the likelihood of the text.",
        "Detectable: the distance from the threshold that this claim alone would have found four times in five; an "
        "order of size. Prompts: pairs for p_i, rows for a statistic over rows.",
    )
    return build_table("claims", "Claims", fields, results, notes, arena)


def claim_sentences(results: Sequence[ClaimResult]) -> list[str]:
    """Markdown, one item a claim: what is claimed, and what came out under each decoding, greedy first."""
    by_name: dict[str, list[ClaimResult]] = defaultdict(list)
    for result in results:
        by_name[result.name].append(result)
    return [
        f"**{markdown(name)}.** {markdown(group[0].sentence)} "
        + " ".join(
            (f"*{DECODING_WORDS[result.decoding].capitalize()}.* " if result.decoding else "")
            + markdown(result.outcome)
            for result in group
        )
        for name, group in by_name.items()
    ]


def power_words(results: Sequence[ClaimResult]) -> str:
    """The smallest distance from a threshold that this run could have seen, by unit and decoding."""
    groups: dict[tuple[str, Decoding | None], list[float]] = defaultdict(list)
    for result in results:
        if result.detectable is not None:
            groups[result.unit, result.decoding].append(result.detectable)
    if not groups:
        return "Nothing could be tested, so that nothing could have been seen."
    parts = []
    order = {unit: i for i, unit in enumerate(dict.fromkeys(unit for unit, _ in groups))}
    for (unit, decoding), found in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1] or "")):
        least, most = number(min(found), 3), number(max(found), 3)
        size = least if least == most else f"{least} to {most}, claim by claim"
        parts.append(f"{markdown(unit)}{f', {DECODING_WORDS[decoding]}' if decoding else ''}: {size}")
    return (
        "**Power.** The smallest distance from its threshold that a claim alone would have shown four times in five: "
        f"{'; '.join(parts)}. {_adjusted_power(results)}What is smaller than that is inconclusive here whether it is "
        "true or not."
    )


def _adjusted_power(results: Sequence[ClaimResult]) -> str:
    """Return how much larger the distances are under the strictest level of Holm's adjustment, as a sentence."""
    family = sum(result.p is not None for result in results)
    found = [r.estimate for r in results if r.p is not None and r.estimate is not None and r.estimate.error]
    factors = [
        smallest_detectable_difference(replace(e, level=1 - (1 - e.level) / family)) / smallest_detectable_difference(e)
        for e in found
    ]
    if family < 2 or not factors:
        return ""
    return (
        f"Holm's adjustment over {family} tests asks the first claim that is decided for up to "
        f"{number(max(factors), 1)} times as much, and each further one for less. "
    )
