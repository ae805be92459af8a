"""Which rows are compared, and the verdict on each primary comparison; tables, sentences and figures read both here.

A family is what is read together: the primary comparisons of one decoding and measure. Holm's adjustment is over a
family. A comparison outside the family is exploratory: its interval is shown and no verdict is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rrhf_bench.evaluation.statistics import Estimate, holm, smallest_detectable_difference
from rrhf_bench.records import Decoding
from rrhf_bench.registry import find
from rrhf_bench.report.table import DECODING_WORDS, Missing
from rrhf_bench.report.view import Found, Measure, View

Verdict = Literal["higher", "lower", "inside noise"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """a - b under one decoding and measure. ``estimate.p`` is the p of this comparison alone, ``p`` is Holm's over its
    family; ``p`` is None if the comparison is in no family: it is exploratory, has one training seed, or could not be
    computed. ``fixed``: neither side is trained, so there are no training seeds to cover."""

    a: str
    b: str
    decoding: Decoding
    measure: Measure
    estimate: Found
    p: float | None = None
    fixed: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """Higher or lower if the adjusted p is below 0.05, else inside noise; None without an adjusted p."""
        if isinstance(self.estimate, Missing) or self.p is None:
            return None
        if not replace(self.estimate, p=self.p).significant:
            return "inside noise"
        return "higher" if self.estimate.value > 0 else "lower"

    @property
    def standing(self) -> str:
        """The verdict, or in one word or two why there is none."""
        if self.verdict is not None or isinstance(self.estimate, Missing):
            return self.verdict or "missing"
        return "one seed" if self.estimate.seeds == 1 and not self.fixed else "exploratory"

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that this comparison alone would have found four times in five."""
        return None if isinstance(self.estimate, Missing) else smallest_detectable_difference(self.estimate)


MANY = 10  # rows of one initial policy; beyond these not every one is compared with the pivot


def comparisons(view: View) -> list[Comparison]:
    """Return the primary and the exploratory comparisons under every decoding and reward, the primary ones first."""
    primary, exploratory = comparison_pairs(view)
    return [*compare(view, primary, view.measures), *compare(view, exploratory, view.measures, primary=False)]


def compare(
    view: View,
    pairs: Sequence[tuple[str, str]],
    measures: Sequence[Measure],
    *,
    primary: bool = True,
    other: View | None = None,
) -> list[Comparison]:
    """Return every pair under every decoding and measure; the primary pairs of a decoding and measure are a family.

    ``other`` is the run of the second row of each pair, by default the same run.
    """
    found: list[Comparison] = []
    for decoding in view.decodings:
        for measure in measures:
            family = [
                Comparison(
                    a, b, decoding, measure, view.difference(a, b, decoding, measure, other),
                    fixed=view.one_model(a) and (other or view).one_model(b),
                )
                for a, b in pairs
            ]  # fmt: skip
            found += adjusted(family) if primary else family
    return found


