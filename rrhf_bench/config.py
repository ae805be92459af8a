"""The experiment file: TOML to a frozen, complete Experiment, every fault found at once, before torch is imported."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from rrhf_bench.data.dialogue import STOP_STRINGS
from rrhf_bench.errors import ConfigError
from rrhf_bench.registry import METHODS, settings_class
from rrhf_bench.rewards.reward_settings import RewardTrainingSettings
from rrhf_bench.settings import READ, SEARCH_KEYS, SIZES, CandidateSettings, MethodSettings, Names, Settings, Strategy

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
RESERVED_ROWS = ("base", "chosen", "rejected")  # rows that every table has without being asked


class ToySettings(Settings):
    """Sizes of the embedded world, in dialogues and labelled pairs."""

    corpus: Positive = 8000
    perplexity_corpus: Positive = 6000
    preferences: Positive = 8000


class DataSettings(Settings):
    source: str = "toy"  # "toy", "files" (with path), or "hub:OWNER/NAME"
    path: str | None = None
    subset: str | None = None  # a folder of a hub data set, such as "harmless-base"
    split: str = "train"
    revision: str | None = None
    seed: int = 0
    train_prompts: Positive = 500  # prompts that policies are trained on
    toy: ToySettings = ToySettings()
    diverging: Literal["drop", "common-prefix"] = "drop"  # pairs that part before the last turn
    faulty_rows: Literal["error", "drop"] = "error"  # texts that are no transcript, or that end with the Human
    long_prompts: Literal["error", "drop"] = "drop"  # prompts that leave no room for a reply in the context

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.source not in ("toy", "files") and not self.source.startswith("hub:"):
            raise ValueError(f'source: found {self.source!r}; allowed are "toy", "files" and "hub:OWNER/NAME"')
        if self.source == "files" and self.path is None:
            raise ValueError(
                'path: missing; source = "files" reads .jsonl, .jsonl.gz or .parquet: --set data.path=FILE names one'
            )
        if self.source == "files" and self.path is not None and not _exists(self.path):
            raise ValueError(f"path: found {self.path!r}, which does not exist; expected a file, a folder or a pattern")
        return self


class ScratchSettings(Settings):
    """A small Llama trained from nothing on the data's own text, where no checkpoint is given."""

    vocabulary: Annotated[int, Field(ge=300)] = 1024
    hidden: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    ffn: Positive = 256
    context: Annotated[int, Field(ge=64)] = 512
    epochs: Positive = 3
    batch: Positive = 16
    lr: Annotated[float, Field(gt=0)] = 6e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 1.0


class ModelSettings(Settings):
    source: str = "toy"  # "toy", "scratch", a hub id or a folder
    revision: str | None = None
    template: Literal["hh", "chat"] = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    max_length: Annotated[int, Field(ge=16)] | None = None  # prompt + reply tokens; none: the model's own context
    scratch: ScratchSettings = ScratchSettings()

    @property
    def from_scratch(self) -> bool:
        return self.source in ("toy", "scratch")


class RewardModelSettings(Settings):
    source: str = "toy"  # "toy" or "scratch": trained on the data's pairs from the initial policy; a hub id or a folder
    layout: Literal["classifier", "value-head"] = "classifier"
    revision: str | None = None
    template: Literal["hh", "chat"] = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    training: RewardTrainingSettings = RewardTrainingSettings()

    @property
    def from_scratch(self) -> bool:
        return self.source in ("toy", "scratch")


class SamplingSettings(CandidateSettings):
    """The candidates of every method that does not say otherwise."""

    backend: Literal["vllm", "transformers"] = "vllm"
    sources: Names = ("model", "chosen", "rejected")
    n: Annotated[int, Field(ge=1, le=1024)] = 4
    strategy: Strategy = "sample"
    beams: Annotated[int, Field(ge=1, le=1024)] = 4
    groups: Annotated[int, Field(ge=1)] = 4
    diversity_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Positive = 64
    stop: Names = STOP_STRINGS
    cut_at_stop: bool = True  # training replies too; the paper did not cut them

    @property
    def training_stop(self) -> tuple[str, ...]:
        """The stop strings that training samples are cut at."""
        return self.stop if self.cut_at_stop else ()


