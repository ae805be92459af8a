"""The experiment file: TOML to a frozen, complete Experiment, every fault found at once, before torch is imported."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from rrhf_bench.data.dialogue import STOP_STRINGS
from rrhf_bench.errors import ConfigError
from rrhf_bench.evaluation.claims_settings import CLAIMS, ClaimSettings
from rrhf_bench.registry import METHODS, settings_class
from rrhf_bench.rewards.judge_settings import JudgeSettings
from rrhf_bench.rewards.reward_settings import RewardTrainingSettings
from rrhf_bench.settings import (
    POLICIES,
    READ,
    SEARCH_KEYS,
    SIZES,
    CandidateSettings,
    MethodSettings,
    Names,
    Settings,
    Strategy,
)

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
RESERVED_ROWS = ("base", "chosen", "rejected")  # rows that every table has without being asked
NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"  # of experiments, policies and sources
OWN_SOURCES = ("model", "chosen", "rejected", "reply")  # candidate sources that need no table of their own
BY_METHOD = "methods."  # how the source of a policy names the row that trained it
TRAINED_WITH = ("rounds", "refresh", "reward_kl")  # what a sampling policy may say beyond the candidates themselves
TOY_MODELS = ("toy", "toy-raw")

WORLDS = ("toy", "toy-reviews")  # what ships inside: dialogues; film reviews


class ToySettings(Settings):
    """Sizes of the embedded world, in dialogues and labelled pairs."""

    raw_corpus: Positive = 8000
    corpus: Positive = 8000
    perplexity_corpus: Positive = 6000
    preferences: Positive = 8000


class DataSettings(Settings):
    source: str = "toy"  # "toy", "toy-reviews", "files" (with path), or "hub:OWNER/NAME"
    path: str | None = None
    subset: str | None = None  # a folder of a hub data set, such as "harmless-base"
    split: str = "train"
    revision: str | None = None
    seed: int = 0
    train_prompts: Positive = 500  # prompts that policies are trained on
    toy: ToySettings = ToySettings()
    rows: Literal["pairs", "texts"] = "pairs"  # of files and the hub; a text is a prompt and the reply that follows it
    prompt_words: Positive = 48  # of a text: some 64 tokens of GPT-2
    reply_words: Positive | None = None  # of a text; none: all the rest
    diverging: Literal["drop", "common-prefix"] = "drop"  # pairs that part before the last turn
    faulty_rows: Literal["error", "drop"] = "error"  # texts that are no transcript, or that end with the Human
    long_prompts: Literal["error", "drop"] = "drop"  # prompts that leave no room for a reply in the context

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.source not in (*WORLDS, "files") and not self.source.startswith("hub:"):
            raise ValueError(
                f'source: found {self.source!r}; allowed are "toy", "toy-reviews", "files" and "hub:OWNER/NAME"'
            )
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
    raw_epochs: Positive = 2  # of the raw model that "toy" goes on from
    batch: Positive = 16
    lr: Annotated[float, Field(gt=0)] = 6e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 1.0


class ModelSettings(Settings):
    source: str = "toy"  # "toy", "toy-raw", "scratch", a hub id or a folder
    revision: str | None = None
    template: Literal["hh", "chat", "raw"] = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    max_length: Annotated[int, Field(ge=16)] | None = None  # prompt + reply tokens; none: the model's own context
    scratch: ScratchSettings = ScratchSettings()

    @property
    def from_scratch(self) -> bool:
        return self.source in (*TOY_MODELS, "scratch")


class PolicySettings(ModelSettings):
    """An initial policy. Beyond [policy], each table of [policies] is one, and a row of the tables."""

    # [policies] only: "methods.ROW" is the model that this row trained with the first seed.
    part: Literal["LLaMA", "Alpaca", "Alpaca-sft"] | None = (
        None  # whose published rows stand beside it; decides nothing
    )

    @property
    def trained_by(self) -> str | None:
        """The row whose result it is."""
        return self.source.removeprefix(BY_METHOD) if self.source.startswith(BY_METHOD) else None


class RewardModelSettings(Settings):
    source: str = "toy"  # "toy" or "scratch": trained on the data's pairs from the initial policy; a hub id or a folder
    layout: Literal["classifier", "value-head"] = "classifier"
    revision: str | None = None
    template: Literal["hh", "chat", "raw"] = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    label: str | None = None  # of a classifier of several labels: the score is this one's softmax probability
    training: RewardTrainingSettings = RewardTrainingSettings()

    @property
    def from_scratch(self) -> bool:
        return self.source in ("toy", "scratch")


class SourceSettings(CandidateSettings):
    """A further candidate source: samples of another model, or responses from a file. Keys that it does not say are
    taken from [sampling]."""

    model: str | None = None  # a table of [policies], or a row of [methods]: the model that it trained
    file: str | None = None  # JSON lines of {"query", "responses", "scores"}, as RRHF's train.py reads them

    @model_validator(mode="before")
    @classmethod
    def _samples(cls, table: Any) -> Any:
        """What is said, before a sampling policy is put in what it stands for."""
        if not isinstance(table, dict):
            return table
        if "sources" in table:
            raise ValueError(f"sources: found {table['sources']!r}; a source is one; remove the key")
        names = [name for name, policy in POLICIES.items() if "strategy" in policy]
        if table.get("policy") in [name for name in POLICIES if name not in names]:
            raise ValueError(
                f"policy: found {table['policy']!r}, which takes no samples; allowed are {', '.join(names)}"
            )
        return table

    @field_validator("sources")
    @classmethod
    def _left_out(cls, value: object) -> None:
        """What a sampling policy takes beside the samples is the method's to say."""

    @model_validator(mode="after")
    def _from_somewhere(self) -> Self:
        if (self.model is None) == (self.file is None):
            raise ValueError(
                "model: a source has either model = a policy or row, or file = a path; give one of the two"
            )
        if self.file is not None and not Path(self.file).is_file():
            raise ValueError(f"file: found {self.file!r}, which does not exist; expected a JSON-lines file")
        return self

    @property
    def said(self) -> tuple[str, ...]:
        """The keys of sampling that are said."""
        keys = CandidateSettings.model_fields
        return tuple(key for key in keys if getattr(self, key) is not None)


