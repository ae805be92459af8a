"""Two runs of one arena beside each other: paired by prompt and seed, from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rrhf_bench.errors import ConfigError, StoreError, nearest
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.report.comparisons import Comparison, compare
from rrhf_bench.report.table import Missing, Table, build_table
from rrhf_bench.report.tables import difference_fields, difference_notes
from rrhf_bench.report.view import View

SAME_MODEL = 0.1  # of the standard deviation of scores; one model in two precisions differs by a few hundredths


def compare_runs(a: RunRecords, b: RunRecords, rows: Sequence[str] = ()) -> list[Comparison]:
    """Compare rows of run ``a`` with rows of run ``b``, under every decoding and reward that both have.

    The comparisons of one decoding and reward are a family: all are primary, and Holm's adjustment is over them.

    ``rows``: pairs such as "rrhf,ppo", a row of ``a`` and one of ``b``; none: the rows of equal names. Raises
    StoreError where the arenas differ, naming what does, or the scores of the reward models on the same replies, and
    ConfigError for a row that is not there.
    """
    if a.arena != b.arena:
        raise StoreError(f"{a.folder} and {b.folder} were judged differently, so nothing compares: {_differing(a, b)}")
    if (apart := _rewards_apart(a, b)) > SAME_MODEL:
        raise StoreError(
            f"{a.folder} and {b.folder} were judged by two reward models of the same settings, so nothing compares: on "
            f"the same held-out replies their scores differ by {apart:.2f} standard deviations (median). Trained on "
            "another kind of processor, a reward model has other weights; make both runs in one --runs folder"
        )
    one, other = View(a), View(b)
    measures = [measure for measure in one.measures if measure in other.measures]
    return compare(one, _pairs(one, other, rows), measures, other=other)


def _rewards_apart(a: RunRecords, b: RunRecords) -> float:
    """Return how far apart two runs score the same held-out replies: the median, in standard deviations of ``a``."""
    other = {(pair.prompt.id, pair.seed): (pair.chosen, pair.rejected) for pair in b.reward_pairs}
    both = [pair for pair in a.reward_pairs if (pair.prompt.id, pair.seed) in other]
    if not both:
        return 0.0
    score_P2 = np.array([(pair.chosen, pair.rejected) for pair in both])
    its_P2 = np.array([other[pair.prompt.id, pair.seed] for pair in both])
    return float(np.median(np.abs(score_P2 - its_P2)) / max(score_P2.std(), np.finfo(float).tiny))


def _differing(a: RunRecords, b: RunRecords) -> str:
    """What of two arenas differs, as both say it."""
    parts = dict.fromkeys([*a.arena_words, *b.arena_words])
    words = [(part, a.arena_words.get(part, "none"), b.arena_words.get(part, "none")) for part in parts]
    return "; ".join(f"{part} ({x} against {y})" for part, x, y in words if x != y) or f"arena {a.arena}, {b.arena}"


def _pairs(one: View, other: View, rows: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for words in rows:
        names = [name.strip() for name in words.split(",")]
        if len(names) != 2:
            raise ConfigError(f"--rows {words}: expected a row of each run, such as --rows rrhf,ppo")
        for name, view in zip(names, (one, other), strict=True):
            if name not in view.rows:
                known = f"{', '.join(view.rows)}{nearest(name, view.rows)}"
                raise ConfigError(f"--rows {words}: found {name!r}; {view.records.folder} has the rows {known}")
        pairs.append((names[0], names[1]))
    pairs = list(dict.fromkeys(pairs)) or [(row, row) for row in one.rows if row in other.rows]
    if not any(row in one.methods or its in other.methods for row, its in pairs):
        raise ConfigError(
            f"{one.records.folder} ({', '.join(one.methods)}) and {other.records.folder} ({', '.join(other.methods)}) "
            "have no method of one name; name a row of each with --rows"
        )
    return pairs


def comparison_table(a: RunRecords, b: RunRecords, compared: Sequence[Comparison]) -> Table:
    """The comparisons as the report's table of differences has them."""
    name = a.experiment.name, b.experiment.name
    folders = f"{a.folder} - {b.folder}" if name[0] == name[1] else " - ".join(name)
    view = View(a)
    notes = (f"Each row: of {a.folder} minus of {b.folder}.", *difference_notes(view))
    return build_table("compare", folders, difference_fields(view), compared, notes, a.arena, group=2)


def comparison_json(a: RunRecords, b: RunRecords, compared: Sequence[Comparison]) -> dict[str, Any]:
    """The same for machines: numbers at full precision, null with a reason where there is none."""
    return {"a": str(a.folder), "b": str(b.folder), "arena": a.arena, "comparisons": [_json(c) for c in compared]}


def _json(c: Comparison) -> dict[str, Any]:
    head = {"a": c.a, "b": c.b, "decoding": c.decoding, "measure": c.measure}
    if isinstance(c.estimate, Missing):
        return {**head, "difference": None, "missing": c.estimate.reason}
    found: Estimate = c.estimate
    numbers = {"difference": found.value, "low": found.low, "high": found.high, "p": found.p, "p_holm": c.p}
    sizes = {"prompts": found.n, "seeds": found.seeds}
    sizes |= {} if found.worlds is None else {"worlds": found.worlds}
    return {**head, **numbers, "verdict": c.verdict, "detectable": c.detectable, **sizes}