def adjusted(family: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of one family with Holm's p.

    A comparison of one training seed gets none: its p takes the trained models as given, and with the seed noise of
    real runs two copies of one method would be called different in a third or more of all runs.
    """
    ps = [p for c in family if (p := _own_p(c)) is not None]
    found: Iterator[float] = iter(holm(ps).tolist() if ps else [])
    return [c if _own_p(c) is None else replace(c, p=next(found)) for c in family]


def _own_p(c: Comparison) -> float | None:
    return c.estimate.p if isinstance(c.estimate, Estimate) and (c.estimate.seeds > 1 or c.fixed) else None


Pairs = list[tuple[str, str]]


def comparison_pairs(view: View) -> tuple[Pairs, Pairs]:
    """Return (primary, exploratory) pairs of rows.

    ``[report] primary`` names the primary ones. By default they are, for each initial policy, each trained row against
    its pivot (``pivot``; of more than MANY rows only the best of the pivot's kind on the dev prompts against the best
    of each other kind of which several rows start there) and against the initial policy itself. The default pairs that
    are not primary, and those of a row that is not trained, are exploratory.
    """
    against_pivot: Pairs = []
    for initial in view.policies:
        rows, middle = view.rows_from(initial), pivot(view, initial)
        if middle is not None and len(rows) > MANY:
            own, others = view.kind(middle), _searched_kinds(view, initial)
            against_pivot += [(_best(view, initial, kind), _best(view, initial, own)) for kind in others]
        elif middle is not None:
            compared = [row for row in rows if row != middle]
            compared.sort(key=lambda row: view.methods[row].family != "online")  # stable: else in the file's order
            against_pivot += [(row, middle) for row in compared]
    against_initial = [(row, initial) for initial in view.policies for row in view.rows_from(initial)]
    pairs = [*against_pivot, *against_initial]
    named = view.experiment.report.primary
    primary = [pair for pair in pairs if pair[0] in view.trained] if named is None else list(named)
    return primary, [pair for pair in pairs if pair not in primary and (pair[1], pair[0]) not in primary]


def pivot(view: View, initial: str) -> str | None:
    """Return the row that the others from an initial policy are compared with, or None if there is none.

    It is ``[report] against``, by default the first trained row; from another initial policy it is the first row of
    the same kind.
    """
    named = view.experiment.report.against or next(iter(view.trained), None)
    if named is None or view.initial(named) == initial:
        return named
    return next(iter(view.rows_from(initial, view.kind(named))), None)


def _searched_kinds(view: View, initial: str) -> list[str]:
    """Return the kinds, but for the pivot's, of which several rows start from an initial policy."""
    middle = pivot(view, initial)
    kinds = dict.fromkeys(map(view.kind, view.rows_from(initial)))
    return [kind for kind in kinds if kind != view.kind(middle or "") and len(view.rows_from(initial, kind)) > 1]


def comparison_words(view: View) -> str:
    """Say which comparisons are primary and which are exploratory, for a note."""
    if view.experiment.report.primary is not None:
        return "Primary: the comparisons that the experiment file names ([report] primary). All others are exploratory."
    pivots = {initial: row for initial in view.policies if (row := pivot(view, initial)) is not None}
    many = [initial for initial in pivots if len(view.rows_from(initial)) > MANY]
    words = "Primary: each trained row against the initial policy that it started from"
    if len(many) < len(pivots):
        few = [row for initial, row in pivots.items() if initial not in many]
        first = all(row == view.rows_from(view.initial(row), view.kind(row))[0] for row in few)
        label = view.method(few[0]).label
        words += f", and against {f'the first {label} row' if first else ' or '.join(few)} that started there"
    if many:
        kinds = dict.fromkeys(kind for initial in many for kind in _searched_kinds(view, initial))
        labels = [view.method(pivots[many[0]]).label, *(find(kind).label for kind in kinds)]
        words += f"; if more than {MANY} rows start from one policy ({', '.join(many)}), "
        if kinds:
            words += (
                f"only one {' and one '.join(labels)} row are compared with each other: of the plain row and those "
                "that differ from it in hyper-parameters alone, that with the highest "
                f"{DECODING_WORDS[view.decodings[0]]} reward on the dev prompts"
            )
        else:
            words += "none of them are compared with each other"
    return words + ". Comparisons of rows that are not trained are exploratory."


def _best(view: View, initial: str, kind: str) -> str:
    """Return the row of a kind with the highest reward on the dev prompts, or its plain row if none was measured.

    The rows are the plain one and those that differ from it in hyper-parameters alone.
    """
    plain = view.plain_row(view.rows_from(initial, kind))
    assert plain is not None
    found = {r: reward for r in view.same_way(plain) if (reward := view.dev_reward(r, view.decodings[0])) is not None}
    return max(found, key=lambda row: found[row]) if found else plain