class JudgeTable(Settings):
    """Who rates the candidates of rows with scored_by = "judge"."""

    source: Literal["toy", "endpoint"] = "toy"  # the embedded world's own; an OpenAI-compatible server
    endpoint: JudgeSettings | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.source == "endpoint") != (self.endpoint is not None):
            raise ValueError('endpoint: the table goes with source = "endpoint", which needs its base_url and model')
        return self


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
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0  # of "sample", like the next
    top_k: Annotated[int, Field(ge=0)] = 0
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

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (0,)
    data: DataSettings = DataSettings()
    policy: PolicySettings = PolicySettings()
    policies: Mapping[str, PolicySettings] = Field(default_factory=dict)
    reward_model: RewardModelSettings = RewardModelSettings()
    perplexity_model: ModelSettings = ModelSettings()
    judge: JudgeTable | None = None
    sampling: SamplingSettings = SamplingSettings()
    sources: Mapping[str, SourceSettings] = Field(default_factory=dict)
    methods: Mapping[str, SerializeAsAny[MethodSettings]] = Field(default_factory=dict)
    evaluation: EvaluationSettings = EvaluationSettings()
    claims: Mapping[str, SerializeAsAny[ClaimSettings]] = Field(default_factory=dict)
    runtime: RuntimeSettings = RuntimeSettings()

    def initial(self, method: MethodSettings | None) -> PolicySettings:
        """The policy that a row starts from."""
        return self.policy if method is None or method.initial is None else self.policies[method.initial]

    def responses(self, method: MethodSettings) -> int:
        """k of a row. A file's responses count as one a prompt: how many it holds is not known before it is read."""
        return method.responses({name: 1 if source.n is None else source.n for name, source in self.sources.items()})

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
    bases = table.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: found {bases!r}; expected paths of other files, relative to this one")
    merged: dict[str, Any] = {}
    for base in bases:  # each over those before it
        below = _read(path.parent / base, (*seen, path.resolve()))
        below.pop("name", None)  # a file that extends another is another experiment: its own name or its file's
        merged = _merged(merged, below)
    return _merged(merged, table)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if isinstance(above.get("policy"), str):  # a sampling policy: nothing that was said below of candidates is left
        below = _without_candidates(below)
    return below | {key: _merged(below[key], value) if key in below else value for key, value in above.items()}


