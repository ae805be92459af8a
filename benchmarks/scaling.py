"""Measure how the cost of a training step grows with the number k of responses, the length of the prompt and the
vocabulary. ``python -m benchmarks.scaling --help``
"""

from __future__ import annotations

from benchmarks.measure import main
from benchmarks.step import Scan, StepBenchmark
from benchmarks.workloads import Workload

SCANS = {
    "k": Scan(
        "responses, k",
        {k: Workload(f"k {k}", f"15M, k = {k}, prompt of 128 tokens", "15M", k, (128,)) for k in (2, 8, 32)},
    ),
    "query": Scan(
        "tokens of the prompt, k = 6",
        {n: Workload(f"query {n}", f"15M, k = 6, prompt of {n} tokens", "15M", 6, (n,)) for n in (64, 256, 1024)},
        memory=False,
    ),
    "vocabulary": Scan(
        "vocabulary, k = 6",
        {
            v: Workload(f"vocabulary {v}", f"15M, k = 6, vocabulary of {v}", "15M", 6, (128,), vocabulary=v)
            for v in (8000, 64000)
        },
        memory=False,
    ),
}
app = StepBenchmark(
    name="scaling",
    help=__doc__ or "",
    title="How the training step scales",
    lead="A Llama of 15M in float32, responses of 32 to 128 tokens.",
    caption="Seconds of a step of one prompt, medians with quartiles over rounds.",
    scans=SCANS,
    quantities={"seconds": "seconds of a step"},
    rounds=3,
).app()

if __name__ == "__main__":
    main(app)
