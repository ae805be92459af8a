"""A table as data, and the same table as Markdown, CSV and LaTeX. Text from models and files is shown, never obeyed.

The bytes depend on the cells alone: no dates, times or paths. CSV holds full precision and every interval; Markdown and
LaTeX round, and print the intervals of the columns that ask for it. A missing number is a dash with its reason below.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from rrhf_bench.errors import visible
from rrhf_bench.evaluation.grid import Missing
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.records import Decoding

L = TypeVar("L")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "—": "---", "[": "{[}", "]": "{]}",
}  # fmt: skip
DECODING_WORDS: Mapping[Decoding, str] = {"greedy": "greedy", "sample": "sampled", "given": "none"}
_WIDE = 7  # columns that fit a LaTeX page as they are


@dataclass(frozen=True, slots=True)
class Cell:
    """Words, a number with what is needed to judge it, or the reason why there is none."""

    value: float | str | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seeds: int | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        assert (self.value is None) == bool(self.reason), "a cell has a value or the reason why it has none"
        assert not isinstance(self.value, float) or math.isfinite(self.value), "a number in a table is finite"

    @classmethod
    def of(cls, found: Value) -> Cell:
        """The cell of whatever a computation gave."""
        if isinstance(found, Cell):
            return found
        if isinstance(found, Missing):
            return cls(None, reason=found.reason)
        if isinstance(found, Estimate):
            return cls(found.value, found.low, found.high, found.n, found.seeds)
        return cls(found)


Value: TypeAlias = Cell | Estimate | Missing | float | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """``digits`` after the point; None for words. ``interval``: print it in the cell, not only in the CSV.

    ``decides`` is a value on whose side a number must be seen to lie, such as the level of a p-value: a cell gets up to
    three digits more if rounding would print that value for another. A p-value is never printed as 0.
    """

    name: str
    digits: int | None = None
    interval: bool = False
    decides: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """``name`` is the file's, without a suffix. Rows are set apart where the cell in column ``group`` changes."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    footnotes: tuple[str, ...]
    arena: str
    group: int | None = None

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"table {self.name}: a row has too few cells"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why numbers are missing, each once, in order of appearance: (a), (b), ... in the cells."""
        return tuple(dict.fromkeys(cell.reason for row in self.rows for cell in row if cell.value is None))


@dataclass(frozen=True, slots=True)
class Field(Generic[L]):
    """A column, and what stands in it for each line of a table. The other fields are those of ``Column``."""

    name: str
    value: Callable[[L], Value]
    digits: int | None = None
    interval: bool = False
    decides: float | None = None


def build_table(
    name: str,
    title: str,
    fields: Sequence[Field[L]],
    lines: Iterable[L],
    notes: Sequence[str],
    arena: str,
    group: int | None = None,
) -> Table:
    """Return the table of the fields of each line."""
    columns = tuple(Column(field.name, field.digits, field.interval, field.decides) for field in fields)
    rows = tuple(tuple(Cell.of(field.value(line)) for field in fields) for line in lines)
    return Table(name, title, columns, rows, tuple(notes), arena, group)


def markdown(text: str) -> str:
    """``text`` as inert words inside Markdown, table cells included."""
    text = re.sub(r"[\\`*{}\[\]#|~$]", r"\\\g<0>", visible(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no emphasis
    text = re.sub(r"^([-+](?=\s|$)|[-=]+$|[-=]{2}|\d+(?=[.)](\s|$)))", _no_marker, text)
    text = re.sub(r"^ +| +$", lambda spaces: "&#32;" * len(spaces[0]), text)
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", text).replace("://", ":\\//")  # no links of their own


def _no_marker(start: re.Match[str]) -> str:
    """The start of a text that would be the mark of a list or heading."""
    return f"{start[0]}\\" if start[0].isdigit() else f"\\{start[0]}"


def fenced(text: str) -> str:
    """``text`` as a code block that nothing in it can close; line ends stay, other unseen characters are spelled."""
    text = visible(text, keep="\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"


def latex(text: str) -> str:
    """``text`` as inert words inside LaTeX."""
    return "".join(_LATEX.get(c, c) for c in visible(text))


def number(value: float, digits: int) -> str:
    """A number as the tables print it; no minus sign before a rounded zero."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text


def deciding_digits(values: Iterable[float], digits: int, threshold: float) -> int:
    """Return ``digits``, or up to three more if with fewer some value is rounded to the threshold without being it."""
    values = list(values)
    for more in range(digits, digits + 3):
        if all(value == threshold or round(value, more) != round(threshold, more) for value in values):
            return more
    return digits + 3


def interval(low: float, high: float, digits: int) -> str:
    return f"[{number(low, digits)}, {number(high, digits)}]"