def _without_candidates(table: Mapping[str, Any]) -> dict[str, Any]:
    of_candidates = (*CandidateSettings.model_fields, *TRAINED_WITH)
    return {key: value for key, value in table.items() if key not in of_candidates}


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
    table = dict(table)
    defaults = dict(_tables(table.pop("defaults", {}), "defaults", "[defaults.rrhf]", faults))
    for kind in list(defaults):
        if not _default(kind, defaults[kind], faults):
            del defaults[kind]
    methods: dict[str, MethodSettings] = {}
    for name, of_row in _tables(table.get("methods", {}), "methods", "[methods.rrhf]", faults).items():
        if isinstance(of_row, dict):
            of_row = _merged(defaults.get(str(of_row.get("kind", name)), {}), of_row)
        method = _method(f"methods.{name}", of_row, faults)
        if method is not None:
            methods[name] = method
    claims: dict[str, ClaimSettings] = {}
    for name, of_claim in _tables(table.get("claims", {}), "claims", "[claims.ordered]", faults).items():
        claim = _claim(f"claims.{name}", of_claim, faults)
        if claim is not None:
            claims[name] = claim
    written = dict(table)
    table |= {"methods": methods, "claims": claims}
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
    inherited = {
        "methods": {name: _inherit(method, sampling) for name, method in methods.items()},
        "sources": {
            name: source if source.file is not None else _inherit_sampling(source, sampling)
            for name, source in experiment.sources.items()
        },
    }
    experiment = experiment.model_copy(update={"sampling": sampling, **inherited})
    # What a faulty table holds is named elsewhere, and cannot be looked at.
    unread = {
        str(name)
        for key in ("policies", "sources", "methods")
        if isinstance(of_key := written.get(key), dict)
        for name in set(of_key) - set(getattr(experiment, key))
    } | faulty
    contradictions = _contradictions(experiment, unread)
    faults.extend(fault for fault in contradictions if faulty.isdisjoint(re.split(r"[.:]", fault)[:1]))
    return experiment


def _tables(found: Any, where: str, example: str, faults: list[str]) -> dict[str, Any]:
    if isinstance(found, dict):
        return found
    faults.append(f"{where}: found {found!r}; expected tables such as {example}")
    return {}


def _default(kind: str, table: Any, faults: list[str]) -> bool:
    """Whether what rows of a kind start from can be used; the faults of one that cannot."""
    before = len(faults)
    where = f"defaults.{kind}"
    if kind not in METHODS:
        faults.append(f"{where}: no kind of method; allowed are {', '.join(METHODS)}{_nearest(kind, METHODS)}")
    elif isinstance(table, dict) and "kind" in table:
        faults.append(f"{where}.kind: found {table['kind']!r}; the table's name is the kind; remove the key")
    else:
        _method(where, {**table, "kind": kind} if isinstance(table, dict) else table, faults)
    return len(faults) == before


def _claim(where: str, table: Any, faults: list[str]) -> ClaimSettings | None:
    name = where.rpartition(".")[2]
    if not isinstance(table, dict):
        faults.append(f"{where}: found {table!r}; expected a table of the claim's rows and margin")
        return None
    kind = table.get("kind", name)
    if kind not in CLAIMS:
        faults.append(f"{where}.kind: found {kind!r}; allowed are {', '.join(CLAIMS)}{_nearest(str(kind), CLAIMS)}")
        return None
    try:
        return CLAIMS[kind].model_validate({**table, "kind": kind})
    except ValidationError as error:
        faults.extend(_faults(error, CLAIMS[kind], where))
        return None


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
        unread = [key for key in table if key in ("policy", *TRAINED_WITH, *SEARCH_KEYS)]
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
    if method.scored_by == "reward model":  # said or not, it is the same row
        method = method.model_copy(update={"scored_by": None})
    return _inherit_sampling(method, sampling, "sources")


C = TypeVar("C", bound=CandidateSettings)


