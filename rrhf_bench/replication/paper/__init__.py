"""The published tables of the RRHF paper (arXiv 2304.05302) as data; every row carries the source of its numbers.

The versions of the paper differ: v2 (May 2023) and v3 (October 2023, NeurIPS) print different rows in Tables 1 to 3, so
a number is quoted with its version. A cell the paper leaves empty is None, never 0. Rewards are those of
Dahoas/gptj-rm-static and belong to no other reward model's scale.

* Table 2: HH, by initial model rho and training setting; perplexity by gpt2-medium, mean reward by gptj-rm-static.
* Table 5: share, in percent, of test pairs in which the scorer puts the chosen reply above the rejected one.
* Table 6: initial model x sampling policy: the test reward, and the mean, std and mean per-query maximum of the rewards
  of the training responses, of which the online policies (OP) have none. Its IP-1 row is the Alpaca DP row again.
* Table 7: RRHF with and without its ranking term.
* Table 8: responses a query, in the paper's words ("fixed n" is made once, "n" anew).
* Table 10: IMDB; ``setting`` is the KL penalty of online methods, the sampling policy of RRHF, or empty.
* Figure 3: read from the plot to about 0.01; its loss axis has no labels, so the loss is a height in [0, 1].
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from rrhf_bench.errors import DataError

Cell = str | float | None

TABLE_2, TABLE_5, TABLE_6 = "rrhf_table2_hh_main", "rrhf_table5_rm_accuracy", "rrhf_table6_sampling"
TABLE_7, TABLE_8, TABLE_10 = "rrhf_table7_rank_ablation", "rrhf_table8_sampling_cost", "rrhf_table10_imdb"
FIGURE_3 = "rrhf_figure3_curve_digitised"
# Not float(): that would also take "nan" and "inf", which are no published numbers.
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row as it stands in the file: numbers as float, words as str, an empty cell as None."""

    table: str
    cells: Mapping[str, Cell]
    source: str

    def number(self, column: str) -> float:
        """Return the number in ``column``, which the paper gives. Raises DataError on a column that holds words."""
        cell = self.cell(column)
        if not isinstance(cell, float):
            raise DataError(f"{self.table}: found {str(cell)[:40]!r} in column {column!r}; expected a number")
        return cell

    def text(self, column: str) -> str:
        """Return the words in ``column``, "" for an empty cell. Raises DataError on a column that holds a number."""
        cell = self.cell(column)
        if isinstance(cell, float):
            raise DataError(f"{self.table}: found {cell} in column {column!r}; expected text; use number()")
        return cell or ""

    def cell(self, column: str) -> Cell:
        if column not in self.cells:
            raise DataError(f"{self.table}: found no column {column!r}; expected one of {', '.join(self.cells)}")
        return self.cells[column]

    @property
    def name(self) -> str:
        """Return the initial policy and the setting of a row of Tables 2, 6 and 7."""
        return f"{self.text('rho')} {self.text('setting')}"


def names() -> tuple[str, ...]:
    """Return the names of the tables, as ``load`` takes them."""
    return tuple(sorted(f.name.removesuffix(".csv") for f in files(__name__).iterdir() if f.name.endswith(".csv")))


@cache
def load(name: str, version: str | None = None) -> tuple[PublishedRow, ...]:
    """Return the rows of a table, in one version of the paper if it is given. Raises DataError on another name."""
    if name not in names():
        raise DataError(f"published tables: found no table {name!r}; expected one of {', '.join(names())}")
    with (files(__name__) / f"{name}.csv").open(encoding="utf-8") as file:
        rows = [_row(name, line) for line in csv.DictReader(file, strict=True)]
    return tuple(row for row in rows if version in (None, row.cells.get("version")))


def _row(name: str, line: dict[str, str]) -> PublishedRow:
    cells = {column: _parse(cell) for column, cell in line.items() if column != "source"}
    return PublishedRow(name, MappingProxyType(cells), line["source"])


def _parse(cell: str) -> Cell:
    if not cell:
        return None
    return float(cell) if _NUMBER.fullmatch(cell) else cell
