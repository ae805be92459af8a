"""The numbers in the tables of README and docs/replication.md are those of the published reports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_report import rows_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "replication.md"]
NUMBER = r"-?\d+(?:\.\d+)?"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")


def published(report: str, table: str) -> list[dict[str, str]]:
    return rows_of(ROOT / "reports" / report / "tables" / f"{table}.csv")


def lines(first: str) -> Iterator[list[str]]:
    """Yield the cells of each line of the table whose header begins so."""
    text = "\n\n".join(page.read_text() for page in PAGES)
    table = text[text.index(first) :].split("\n\n")[0].splitlines()
    for line in table[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def rounded(printed: str, exact: str) -> bool:
    """Return True if a number was printed as the exact one rounds; halves may go either way."""
    places = len(printed.partition(".")[2])
    return abs(float(printed) - float(exact)) <= 0.5 * 10**-places + 1e-9


def is_printed(cell: str, row: dict[str, str], name: str) -> bool:
    """Return True if a cell holds a row's estimate and interval."""
    found = INTERVAL.search(cell)
    ends = (row[name], row[f"{name} low"], row[f"{name} high"])
    return found is not None and all(map(rounded, found.groups(), ends))


def test_the_headline_table() -> None:
    differences = {(r["comparison"], r["decoding"], r["reward"]): r for r in published("hh_compare", "differences")}
    main = {(r["method"], r["decoding"]): r for r in published("hh_compare", "main")}
    (_, *base), *rows = lines("| method | proxy, greedy")
    places = [(decoding, reward) for decoding in ("greedy", "sampled") for reward in ("proxy", "gold")]
    for cell, (decoding, reward) in zip(base, places, strict=False):
        assert rounded(cell, main["base", decoding][f"{reward} reward"])
    assert len(rows) == 8
    for name, *cells in rows:
        row = name.partition(",")[0]
        for cell, place in zip(cells, places, strict=False):
            known = differences[f"{row} - base", *place]
            assert cell == "—" if not known["difference"] else is_printed(cell, known, "difference"), (row, place)
        kl, models = cells[4:]
        assert models == main[row, "sampled"]["models"]
        assert kl.startswith("at most") or rounded(kl, main[row, "sampled"]["KL"]), row


def test_the_verdicts_of_the_headline_under_three_roundings() -> None:
    """README says how many verdicts are the same; the others are decided in one of two runs, and in one direction."""

    def verdicts(report: str) -> dict[tuple[str, ...], str]:
        found = {(r["comparison"], r["decoding"], r["reward"]): r["verdict"] for r in published(report, "differences")}
        return {place: verdict for place, verdict in found.items() if verdict not in ("", "exploratory")}

    first = verdicts("hh_compare")
    same = []
    for report in ("hh_compare_avx512", "hh_compare_intel"):
        pairs = [(verdict, verdicts(report)[place]) for place, verdict in first.items()]
        same.append(sum(one == other for one, other in pairs))
        assert all("inside noise" in pair for pair in pairs if pair[0] != pair[1])
    words = f"Of {len(first)} verdicts {same[0]} and {same[1]} are the same there"
    assert words in " ".join(PAGES[0].read_text().split())


@pytest.mark.parametrize(("last", "report"), [("in one", "claims"), ("report", None)])
def test_the_tables_of_claims(last: str, report: str | None) -> None:
    for name, margin, *verdicts, link in lines(f"| claim | margin | greedy | sampled | {last}"):
        own = report or re.findall(r"\[(\w+)\]", link)[0]
        known = {(row["claim"], row["decoding"]): row for row in published(own, "claims")}
        for cell, decoding in zip(verdicts, ("greedy", "sampled"), strict=True):
            row = known.get((name.strip("`"), "none" if "(no decoding)" in cell else decoding))
            if cell == "—":
                assert row is None
                continue
            assert row is not None
            assert rounded(margin, row["margin"])
            assert cell.startswith(f"*{row['verdict']}*"), (name, decoding)
            assert is_printed(cell, row, "estimate"), (name, decoding)


def test_the_table_of_the_field() -> None:
    known = {(r["comparison"], r["decoding"], r["reward"]): r for r in published("methods", "differences")}
    printed = [
        found for cells in lines("| rows and estimates |") for found in re.findall(rf"`(\w+)` ({NUMBER})", cells[0])
    ]
    assert {row for row, _ in printed} == {
        comparison.removesuffix(" - base") for comparison, *_ in known if comparison.endswith(" - base")
    }
    for row, value in printed:
        assert rounded(value, known[f"{row} - base", "sampled", "gold"]["difference"]), row


def test_every_report_that_is_linked_is_there_and_its_age_is_told() -> None:
    ages = (ROOT / "reports" / "README.md").read_text().partition("## How old each report is")[2]
    for folder in sorted(path.name for path in (ROOT / "reports").iterdir() if path.is_dir()):
        assert re.search(rf"\b{folder}\b", ages), folder
    for page in PAGES:
        for link in re.findall(r"\]\(((?:\.\./)?reports/[^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)
