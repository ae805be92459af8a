"""What the released code's length bug changed: RRHF's three readings on the same candidates, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rrhf_bench.records import Decoding
from rrhf_bench.report.comparisons import compare
from rrhf_bench.report.table import DECODING_WORDS, Cell, Column, Missing, Table, interval, markdown, number
from rrhf_bench.report.tables import accuracy, likelihood_cells, right
from rrhf_bench.report.view import MEASURE_WORDS, Found, Measure, View, paired
from rrhf_bench.settings.methods import candidates_of
from rrhf_bench.training.rrhf_settings import RRHFSettings

REFERENCE = "paper"
COMPUTES: Mapping[str, str] = {
    "paper": (
        "the equations as printed: candidates are ranked by the mean log-probability of their own tokens, while the "
        "term for the best one sums over its tokens, so that a token of a reply of T tokens weighs at least T / (k - "
        "1) times as much in that term as in the ranking of k candidates"
    ),
    "intended": "the same ranking, with the mean over the best reply's tokens in the other term: both on one scale",
    "official": (
        "what the released train.py does: it overwrites the ignore marks before it counts a reply's tokens, so that "
        "both terms divide by the padded length of query and reply, which all candidates of a query share; summed "
        "log-probabilities are ranked, and a longer reply starts lower"
    ),
}
_OWN = Missing("the others are compared with this row")
_MEASURES: tuple[Measure, ...] = ("reward", "gold", "tokens")


def variant_groups(view: View) -> list[list[str]]:
    """Return the rows that differ in ``variant`` alone and train on the same candidates, ``paper`` first."""
    groups = []
    for rows in view.rows_differing_only_in("variant"):
        candidates = candidates_of(view.methods[rows[0]])
        if candidates and not candidates.refresh and candidates.rounds == 1:  # else each has sampled its own candidates
            rows = sorted(rows, key=lambda row: list(COMPUTES).index(_variant(view, row)))
            if _variant(view, rows[0]) == REFERENCE and len(rows) > 1:
                groups.append(rows)
    return groups


def _variant(view: View, row: str) -> str:
    settings = view.methods[row]
    assert isinstance(settings, RRHFSettings)
    return settings.variant


def variants_table(view: View) -> Table | None:
    """Return each reading's rewards, length, p_i accuracy and perplexity, and its paired differences to ``paper``."""
    groups = variant_groups(view)
    measures = [measure for measure in _MEASURES if measure in (*view.measures, "tokens")]
    columns = [Column("method"), Column("variant"), Column("decoding")]
    for measure in measures:
        digits = 1 if measure == "tokens" else 2
        columns += [Column(MEASURE_WORDS[measure], digits, interval=measure != "tokens")]
        columns += [Column(f"{MEASURE_WORDS[measure]}: less paper", digits, interval=True)]
    columns += [Column("p_i accuracy", 3), Column("p_i accuracy: less paper", 3, interval=True)]
    columns += [Column("PPL", 2), Column("prompts", 0), Column("seeds", 0)]
    rows = []
    for group in groups:
        found = _differences(view, group)
        orders = _accuracy_differences(view, group)
        for decoding in view.decodings:
            for row in group:
                cells = [Cell(row), Cell(_variant(view, row)), Cell(DECODING_WORDS[decoding])]
                for measure in measures:
                    cells.append(Cell.of(view.mean(row, decoding, measure)))
                    cells.append(Cell.of(found.get((row, decoding, measure), _OWN)))
                cells += [Cell.of(accuracy(view, row)), Cell.of(orders.get(row, _OWN))]
                block = view.block(row, decoding)
                ends = [Cell.of(view.absent(row))] * 3
                if block is not None:
                    ppl = likelihood_cells(view, block, row, decoding)[0]
                    ends = [ppl, Cell(len(block.prompts)), Cell(len(block.seeds))]
                rows.append((*cells, *ends))
    notes = (
        "Rows of one group differ in the variant alone: the same candidates, data order and optimiser. Less paper: "
        "paired difference over the prompts (for the accuracy: pairs) and seeds that both have, with its interval; "
        "these differences are exploratory. Length: tokens of a reply.",
        "p_i is the mean log-probability here for every row, also for the one that trained on another.",
        "No published table has this comparison: the paper prints one row, and its code computes another.",
    )
    title = "What the bug changed: three readings of the objective"
    return Table("variants", title, tuple(columns), tuple(rows), notes, view.records.arena, group=2) if rows else None


def _differences(view: View, group: Sequence[str]) -> dict[tuple[str, Decoding, Measure], Found]:
    """Return each row minus the first of its group."""
    pairs = [(row, group[0]) for row in group[1:]]
    return {(c.a, c.decoding, c.measure): c.estimate for c in compare(view, pairs, _MEASURES, primary=False)}


def _accuracy_differences(view: View, group: Sequence[str]) -> dict[str, Found]:
    """Return the difference in p_i accuracy of each row to the first of its group."""
    found: dict[str, Found] = {}
    for row in group[1:]:
        blocks = view.pairs.get(row), view.pairs.get(group[0])
        found[row] = view.absent(row)
        if blocks[0] is not None and blocks[1] is not None:
            found[row] = paired(blocks[0], right, blocks[1], right, view.clusters)
    return found


def variant_sentences(view: View) -> list[str]:
    """Return what each variant computes, then its differences in this run, as Markdown sentences."""
    groups = variant_groups(view)
    here = list(dict.fromkeys(_variant(view, row) for group in groups for row in group))
    sentences = [f"**{variant}**: {markdown(COMPUTES[variant])}." for variant in here]
    for group in groups:
        found = _differences(view, group)
        for row in group[1:]:
            parts = []
            for decoding in view.decodings:
                for measure in _MEASURES:
                    words = _words(found[row, decoding, measure], 1, 1 if measure == "tokens" else 2)
                    where = f"{MEASURE_WORDS[measure]}, {DECODING_WORDS[decoding]}"
                    parts += [f"{where}: {words}"] if words else []
            points = _words(_accuracy_differences(view, group)[row], 100, 1)
            parts += [f"p_i accuracy, in points: {points}"] if points else []
            if parts:
                sentences.append(
                    f"**{markdown(row)}** ({_variant(view, row)}) against {markdown(group[0])} ({REFERENCE}). "
                    f"{'; '.join(parts)}."
                )
    return sentences


def _words(found: Found, scale: float, digits: int) -> str | None:
    """Return the difference with its interval, times ``scale``; None if there is none."""
    if isinstance(found, Missing):
        return None
    return f"{number(scale * found.value, digits)} {interval(scale * found.low, scale * found.high, digits)}"
