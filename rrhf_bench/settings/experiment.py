"""The tables of an experiment file: names, types, defaults and what a single table may not say. Frozen."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rrhf_bench.errors import nearest
from rrhf_bench.records import STOP_STRINGS
from rrhf_bench.registry import METHODS, settings_class
from rrhf_bench.settings.base import Settings, Switch
from rrhf_bench.settings.candidates import (
    LOWEST_TEMPERATURE,
    RECIPES,
    STRATEGY_KEYS,
    Beams,
    CandidateDefaults,
    DiverseBeams,
    Draw,
    DrawnCandidates,
    expand,
    merge,
    of_strategy,
)
from rrhf_bench.settings.claims import Claim
from rrhf_bench.settings.judge import JudgeSettings
from rrhf_bench.settings.methods import MethodSettings, candidates_of
from rrhf_bench.settings.reward import RewardTrainingSettings

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
# Of experiments, rows, claims, policies and sources: files and folders bear them, so none is a device on Windows.
NAME = r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)$)[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
BY_METHOD = "methods."  # how the source of a policy names the row that trained it
TOY_MODELS = ("toy", "toy-raw")
WORLDS = ("toy", "toy-reviews")  # what ships inside: dialogues; film reviews


def _looked_up(name: str) -> str:
    """A model's name, of which the file system can say whether it is a folder. Raises ValueError for the rest."""
    try:
        Path(name).is_dir()
    except OSError as error:  # too long, or where nobody may look
        raise ValueError(f"found {name[:60]!r} ({error.strerror}); expected a hub id or a folder") from error
    if not name.strip() or "://" in name:
        raise ValueError(f"found {name[:60]!r}; expected a hub id or a folder")
    return name


def _borne(name: str) -> str:
    """A name that a folder can bear. Raises ValueError for the rest."""
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"found {name[:60]!r}; a name is letters, digits, - and _, at most 100, and no device of Windows"
        )
    return name


Name = Annotated[str, AfterValidator(_borne)]
ModelName = Annotated[str, AfterValidator(_looked_up)]


