"""What a person sees while stages run: bars with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rrhf_bench.errors import visible
from rrhf_bench.pipeline.stage_graph import Stage

WIDEST = 1 << 16  # columns of a table that goes to a file or a pipe


def inert(text: str) -> str:
    """Text that cannot act on a terminal: what cannot be seen is shown as escapes; line feeds and tabs are left."""
    return visible(text, keep="\n\t")


class Screen(Console):
    """A console on which words are words: no markup, no highlighting, nothing that acts on the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return Text(inert(text), style=options.get("style", ""))


def table_of(*columns: str, rows: Iterable[Iterable[object]]) -> Table:
    """Return a table without lines, whose cells are the words of values; a narrow screen folds them and cuts none."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(inert(str(cell))) for cell in row))
    return table


def answer(as_json: bool, value: Any, *parts: Table | str) -> None:
    """Print a value as JSON on standard output, in ASCII since that may be a terminal; or its parts for a person.

    Where standard output is no terminal, each row of a table is one line.
    """
    if as_json:
        print(json.dumps(value, indent=1), flush=True)
        return
    screen = Screen(width=None if sys.stdout.isatty() else WIDEST)
    for part in parts:
        screen.print(part, soft_wrap=isinstance(part, str))


class TerminalReporter:
    """A Reporter: one line a finished stage, and bars for those at work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._tasks: dict[str, tuple[TaskID, float]] = {}  # stage -> (bar, when it started)
        self._said: dict[str, float] = {}  # stage -> when its last plain line was printed
        self._reused = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _print(self, line: str) -> None:
        self.console.print(Text(inert(line)), soft_wrap=True)

    def reused(self, stage: Stage) -> None:
        self._reused += 1

    def started(self, stage: Stage) -> None:
        if self._reused:
            self._print(f"reused {self._reused} artifacts from the store")
            self._reused = 0
        self.begin(stage.name)

    def begin(self, name: str) -> None:
        """A bar for work that is no stage."""
        self._tasks[name] = (self._bars.add_task(inert(name), total=None, rate=""), time.monotonic())

    def progress(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            return
        bar, started = self._tasks[name]
        elapsed = max(1e-6, time.monotonic() - started)
        rate = done / elapsed
        self._bars.update(bar, completed=done, total=total, rate=f"{rate:.0f}/s")
        if not self._live and time.monotonic() - self._said.get(name, started) > 20 and rate:
            self._said[name] = time.monotonic()
            self._print(f"  {name}: {done}/{total}, {rate:.0f}/s, {(total - done) / rate:.0f} s left")

    def finished(self, stage: Stage, seconds: float | None) -> None:
        self._bars.remove_task(self._tasks.pop(stage.name)[0])
        took = "  elsewhere" if seconds is None else f"{seconds:7.1f} s"
        self._print(f"{took}  {stage.name}  ({stage.size})")

    def note(self, text: str) -> None:
        self._print(f"note: {text}")
