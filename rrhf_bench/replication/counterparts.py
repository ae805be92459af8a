"""Which row of a run stands beside which published row of the RRHF paper (arXiv 2304.05302).

A published row stands beside the run's row that starts from an initial policy in the same part (``[policy].part``) and
is trained in the same way. Nothing else makes them alike: models, data and reward model are others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rrhf_bench.report.table import Cell, Column, Missing, Table
from rrhf_bench.report.view import BASE, View
from rrhf_bench.settings.methods import candidates_of

RRHF, SFT, PPO, BEST_OF_N = "rrhf", "sft", "ppo", "best_of_n"  # kinds of the registry
# The objective as the paper prints it: a row with another stands beside none of its rows.
_AS_PRINTED: Mapping[str, object] = {"variant": "paper", "rank_weight": 1.0, "sft_weight": 1.0, "margin": 0.0}
_OWN_PART = "Alpaca"  # the part of [policy] in a run whose policies name none


def replicates(view: View) -> bool:
    """Return whether the run has a row of RRHF, without which nothing of it stands beside the paper."""
    return any(view.kind(row) == RRHF for row in view.methods)


def writes_reviews(view: View) -> bool:
    """Return whether the run writes film reviews, which the paper's Table 10 is about and its other tables are not."""
    source = view.experiment.data.source
    return source == "toy-reviews" or "imdb" in source.lower()


def names_parts(view: View) -> bool:
    """Return whether some initial policy says in which part of the paper it is."""
    return any(policy.part for policy in (view.experiment.policy, *view.experiment.policies.values()))


def part_of(view: View, row: str) -> str | None:
    """Return the paper's initial policy whose published rows on HH stand beside a row, or None."""
    initial = view.initial(row)
    if writes_reviews(view) or initial not in view.policies:
        return None
    settings = view.experiment.policies.get(initial, view.experiment.policy)
    return settings.part or (_OWN_PART if initial == BASE and not names_parts(view) else None)


def with_parts(view: View, table: Table) -> Table:
    """Return the report's table of rows with the part of the paper that each row is in."""
    none = Missing("its initial policy is in no part of the paper's")
    parts = [Cell.of(part_of(view, row) or none) for row in view.rows]
    own, *notes = table.footnotes
    return replace(
        table,
        columns=(*table.columns[:3], Column("in the part of"), *table.columns[3:]),
        rows=tuple((*row[:3], part, *row[3:]) for row, part in zip(table.rows, parts, strict=True)),
        footnotes=(
            f"In the part of: the initial policy of the paper whose published rows stand beside. {own}",
            *notes,
        ),
    )


def counterparts(view: View, part: str, setting: str) -> list[str]:
    """Return the rows that a published row can stand beside, in the file's order.

    ``setting`` is as in Tables 2 and 6: "none", "PPO", "Best-of-4", or a sampling policy with or without "RRHF_".
    """
    if setting == "none":
        return [policy for policy in view.policies if part_of(view, policy) == part]
    rows = [row for row in view.methods if part_of(view, row) == part]
    if setting == "PPO":
        return [row for row in rows if view.kind(row) == PPO]
    if setting.startswith("Best-of-"):
        n = int(setting.removeprefix("Best-of-"))
        return [row for row in rows if view.kind(row) == BEST_OF_N and view.reranked(row) == n]
    name = setting.removeprefix("RRHF_")
    printed = [row for row in rows if as_printed(view, row)]
    exact = [row for row in printed if view.sampling_policy(row) == name]
    return exact or [row for row in printed if _alike(view.sampling_policy(row), name)]


def counterpart(view: View, part: str, setting: str) -> str | Missing:
    """Return the plain one of ``counterparts``, or why there is none."""
    row = view.plain_row(counterparts(view, part, setting))
    if row is not None:
        return row
    starts = [policy for policy in view.policies if part_of(view, policy) == part]
    if not starts:
        return Missing(f"no initial policy of this run is in the part of {part}")
    what = {"PPO": "is trained by PPO"}.get(setting) or (
        f"is {setting.lower()}" if setting.startswith("Best-of-") else f"samples as {setting.removeprefix('RRHF_')}"
    )
    return Missing(f"no row of this run that starts from {' or '.join(starts)} {what}")


def as_printed(view: View, row: str, *, but: str = "") -> bool:
    """Return whether a row has the objective and the scores of the paper, one of its weights (``but``) aside."""
    settings = view.methods[row]
    how = candidates_of(settings)
    return (
        view.kind(row) == RRHF
        and how is not None
        and how.scored_by == "reward model"
        and all(getattr(settings, key) == value for key, value in _AS_PRINTED.items() if key != but)
    )


def _alike(found: str | None, name: str) -> bool:
    """Return whether two sampling policies are one: IP-1 is DP, and an OP-k stands for one with another k."""

    def general(policy: str) -> str:
        return re.sub(r"OP-\d+", "OP-k", "DP" if policy == "IP-1" else policy)

    return found is not None and general(found) == general(name)


def choices(view: View, wanted: Sequence[tuple[str, str]]) -> list[str]:
    """Return a footnote on the published rows that several rows of the run fit."""
    found: dict[str, list[str]] = defaultdict(list)
    for part, setting in wanted:
        rows = counterparts(view, part, setting)
        if len(rows) > 1:
            others = ", ".join(row for row in rows if row != view.plain_row(rows))
            found[f"{view.plain_row(rows)} rather than {others}"].append(f"{part} {setting}")
    if not found:
        return []
    words = "; ".join(f"{', '.join(settings)}: {choice}" for choice, settings in found.items())
    return [
        "Where several rows fit, the plain one is taken: the fewest settings that differ from their defaults, then the "
        f"first in the experiment file. {words}."
    ]