class ToySettings(Settings):
    """Sizes of the embedded world, in dialogues and labelled pairs."""

    raw_corpus: Positive = 8000
    corpus: Positive = 8000
    perplexity_corpus: Positive = 6000
    preferences: Positive = 3500  # the accuracy of the reward model is flat from about here on


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
    faulty_rows: Literal["error", "drop"] = "error"  # no pair, or refused by a chat template
    long_prompts: Literal["error", "drop"] = "drop"  # prompts that leave no room for a reply in the context
    # Read the columns "margin" and "tie" of pairs, for reward models; policies train on pairs that are no tie.
    margins_and_ties: Switch = False

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.source not in (*WORLDS, "files") and not re.fullmatch("hub:.+", self.source):
            raise ValueError(
                f'source: found {self.source!r}; allowed are "toy", "toy-reviews", "files" and "hub:OWNER/NAME"'
            )
        if self.source == "files" and self.path is None:
            raise ValueError(
                'path: missing; source = "files" reads JSON, Parquet and Arrow files: --set data.path=FILE names one'
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
    # The raw model, from which "toy" goes on, reads its text so often. One epoch in place of two halves the longest
    # training (224 to 116 s of processor time on a busy machine). Greedily [policy]'s gold reward is then 0.89 in place
    # of 0.97 (one world, 300 prompts, standard error 0.03), and 0.7 in place of 0.3 sentences in 100 replies are
    # garbled.
    raw_epochs: Positive = 1
    batch: Positive = 16
    lr: Annotated[float, Field(gt=0)] = 6e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 1.0


class ModelSettings(Settings):
    source: ModelName = "toy"  # "toy", "toy-raw", "scratch", a hub id or a folder
    revision: str | None = None
    template: Literal["hh", "chat", "raw"] = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    max_length: Annotated[int, Field(ge=16)] | None = None  # prompt + reply tokens; none: the model's own context
    trust_remote_code: Switch = False  # run code that comes with the model; read it first
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
    # "toy" or "scratch": trained on the data's pairs from the initial policy; or a hub id, or a folder.
    source: ModelName = "toy"
    layout: Literal["classifier", "value-head"] = "classifier"
    revision: str | None = None
    template: Literal["hh", "chat", "raw"] = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    label: str | None = None  # of a classifier of several labels: the score is this one's softmax probability
    trust_remote_code: Switch = False  # run code that comes with the model; read it first
    training: RewardTrainingSettings = RewardTrainingSettings()

    @property
    def from_scratch(self) -> bool:
        return self.source in ("toy", "scratch")


class FileSource(Settings):
    """A further candidate source: the responses of a file."""

    table: ClassVar[str] = " of responses from a file"
    file: str  # JSON lines of {"query", "responses", "scores"}, as RRHF's train.py reads them

    @field_validator("file")
    @classmethod
    def _there(cls, file: str) -> str:
        if not _exists(file, Path.is_file):
            raise ValueError(f"found {file!r}, which does not exist; expected a JSON-lines file")
        return file


class ModelSource(Settings):
    """A further candidate source: samples of another model. Keys that it does not say are taken from [candidates]."""

    model: str  # a table of [policies], or a row of [methods]: the model that it trained


class DrawnSource(Draw, ModelSource): ...


class BeamSource(Beams, ModelSource): ...


class DiverseBeamSource(DiverseBeams, ModelSource): ...


_OF_STRATEGY: Mapping[str, type[Settings]] = {
    "sample": DrawnSource,
    "beam": BeamSource,
    "diverse-beam": DiverseBeamSource,
}


def _source(table: Any, info: ValidationInfo) -> Any:
    """Return the settings of a table of [sources]. Of a recipe, what it takes beside the samples is left out."""
    if isinstance(table, dict) and "file" in table:
        return FileSource.model_validate(table)
    if isinstance(table, dict) and (shared := info.data.get("candidates")) is not None:
        table = merge(shared.model_dump(include=STRATEGY_KEYS), table, row=False)
    elif isinstance(table, dict):  # [candidates] is faulty, and so may be what lies over it
        table = {key: value for key, value in table.items() if key == "model"}
    expanded = expand(table)
    if isinstance(expanded, Settings):
        return expanded
    if (name := table.get("recipe")) is not None:
        names = [name for name, recipe in RECIPES.items() if "strategy" in recipe]
        if name not in names:
            raise ValueError(f"recipe: found {name!r}; allowed for the samples of one source are {', '.join(names)}")
        expanded = {key: value for key, value in expanded.items() if key != "sources" or key in table}
    return of_strategy(_OF_STRATEGY, expanded)


Source = Annotated[FileSource | DrawnSource | BeamSource | DiverseBeamSource, BeforeValidator(_source)]


def _method(table: Any, info: ValidationInfo) -> Any:
    """Return the settings of a row, whose ``kind`` is filled in, with its candidates over [candidates]."""
    if isinstance(table, MethodSettings):
        return table
    if not isinstance(table, dict):
        raise ValueError(f"found {table!r}; expected a table of the method's settings")
    settings = _settings_class(table["kind"])
    candidates = table.get("candidates", {})
    reads = "candidates" in settings.requires or ("candidates" in table and "candidates" in settings.model_fields)
    if reads and isinstance(candidates, dict):
        shared = info.data.get("candidates")  # none: it is faulty, and so may be what lies over it
        table = {**table, "candidates": {} if shared is None else merge(shared.model_dump(), candidates, row=True)}
    return settings.model_validate(table)


def _settings_class(kind: Any) -> type[MethodSettings]:
    """Return the settings class of a ``kind``. Raises ValueError if it names no method."""
    try:
        if isinstance(kind, str):
            return settings_class(kind)
    except LookupError as error:
        if ":" in kind:
            raise ValueError(f"kind: found {kind!r}, which {error}") from error
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        reason = f"whose settings cannot be imported ({error}); mend the address or the module"
        raise ValueError(f"kind: found {kind!r}, {reason}") from error
    allowed = f"{', '.join(METHODS)} or package.module:OBJECT{nearest(str(kind), METHODS)}"
    raise ValueError(f"kind: found {kind!r}; allowed are {allowed}")


Row = Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_method)]


