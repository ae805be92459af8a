"""The published tables of the RRHF paper (arXiv 2304.05302) as data; every row carries the source of its numbers.

The versions of the paper differ: v2 (May 2023) and v3 (October 2023, NeurIPS) print different rows in Tables 1 to 3, so
a number is quoted with its version. A cell the paper leaves empty is None, never 0. Rewards are those of
Dahoas/gptj-rm-static and belong to no other reward model's scale.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

from rrhf_bench.errors import DataError

Cell = str | float | None

# Not float(): that would also take "nan" and "inf", which are no published numbers.
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row as it stands in the file: numbers as float, words as str, an empty cell as None."""

    table: str
    cells: Mapping[str, Cell]
    source: str

    def number(self, column: str) -> float | None:
        """The number in ``column``, None where the paper gives none. Raises DataError on a column that holds words."""
        cell = self._cell(column)
        if isinstance(cell, str):
            raise DataError(f"{self.table}: found {cell[:40]!r} in column {column!r}; expected a number; use text()")
        return cell

    def text(self, column: str) -> str:
        """The words in ``column``, "" for an empty cell. Raises DataError on a column that holds a number."""
        cell = self._cell(column)
        if isinstance(cell, float):
            raise DataError(f"{self.table}: found {cell} in column {column!r}; expected text; use number()")
        return cell or ""

    def _cell(self, column: str) -> Cell:
        if column not in self.cells:
            raise DataError(f"{self.table}: found no column {column!r}; expected one of {', '.join(self.cells)}")
        return self.cells[column]

    def _given(self, column: str) -> float:
        number = self.number(column)
        assert number is not None, f"{self.table}: the shipped table has lost a number in {column}"
        return number


@dataclass(frozen=True, slots=True)
class Table2Row:
    """HH: initial model rho, training setting, perplexity by gpt2-medium, mean reward by gptj-rm-static."""

    version: str
    rho: str
    setting: str
    ppl: float | None
    reward: float
    note: str
    source: str


@dataclass(frozen=True, slots=True)
class Table5Row:
    """Share, in percent, of test pairs in which the scorer puts the chosen reply above the rejected one."""

    scorer: str
    accuracy_percent: float
    score_used: str
    source: str


@dataclass(frozen=True, slots=True)
class Table6Row:
    """Initial model x sampling policy: the test reward, and the mean, std and mean per-query maximum of the rewards of
    the training responses. The online policies (OP) have no fixed training responses: None."""

    rho: str
    setting: str
    ppl: float
    test_reward: float
    train_mean: float | None
    train_std: float | None
    train_max: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Table7Row:
    """The ranking term left out: "BP - L_rank" beside "BP"."""

    rho: str
    setting: str
    ppl: float
    reward: float
    source: str


@dataclass(frozen=True, slots=True)
class Table8Row:
    """Responses a query while training and at inference, in the paper's words ("fixed n" is made once, "n" anew)."""

    method: str
    training: str
    inference: str
    source: str


@dataclass(frozen=True, slots=True)
class Table10Row:
    """IMDB: ``setting`` is the KL penalty of online methods, the sampling policy of RRHF, or "". The perplexities of
    the rows are not all of the same texts."""

    method: str
    setting: str
    reward: float
    ppl: float
    source: str


@dataclass(frozen=True, slots=True)
class CurveRow:
    """One point of Figure 3, read from the plot: Alpaca, DP. The loss axis has no labels, so the loss is a height in
    [0, 1]."""

    step: int
    ppl: float
    reward: float
    loss_relative: float
    source: str


def names() -> tuple[str, ...]:
    """The tables there are, as ``load`` takes them."""
    return tuple(sorted(f.name.removesuffix(".csv") for f in files(__name__).iterdir() if f.name.endswith(".csv")))


