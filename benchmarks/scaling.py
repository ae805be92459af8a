"""Measure how the cost of a training step grows with the number k of responses, the length of the prompt and the
vocabulary. ``python -m benchmarks.scaling --help``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.measure import main
from benchmarks.step import Record, StepBenchmark, measure, panel, table_of
from benchmarks.workloads import Workload

Scan = tuple[str, Mapping[int, Workload]]  # what grows, and the workload at each of its values

SCANS: dict[str, Scan] = {
    "k": (
        "responses, k",
        {k: Workload(f"k {k}", f"15M, k = {k}, prompt of 128 tokens", "15M", k, (128,)) for k in (2, 4, 8, 16, 32)},
    ),
    "query": (
        "tokens of the prompt, k = 6",
        {
            n: Workload(f"query {n}", f"15M, k = 6, prompt of {n} tokens", "15M", 6, (n,))
            for n in (32, 64, 128, 256, 512, 1024)
        },
    ),
    "vocabulary": (
        "vocabulary, k = 6",
        {
            v: Workload(f"vocabulary {v}", f"15M, k = 6, vocabulary of {v}", "15M", 6, (128,), vocabulary=v)
            for v in (8000, 16000, 32000, 64000)
        },
    ),
}


def rows(scan: Scan, record: Record, memory: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a scan. Peak memory is measured over k only: it takes a process for each number."""
    name = next(name for name, of in SCANS.items() if of is scan)
    for x, workload in scan[1].items():
        yield {"scan": name, "x": x, **measure(workload, record, memory=memory and name == "k")}


def by_scan(record: Record) -> dict[str, list[Record]]:
    """Return the rows of each scan that was measured, under what grows."""
    found = {words: [row for row in record["rows"] if row["scan"] == scan] for scan, (words, _) in SCANS.items()}
    return {words: rows for words, rows in found.items() if rows}


SCALING = StepBenchmark(
    name="scaling",
    help=__doc__ or "",
    title="How the training step scales",
    lead="A Llama of 15M in float32, responses of 32 to 128 tokens.",
    caption="Seconds of a step of one prompt, medians with quartiles over rounds.",
    known=SCANS,
    rounds=5,
    rows=rows,
    tables=lambda record: [table_of(rows, words, "x") for words, rows in by_scan(record).items()],
    panels=lambda record: [
        panel(rows, "seconds", "seconds of a step", "x", words) for words, rows in by_scan(record).items()
    ],
)
app = SCALING.app()

if __name__ == "__main__":
    main(app)