class JudgeTable(Settings):
    """The judge that rates the candidates of rows with scored_by = "judge"."""

    source: Literal["toy", "endpoint"] = "toy"  # the embedded world's own; an OpenAI-compatible server
    endpoint: JudgeSettings | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.source == "endpoint") != (self.endpoint is not None):
            raise ValueError('endpoint: the table goes with source = "endpoint", which needs its base_url and model')
        return self


class SamplingSettings(Settings):
    """Settings of all samples, whichever model and method they serve."""

    backend: Literal["vllm", "transformers"] = "vllm"
    max_new_tokens: Positive = 64
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = STOP_STRINGS
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
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=10.0)] = 1.0  # of "sample", like the next
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Positive = 64
    curve_points: Positive = 8
    curve_kl: Switch = False  # KL of the sampled dev replies at every point; the initial policy stays in memory for it
    pool_prompts: Positive = 100  # the best-of-n curve: prompts, and samples a prompt
    pool_samples: Positive = 32


class ReportSettings(Settings):
    """Name the comparisons that get a verdict. The table decides no artifact and enters no key."""

    # The trained row that the others are compared with; None: the first one. Rows that start from another initial
    # policy are compared with the first row of the same kind that starts there.
    against: str | None = None
    # Pairs of rows, such as [["ppo", "rrhf"], ["rrhf", "base"]]: the comparisons that get a verdict. None: each trained
    # row against the row above and against its initial policy.
    primary: Annotated[tuple[Annotated[tuple[str, str], Field(strict=False)], ...] | None, Field(strict=False)] = None