def _inherit_sampling(candidates: C, sampling: SamplingSettings, *also: str) -> C:
    strategy = candidates.strategy or sampling.strategy
    unsaid = [key for key in (*also, "strategy", *READ[strategy]) if getattr(candidates, key) is None]
    update = {key: getattr(sampling, key) for key in unsaid}
    if strategy != "sample" and candidates.n is None:
        update["n"] = candidates.beams or sampling.beams
    return candidates.model_copy(update=update)


def _contradictions(experiment: Experiment, unread: Collection[str]) -> Iterator[str]:
    """Faults that no single key shows. ``unread``: names of tables with a fault of their own, which are not there."""
    evaluation = experiment.evaluation
    if experiment.name == "store":
        yield "name: found 'store', the folder beside the runs that holds the artifacts of them all; choose another"
    yield from _model_faults(experiment, unread)
    if evaluation.pairs < evaluation.prompts:
        yield f"evaluation.pairs: found {evaluation.pairs}; expected at least evaluation.prompts ({evaluation.prompts})"
    if evaluation.pool_prompts > evaluation.prompts:
        yield f"evaluation.pool_prompts: found {evaluation.pool_prompts}; expected at most {evaluation.prompts}"
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield f"seeds: found {list(experiment.seeds)}; a seed may stand once only"
    of_all = list(_search_faults(experiment.sampling))
    yield from (f"sampling: {fault}" for fault in of_all)
    for name, source in experiment.sources.items():
        yield from (f"sources.{name}{fault}" for fault in _source_faults(experiment, name, source, of_all, unread))
    rows = (*RESERVED_ROWS[:1], *experiment.policies, *experiment.methods)
    for name, method in experiment.methods.items():
        if name in RESERVED_ROWS:
            yield f"methods.{name}: the name is taken; every table has the rows {', '.join(RESERVED_ROWS)} by itself"
        if method.initial is not None and method.initial not in (*experiment.policies, *unread):
            allowed = tuple(experiment.policies)
            yield (
                f"methods.{name}.initial: found {method.initial!r}; expected a table of [policies] "
                f"({', '.join(allowed) or 'there is none'}){_nearest(method.initial, allowed)}, or nothing for [policy]"
            )
        if "candidates" in method.requires:
            yield from (f"methods.{name}{fault}" for fault in _candidate_faults(experiment, method, of_all, unread))
        elif method.scored_by is not None:
            yield f"methods.{name}.scored_by: {method.kind} trains on no candidates; remove the key"
    yield from _circles(experiment)
    for name, claim in experiment.claims.items():
        for row in claim.rows():
            if row not in (*rows, *unread):
                yield f"claims.{name}: found the row {row!r}; allowed are {', '.join(rows)}{_nearest(row, rows)}"


