"""One training step of RRHF, one prompt with its k candidates: the released computation, padded rows with the head on
labelled positions, and ours. `python -m benchmarks.step --help`.

Before anything is timed the sides must agree: same loss, same scores p, same gradients from the same weights. A step is
forward, loss and backward, added to gradients that are there (`--gradients none`: with none), no optimiser after it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.measure import (
    PRODUCT_SIZE,
    Side,
    Spread,
    apart,
    device_of,
    in_own_process,
    machine,
    main,
    measure_rounds,
    product,
    product_rates,
    ratios,
    read_json,
    spread,
    write_json,
)
from benchmarks.page import Panel, Series, dots_figure, make_console, rich_table, spread_words, write_page
from benchmarks.sides import (
    COLOURS,
    FLOAT32,
    LABELLED,
    OURS,
    PACKED,
    RELEASED,
    SIDES,
    STEERED,
    Errors,
    Results,
    Stepper,
    bfloat16_bound,
    check_equal,
    extra_memory,
    sides_for,
    timed_step,
)
from benchmarks.workloads import SHAPES, Group, Shape, Workload, make_model, model_flops, total_tokens, useful_flops
from rrhf_bench.errors import ConfigError, nearest
from rrhf_bench.policy import onednn

NAME = "step"
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "15M-cut",
            "15M, k = 6, one prompt of 64 tokens and one of 128, cut to 192 in all",
            "15M",
            6,
            (64, 128),
            cut=192,
        ),
        Workload("60M", "60M, k = 6, prompt of 128 tokens", "60M", 6, (128,)),
        Workload("60M-bf16", "60M, k = 6, prompt of 128 tokens, bfloat16", "60M", 6, (128,), dtype=torch.bfloat16),
        Workload("15M-k32", "15M, k = 32, prompt of 128 tokens", "15M", 32, (128,)),
        Workload("15M-512", "15M, k = 6, prompt of 512 tokens", "15M", 6, (512,)),
    )
}
PRODUCT, PRODUCT_ONEDNN = "product", "product, oneDNN"  # the machine's peak, timed among the sides
VOICED = "packed, none silent"  # packed, with rewards for which no response is without a gradient

# --- measuring ------------------------------------------------------------------------------------------------


def measure(workload: Workload, record: Mapping[str, Any], *, memory: bool, console: Console) -> dict[str, Any]:
    """One row of the record: equality first, then rounds and memory, each side in a process of its own.

    Raises StageError where a side computes something else.
    """
    seed, device, threads = record["seed"], torch.device(record["device"]), torch.get_num_threads()
    if record["quick"]:
        memory = memory and not record["rows"]  # of the first row only: a process takes its time to start
        workload = workload.quick()
    groups = workload.groups(seed)
    names = sides_for(workload.dtype, device)
    with console.status(f"{workload.name}: equality") as status:
        steppers = {
            name: Stepper.make(name, workload.shape, seed=seed, dtype=workload.dtype, device=device) for name in names
        }
        layouts = {name: stepper.layout for name, stepper in steppers.items()}
        found = agreed(workload, steppers, groups, seed=seed, device=device)
        voiced = [group.contradicting(score_K) for group, score_K in zip(groups, found.scores, strict=True)]
        two = {name: steppers[name] for name in (RELEASED, PACKED)}
        found_voiced = agreed(workload, two, voiced, seed=seed, device=device)
        del steppers, two

        def arguments(groups: Sequence[Group]) -> tuple[Shape, Sequence[Group], int, torch.dtype, torch.device, int]:
            return workload.shape, groups, seed, workload.dtype, device, threads

        makers = {name: partial(timed_step, name, *arguments(groups), record["gradients"]) for name in names}
        makers[VOICED] = partial(timed_step, PACKED, *arguments(voiced), record["gradients"])
        with apart(makers) as steps:
            sides: dict[str, Side] = {**steps, PRODUCT: product(workload.dtype, device)}
            if STEERED in names:
                sides[PRODUCT_ONEDNN] = product(workload.dtype, device, onednn=True)
            seconds = measure_rounds(
                sides, record["rounds"], progress=lambda words: status.update(f"{workload.name}: {words}")
            )
            usage = {name: side.usage()[-record["rounds"] :] for name, side in steps.items()}
        used: dict[str, int | None] = {}
        for name in names if memory else ():
            status.update(f"{workload.name}: memory of {name}")
            used[name] = in_own_process(extra_memory, name, *arguments(groups))
    row = {
        "name": workload.name,
        "words": workload.words,
        "parameters": workload.shape.parameters,
        "k": workload.k,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "queries": [len(group.query) for group in groups],
        "responses": [[len(response) for response in group.responses] for group in groups],
        **total_tokens(groups),
        "silent": [sorted(of) for of in found.silent],
        "useful_flops": sum(useful_flops(workload.shape, *of) for of in zip(groups, found.silent, strict=True)),
        "useful_flops_voiced": sum(
            useful_flops(workload.shape, *of) for of in zip(voiced, found_voiced.silent, strict=True)
        ),
        "errors": {
            name: error._asdict() for name, error in {**found.errors, VOICED: found_voiced.errors[PACKED]}.items()
        },
        "bound": found.bound._asdict(),
        "layout": layouts,
        "seconds": seconds,
        "kernel_seconds": {name: [of.kernel_seconds for of in runs] for name, runs in usage.items()},
        "pages": {name: [of.pages for of in runs] for name, runs in usage.items()},
        "extra_memory": used,
    }
    return {**row, "summary": summary(row)}


class Agreed(NamedTuple):
    """What sides that compute the same computed."""

    errors: dict[str, Errors]  # by side
    bound: Errors
    scores: Sequence[Tensor]  # p of each group
    silent: list[frozenset[int]]  # responses of each group


def agreed(
    workload: Workload, steppers: Mapping[str, Stepper], groups: Sequence[Group], *, seed: int, device: torch.device
) -> Agreed:
    """Raises StageError as ``check_equal`` does."""
    found = {name: stepper.results(groups) for name, stepper in steppers.items()}
    expected, bound = reference(workload, found, groups, seed=seed, device=device)
    compared = check_equal(found, expected, bound, workload.name)
    scores = found[RELEASED].score_N.split([len(group.responses) for group in groups])
    silent = [group.silent(score_K) for group, score_K in zip(groups, scores, strict=True)]
    return Agreed(compared, bound, scores, silent)


def reference(
    workload: Workload, found: Mapping[str, Results], groups: Sequence[Group], *, seed: int, device: torch.device
) -> tuple[Results, Errors]:
    """What all sides are held to, and how closely: in float32 the released computation; in half precision the same in
    float32 on the same weights."""
    if workload.dtype == torch.float32:
        return found[RELEASED], FLOAT32
    model = make_model(workload.shape, seed=seed, dtype=workload.dtype, device=device).float()
    return Stepper(model, SIDES[RELEASED](model)).results(groups), bfloat16_bound(workload.shape.layers)


# --- reading --------------------------------------------------------------------------------------------------


def summary(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a row's rounds say of each side: seconds, speed against the two others, share of the product's peak, and the
    share of the released side's memory. Spreads are (median, lower quartile, upper quartile) over rounds."""
    seconds, memory = row["seconds"], row["extra_memory"]
    found = {}
    for name in (name for name in (*SIDES, VOICED) if name in seconds):
        peak = PRODUCT_ONEDNN if name == STEERED else PRODUCT
        flops = row["useful_flops_voiced" if name == VOICED else "useful_flops"]
        achieved = [flops / took for took in seconds[name]]
        found[name] = {
            "flops": flops,
            "seconds": spread(seconds[name]),
            "times_released": ratios(seconds[RELEASED], seconds[name]),
            "times_labelled": ratios(seconds[LABELLED], seconds[name]),
            "share_of_peak": ratios(achieved, product_rates(seconds[peak])),
            "memory": memory.get(name),
            "memory_share": memory[name] / memory[RELEASED] if memory.get(name) is not None else None,
        }
    return found