class RuntimeSettings(Settings):
    """Recorded, never part of a key: none of these changes a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    pass_tokens: Positive | None = None  # fed to a policy at once in training; none: 2048 on a CPU, 16384 on a GPU
    checkpoint_activations: bool = False  # computed again in the backward pass: a third to a half slower, far smaller
    checkpoint_seconds: Annotated[float, Field(ge=0.0)] = 120.0  # between two checkpoints of a training run
    # PyTorch uses these on a CPU. "auto" takes the newest that the processor has. With "avx2" a processor with AVX-512
    # rounds like one without.
    vector_instructions: Literal["auto", "avx2"] = "auto"
    onednn: Literal["auto", "on", "off"] = "auto"  # float32 products on a CPU; auto: where it is faster
    autocast: Literal["bfloat16"] | None = None  # of policies in float32: products in bfloat16; rounds like bfloat16
    kernels: Literal["liger"] | None = None  # Liger's norms and gated layers on a GPU; none: the model's own
    score_batch: Positive = 64  # texts a pass of the reward and perplexity models
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share that the sampler's engine may take on a GPU
    kv_cache_mib: Positive = 96  # of the sampler's engine on a CPU
    workers: Positive | None = None  # processes that share the stages; none: one on a GPU, one a core (at most 4) else


Grid = Annotated[tuple[float | int | str | bool, ...], Field(strict=False, min_length=1)]


class Repetition(NamedTuple):
    """One time that an experiment is run: with one training seed, in one embedded world."""

    world: int
    seed: int


class Experiment(Settings):
    """One experiment, complete: every default filled in, every method's inheritance resolved."""

    name: Name
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (0,)
    # Embedded worlds by number: each has its own corpus, labels, models and prompts, and every seed runs in each.
    # None: the world of data.seed.
    worlds: Annotated[tuple[int, ...], Field(strict=False, exclude_if=lambda worlds: not worlds)] = ()
    data: DataSettings = DataSettings()
    policy: PolicySettings = PolicySettings()
    policies: Mapping[Name, PolicySettings] = Field(default_factory=dict)
    reward_model: RewardModelSettings = RewardModelSettings()
    # Further reward models, which are only compared: on held-out pairs and on samples of [policy].
    reward_models: Annotated[Mapping[Name, RewardModelSettings], Field(exclude_if=lambda models: not models)] = Field(
        default_factory=dict
    )
    perplexity_model: ModelSettings = ModelSettings()
    judge: JudgeTable | None = None
    sampling: SamplingSettings = SamplingSettings()
    candidates: CandidateDefaults = DrawnCandidates()  # of every row and source that does not say otherwise
    sources: Mapping[Name, Source] = Field(default_factory=dict)
    methods: Mapping[Name, Row] = Field(default_factory=dict)
    # By row: the values of its settings that are tried with the first seed. The trial with the highest reward on the
    # dev prompts, under the first decoding, is the row; the other seeds train with its settings.
    tune: Mapping[str, Mapping[str, Grid]] = Field(default_factory=dict)
    evaluation: EvaluationSettings = EvaluationSettings()
    claims: Mapping[Name, Claim] = Field(default_factory=dict)
    report: ReportSettings = ReportSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @property
    def several_worlds(self) -> bool:
        return len(self.worlds) > 1

    @property
    def repetitions(self) -> dict[int, Repetition]:
        """Return every run of the rows by number.

        The number is the seed; in several worlds it is the world, or of several seeds in each a running number.
        """
        every = [Repetition(world, seed) for world in self.worlds or (self.data.seed,) for seed in self.seeds]
        if not self.several_worlds:
            return {repetition.seed: repetition for repetition in every}
        return dict(enumerate(every)) if len(self.seeds) > 1 else {repetition.world: repetition for repetition in every}

    def repetition_words(self, number: int) -> str:
        """Return the world and the seed of a repetition, as far as the run has several of them."""
        world, seed = self.repetitions[number]
        if not self.several_worlds:
            return f"seed {seed}"
        return f"world {world}, seed {seed}" if len(self.seeds) > 1 else f"world {world}"

    def in_world(self, world: int) -> Experiment:
        """Return the experiment in one world."""
        return self.model_copy(update={"worlds": (), "data": self.data.model_copy(update={"seed": world})})

    def initial(self, method: MethodSettings | None) -> PolicySettings:
        """The policy that a row starts from."""
        return self.policy if method is None or method.initial is None else self.policies[method.initial]

    def trials(self, row: str) -> list[dict[str, Any]]:
        """Return the settings that each tuning trial of a row changes; none if the row is not tuned."""
        grid = self.tune.get(row, {})
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())] if grid else []

    def responses(self, method: MethodSettings) -> int:
        """Return k of a row, the responses a prompt; 0 if it trains on no candidates.

        A file's responses count as one a prompt: how many it holds is not known before it is read.
        """
        candidates = candidates_of(method)
        if candidates is None:
            return 0
        models = {name: source.n for name, source in self.sources.items() if not isinstance(source, FileSource)}
        sizes = {**models, "model": candidates.n}
        return sum(sizes.get(source, 1) for source in candidates.sources)

    def to_toml(self) -> str:
        """The resolved file: loading it gives this Experiment again."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _exists(path: str, how: Callable[[Path], bool] = Path.exists) -> bool:
    """Return True if a path exists, by ``how`` unless it has a pattern, which is expanded as data files are."""
    try:
        if how is Path.exists and glob.has_magic(path):
            return any(glob.iglob(path, recursive=True))
        return path != "" and how(Path(path))
    except (OSError, ValueError):  # too long a name, or one that may not be seen
        return False
