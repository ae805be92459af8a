"""Options that several commands share, each written once: annotated types, and dataclasses of options of one model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from rrhf_bench.errors import ConfigError
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.settings.experiment import Dtype

if TYPE_CHECKING:
    from rrhf_bench.pipeline.services import ModelRef

Chat = Literal["hh", "chat"]
FaultyRows = Literal["error", "drop"]


def require_utf8(folder: Path) -> Path:
    """Return the folder. Raises ConfigError if its name is no UTF-8, because no tokenizer can be saved there."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{folder}: is no UTF-8 name, and no tokenizer can be saved there; name another folder"
        ) from error
    return folder


ExperimentFile = Annotated[Path, typer.Argument(help="an experiment file, such as experiments/hh_compare.toml")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the file")]
Runs = Annotated[
    Path,
    typer.Option(envvar="RRHF_BENCH_RUNS", help="where runs and the store of artifacts are", callback=require_utf8),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object for machines, on standard output")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where models run")]
Backend = Annotated[BackendName, typer.Option(help="what samples; vllm falls back if absent")]
Policy = Annotated[str, typer.Option("--model", help="hub id or folder of the policy")]
RewardModel = Annotated[str, typer.Option("--reward-model", help="hub id or folder of a reward model")]
Prompts = Annotated[Path, typer.Option(help='JSONL of {"prompt"} or of preferences')]
Out = Annotated[Path, typer.Option(help="what to write")]
Seed = Annotated[int, typer.Option(help="names the random draws")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="length cap of a reply")]
Layout = Annotated[
    Literal["classifier", "value-head"] | None, typer.Option(help="of the reward model", show_default="classifier")
]
Label = Annotated[str | None, typer.Option(help="of a classifier of several labels: its probability is the reward")]


def reward_template(*names: str) -> Any:
    """Return the option of a reward model's template."""
    words = "how the reward model wants a dialogue; its own contract goes first"
    return typer.Option(*names, help=words, show_default="hh")


def reward_dtype(*names: str) -> Any:
    """Return the option of a reward model's dtype."""
    return typer.Option(*names, help="of the reward model's weights", show_default="float32")


# In each dataclass of options, None is an option that was not given: the folder of an artifact then decides, or else
# the default that --help shows.


@dataclass(frozen=True)
class WeightOptions:
    """Options of a policy, without its template."""

    dtype: Annotated[Dtype | None, typer.Option(help="of the policy's weights", show_default="float32")] = None
    pad_token: Annotated[
        str | None, typer.Option(help="for a policy whose tokenizer has no pad token: which of its tokens pads")
    ] = None


@dataclass(frozen=True)
class PolicyOptions(WeightOptions):
    """Options of a policy."""

    template: Annotated[Chat | None, typer.Option(help="how the policy wants a dialogue", show_default="hh")] = None


@dataclass(frozen=True)
class RewardOptions:
    """Options of the reward model of a command that also has a policy."""

    layout: Layout = None
    label: Label = None
    reward_template: Annotated[Chat | None, reward_template("--reward-template")] = None
    reward_dtype: Annotated[Dtype | None, reward_dtype("--reward-dtype")] = None
    reward_pad_token: Annotated[
        str | None, typer.Option(help="for a reward model whose tokenizer has no pad token: which of its tokens pads")
    ] = None

    def ref(self, source: str | None) -> ModelRef | None:
        """Return the reference of --reward-model, or None. Raises ConfigError if an option is given without a model."""
        from rrhf_bench.pipeline.file_commands import model_ref

        given = asdict(self)
        refuse_unread(source, "--reward-model", given)
        own: dict[str, Any] = {name.removeprefix("reward_"): value for name, value in given.items()}
        return None if source is None else model_ref(source, prefix="reward-", **own)


@dataclass(frozen=True)
class ScorerOptions:
    """Options of the reward model of a command that has no other model, by both names."""

    layout: Layout = None
    label: Label = None
    template: Annotated[Chat | None, reward_template("--template", "--reward-template")] = None
    dtype: Annotated[Dtype | None, reward_dtype("--dtype", "--reward-dtype")] = None
    pad_token: Annotated[
        str | None,
        typer.Option(
            "--pad-token", "--reward-pad-token", help="for a tokenizer without a pad token: which of its tokens pads"
        ),
    ] = None


@dataclass(frozen=True)
class StepOptions:
    """Options of a command on plain files."""

    device: Device = "auto"
    faulty_rows: Annotated[
        FaultyRows, typer.Option(help="rows that cannot be used: stop at the first, or leave them out and count them")
    ] = "error"
    as_json: Json = False


def refuse_unread(source: str | None, model: str, options: dict[str, Any]) -> None:
    """Raise ConfigError if an option of a model is given and the model is not: the option would have no effect."""
    for name, value in options.items():
        if source is None and value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: found {value!r}, which is read with {model} only; name that model, or "
                "leave the option out"
            )


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command in whose signature each dataclass is replaced by its fields, since typer knows no dataclasses.

    All parameters become keywords; the command receives each dataclass filled with what was given.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kept = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        if name not in groups:
            parameters.append(kept)
            continue
        types = get_type_hints(groups[name], include_extras=True)
        of_fields = ((field.name, field.default, types[field.name]) for field in fields(groups[name]))
        parameters += [kept.replace(name=n, default=default, annotation=hint) for n, default, hint in of_fields]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        filled = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **filled)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call