def all_flops(row: Mapping[str, Any]) -> float:
    """The operations of a row's steps as 2204.02311 counts them."""
    (shape,) = (shape for shape in SHAPES.values() if shape.parameters == row["parameters"])
    return sum(model_flops(shape, *of) for of in zip(row["queries"], row["responses"], strict=True))


def brief(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    return ", ".join(
        f"{name} {of['seconds'].median:.3g} s"
        + ("" if name == RELEASED else f" ({of['times_released'].median:.2f} x)")
        + ("" if of["memory"] is None else f" {of['memory'] / 1e6:.0f} MB")
        for name, of in summary(row).items()
    )


COLUMNS = ("workload", "side", "seconds", "x released", "x labelled", "of peak", "extra MB", "of released")


def cells(record: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table, as words."""
    found = []
    for row in record["rows"]:
        for name, of in summary(row).items():
            padded = name in (*OURS, VOICED) and row["layout"][PACKED if name == VOICED else name] != "packed"
            found.append(
                [
                    row["name"],
                    f"{name} (on padded rows)" if padded else name,
                    spread_words(of["seconds"], 3),
                    spread_words(of["times_released"], 2),
                    spread_words(of["times_labelled"], 2),
                    f"{of['share_of_peak'].median:.0%}",
                    "—" if of["memory"] is None else f"{of['memory'] / 1e6:.1f}",
                    "—" if of["memory_share"] is None else f"{of['memory_share']:.1%}",
                ]
            )
    return found


USAGE_COLUMNS = ("workload", "side", "pages mapped", "seconds of the kernel")


def usage_cells(record: Mapping[str, Any]) -> list[list[str]]:
    """What the system did for a step, medians over rounds."""
    return [
        [row["name"], name, f"{statistics.median(pages):,.0f}", f"{statistics.median(row['kernel_seconds'][name]):.2f}"]
        for row in record["rows"]
        for name, pages in row["pages"].items()
    ]


def notes(record: Mapping[str, Any]) -> list[str]:
    """How the numbers are to be read, and what the run found about itself."""
    rates = [
        f"{name} {spread(product_rates(row['seconds'][name])).median / 1e9:.0f} GFLOP/s ({row['dtype']}, {row['name']})"
        for row in record["rows"]
        for name in (PRODUCT, PRODUCT_ONEDNN)
        if name in row["seconds"]
    ]
    of_model = [
        f"{name} "
        + ", ".join(
            f"{row['name']} {found['share_of_peak'].median * all_flops(row) / found['flops']:.0%}"
            for row, found in ((row, summary(row)[name]) for row in record["rows"])
        )
        for name in (PACKED, VOICED)
    ]
    worst = {row["name"]: max(max(error.values()) for error in row["errors"].values()) for row in record["rows"]}
    said = [
        "Speeds are medians of the ratios of each round, with the quartiles over rounds in brackets; higher is faster.",
        "A timed step adds to gradients that are there."
        if record["gradients"] == "kept"
        else "A timed step begins without gradients.",
        "Kernel: processor time of the system, nearly all of it to map fresh memory, of all threads together.",
        "Extra memory is what a step takes above weights and gradients at its peak, each side in a process of its own.",
        "Share of peak: the operations that no side can do without, over what a product of two "
        f"{PRODUCT_SIZE} x {PRODUCT_SIZE} matrices reached in the same rounds; "
        "against oneDNN's product for the side that uses it. " + "; ".join(rates) + ".",
        "A response for which the loss has no gradient counts forward only, and the last layer of a prompt only with "
        f"what its responses see of it. {VOICED!r} has rewards that contradict every score, so that the loss leaves no "
        "response out of the backward pass; what the released computation does hangs on no reward.",
        "Counted as 2204.02311 does, every token forward and backward through everything, whatever a side leaves out, "
        "the shares are: " + "; ".join(of_model) + ".",
        "Largest relative error of loss, scores and gradients, measured before the timing: "
        + ", ".join(f"{name} {error:.1g}" for name, error in worst.items())
        + ".",
        f"The package as shipped takes {record['shipped']!r} on this machine for float32.",
    ]
    if record["quick"]:
        said.insert(0, "A smoke run of tiny models: the numbers say that everything runs, and nothing about speed.")
    return said


def draw(record: Mapping[str, Any], folder: Path) -> None:
    """The page, its figure and the record itself, from the record alone."""
    rows = [(row["name"], summary(row)) for row in record["rows"]]
    names = [name for name in SIDES if any(name in found for _, found in rows)]

    def speed(name: str) -> list[Spread | None]:
        return [found[name]["times_released"] if name in found else None for _, found in rows]

    def memory(name: str) -> list[Spread | None]:
        shares = [found[name]["memory_share"] if name in found else None for _, found in rows]
        return [None if share is None else Spread(share, share, share) for share in shares]

    panels = [
        Panel("times as fast as the released computation", [Series(n, COLOURS[n], speed(n)) for n in names], log=2),
        Panel("extra memory, share of the released one's", [Series(n, COLOURS[n], memory(n)) for n in names], log=2),
    ]
    figure = dots_figure([name for name, _ in rows], panels)
    write_page(
        folder,
        NAME,
        title="The training step",
        lead="One prompt with k candidates: forward, loss and backward of RRHF.",
        record=record,
        tables=[(COLUMNS, cells(record)), (USAGE_COLUMNS, usage_cells(record))],
        notes=[*(f"{row['name']}: {row['words']}." for row in record["rows"]), *notes(record)],
        figures={NAME: (figure, "Speed and extra memory of the sides, medians and quartiles over rounds.")},
    )


# --- the command line -----------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def step(
    rows: Annotated[list[str] | None, typer.Option(help=f"workloads: {', '.join(WORKLOADS)}")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds, after one that warms up")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's own number otherwise")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where the models run")] = "auto",
    seed: Annotated[int, typer.Option(help="names weights, tokens and lengths")] = 0,
    gradients: Annotated[
        Literal["kept", "none"], typer.Option(help="before a timed step: those of other steps, or none")
    ] = "kept",
    memory: Annotated[bool, typer.Option(help="measure the peak memory of each side too")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="tiny models: does everything run?")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the record, as JSON")] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="write a page with figures")] = None,
    read: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="measure nothing: show the record in this file")
    ] = None,
) -> None:
    console = make_console()
    if read is not None:
        record = read_json(read, NAME)
    else:
        torch.set_num_threads(threads or torch.get_num_threads())
        record = begin(device_of(device), rounds=rounds, seed=seed, quick=quick, gradients=gradients)
        for workload in chosen(rows, WORKLOADS):
            row = measure(workload, record, memory=memory, console=console)
            record["rows"].append(row)
            console.print(f"{workload.name}: {brief(row)}", highlight=False)
            if out is not None:  # row by row: what a long run has measured is not lost with it
                write_json(out, record)
    console.print(rich_table(COLUMNS, cells(record)))
    for note in notes(record):
        console.print(note, highlight=False)
    if report is not None:
        draw(record, report)


def begin(device: torch.device, *, rounds: int, seed: int, quick: bool, gradients: str) -> dict[str, Any]:
    """A record without rows: what they all have in common."""
    return {
        "benchmark": NAME,
        "command": ["python", "-m", "benchmarks.step", *sys.argv[1:]],
        "machine": machine(device),
        "device": str(device),
        "rounds": rounds,
        "seed": seed,
        "quick": quick,
        "gradients": gradients,
        "shipped": STEERED if device.type == "cpu" and onednn.worth_it() else PACKED,
        "rows": [],
    }


def chosen(names: Sequence[str] | None, known: Mapping[str, Workload]) -> list[Workload]:
    """The workloads of that name, all where none is named. Raises ConfigError for one that is not known."""
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"--rows: found {name!r}; allowed are {', '.join(known)}, one for each --rows{nearest(name, known)}"
            )
    return [known[name] for name in names or known]


if __name__ == "__main__":
    main(app)
