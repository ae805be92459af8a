"""The commands on plain files: sample, score, train and evaluate. Each is a function that `cli.py` registers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rrhf_bench.cli_options import (
    Backend,
    MaxNewTokens,
    Out,
    Policy,
    PolicyOptions,
    Prompts,
    RewardModel,
    RewardOptions,
    ScorerOptions,
    Seed,
    StepOptions,
    WeightOptions,
    require_utf8,
)
from rrhf_bench.data.dialogue import TemplateKind
from rrhf_bench.errors import ConfigError, nearest
from rrhf_bench.records import STOP_STRINGS
from rrhf_bench.registry import METHODS
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.settings.candidates import LOWEST_TEMPERATURE, Strategy
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.reading import parse_method, parse_reward_training
from rrhf_bench.terminal import Screen, TerminalReporter, answer, table_of

if TYPE_CHECKING:
    from rrhf_bench.pipeline.file_commands import PlainSteps
    from rrhf_bench.records import Evaluated

REWARD_MODEL = "reward-model"  # what `train` makes beside policies


def sample(
    *,
    model: Policy,
    prompts: Prompts,
    out: Out,
    strategy: Annotated[Strategy, typer.Option(help="draw samples, or search with beams")] = "sample",
    beams: Annotated[int, typer.Option(min=1, help="of a beam search, all of which it returns, best first")] = 4,
    groups: Annotated[int, typer.Option(min=1, help="of diverse-beam: groups of equal size")] = 4,
    diversity_penalty: Annotated[
        float, typer.Option(min=0.0, help="of diverse-beam: for a token that a beam of an earlier group has just taken")
    ] = 1.0,
    n: Annotated[int, typer.Option(min=1, help="samples a prompt")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0 is greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="above 0; 1 is off")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off")] = 0,
    max_new_tokens: MaxNewTokens = 64,
    sources: Annotated[str, typer.Option(help="what a group holds, in order: model,chosen,rejected")] = "model",
    cut: Annotated[
        bool | None, typer.Option("--cut/--no-cut", help="cut replies at a fake turn", show_default="cut, unless raw")
    ] = None,
    seed: Seed = 0,
    template: Annotated[
        TemplateKind | None,
        typer.Option(
            help="how the model wants a dialogue; raw: the prompt is fed as tokenizer(prompt), the reply is kept as "
            "generated",
            show_default="hh; raw for beams",
        ),
    ] = None,
    own: WeightOptions,
    backend: Backend = "vllm",
    options: StepOptions,
) -> None:
    """Sample responses to prompts, or search for them with beams, and write them as {"query", "responses"}.

    With each response come its token_ids as generated, the end-of-text token included.
    """
    from rrhf_bench.pipeline.file_commands import model_ref
    from rrhf_bench.pipeline.stages import CANDIDATES
    from rrhf_bench.sampling.sampler import SamplingSpec

    names = tuple(sources.split(","))
    unknown = sorted(set(names) - {"model", "chosen", "rejected"})
    if unknown:
        raise ConfigError(f"--sources: found {unknown[0]!r}; allowed are model, chosen, rejected")
    if len(set(names)) < len(names):
        raise ConfigError(f"--sources: found {sources!r}; a source may stand once only")
    if top_p == 0.0:
        raise ConfigError("--top-p: found 0; expected more than 0 and at most 1 (off)")
    if 0.0 < temperature < LOWEST_TEMPERATURE:
        raise ConfigError(
            f"--temperature: found {temperature:g}; expected 0 (greedy) or at least {LOWEST_TEMPERATURE:g}"
        )
    default_template: TemplateKind = "hh" if strategy == "sample" else "raw"
    ref = model_ref(model, default_template=default_template, template=template, **asdict(own))
    if cut is None:
        cut = ref.template != "raw"
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "purpose": CANDIDATES, "top_p": top_p}
    common |= {"temperature": temperature, "top_k": top_k, "stop": STOP_STRINGS if cut else ()}
    if strategy == "sample":
        if temperature == 0.0 and n > 1:
            raise ConfigError(f"--temperature 0 gives {n} equal samples; raise it or use --n 1")
        spec = SamplingSpec(n=n, **common)
    else:
        groups = groups if strategy == "diverse-beam" else 1
        if beams % groups:
            raise ConfigError(f"--groups {groups}: {beams} beams do not divide into groups of equal size")
        if (n, temperature, top_p, top_k) != (4, 1.0, 1.0, 0):
            Screen(stderr=True).print("note: --n, --temperature, --top-p and --top-k have no effect on beams")
        search: dict[str, Any] = {"strategy": strategy, "beams": beams, "groups": groups}
        spec = SamplingSpec(n=beams, diversity_penalty=diversity_penalty, **search, **common)
    with _steps(options, "sampling", backend, strategy) as steps:
        counts = steps.sample(ref, prompts, out, spec, names)
    answer(options.as_json, {"counts": counts, "out": str(out)}, f"{spec.n} samples a prompt ({_words(counts)}): {out}")


def score(
    *,
    reward_model: RewardModel,
    candidates: Annotated[Path, typer.Option(help='JSONL of {"query", "responses"}')],
    out: Out,
    own: ScorerOptions,
    options: StepOptions,
) -> None:
    """Score responses with a reward model and write them as {"query", "responses", "scores"}."""
    from rrhf_bench.pipeline.file_commands import model_ref

    ref = model_ref(reward_model, **asdict(own))
    with _steps(options, "scoring") as steps:
        counts = steps.score(ref, candidates, out)
    answer(options.as_json, {"counts": counts, "out": str(out)}, f"{_words(counts)}: {out}")


def score_pairs(
    *,
    reward_model: RewardModel,
    data: Annotated[Path, typer.Option(help='pairs: {"prompt", "chosen", "rejected"}')],
    out: Annotated[Path, typer.Option(help="the folder to write tables, figure and scored pairs to")],
    own: ScorerOptions,
    options: StepOptions,
) -> None:
    """Judge a reward model on labelled pairs: accuracy, by difference of length, and calibration."""
    from rrhf_bench.data.rrhf_files import write_rrhf
    from rrhf_bench.pipeline.file_commands import model_ref
    from rrhf_bench.pipeline.store import replace_path
    from rrhf_bench.report import preference_models
    from rrhf_bench.report.drawing import styled
    from rrhf_bench.report.figures import write_figures
    from rrhf_bench.report.table import write_table

    ref = model_ref(reward_model, **asdict(own))
    with _steps(options, "scoring") as steps, replace_path(out) as folder:
        groups, clusters, counts = steps.score_pairs(ref, data)
        judged = [preference_models.judged_pairs(Path(reward_model).name, {0: groups}, clusters)]
        accuracy = judged[0].mean(judged[0].right_SP, "accuracy")  # refuses a single pair before files are made
        folder.mkdir()
        (folder / "tables").mkdir()
        write_rrhf(folder / "scored.jsonl", groups)
        for table in preference_models.tables(judged, f"of one file, {data.name}"):
            write_table(table, folder / "tables")
        with styled():
            figure = preference_models.pairs_figure(judged)
        write_figures([figure], folder)
    error = preference_models.calibration_error(judged[0])
    words = f"accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}], calibration error {error:.3f}"
    found = {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high, "n": accuracy.n}
    about = {"accuracy": found, "calibration_error": error, "counts": counts, "out": str(out)}
    answer(options.as_json, about, f"{words} ({_words(counts)}): {out}")


def train(
    *,
    method: Annotated[str, typer.Option(help=f"one of {', '.join(METHODS)}, or {REWARD_MODEL} from pairs")],
    model: Annotated[str, typer.Option(help="hub id or folder of the initial policy")],
    data: Annotated[Path, typer.Option(help="scored candidates, pairs or prompts, as the method requires, as JSONL")],
    out: Annotated[Path, typer.Option(help="the folder to write the trained policy to", callback=require_utf8)],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting of the method, such as lr=1e-5")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="hub id or folder, for a method that scores its own samples")
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    cut: Annotated[bool, typer.Option("--cut/--no-cut", help="cut replies at a fake turn")] = True,
    seed: Seed = 0,
    own: PolicyOptions,
    reward: RewardOptions,
    backend: Backend = "vllm",
    options: StepOptions,
) -> None:
    """Train a policy by one method, or a reward model on pairs, and write it as a transformers folder."""
    if method == REWARD_MODEL:
        _train_reward_model(model, data, out, override or [], reward_model, seed, own, reward, options)
        return
    if method not in METHODS and ":" not in method:
        kinds = (*METHODS, REWARD_MODEL)
        allowed = f"{', '.join(kinds)} or package.module:OBJECT"
        raise ConfigError(f"--method: found {method!r}; allowed are {allowed}{nearest(method, kinds)}")
    settings = parse_method(method, override or [])
    if settings.family == "inference":
        raise ConfigError(f"--method {method}: trains nothing; use `sample` and `score`")
    from rrhf_bench.pipeline.file_commands import model_ref

    ref, judge = model_ref(model, **asdict(own)), reward.ref(reward_model)
    lengths: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": STOP_STRINGS if cut else ()}
    with _steps(options, f"training {method}", backend) as steps:
        result = steps.train(settings, ref, data, out, seed=seed, reward=judge, **lengths)
    summary = {"steps": result.steps, "counts": dict(result.counts), "out": str(out)}
    answer(options.as_json, summary, f"{result.steps} optimiser steps ({_words(result.counts)}): {out}")


def _train_reward_model(
    model: str,
    data: Path,
    out: Path,
    override: list[str],
    reward_model: str | None,
    seed: int,
    own: PolicyOptions,
    reward: RewardOptions,
    options: StepOptions,
) -> None:
    settings = parse_reward_training(override)
    from rrhf_bench.pipeline.file_commands import model_ref
    from rrhf_bench.pipeline.preference_models import train_from_file

    if reward_model is not None:
        raise ConfigError(f"--reward-model: found {reward_model!r}; --method {REWARD_MODEL} starts from --model alone")
    reward.ref(None)  # raises for an option of a reward model, which nothing would read
    if own.dtype not in (None, "float32"):
        raise ConfigError(f"--dtype: found {own.dtype!r}; a reward model is trained in float32; leave the option out")
    ref = model_ref(model, **asdict(own))
    with _steps(options, "training a reward model") as steps:
        result = train_from_file(steps, ref, data, settings, out, seed=seed)
    last = f", accuracy {result.accuracy_curve[-1][1]:.3f} over the last steps" if result.accuracy_curve else ""
    words = f"{result.steps} optimiser steps, loss {result.loss:.3f}{last} ({_words(result.counts)}): {out}"
    curve = [{"step": step, "accuracy": accuracy} for step, accuracy in result.accuracy_curve]
    about = {"steps": result.steps, "loss": result.loss, "curve": curve}
    answer(options.as_json, {**about, "counts": dict(result.counts), "out": str(out)}, words)


def evaluate(
    *,
    model: Policy,
    reward_model: RewardModel,
    prompts: Prompts,
    out: Out,
    name: Annotated[str, typer.Option(help="the row's name in the records")] = "policy",
    initial: Annotated[
        str | None,
        typer.Option(help="the initial policy, for the KL to it; template, dtype and pad token are the policy's"),
    ] = None,
    perplexity_model: Annotated[
        str | None, typer.Option(help="a fixed language model, for perplexity; it reads transcripts (hh) in float32")
    ] = None,
    gold: Annotated[bool, typer.Option("--gold", help="the embedded world's gold reward, on its prompts")] = False,
    decoding: Annotated[str, typer.Option(help="greedy, sample or both")] = "greedy,sample",
    temperature: Annotated[float, typer.Option(min=0.01, max=10.0, help="of sample")] = 1.0,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    own: PolicyOptions,
    reward: RewardOptions,
    backend: Backend = "vllm",
    options: StepOptions,
) -> None:
    """Judge a policy on prompts: one record a prompt and decoding."""
    from rrhf_bench.pipeline.file_commands import model_ref, pad_token_of
    from rrhf_bench.pipeline.stage_helpers import decodings

    names = decoding.split(",")
    if not set(names) <= {"greedy", "sample"} or len(set(names)) < len(names):
        raise ConfigError(f"--decoding: found {decoding!r}; allowed are greedy, sample and greedy,sample")
    arena = {"decoding": names, "temperature": temperature, "top_k": 0, "max_new_tokens": max_new_tokens}
    specs = decodings({**arena, "stop": STOP_STRINGS}, seed, "evaluate")

    def policy_ref(source: str) -> Any:
        return model_ref(source, **{**asdict(own), "pad_token": pad_token_of(source, (model, initial), own.pad_token)})

    policy, base = policy_ref(model), None if initial is None else policy_ref(initial)
    judge, fluency = reward.ref(reward_model), None
    assert judge is not None
    if perplexity_model is not None:
        fluency = model_ref(perplexity_model)
    others: dict[str, Any] = {"initial": base, "perplexity": fluency, "gold": gold}
    with _steps(options, "evaluating", backend) as steps:
        records, counts = steps.evaluate(policy, judge, prompts, out, name=name, seed=seed, decodings=specs, **others)
    by_decoding = {way: [r for r in records if r.decoding == way] for way in dict.fromkeys(r.decoding for r in records)}
    rows = [{"decoding": way, **_summary(chosen, gold)} for way, chosen in by_decoding.items()]
    cells = (("-" if v is None else f"{v:.3f}" if isinstance(v, float) else v for v in row.values()) for row in rows)
    value = {"out": str(out), "counts": counts, "results": rows}
    answer(options.as_json, value, table_of(*rows[0], rows=cells), f"{_words(counts)}: {out}")


def _summary(records: list[Evaluated], gold: bool) -> dict[str, Any]:
    """Return the means over the records of one decoding; None is what was not measured."""
    from rrhf_bench.evaluation.metrics import fake_turn_share, mean_kl, mean_length, perplexity

    fluency = perplexity(records)
    return {
        "n": len(records),
        "reward/mean": sum(record.reward for record in records) / len(records),
        "gold/mean": sum(record.gold or 0.0 for record in records) / len(records) if gold else None,
        "perplexity": None if fluency is None else fluency.pooled,
        "objective/kl": mean_kl(records),
        "completions/mean_length": mean_length(records),
        "completions/fake_turn_share": fake_turn_share(records),
    }


def _words(counts: Mapping[str, int]) -> str:
    """Return the counts that are not zero as words."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)


@contextmanager
def _steps(
    options: StepOptions, words: str, backend: BackendName = "transformers", strategy: Strategy = "sample"
) -> Iterator[PlainSteps]:
    """Yield the steps on plain files, with a progress bar on standard error."""
    from rrhf_bench.pipeline.file_commands import PlainSteps
    from rrhf_bench.pipeline.memory import WITHOUT_A_FILE, out_of_memory_named
    from rrhf_bench.pipeline.scheduler import quiet
    from rrhf_bench.sampling.backend import choose_backend

    chosen = choose_backend(backend, strategy, options.device)
    console = Screen(stderr=True)
    if chosen.note:
        console.print(f"note: {chosen.note}")
    with TerminalReporter(console) as reporter, quiet():
        reporter.begin(words)
        runtime = RuntimeSettings(device=options.device)
        steps = PlainSteps(
            runtime, chosen.name, lambda i, n: reporter.progress(words, i, n), options.faulty_rows, reporter.note
        )
        with out_of_memory_named(steps.services, WITHOUT_A_FILE):
            yield steps
