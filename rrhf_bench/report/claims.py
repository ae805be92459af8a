"""Claims in the report: a run's records as evidence, one table, a sentence a claim, a word on power."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rrhf_bench.evaluation.claims import ClaimResult, Grid, Scores, evaluate_claims
from rrhf_bench.evaluation.statistics import Floats
from rrhf_bench.records import Decoding, Evaluated
from rrhf_bench.report.table import DECODING_WORDS, Cell, Column, Missing, Table, markdown, number
from rrhf_bench.report.tables import accuracy, right
from rrhf_bench.report.view import Block, T, View
from rrhf_bench.settings.claims import Measure


class RunEvidence:
    """The records of a run, as its claims ask for them (``evaluation.claims.Evidence``)."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.decodings: tuple[Decoding, ...] = view.decodings
        self.trained: Sequence[str] = view.trained

    def clusters(self, prompts: Sequence[str]) -> Sequence[str]:
        return self.view.clusters(prompts)

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Grid | str:
        block = self.view.block(row, decoding)
        if block is None:
            return f"the run holds no {DECODING_WORDS[decoding]} replies of this row"
        for field in ("nll", "nll_tokens") if measure == "nll" else (measure,):
            missing = self.view.unmeasured(field, decoding, block.items)
            if missing:
                return missing.reason
        return self._grid(row, block, block.array(lambda reply: _value(reply, measure)))

    def candidates(self, row: str) -> Scores | str:
        block = self.view.candidates.get(row)
        if block is None:
            return "the run holds no training candidates of this row"
        if row not in self.view.rewarded:
            return "its candidates were not scored by the reward model, and other scores are on another scale"
        scores_SP = tuple(tuple(group.scores for group in groups_P) for groups_P in block.items_SP)
        return Scores(block.seeds, block.prompts, scores_SP)

    def best_candidates(self, row: str) -> Grid | str:
        block = self.view.test_candidates.get(row)
        if block is None:
            return "its candidate policy was not drawn on the evaluation prompts"
        return self._grid(row, block, block.array(lambda group: max(group.scores)))

    def accuracy(self, row: str) -> Grid | str:
        found, block = accuracy(self.view, row), self.view.pairs.get(row)
        if isinstance(found, Missing):
            return found.reason
        return self.view.absent(row).reason if block is None else self._grid(row, block, block.array(right))

    def dev_reward(self, row: str, decoding: Decoding) -> float | str:
        """Mean over seeds of the last point of the row's curve."""
        found = self.view.dev_reward(row, decoding)
        if found is None:
            return f"it has no {DECODING_WORDS[decoding]} reward on the dev prompts, by which it would be picked"
        return found

    def _grid(self, row: str, block: Block[T], values_SP: Floats) -> Grid:
        # A row that is no method is one model, or one text, for every training seed.
        return Grid(block.seeds, block.prompts, values_SP, one_model=row not in self.view.methods)


def _value(reply: Evaluated, measure: Measure) -> float:
    if measure != "nll":
        return float(getattr(reply, measure))
    assert reply.nll is not None
    return reply.nll / reply.nll_tokens if reply.nll_tokens else math.nan  # a text without tokens has no mean


def claim_results(view: View) -> list[ClaimResult]:
    """Every claim of the experiment file, in its order."""
    return evaluate_claims(view.experiment.claims, RunEvidence(view), rng_name=("report", "claims"))


def claims_table(results: Sequence[ClaimResult], arena: str) -> Table:
    columns = (
        Column("claim"),
        Column("decoding"),
        Column("statistic"),
        Column("estimate", 3, interval=True),
        Column("margin", 3),
        Column("p", 4, decides=0.05),
        Column("p (Holm)", 4, decides=0.05),
        Column("verdict"),
        Column("detectable", 3),
        Column("prompts", 0),
        Column("seeds", 0),
    )
    rows = [_row(result) for result in results]
    notes = (
        "Supported or refuted: Holm's p is below 0.05 and theta lies on the claimed or on the other side of the "
        "threshold; all else is inconclusive, which is no proof of the contrary. To reach a method is to be no worse "
        "by the margin; to come to a value is to lie within the margin on both sides of it (two one-sided tests).",
        "p: two-sided, of the distance to the threshold, from the statistic of the interval (t over training seeds and "
        "clusters of prompts; for correlations Fisher's z over rows). Holm: over all claims and decodings of this "
        "table that have a p. Intervals are at 95%, each by itself.",
        "Claims of several parts (over-optimisation and its repair) show the part that decides; the sentences have "
        "all parts. If the run has a gold reward, it decides, and not the likelihood of the text.",
        "Detectable: the distance from the threshold that this claim alone would have found four times in five; an "
        "order of size. Prompts: pairs for p_i, rows for a statistic over rows.",
    )
    return Table("claims", "Claims", columns, tuple(rows), notes, arena)


def _row(result: ClaimResult) -> tuple[Cell, ...]:
    head = (Cell(result.name), Cell(DECODING_WORDS[result.decoding] if result.decoding else "none"))
    margin, verdict = Cell(result.margin), Cell(result.verdict)
    if result.estimate is None:
        untested = Cell.of(Missing(result.reason))
        return (*head, *[untested] * 2, margin, *[untested] * 2, verdict, *[untested] * 3)
    no_test = Missing("too few rows to test")
    p, p_holm = (Cell.of(no_test if value is None else value) for value in (result.p, result.p_holm))
    assert result.detectable is not None
    detectable = Cell(result.detectable)
    sizes = (Cell(result.estimate.n), Cell(result.estimate.seeds))
    return (*head, Cell(result.statistic), Cell.of(result.estimate), margin, p, p_holm, verdict, detectable, *sizes)


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
        f"{'; '.join(parts)}. Adjusting for all claims makes each a little coarser. What is smaller than that is "
        "inconclusive here whether it is true or not."
    )
