"""The largest published ranking of these methods beside this run's own."""

from __future__ import annotations

from rrhf_bench.report.ranking import places, ranked_rows
from rrhf_bench.report.section import Part, Sentence
from rrhf_bench.report.table import DECODING_WORDS, Cell, Column, Missing, Table
from rrhf_bench.report.view import View

# Spangher et al., "RLHF Algorithms Ranked" (EMNLP 2025, industry track): seventeen algorithms on TL;DR and HH with a 2B
# reward model and one of rules. The methods that it puts at the top, in its order, by the name that rows have here.
TOP = ("ipo", "dpo", "reinforce", "grpo", "best_of_n")


def published_ranking(view: View) -> list[Part]:
    """Return the table of the two orders, with what cannot be compared; nothing if the run ranks nothing."""
    rows = ranked_rows(view)
    if not rows:
        return []
    about = Sentence(
        "The largest published ranking known to us has seventeen algorithms (Spangher et al., RLHF Algorithms Ranked, "
        "EMNLP 2025, industry track). It names these five as its best. It gives no intervals that we know of, so how "
        "far its order would repeat is open. Models, data, reward models and tuning differ from this run's; the orders "
        "can be set side by side, their distances cannot. The published order of the other twelve is not at hand."
    )
    measure = view.measures[-1]
    found = {decoding: places(view, rows, decoding, measure) for decoding in view.decodings}
    columns = (Column("published", 0), Column("method"), *(Column(f"here, {DECODING_WORDS[d]}") for d in found))
    absent = Missing("the run has no such row, or no replies of it under this decoding")
    lines = []
    for place, row in enumerate(TOP, 1):
        here = (Cell(p[row].words) if row in p else Cell.of(absent) for p in found.values())
        lines.append((Cell(place), Cell(row), *here))
    sizes = ", ".join(f"{len(p)} {DECODING_WORDS[d]}" for d, p in found.items())
    notes = (f"Here: the range of ranks of the table above, initial policy included, among so many rows: {sizes}.",)
    table = Table("published_ranking", "Beside a published ranking", columns, tuple(lines), notes, view.records.arena)
    return [about, table]