@cache
def load(name: str) -> tuple[PublishedRow, ...]:
    """All rows of the table ``name`` (see ``names``), in the paper's order. Raises DataError on an unknown name."""
    if name not in names():
        raise DataError(f"published tables: found no table {name!r}; expected one of {', '.join(names())}")
    with (files(__name__) / f"{name}.csv").open(encoding="utf-8") as file:
        return tuple(_row(name, line) for line in csv.DictReader(file, strict=True))


def _row(name: str, line: dict[str, str]) -> PublishedRow:
    cells = MappingProxyType({column: _parse(cell) for column, cell in line.items() if column != "source"})
    return PublishedRow(name, cells, line["source"])


def _parse(cell: str) -> Cell:
    if not cell:
        return None
    return float(cell) if _NUMBER.fullmatch(cell) else cell


def table2(version: Literal["v2", "v3"] = "v3") -> tuple[Table2Row, ...]:
    """Table 2 (the main HH result) of one version of the paper. Raises DataError on another version."""
    rows = [r for r in load("rrhf_table2_hh_main") if r.text("version") == version]
    if not rows:
        raise DataError(f"Table 2: found version {version!r}; expected 'v2' or 'v3'")
    return tuple(
        Table2Row(
            version=version,
            rho=r.text("rho"),
            setting=r.text("setting"),
            ppl=r.number("ppl_gpt2_medium"),
            reward=r._given("reward_gptj_rm_static"),
            note=r.text("note"),
            source=r.source,
        )
        for r in rows
    )


def table5() -> tuple[Table5Row, ...]:
    """Table 5: the length-normalised log-probability as a reward model, beside the reward model itself."""
    return tuple(
        Table5Row(r.text("scorer"), r._given("accuracy_percent"), r.text("score_used"), r.source)
        for r in load("rrhf_table5_rm_accuracy")
    )


def table6() -> tuple[Table6Row, ...]:
    """Table 6: initial models and sampling policies. Its IP-1 row is the Alpaca DP row again."""
    return tuple(
        Table6Row(
            rho=r.text("rho"),
            setting=r.text("setting"),
            ppl=r._given("ppl"),
            test_reward=r._given("test_reward"),
            train_mean=r.number("train_mean"),
            train_std=r.number("train_std"),
            train_max=r.number("train_max"),
            source=r.source,
        )
        for r in load("rrhf_table6_sampling")
    )


def table7() -> tuple[Table7Row, ...]:
    """Table 7: RRHF with and without its ranking term."""
    return tuple(
        Table7Row(r.text("rho"), r.text("setting"), r._given("ppl"), r._given("reward"), r.source)
        for r in load("rrhf_table7_rank_ablation")
    )


def table8() -> tuple[Table8Row, ...]:
    """Table 8: responses a query."""
    return tuple(
        Table8Row(
            r.text("method"), _words(r, "train_samples_per_query"), _words(r, "inference_samples_per_query"), r.source
        )
        for r in load("rrhf_table8_sampling_cost")
    )


def table10() -> tuple[Table10Row, ...]:
    """Table 10: IMDB."""
    return tuple(
        Table10Row(r.text("method"), r.text("setting"), r._given("reward"), r._given("perplexity"), r.source)
        for r in load("rrhf_table10_imdb")
    )


def _words(row: PublishedRow, column: str) -> str:
    """A cell that holds a number in some rows and words in others, as printed; "" for an empty one."""
    cell = row.cells[column]
    return f"{cell:g}" if isinstance(cell, float) else cell or ""


def figure3_curve() -> tuple[CurveRow, ...]:
    """Figure 3: perplexity, reward and relative loss over optimiser steps, read from the plot to about 0.01."""
    return tuple(
        CurveRow(
            step=int(r._given("training_step")),
            ppl=r._given("perplexity_digitised"),
            reward=r._given("mean_reward_digitised"),
            loss_relative=r._given("loss_relative_0_1"),
            source=r.source,
        )
        for r in load("rrhf_figure3_curve_digitised")
    )