class EvaluationSettings(Settings):
    """The arena's own part: what is asked of every method, and how it is decoded."""

    prompts: Positive = 300
    pairs: Positive = 1000  # held-out pairs for p_i as a reward model; their first `prompts` are the evaluation prompts
    dev_prompts: Positive = 100  # for curves and tuning; disjoint from training and evaluation
    decoding: Annotated[tuple[Literal["greedy", "sample"], ...], Field(strict=False, min_length=1)] = (
        "greedy",
        "sample",
    )
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0  # of "sample"
    max_new_tokens: Positive = 64
    curve_points: Positive = 8
    pool_prompts: Positive = 100  # the best-of-n curve: prompts, and samples a prompt
    pool_samples: Positive = 32


class RuntimeSettings(Settings):
    """Recorded, never part of a key: none of these changes a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    score_batch: Positive = 64  # texts a pass of the reward and perplexity models
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share that the sampler's engine may take on a GPU
    kv_cache_mib: Positive = 96  # of the sampler's engine on a CPU
    workers: Positive | None = None  # processes that share the stages; none: one on a GPU, one a core (at most 4) else


class Experiment(Settings):
    """One experiment, complete: every default filled in, every method's inheritance resolved."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (0,)
    data: DataSettings = DataSettings()
    policy: ModelSettings = ModelSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    perplexity_model: ModelSettings = ModelSettings()
    sampling: SamplingSettings = SamplingSettings()
    methods: Mapping[str, SerializeAsAny[MethodSettings]] = Field(default_factory=dict)
    evaluation: EvaluationSettings = EvaluationSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    def to_toml(self) -> str:
        """The resolved file: loading it gives this Experiment again."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, with ``key.path=value`` overrides applied. Raises ConfigError listing every fault."""
    table = _read(path, ())
    faults: list[str] = []
    for override in overrides:
        fault = _override(table, override)
        if fault:
            faults.append(fault)
    table.setdefault("name", path.stem)
    # A path in a file is relative to where the command runs, as on the command line: the two can override each other.
    experiment = _validate(table, faults)
    if faults:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    assert experiment is not None
    return experiment


def parse_method(kind: str, assignments: Sequence[str]) -> MethodSettings:
    """A method's settings from ``key=value`` words alone, for the plain-file steps. Raises ConfigError."""
    table: dict[str, Any] = {"method": {"kind": kind}}
    faults = [fault for word in assignments if (fault := _override(table, f"method.{word}"))]
    method = None if faults else _method("method", table["method"], faults)
    if faults or method is None:
        raise ConfigError("\n".join(faults))
    return method


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's table merged over the file it extends."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends: comes back to itself through {seen[-1]}; remove one of the two")
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of an experiment file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: found {base!r}; expected the path of one other file, relative to this one")
    below = _read(path.parent / base, (*seen, path.resolve()))
    below.pop("name", None)  # a file that extends another is another experiment: its own name or its file's
    return _merged(below, table)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if isinstance(above.get("policy"), str):  # a sampling policy: nothing that was said below of candidates is left
        below = _without_candidates(below)
    return below | {key: _merged(below[key], value) if key in below else value for key, value in above.items()}


def _without_candidates(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in CandidateSettings.model_fields}


