"""The report of a run: one Markdown page, with its tables and figures in folders beside it. Records in, files out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from rrhf_bench.errors import StoreError, visible
from rrhf_bench.evaluation.claims import ClaimResult
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.records import Evaluated, Prompt
from rrhf_bench.report.budgets import budgets_table
from rrhf_bench.report.claims import claim_results, claim_sentences, claims_table, power_words
from rrhf_bench.report.drawing import Drawn, styled
from rrhf_bench.report.figures import own_figures, write_figures
from rrhf_bench.report.findings import findings, standing
from rrhf_bench.report.frontier import no_frontier
from rrhf_bench.report.health import append_loss_footnotes
from rrhf_bench.report.ranking import ranking_parts, win_rates_tables
from rrhf_bench.report.rows import rows_table, tuning_table
from rrhf_bench.report.section import Part, Section
from rrhf_bench.report.table import DECODING_WORDS, Table, fenced, markdown, number, to_csv, to_markdown, write_table
from rrhf_bench.report.tables import (
    FEATURES,
    candidates_table,
    cost_tables,
    counts_table,
    differences_table,
    features_table,
    level_words,
    main_table,
    seeds_table,
)
from rrhf_bench.report.topics import topics_table
from rrhf_bench.report.view import View

DIALOGUES = 5
_LONGEST = 1200  # characters of a text in the page; the records hold all of it


def write_report(records: RunRecords, folder: Path, sections: Sequence[Section] = ()) -> Path:
    """Write report.md, cost.md, tables/ and figures/ into ``folder`` and return the path of report.md.

    ``sections`` are what other rooms add to the report's own content.

    The folder is complete or as it was: everything is written beside it and then moved into its place, where it
    replaces an earlier report. ``tables/`` depends on the records alone, byte for byte; wall-clock stands in the cost
    files, in one figure and in the page. Raises StoreError where the folder holds something else than a report.
    """
    if folder.exists() and not (folder / "report.md").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            f"{folder}: holds files that are no report; expected a new or empty folder, or an earlier report; "
            "name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{part}") for part in ("new", "old"))
    try:
        fresh.mkdir()
        _write(View(records), fresh, sections)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    return folder / "report.md"


def _write(view: View, folder: Path, sections: Sequence[Section]) -> None:
    for name in ("tables", "figures"):
        (folder / name).mkdir()
    claims = claim_results(view)
    with styled():
        ranking = list(ranking_parts(view))
        parts = {section.title: section.parts(view) for section in sections}
    further = [*ranking, *(part for of_section in parts.values() for part in of_section)]
    tables = {table.name: table for table in _tables(view, claims, sections, further)}
    for table in tables.values():
        write_table(table, folder / "tables")
    costs = cost_tables(view)
    for table in costs:
        (folder / f"{table.name}.csv").write_text(to_csv(table), encoding="utf-8", newline="\n")
    cost = _render("cost.md.j2", tables=costs, environment=view.records.environment)
    drawn = write_figures(chain(own_figures(view), (p for p in further if isinstance(p, tuple))), folder / "figures")
    figures = {figure.name: figure for figure in drawn}
    page = _render(
        "report.md.j2",
        records=view.records,
        question=_methods_words(view),
        standing=standing(view.experiment),
        findings=findings(view),
        repeated="worlds" if view.experiment.several_worlds else "training seeds",
        levels=level_words(view),
        both_decodings=len(view.decodings) > 1,
        claims=claim_sentences(claims),
        power=power_words(claims),
        tables=tables,
        figures=figures,
        curves=_family(figures, "reward_curves"),
        ranking=_section_text(ranking, tables),
        frontiers=_family(figures, "frontier"),
        no_frontier=no_frontier(view),
        sections={title: text for title, found in parts.items() if (text := _section_text(found, tables))},
        replies_of="every method's" if set(view.main_rows) == set(view.methods) else "the main rows'",
        dialogues=list(_dialogues(view)),
        cost=cost,
    )
    (folder / "cost.md").write_text(f"# Cost\n\n{cost}", encoding="utf-8", newline="\n")
    (folder / "report.md").write_text(page, encoding="utf-8", newline="\n")


def _tables(
    view: View, claims: Sequence[ClaimResult], sections: Sequence[Section], parts: Sequence[Part]
) -> list[Table]:
    own = (
        rows_table(view),
        tuning_table(view),
        main_table(view),
        claims_table(claims, view.records.arena),
        differences_table(view),
        seeds_table(view),
        topics_table(view),
        candidates_table(view),
        features_table(view),
        counts_table(view),
        budgets_table(view),
        *win_rates_tables(view),
    )
    amended = []
    for table in own:
        if table is not None and table.rows:
            for section in sections:
                table = section.amend(view, table)
            amended.append(table)
    return append_loss_footnotes(view, [*amended, *(p for p in parts if isinstance(p, Table) and p.rows)])


def _section_text(parts: Sequence[Part], tables: Mapping[str, Table]) -> str:
    """Return the parts of a section as Markdown. Neighbouring sentences are one list."""
    texts = []
    for part in parts:
        if isinstance(part, Table):
            texts += [_table(tables[part.name])] if part.name in tables else []
        elif isinstance(part, str):
            texts.append(f"- {part}\n")
        else:
            texts.append(_figure(part[0]))
    return "\n".join(texts).replace("\n\n- ", "\n- ")


def _render(template: str, **values: object) -> str:
    # Markdown has its own escapes, not HTML's: every template passes foreign text through `md` or `fenced`.
    environment = Environment(
        loader=PackageLoader("rrhf_bench.report", "."),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(md=markdown, fenced=fenced, table=_table, figure=_figure)
    return environment.get_template(template).render(values)


def _methods_words(view: View) -> str:
    """Return the names of the methods, or if they are many their numbers; nothing if there are none."""
    rows = list(view.methods)
    return ", ".join(rows) if len(rows) <= 12 else f"{len(rows)} rows, of {len(set(map(view.kind, rows)))} kinds"


def _family(figures: Mapping[str, Drawn], name: str) -> list[Drawn]:
    """The figures of that name, one an initial policy."""
    return [figure for key, figure in figures.items() if key == name or key.startswith(f"{name}_")]


def _table(table: Table | None, reason: str = "The run holds no records for this table.") -> str:
    return to_markdown(table) if table is not None else f"— {reason}\n"


def _figure(figure: Drawn | None, reason: str = "The run holds no records for this figure.") -> str:
    if figure is None:
        return f"— {reason}\n"
    title = markdown(figure.title)
    return f"![{title}](figures/{figure.name}.png)\n\n*{title}.* {markdown(figure.caption)}\n"


def _dialogues(view: View) -> Iterable[str]:
    """The first evaluation prompts, each with every row's reply, as plain text to be fenced."""
    replies: dict[tuple[str, Prompt], Evaluated] = {}
    for decoding in view.all_decodings:  # greedy where there is one: best-of-n has samples only
        for reply in view.records.evaluated:
            if reply.decoding == decoding:
                replies.setdefault((reply.method, reply.prompt), reply)  # the first seed's
    prompts = list(dict.fromkeys(prompt for row, prompt in replies if row in view.rows))[:DIALOGUES]
    for prompt in prompts:
        lines = [_indented(prompt.text)]
        for row in (*view.policies, *view.main_rows, *view.given):
            found = replies.get((row, prompt))
            lines += ["", _heading(view, row, found)] + ([_indented(found.response)] if found else [])
        yield "\n".join(lines)


def _heading(view: View, row: str, reply: Evaluated | None) -> str:
    name = visible(row)
    if reply is None:
        return f"[{name}] — no reply in the records"
    parts = [f"reward {number(reply.reward, 2)}"]
    if reply.gold is not None:
        parts.append(f"gold {number(reply.gold, 2)}")
    counts = {name: (reply.features or {}).get(name, 0) for name in FEATURES}
    parts += [f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count]
    seed = "" if view.one_model(row) else f", {view.experiment.repetition_words(reply.seed)}"
    return f"[{name}, {DECODING_WORDS[reply.decoding]}{seed}] {', '.join(parts)}"


def _indented(text: str) -> str:
    """Indented line by line, so that no text can pose as a heading of this page."""
    text = visible(text, keep="\n").strip("\n")
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ... ({len(text) - _LONGEST} more characters)"
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