def _model_faults(experiment: Experiment, unread: Collection[str]) -> Iterator[str]:
    world = experiment.data.source in WORLDS
    policies = {"policy": experiment.policy} | {f"policies.{name}": p for name, p in experiment.policies.items()}
    models: dict[str, ModelSettings] = {**policies, "perplexity_model": experiment.perplexity_model}
    for key, model in models.items():
        if model.source in TOY_MODELS and not world:
            yield f'{key}.source: "{model.source}" needs data.source = "toy"; use "scratch", a hub id or a folder'
        if model.source == "toy-raw" and (experiment.data.source != "toy" or key == "perplexity_model"):
            yield f'{key}.source: "toy-raw" is a policy of the embedded dialogues, data.source = "toy"'
        if model.scratch.hidden % model.scratch.heads or model.scratch.hidden // model.scratch.heads % 32:
            yield (
                f"{key}.scratch: found hidden = {model.scratch.hidden} in {model.scratch.heads} heads; expected heads "
                "of 32, 64, 96 or 128, which the samplers know"
            )
    if experiment.reward_model.source == "toy" and not world:
        yield 'reward_model.source: "toy" needs data.source = "toy"; use "scratch", a hub id or a folder'
    if experiment.data.rows == "texts" and experiment.data.source in WORLDS:
        yield 'data.rows: found "texts"; the embedded worlds have pairs; remove the key'
    elif experiment.data.rows == "texts" and experiment.reward_model.from_scratch:
        yield "reward_model.source: texts have no pairs to train a reward model on; name a folder or a hub id"
    if experiment.reward_model.from_scratch and experiment.reward_model.layout != "classifier":
        yield 'reward_model.layout: a reward model trained here is a "classifier"'
    if experiment.judge is not None and experiment.judge.source == "toy" and experiment.data.source != "toy":
        yield 'judge.source: "toy" judges the embedded dialogues, data.source = "toy"; use "endpoint"'
    if experiment.policy.trained_by is not None:
        yield f"policy.source: found {experiment.policy.source!r}; only a table of [policies] may be a row's result"
    for name, policy in experiment.policies.items():
        if not re.fullmatch(NAME, name):
            yield f"policies.{name}: a name is letters, digits, - and _; choose another"
        if name in RESERVED_ROWS or name in experiment.methods or name == "policy":
            yield f"policies.{name}: the name is taken; it would be a row of the tables beside the one of that name"
        template = experiment.policy.template
        if policy.template != template and policy.trained_by is None:
            yield f"policies.{name}.template: found {policy.template!r}; expected {template!r}, that of [policy]"
        yield from (f"policies.{name}{fault}" for fault in _unused_faults(experiment, policy))
        row = policy.trained_by
        if row is not None and row not in (trained := _that_train(experiment)) and row not in unread:
            yield (
                f"policies.{name}.source: found {policy.source!r}; expected a row that trains "
                f"({', '.join(trained)}){_nearest(row, trained)}"
            )


def _unused_faults(experiment: Experiment, policy: PolicySettings) -> Iterator[str]:
    """Keys of one of [policies] that nothing would read."""
    unused = {name for name, of in PolicySettings.model_fields.items() if getattr(policy, name) != of.default}
    if policy.trained_by is not None:
        for key in sorted(unused - {"source", "part"}):
            yield f".{key}: has no effect: a row's result is as what the row started from; remove the key"
    elif policy.source == "toy-raw" and "scratch" in unused:
        yield '.scratch: has no effect: "toy-raw" is trained as [policy.scratch] says; remove the table'


def _that_train(experiment: Experiment) -> list[str]:
    """The rows that end with a model of their own."""
    return [name for name, method in experiment.methods.items() if method.family != "inference"]


def _circles(experiment: Experiment) -> Iterator[str]:
    """Rows that would have to be trained before themselves."""
    seen: set[str] = set()

    def needed(row: str) -> Iterator[tuple[str, str]]:
        """(what must be trained before this row: another, or none of [methods]; the key that says so)"""
        method = experiment.methods[row]
        if method.initial is not None and method.initial in experiment.policies:
            yield experiment.policies[method.initial].trained_by or "", f"methods.{row}.initial"
        for name in method.sources or ():
            if name in experiment.sources and name not in OWN_SOURCES:
                model = experiment.sources[name].model or ""
                policy = experiment.policies.get(model)
                yield (policy.trained_by or "" if policy else model), f"sources.{name}.model"

    def visit(row: str, before: tuple[tuple[str, str], ...]) -> Iterator[str]:
        """``before``: (row, the key by which it needs the next) on the way to this row."""
        rows = [name for name, _ in before]
        if row in rows:
            circle = before[rows.index(row) :]
            afters = [*rows[rows.index(row) + 1 :], row]
            ways = ", ".join(f"{one} needs {after} ({key})" for (one, key), after in zip(circle, afters, strict=True))
            yield f"methods.{row}: would have to be trained before itself: {ways}; change one of these keys"
        elif row in experiment.methods and row not in seen:
            seen.add(row)
            for other, key in needed(row):
                yield from visit(other, (*before, (row, key)))

    for row in experiment.methods:
        yield from visit(row, ())


def _source_faults(
    experiment: Experiment, name: str, source: SourceSettings, of_all: Sequence[str], unread: Collection[str]
) -> Iterator[str]:
    if name in OWN_SOURCES:
        yield f": the name is taken; {', '.join(OWN_SOURCES)} need no table"
    if not re.fullmatch(NAME, name):
        yield ": a name is letters, digits, - and _; choose another"
    if source.file is not None:
        for key in source.said:
            yield f".{key}: has no effect on the responses of a file; remove the key"
        return
    models = (*experiment.policies, *_that_train(experiment))
    if source.model not in (*models, *unread):
        yield (
            f".model: found {source.model!r}; expected a table of [policies] or a row that trains "
            f"({', '.join(models)}){_nearest(source.model or '', models)}"
        )
    yield from _sampling_faults(source, of_all)


