"""What the released code's length bug changed: RRHF's three readings on the same candidates, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rrhf_bench.evaluation.grid import Missing
from rrhf_bench.records import Decoding
from rrhf_bench.report.table import DECODING_WORDS, Field, Table, Value, build_table, interval, markdown, number
from rrhf_bench.report.tables import accuracy, orders, perplexity, sizes
from rrhf_bench.report.view import MEASURE_WORDS, Found, Measure, View, difference_of
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
Line = tuple[str, Decoding, str]  # a row under a decoding, and the row that it is compared with
_OWN = Missing("the others are compared with this row")
_MEASURES: tuple[Measure, ...] = ("reward", "gold", "tokens")


def variant_groups(view: View) -> list[list[str]]:
    """Return the rows that differ in ``variant`` alone and train on the same candidates, ``paper`` first."""
    groups = []
    for rows in view.rows_differing_only_in("variant"):
        candidates = candidates_of(view.methods[rows[0]])
        if not isinstance(view.methods[rows[0]], RRHFSettings):
            continue  # another method's key of the same name
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
    measures = [measure for measure in _MEASURES if measure in (*view.measures, "tokens")]

    def less(line: Line, measure: Measure) -> Value:
        row, decoding, first = line
        return _OWN if row == first else view.difference(row, first, decoding, measure)

    def of_measure(measure: Measure) -> Iterator[Field[Line]]:
        words, digits, interval = MEASURE_WORDS[measure], 1 if measure == "tokens" else 2, measure != "tokens"
        yield Field(words, lambda line: view.mean(line[0], line[1], measure), digits, interval)
        yield Field(f"{words}: less paper", lambda line: less(line, measure), digits, interval=True)

    fields: Sequence[Field[Line]] = (
        Field("method", lambda line: line[0]),
        Field("variant", lambda line: _variant(view, line[0])),
        Field("decoding", lambda line: DECODING_WORDS[line[1]]),
        *(field for measure in measures for field in of_measure(measure)),
        Field("p_i accuracy", lambda line: accuracy(view, line[0]), 3),
        Field("p_i accuracy: less paper", lambda line: _less_accurate(view, line[0], line[2]), 3, interval=True),
        Field("PPL", lambda line: perplexity(view, line[0], line[1]), 2),
        *sizes(view),
    )
    lines = [
        (row, decoding, group[0]) for group in variant_groups(view) for decoding in view.decodings for row in group
    ]
    notes = (
        "Rows of one group differ in the variant alone: the same candidates, data order and optimiser. Less paper: "
        f"paired difference over the prompts (for the accuracy: pairs) and {view.repetition}s that both have, with its "
        "interval; "
        "these differences are exploratory. Length: tokens of a reply.",
        "p_i is the mean log-probability here for every row, also for the one that trained on another.",
        "No published table has this comparison: the paper prints one row, and its code computes another.",
    )
    title = "What the bug changed: three readings of the objective"
    return build_table("variants", title, fields, lines, notes, view.records.arena, group=2) if lines else None


def _less_accurate(view: View, row: str, first: str) -> Found:
    """Return the difference in p_i accuracy of a row to the first of its group."""
    return _OWN if row == first else difference_of(orders(view, row), orders(view, first), view.clusters)


def variant_sentences(view: View) -> list[str]:
    """Return what each variant computes, then its differences in this run, as Markdown sentences."""
    groups = variant_groups(view)
    here = list(dict.fromkeys(_variant(view, row) for group in groups for row in group))
    sentences = [f"**{variant}**: {markdown(COMPUTES[variant])}." for variant in here]
    for group in groups:
        for row in group[1:]:
            parts = []
            for decoding in view.decodings:
                for measure in _MEASURES:
                    words = _words(
                        view.difference(row, group[0], decoding, measure), 1, 1 if measure == "tokens" else 2
                    )
                    where = f"{MEASURE_WORDS[measure]}, {DECODING_WORDS[decoding]}"
                    parts += [f"{where}: {words}"] if words else []
            points = _words(_less_accurate(view, row, group[0]), 100, 1)
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