def to_markdown(table: Table) -> str:
    """The table with its title, footnotes and arena."""
    head = [markdown(column.name) for column in table.columns]
    align = [":---" if column.digits is None else "---:" for column in table.columns]
    body = printed(table, markdown)
    lines = [f"**{markdown(table.title)}**", "", *("| " + " | ".join(row) + " |" for row in (head, align, *body)), ""]
    return "\n".join([*lines, *(f"- {markdown(note)}" for note in notes(table)), ""])


def to_latex(table: Table) -> str:
    """A booktabs table; it needs ``\\usepackage{booktabs,graphicx}`` and a T1 font encoding."""
    wide = len(table.columns) > _WIDE
    spec = "".join("l" if column.digits is None else "r" for column in table.columns)
    lines = [
        "% \\usepackage[T1]{fontenc}\\usepackage{booktabs,graphicx}",
        "\\begin{table}[t]",
        "\\centering\\small",
        f"\\caption{{{latex(table.title)}}}",
        f"\\label{{tab:{table.name}}}",
        *(["\\resizebox{\\textwidth}{!}{%"] if wide else []),
        f"\\begin{{tabular}}{{{spec}}}",
        "\\toprule",
        " & ".join(latex(column.name) for column in table.columns) + r" \\",
        "\\midrule",
    ]
    for before, row in zip([None, *table.rows], table.rows, strict=False):
        if before and table.group is not None and before[table.group] != row[table.group]:
            lines.append("\\addlinespace")
        lines.append(" & ".join(_printed(table, c, cell, latex) for c, cell in enumerate(row)) + r" \\")
    lines += ["\\bottomrule", "\\end{tabular}" + ("}" if wide else "")]
    lines += [f"\\par\\footnotesize {latex(note)}" for note in notes(table)]
    return "\n".join([*lines, "\\end{table}", ""])


def to_csv(table: Table) -> str:
    """One line a row at full precision. An empty cell has its reason in the last column but one, ``missing``."""
    fields = [_fields(table, c) for c in range(len(table.columns))]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [
        column.name if field == "value" else f"{column.name} {field}"
        for column, wanted in zip(table.columns, fields, strict=True)
        for field in wanted
    ]
    writer.writerow([*map(_csv_text, names), "missing", "arena"])
    for row in table.rows:
        values = [getattr(cell, field) for cell, wanted in zip(row, fields, strict=True) for field in wanted]
        reasons = "; ".join(
            f"{column.name}: {cell.reason}" for column, cell in zip(table.columns, row, strict=True) if cell.reason
        )
        writer.writerow([*map(_csv_value, values), _csv_text(reasons), table.arena])
    return file.getvalue()


def write_table(table: Table, folder: Path) -> None:
    """``folder/name`` as .md, .csv and .tex."""
    for suffix, text in ((".md", to_markdown(table)), (".csv", to_csv(table)), (".tex", to_latex(table))):
        (folder / f"{table.name}{suffix}").write_text(text, encoding="utf-8", newline="\n")


def printed(table: Table, escape: Callable[[str], str]) -> list[list[str]]:
    """The cells as they are read, for a page whose words ``escape`` makes."""
    return [[_printed(table, c, cell, escape) for c, cell in enumerate(row)] for row in table.rows]


def _printed(table: Table, c: int, cell: Cell, escape: Callable[[str], str]) -> str:
    column = table.columns[c]
    if cell.value is None:
        return f"{escape('—')} ({_letter(table.reasons.index(cell.reason))})"
    if isinstance(cell.value, str):
        return escape(cell.value)
    assert column.digits is not None, f"table {table.name}: a number in the column of words {column.name}"
    bounds = None
    if column.interval and cell.low is not None and cell.high is not None:
        bounds = cell.low, cell.high
    digits = column.digits
    if column.decides is not None:
        digits = deciding_digits((cell.value, *(bounds or ())), digits, column.decides)
    text = number(cell.value, digits)
    if column.decides and 0 < cell.value < 0.5 * 10**-digits:  # a p-value that would be printed as 0
        text = f"< {number(10**-digits, digits)}"
    return text if bounds is None else f"{text} {interval(*bounds, digits)}"


def notes(table: Table) -> list[str]:
    """The footnotes, the reasons for what is missing, and the arena."""
    reasons = [f"— ({_letter(i)}): {reason}." for i, reason in enumerate(table.reasons)]
    return [*table.footnotes, *reasons, f"Arena {table.arena}."]


def _letter(i: int) -> str:
    return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("a") + i % 26)


def _fields(table: Table, c: int) -> list[str]:
    """The parts of a cell that any row of this column has."""
    cells = [row[c] for row in table.rows]
    extra = ("low", "high", "n", "seeds")
    return ["value", *(field for field in extra if any(getattr(cell, field) is not None for cell in cells))]


def _csv_value(value: float | str | None) -> str:
    if value is None:
        return ""
    return _csv_text(value) if isinstance(value, str) else repr(value)


def _csv_text(text: str) -> str:
    text = visible(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text  # a spreadsheet would run it