def _candidate_faults(
    experiment: Experiment, method: MethodSettings, of_all: Sequence[str], unread: Collection[str]
) -> Iterator[str]:
    """What is wrong with how a row comes to its candidates."""
    sources = method.sources or ()
    if not set(unread).isdisjoint(sources):
        return
    allowed = (*OWN_SOURCES, *experiment.sources)
    files = [name for name in sources if name in experiment.sources and experiment.sources[name].file is not None]
    unknown = sorted(set(sources) - set(allowed))
    if unknown:
        yield f".sources: found {unknown[0]!r}; allowed are {', '.join(allowed)}{_nearest(unknown[0], allowed)}"
    elif experiment.responses(method) < 2 and not files:
        yield (
            f": k = {experiment.responses(method)} response a prompt leaves nothing to rank; add sources, or "
            'use kind = "sft"'
        )
    single = experiment.data.rows == "texts" or experiment.data.source == "toy-reviews"
    twice = [source for i, source in enumerate(sources) if source in sources[:i]]
    if twice:
        yield f".sources: found {twice[0]!r} twice; a source may stand once only"
    if "reply" in sources and not single:
        yield '.sources: "reply" is a data set\'s single reply to a prompt; this one has pairs: "chosen", "rejected"'
    if experiment.data.rows == "texts" and {"chosen", "rejected"} & set(sources):
        yield f'.sources: found {list(sources)}, but texts have one reply to a prompt; use "reply"'
    if method.refresh is not None and "model" not in sources:
        yield (
            f".refresh: OP-{method.refresh} samples the policy while it trains, but sources = {list(sources)} has no "
            '"model"; add it, or remove refresh'
        )
    if method.refresh is not None and method.rounds is not None:
        yield ".rounds: has no effect beside refresh, which samples the policy all the time; remove one of the two"
    if method.rounds is not None and "model" not in sources:
        yield f'.rounds: IP-{method.rounds} samples the model of the round before, but sources has no "model"; add it'
    if method.reward_kl is not None and method.refresh is None:
        yield ".reward_kl: is of online sampling only; set refresh (k of OP-k), or remove it"
    if method.refresh is not None and method.scored_by is not None:
        yield f".scored_by: found {method.scored_by!r}; the reward model scores online candidates; remove the key"
    if method.scored_by == "judge" and experiment.judge is None and "judge" not in unread:
        yield '.scored_by: found "judge", and there is no [judge]; add the table, with source = "toy" or "endpoint"'
    if method.scored_by == "file" and set(files) != set(sources):
        yield (
            f'.scored_by: found "file", but of sources = {list(sources)} only {files} are files; scores of two kinds '
            "have no common scale: keep the files alone, or let the reward model score them all"
        )
    yield from _sampling_faults(method, of_all)


def _sampling_faults(candidates: CandidateSettings, of_all: Sequence[str]) -> Iterator[str]:
    """What is wrong with how the samples of a model come about."""
    drawn = candidates.drawn and "model" in (candidates.sources or ("model",))
    if drawn and candidates.temperature == 0.0 and (candidates.n or 0) > 1:
        yield f": temperature 0 gives {candidates.n} equal samples; raise it or set n = 1"
    read = READ[candidates.strategy or "sample"]
    for key in SIZES:
        if key not in read and getattr(candidates, key) is not None:  # said: nothing unread is inherited
            yield f'.{key}: has no effect where strategy = "{candidates.strategy}"; remove the key'
    yield from (f": {fault}" for fault in _search_faults(candidates) if fault not in of_all)


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
    path = iter(keys)
    for key in path:
        annotation = model.model_fields[str(key)].annotation
        found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in found if issubclass(kind, BaseModel))
        if get_origin(annotation) is Mapping:
            next(path, None)  # the table's own name
    return model


def _nearest(word: str, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
