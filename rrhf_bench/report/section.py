"""Define the sections that other rooms add to a report: tables, figures and sentences, made from a view of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NewType, TypeAlias

from rrhf_bench.report.drawing import Made
from rrhf_bench.report.table import Table
from rrhf_bench.report.view import View

Sentence = NewType("Sentence", str)  # Markdown, one item of a list
Part: TypeAlias = Table | Made | Sentence


def _unchanged(view: View, table: Table) -> Table:
    return table


@dataclass(frozen=True)
class Section:
    """One section of the page.

    ``parts`` gives its content in order; a section without parts is left out. ``amend`` gives one of the report's own
    tables as it is printed, with a column or words that the section adds.
    """

    title: str
    parts: Callable[[View], Sequence[Part]]
    amend: Callable[[View, Table], Table] = _unchanged
