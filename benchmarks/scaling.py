"""How the cost of a training step grows: with the number k of responses, with the length of the prompt, with the
vocabulary; and what planning many prompts holds in memory. `python -m benchmarks.scaling --help`.

Cost of one more response: in each round, seconds = a + b x response tokens is fitted by least squares to the steps of
one prompt with its first 2, 4, 8, 16 and 32 responses. b is what a token of one more response costs. Its own cost, c,
is that of a token in a plain forward and backward with nothing to share: as many tokens as the largest step has, in
rows so long that a token sees on average as many tokens before it as one of a response does. b / c is 1 where one more
response costs its own tokens and no more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.measure import (
    Side,
    Spread,
    device_of,
    in_own_process,
    machine,
    main,
    measure_rounds,
    peak_above,
    ratios,
    read_json,
    spread,
    write_json,
)
from benchmarks.page import Panel, Series, lines_figure, make_console, rich_table, spread_words, write_page
from benchmarks.sides import (
    COLOURS,
    FLOAT32,
    LABELLED,
    PACKED,
    RELEASED,
    STEERED,
    Ours,
    Stepper,
    check_equal,
    extra_memory,
    sides_for,
)
from benchmarks.workloads import Group, Workload, make_model, make_tokenization
from rrhf_bench.errors import ConfigError, nearest
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Prompt, Response
from rrhf_bench.seeding import generator
from rrhf_bench.training.method import LossOutput, MethodBatch, TrainContext, TrainInputs
from rrhf_bench.training.offline import FixedExamples, OfflineTrainer
from rrhf_bench.training.rrhf import RRHF
from rrhf_bench.training.rrhf_settings import RRHFSettings

NAME = "scaling"
BASE = Workload(NAME, "15M, float32", "15M", 32, (128,))
K = (2, 4, 8, 16, 32)
QUERIES = (32, 64, 128, 256, 512, 1024)  # tokens of the prompt, k = 6
VOCABULARIES = (8000, 16000, 32000, 64000)  # k = 6, prompt of 128
PLANNED = (1_000, 10_000, 100_000)  # prompts, k = 6
SCANS = ("k", "query", "vocabulary", "planning")
SIDES = (RELEASED, LABELLED, PACKED, STEERED)
PLAIN = "plain"  # the key of c's seconds: PLAIN for PACKED, and so on


# --- steps ----------------------------------------------------------------------------------------------------


class Scan:
    """Measures steps of some sides on groups of one model; what all scans of a run share."""

    def __init__(self, *, rounds: int, seed: int, device: torch.device, quick: bool, console: Console) -> None:
        self.rounds = rounds
        self.seed = seed
        self.device = device
        self.quick = quick
        self.console = console
        self.names = [name for name in sides_for(torch.float32, device) if name in SIDES]

    def workload(self, **changes: Any) -> Workload:
        workload = replace(BASE, **changes)
        return workload.quick() if self.quick else workload

    def steppers(self, workload: Workload) -> dict[str, Stepper]:
        return {
            name: Stepper.make(name, workload.shape, seed=self.seed, dtype=workload.dtype, device=self.device)
            for name in self.names
        }

    def seconds(
        self, steppers: Mapping[str, Stepper], groups: Mapping[int, Group], words: str, extra: Mapping[str, Side]
    ) -> dict[str, Any]:
        """{side: {x: seconds of each round}} of one step on each group, and {name: seconds} of the sides beside them.
        Raises StageError where two sides do not compute the same."""
        with self.console.status(words) as status:
            for x, group in groups.items():
                status.update(f"{words} {x}: equality")
                found = {name: stepper.results([group]) for name, stepper in steppers.items()}
                check_equal(found, found[RELEASED], FLOAT32, f"{words} {x}")
                del found
            sides = {
                (name, x): Side(partial(stepper.step, [group]), stepper.clear)
                for name, stepper in steppers.items()
                for x, group in groups.items()
            }
            taken = measure_rounds(
                {**sides, **extra}, self.rounds, progress=lambda said: status.update(f"{words}: {said}")
            )
        by_side = {name: {str(x): taken[name, x] for x in groups} for name in steppers}
        return {**by_side, **{name: taken[name] for name in extra}}


def scan_k(scan: Scan, *, memory: bool) -> dict[str, Any]:
    workload = scan.workload()
    (largest,) = workload.groups(scan.seed)
    groups = {k: largest.first(k) for k in K if k <= workload.k}
    plain = plain_batch(largest, workload.shape.vocabulary, scan.seed)
    steppers = scan.steppers(workload)
    extra = {
        f"{PLAIN} for {name}": plain_side(stepper, plain)
        for name, stepper in steppers.items()
        if isinstance(stepper.forward, Ours)
    }
    record = {
        "tokens": {str(k): group.response_tokens for k, group in groups.items()},
        "silent_tokens": {str(k): silent_tokens(steppers[RELEASED], group) for k, group in groups.items()},
        "plain_tokens": sum(len(p) + len(r) for p, r in zip(plain.prompt_ids, plain.response_ids, strict=True)),
        "seconds": scan.seconds(steppers, groups, "k", extra),
    }
    del steppers, extra
    if memory:
        arguments = (scan.seed, workload.dtype, scan.device, torch.get_num_threads())
        record["extra_memory"] = {
            name: {
                str(k): in_own_process(extra_memory, name, workload.shape, [group], *arguments)
                for k, group in groups.items()
            }
            for name in scan.names
        }
    return record


def silent_tokens(stepper: Stepper, group: Group) -> int:
    """Tokens of the responses for which the loss has no gradient."""
    silent = group.silent(stepper.results([group]).score_N)
    return sum(len(group.responses[i]) for i in silent)


def plain_batch(largest: Group, vocabulary: int, seed: int) -> ResponseBatch:
    """Rows of like length with nothing in common, as many tokens in all as the group has or up to a row less: each a
    prompt of one token and a response. A token of a response sees the prompt and half a response before it, and so, on
    average, does a token of a row twice as long as these two."""
    length = 2 * len(largest.query) + largest.response_tokens // len(largest.responses)
    rows = max(1, largest.distinct_tokens // length)
    ids = generator(seed, "benchmark", PLAIN).integers(2, vocabulary, (rows, length)).tolist()
    return ResponseBatch(tuple((row[0],) for row in ids), tuple(tuple(row[1:]) for row in ids), tuple(range(rows)))


def plain_side(stepper: Stepper, batch: ResponseBatch) -> Side:
    """Forward and backward of the mean log-prob of the rows, by our policy, which finds nothing to share in them."""
    policy = cast(Ours, stepper.forward).policy

    def run() -> None:
        fresh = ResponseBatch(batch.prompt_ids, batch.response_ids, batch.prompt_of)
        policy.token_logprobs(fresh).mean().backward()

    return Side(run, stepper.clear)


def scan_query(scan: Scan) -> dict[str, Any]:
    workload = scan.workload(k=6)
    groups = {}
    for n in QUERIES:
        (groups[n],) = scan.workload(k=6, queries=(n,)).groups(scan.seed)
    return {"seconds": scan.seconds(scan.steppers(workload), groups, "query", {})}


def scan_vocabulary(scan: Scan) -> dict[str, Any]:
    """A model each, so the sides take turns within one vocabulary only."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in scan.names}
    for size in VOCABULARIES:
        workload = replace(scan.workload(k=6), vocabulary=size // 50 if scan.quick else size)
        (group,) = workload.groups(scan.seed)
        for name, of in scan.seconds(scan.steppers(workload), {size: group}, "vocabulary", {}).items():
            found[name].update(of)
    return {"seconds": found}


# --- planning -------------------------------------------------------------------------------------------------


class MadePrompts(Sequence[Candidates]):
    """n prompts with six scored responses each, made when they are asked for and held nowhere."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.n:
            raise IndexError(index)
        random = generator(self.seed, "benchmark", "planning", index)

        def text(tokens: int) -> str:
            return "".join(f" w{word}" for word in random.integers(3, 2000, tokens))

        responses = tuple(
            Response(text(length), "model", "eos", score=float(rank))
            for rank, length in enumerate(random.integers(32, 129, 6))
        )
        return Candidates(Prompt(f"\n\nHuman:{text(128)}\n\nAssistant:"), responses)


class NoLoss(RRHF):
    """RRHF that plans and computes nothing."""

    def loss(self, logp_RT: Any, batch: MethodBatch) -> LossOutput:
        return LossOutput(torch.zeros((), requires_grad=True), float(batch.prompts))


def planning_memory(prompts: int, seed: int) -> tuple[int | None, float]:
    """(bytes, seconds): what one epoch over that many prompts adds at its peak, no model computing anything; for a
    process of its own."""
    torch.set_num_threads(1)
    model = make_model(BASE.quick().shape, seed=seed, dtype=torch.float32, device=torch.device("cpu"))
    policy = TransformersPolicy(model, make_tokenization(2000))
    method = NoLoss(RRHFSettings())
    settings = RRHFSettings(epochs=1, batch_prompts=64)
    trainer = OfflineTrainer(method, settings)

    def plan(candidates: Sequence[Candidates]) -> None:
        context = cast(TrainContext, SimpleNamespace(seed=seed))
        for batch in FixedExamples(method, settings, policy, TrainInputs(candidates=candidates), context):
            trainer.accumulate(policy, batch)

    plan(MadePrompts(8, seed))  # what is set up once
    start = time.perf_counter()
    peak = peak_above(lambda: plan(MadePrompts(prompts, seed)), torch.device("cpu"))
    return peak, time.perf_counter() - start


def records_memory(prompts: int, seed: int) -> int | None:
    """Bytes of the records of that many prompts in a list; for a process of its own."""
    return peak_above(lambda: list(MadePrompts(prompts, seed)), torch.device("cpu"))


def scan_planning(scan: Scan) -> dict[str, Any]:
    found = {}
    for n in PLANNED:
        prompts = n // 100 if scan.quick else n
        with scan.console.status(f"planning {prompts} prompts"):
            peak, seconds = in_own_process(planning_memory, prompts, scan.seed)
            records = in_own_process(records_memory, prompts, scan.seed)
        found[str(prompts)] = {"peak": peak, "seconds": seconds, "records": records}
    return found


# --- reading --------------------------------------------------------------------------------------------------


def marginal(record: Mapping[str, Any], name: str) -> dict[str, Spread]:
    """From the scan over k, for one side: a and b of seconds = a + b x tokens, b / c, and the same ratio between each
    k and the next; spreads over rounds. c is that of our policy on the products that the side uses."""
    tokens = np.array([record["tokens"][k] for k in record["tokens"]], dtype=float)
    seconds = np.array([record["seconds"][name][k] for k in record["tokens"]])  # (k, rounds)
    plain = record["seconds"][f"{PLAIN} for {STEERED if name == STEERED else PACKED}"]
    c = np.array(plain) / record["plain_tokens"]
    b, a = np.polyfit(tokens, seconds, 1)
    found = {"a": spread(a.tolist()), "b": spread(b.tolist()), "b / c": spread((b / c).tolist())}
    ks = list(record["tokens"])
    for i, (before, after) in enumerate(pairwise(ks)):
        between = (seconds[i + 1] - seconds[i]) / (tokens[i + 1] - tokens[i]) / c
        found[f"{before} to {after}"] = spread(between.tolist())
    return found


Shown = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, columns, cells


def tables(record: Mapping[str, Any]) -> list[Shown]:
    """What there is to show, as words."""
    found: list[Shown] = []
    if "k" in record:
        of = {name: marginal(record["k"], name) for name in record["sides"]}
        between = [key for key in of[PACKED] if " to " in key]
        rows = [
            [
                name,
                spread_words(m["a"], 3),
                f"{m['b'].median * 1e6:.0f}",
                spread_words(m["b / c"], 2),
                *(f"{m[key].median:.2f}" for key in between),
            ]
            for name, m in of.items()
        ]
        columns = ("side", "a, seconds", "b, µs a token", "b / c", *(f"from k = {key}" for key in between))
        found.append(("Cost of one more response, in its own tokens' cost", columns, rows))
    for scan, words in (("k", "k"), ("query", "tokens of the prompt"), ("vocabulary", "vocabulary")):
        if scan in record:
            found.append(_seconds_table(record, scan, words))
    if "planning" in record:
        rows = [
            [n, _megabytes(of["peak"]), _megabytes(of["records"]), f"{of['seconds']:.1f}"]
            for n, of in record["planning"].items()
        ]
        found.append(("One epoch planned", ("prompts", "added MB", "MB of the records in a list", "seconds"), rows))
    return found


def _megabytes(value: float | None) -> str:
    return "—" if value is None else f"{value / 1e6:.1f}"


def _seconds_table(record: Mapping[str, Any], scan: str, words: str) -> Shown:
    seconds = record[scan]["seconds"]
    memory = record[scan].get("extra_memory", {})
    rows = []
    for x in seconds[RELEASED]:
        for name in record["sides"]:
            row = [x, name, spread_words(spread(seconds[name][x]), 3)]
            row.append(spread_words(ratios(seconds[RELEASED][x], seconds[name][x]), 2))
            rows.append([*row, _megabytes(memory[name][x])] if memory else row)
    columns = (words, "side", "seconds", "x released", *(["extra MB"] if memory else []))
    return (f"A step by {words}", columns, rows)


def draw(record: Mapping[str, Any], folder: Path) -> None:
    """The page, its figures and the record itself, from the record alone."""
    figures = {}
    words = {"k": "responses, k", "query": "tokens of the prompt, k = 6", "vocabulary": "vocabulary, k = 6"}
    panels = [
        Panel("seconds of a step", [_line(record[scan]["seconds"], n) for n in record["sides"]], label, log=2)
        for scan, label in words.items()
        if scan in record
    ]
    if panels:
        figures[NAME] = (lines_figure(panels), "Seconds of a step of one prompt, medians with quartiles over rounds.")
    memory = record.get("k", {}).get("extra_memory")
    if memory and all(value is not None for of in memory.values() for value in of.values()):
        in_mb = {name: {k: [value / 1e6] for k, value in of.items()} for name, of in memory.items()}
        panel = Panel("extra MB", [_line(in_mb, name) for name in record["sides"]], words["k"], log=2)
        figures[f"{NAME}_memory"] = (lines_figure([panel]), "Peak memory of a step above weights and gradients.")
    write_page(
        folder,
        NAME,
        title="How the training step scales",
        lead=f"{BASE.words}, responses of 32 to 128 tokens; prompt of 128 tokens where nothing else is said.",
        record=record,
        tables=[(columns, cells) for _, columns, cells in tables(record)],
        notes=notes(record),
        figures=figures,
    )


def _line(seconds: Mapping[str, Mapping[str, Sequence[float]]], name: str) -> Series:
    points = seconds[name]
    return Series(name, COLOURS[name], [spread(values) for values in points.values()], [float(x) for x in points])


def notes(record: Mapping[str, Any]) -> list[str]:
    said = ["Medians over rounds, with quartiles in brackets; the sides agreed in loss, scores and gradients before."]
    if "k" in record:
        said.append(
            "One more response: seconds = a + b x response tokens over k; c is the cost of a token in a plain forward "
            "and backward with nothing to share, at the same average context. Where b / c is 1, a response costs its "
            "own tokens and no more."
        )
        of = record["k"]
        said.append(
            "Ours makes no backward pass for responses whose gradient is zero at these weights and rewards; from one k "
            "to the next a response costs more than its tokens where fewer are. Without a gradient are "
            + ", ".join(f"{n} of {of['tokens'][k]} response tokens at k = {k}" for k, n in of["silent_tokens"].items())
            + "."
        )
    if "planning" in record:
        said.append(
            "Planning: prompts with six responses, made one by one when asked for; what is added is what the loop "
            "holds, which is the records and the token ids of the texts seen last, of a number of them at most. Beside "
            "it, what the records alone take where a list holds them."
        )
    if record["quick"]:
        said.insert(0, "A smoke run of tiny models: the numbers say that everything runs, and nothing about speed.")
    return said


# --- the command line -----------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def scaling(
    rows: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SCANS)}; all otherwise")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds, after one that warms up")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's own number otherwise")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where the models run")] = "auto",
    seed: Annotated[int, typer.Option(help="names weights, tokens and lengths")] = 0,
    memory: Annotated[bool, typer.Option(help="measure the peak memory of each side for each k too")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="tiny models: does everything run?")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the record, as JSON")] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="write a page with figures")] = None,
    read: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="measure nothing: show the record in this file")
    ] = None,
) -> None:
    for name in rows or ():
        if name not in SCANS:
            raise ConfigError(
                f"--rows: found {name!r}; allowed are {', '.join(SCANS)}, one for each --rows{nearest(name, SCANS)}"
            )
    console = make_console()
    if read is not None:
        record = read_json(read, NAME)
    else:
        torch.set_num_threads(threads or torch.get_num_threads())
        scan = Scan(rounds=rounds, seed=seed, device=device_of(device), quick=quick, console=console)
        record = run(scan, rows or SCANS, out, memory=memory and not quick)
    for title, columns, cells in tables(record):
        console.print(rich_table(columns, cells, title))
    for note in notes(record):
        console.print(note, highlight=False)
    if report is not None:
        draw(record, report)


def run(scan: Scan, rows: Sequence[str], out: Path | None, *, memory: bool) -> dict[str, Any]:
    """Measure the scans one after another; the record, written to a file after each."""
    record: dict[str, Any] = {
        "benchmark": NAME,
        "command": ["python", "-m", "benchmarks.scaling", *sys.argv[1:]],
        "machine": machine(scan.device),
        "device": str(scan.device),
        "rounds": scan.rounds,
        "seed": scan.seed,
        "quick": scan.quick,
        "sides": scan.names,
    }
    for row in (row for row in SCANS if row in rows):
        if row == "k":
            record[row] = scan_k(scan, memory=memory)
            record[row]["summary"] = {name: marginal(record[row], name) for name in scan.names}
        else:
            record[row] = {"query": scan_query, "vocabulary": scan_vocabulary, "planning": scan_planning}[row](scan)
        if out is not None:
            write_json(out, record)
    return record


if __name__ == "__main__":
    main(app)