def _override(table: dict[str, Any], override: str) -> str | None:
    """Apply one ``key.path=value``; the fault, if there is one."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        return f"--set {override}: expected KEY=VALUE, such as methods.rrhf.lr=1e-5"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text  # a bare word is text: --set policy.source=gpt2
    *parents, last = [part.strip() for part in key.split(".")]
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            return f"--set {override}: {parent} is a value, not a table"
    if last == "policy" and isinstance(value, str):  # as in a file that extends another
        kept = _without_candidates(table)
        table.clear()
        table.update(kept)
    table[last] = value
    return None


def _validate(table: dict[str, Any], faults: list[str]) -> Experiment | None:
    methods: dict[str, MethodSettings] = {}
    tables = table.get("methods", {})
    if isinstance(tables, dict):
        for name, method_table in tables.items():
            method = _method(f"methods.{name}", method_table, faults)
            if method is not None:
                methods[name] = method
    else:
        faults.append(f"methods: found {tables!r}; expected tables such as [methods.rrhf]")
    table = {**table, "methods": methods}
    faulty: set[str] = set()  # tables with a faulty key
    try:
        experiment = Experiment.model_validate(table)
    except ValidationError as error:
        faults.extend(_faults(error, Experiment, ""))
        faulty = {str(fault["loc"][0]) for fault in error.errors()}
        try:  # the sound tables, for the faults that only several keys together show
            experiment = Experiment.model_validate({key: value for key, value in table.items() if key not in faulty})
        except ValidationError:
            return None
    sampling = experiment.sampling
    if not sampling.drawn and "n" not in sampling.model_fields_set:
        sampling = sampling.model_copy(update={"n": sampling.beams})
    inherited = {name: _inherit(method, sampling) for name, method in methods.items()}
    experiment = experiment.model_copy(update={"sampling": sampling, "methods": inherited})
    faults.extend(fault for fault in _contradictions(experiment) if faulty.isdisjoint(re.split(r"[.:]", fault)[:1]))
    return experiment


def _method(where: str, table: Any, faults: list[str]) -> MethodSettings | None:
    name = where.rpartition(".")[2]
    if not isinstance(table, dict):
        faults.append(f"{where}: found {table!r}; expected a table of the method's settings")
        return None
    kind = table.get("kind", name)
    if kind not in METHODS:
        faults.append(f"{where}.kind: found {kind!r}; allowed are {', '.join(METHODS)}{_nearest(str(kind), METHODS)}")
        return None
    settings = settings_class(kind)
    if "candidates" not in settings.requires:
        unread = [key for key in table if key == "policy" or key in SEARCH_KEYS]
        faults.extend(f"{where}.{key}: {kind} trains on no candidates; remove the key" for key in unread)
        table = {key: value for key, value in table.items() if key not in unread}
    try:
        return settings.model_validate({**table, "kind": kind})
    except ValidationError as error:
        faults.extend(_faults(error, settings, where))
        return None


def _inherit(method: MethodSettings, sampling: SamplingSettings) -> MethodSettings:
    """A method that trains on candidates, with what it does not say about them taken from [sampling]."""
    if "candidates" not in method.requires:
        return method
    strategy = method.strategy or sampling.strategy
    unsaid = [key for key in ("sources", "strategy", *READ[strategy]) if getattr(method, key) is None]
    update = {key: getattr(sampling, key) for key in unsaid}
    if strategy != "sample" and method.n is None:
        update["n"] = method.beams or sampling.beams
    return method.model_copy(update=update)


def _contradictions(experiment: Experiment) -> Iterator[str]:
    """Faults that no single key shows."""
    data, evaluation = experiment.data, experiment.evaluation
    if experiment.name == "store":
        yield "name: found 'store', the folder beside the runs that holds the artifacts of them all; choose another"
    for key in ("policy", "reward_model", "perplexity_model"):
        model = getattr(experiment, key)
        if model.source == "toy" and data.source != "toy":
            yield f'{key}.source: "toy" needs data.source = "toy"; use "scratch", a hub id or a folder'
    for key in ("policy", "perplexity_model"):
        scratch = getattr(experiment, key).scratch
        if scratch.hidden % scratch.heads or scratch.hidden // scratch.heads % 32:
            yield (
                f"{key}.scratch: found hidden = {scratch.hidden} in {scratch.heads} heads; expected heads of 32, 64, "
                "96 or 128, which the samplers know"
            )
    if experiment.reward_model.from_scratch and experiment.reward_model.layout != "classifier":
        yield 'reward_model.layout: a reward model trained here is a "classifier"'
    if evaluation.pairs < evaluation.prompts:
        yield f"evaluation.pairs: found {evaluation.pairs}; expected at least evaluation.prompts ({evaluation.prompts})"
    if evaluation.pool_prompts > evaluation.prompts:
        yield f"evaluation.pool_prompts: found {evaluation.pool_prompts}; expected at most {evaluation.prompts}"
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield f"seeds: found {list(experiment.seeds)}; a seed may stand once only"
    of_all = list(_search_faults(experiment.sampling))
    yield from (f"sampling: {fault}" for fault in of_all)
    for name, method in experiment.methods.items():
        if name in RESERVED_ROWS:
            yield f"methods.{name}: the name is taken; every table has the rows {', '.join(RESERVED_ROWS)} by itself"
        if "candidates" in method.requires:
            sources = method.sources or ()
            unknown = sorted(set(sources) - {"model", "chosen", "rejected"})
            if unknown:
                allowed = ("model", "chosen", "rejected")
                yield (
                    f"methods.{name}.sources: found {unknown[0]!r}; allowed are {', '.join(allowed)}"
                    f"{_nearest(unknown[0], allowed)}"
                )
            elif method.responses < 2:
                yield (
                    f"methods.{name}: k = {method.responses} response a prompt leaves nothing to rank; add sources, or "
                    'use kind = "sft"'
                )
            if method.temperature == 0.0 and "model" in sources and (method.n or 0) > 1:
                yield f"methods.{name}: temperature 0 gives {method.n} equal samples; raise it or set n = 1"
            read = READ[method.strategy or "sample"]
            for key in SIZES:
                if key not in read and getattr(method, key) is not None:  # said: nothing unread is inherited
                    yield f'methods.{name}.{key}: has no effect where strategy = "{method.strategy}"; remove the key'
            yield from (f"methods.{name}: {fault}" for fault in _search_faults(method) if fault not in of_all)


def _search_faults(candidates: CandidateSettings) -> Iterator[str]:
    """What is wrong with the sizes of a search."""
    beams, groups = candidates.beams, candidates.groups
    if candidates.drawn or beams is None:
        return
    if candidates.n != beams:
        yield f"n = {candidates.n}, but a search returns all its {beams} beams; set beams and remove n"
    if candidates.strategy == "diverse-beam" and groups is not None and beams % groups:
        yield f"{beams} beams do not divide into {groups} groups of equal size; change beams or groups"


def _exists(path: str) -> bool:
    if any(mark in path for mark in "*?["):
        return any(Path().glob(path)) if not Path(path).is_absolute() else any(Path("/").glob(path[1:]))
    return Path(path).exists()


def _faults(error: ValidationError, model: type[BaseModel], prefix: str) -> Iterator[str]:
    """pydantic's findings as one line each: where, what was found, what is allowed, the nearest valid key."""
    found_at = [fault["loc"] for fault in error.errors()]
    for fault in error.errors():
        if fault["type"] == "too_short" and any(loc[:-1] == fault["loc"] for loc in found_at):
            continue  # pydantic counts the valid items of a list only; the invalid ones are faults already
        where = ".".join(filter(None, [prefix, *map(str, fault["loc"])]))
        found = repr(fault["input"])
        found = found if len(found) <= 60 else found[:57] + "..."
        if fault["type"] == "extra_forbidden":
            keys = list(_table_at(model, fault["loc"][:-1]).model_fields)
            yield f"{where}: unknown key; allowed are {', '.join(keys)}{_nearest(str(fault['loc'][-1]), keys)}"
        elif fault["type"] == "missing":
            yield f"{where}: missing"
        elif fault["type"] == "value_error":
            # A message of one key starts with what was found there; one of a whole table, with the key at fault.
            message = str(fault["ctx"]["error"])
            yield f"{where}: {message}" if message.startswith("found") else f"{where}.{message}"
        else:
            message = fault["msg"]
            yield f"{where}: found {found}; {message[0].lower()}{message[1:]}"


def _table_at(model: type[BaseModel], keys: Sequence[int | str]) -> type[BaseModel]:
    for key in keys:
        annotation = model.model_fields[str(key)].annotation
        found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in found if issubclass(kind, BaseModel))
    return model


def _nearest(word: str, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
