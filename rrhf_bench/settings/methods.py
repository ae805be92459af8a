"""What every method's settings share. Free of torch: `plan` validates every key without importing it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rrhf_bench.registry import Family, find

Requirement = Literal["pairs", "candidates", "scores", "reference", "sampler", "reward"]
Schedule = Literal["linear", "cosine", "constant"]
Strategy = Literal["sample", "beam", "diverse-beam"]
Scorer = Literal["reward model", "judge", "file"]

# TOML has lists only; strict mode would refuse them for a tuple.
Names = Annotated[tuple[str, ...], Field(strict=False)]
Floats = Annotated[tuple[float, ...], Field(strict=False)]


class Settings(BaseModel):
    """A table of the experiment file: no unknown keys, no silent conversions, no change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


# What decides the samples of "model" under each strategy, and enters keys; a search has no temperature.
READ: Mapping[Strategy, tuple[str, ...]] = {
    "sample": ("n", "temperature", "top_p", "top_k"),
    "beam": ("n", "strategy", "beams"),
    "diverse-beam": ("n", "strategy", "beams", "groups", "diversity_penalty"),
}
SEARCH_KEYS = frozenset({"strategy", "beams", "groups", "diversity_penalty"})
SIZES = ("beams", "groups", "diversity_penalty", "temperature", "top_p", "top_k")  # each read by some strategies only

_BEAM: Mapping[str, Any] = {"strategy": "beam", "beams": 4, "n": 4}
_DIVERSE: Mapping[str, Any] = {
    "strategy": "diverse-beam", "beams": 4, "groups": 4, "diversity_penalty": 1.0, "n": 4,
}  # fmt: skip
_TOP_P: Mapping[str, Any] = {"strategy": "sample", "n": 4, "temperature": 0.8, "top_p": 1.0, "top_k": 0}
_WITH_PAIR = {"sources": ("model", "chosen", "rejected")}

# The offline sampling policies of 2304.05302 (Tables 1, 6 and 10; SP is v3's), each with what it stands for.
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "BP": {**_WITH_PAIR, **_BEAM},
    "DP": {**_WITH_PAIR, **_DIVERSE},
    "SP": {**_WITH_PAIR, **_TOP_P},
    "D": {"sources": ("model",), **_DIVERSE},
    "P": {"sources": ("chosen", "rejected")},
    "B": {"sources": ("model",), **_BEAM},
}
POLICY_NAMES = (*POLICIES, "IP-n", "OP-k", "OP-k+KL")
ONLINE_KL = 0.01  # of OP-k+KL, per nat of the summed log-ratio (2304.05302 section 5)
REVIEWS_KL = 0.1  # the same on IMDB (Table 10)


def expand_policy(name: str) -> dict[str, Any] | None:
    """What a sampling policy of 2304.05302 stands for; None for a name that is none.

    IP-n: DP, n times over, each round sampling with the model that the round before trained. OP-k: the policy in
    training samples anew every k optimiser steps; drawn as in SP, where the paper searches for diverse beams (say
    strategy = "diverse-beam" for these). OP-k+KL: its rewards less 0.01 x log-ratio to the initial policy.
    """
    if name in POLICIES:
        return dict(POLICIES[name])
    if found := re.fullmatch(r"IP-([1-9]\d?)", name):
        return {**POLICIES["DP"], "rounds": int(found[1])}
    if found := re.fullmatch(r"OP-([1-9]\d*)(\+KL)?", name):
        return {**POLICIES["SP"], "refresh": int(found[1])} | ({"reward_kl": ONLINE_KL} if found[2] else {})
    return None


class CandidateSettings(Settings):
    """How a training prompt's candidates come about. A method inherits what it does not say from [sampling].

    ``policy`` is short for the keys that it stands for, which are what is kept: once loaded it is None. Keys beside it
    override theirs.
    """

    policy: Annotated[str | None, Field(exclude=True)] = None  # of POLICY_NAMES
    sources: Names | None = None  # of "model", "chosen", "rejected", "reply" and the tables of [sources]
    n: Annotated[int, Field(ge=1, le=1024)] | None = None  # samples of "model"; of a search, its beams
    strategy: Strategy | None = None  # draw, or search for the likeliest
    beams: Annotated[int, Field(ge=1, le=1024)] | None = None  # of a search, all of which are candidates
    groups: Annotated[int, Field(ge=1)] | None = None  # of diverse-beam; of equal size
    diversity_penalty: Annotated[float, Field(ge=0.0)] | None = None  # of diverse-beam, between groups
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None

    @field_validator("policy")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and expand_policy(name) is None:
            raise ValueError(f"found {name!r}; allowed are {', '.join(POLICY_NAMES)} (n rounds, k optimiser steps)")
        return name

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, table: Any) -> Any:
        name = table.get("policy") if isinstance(table, dict) else None
        policy = expand_policy(name) if isinstance(name, str) else None
        if policy is None:
            return table
        said = {key: value for key, value in table.items() if key != "policy"}
        if "refresh" in policy and said.get("strategy") in ("beam", "diverse-beam"):  # the paper's own form of OP-k
            policy = {**policy, **(_BEAM if said["strategy"] == "beam" else _DIVERSE)}
            policy = {key: value for key, value in policy.items() if key not in ("temperature", "top_p", "top_k")}
        unknown = sorted(set(policy) - set(cls.model_fields))
        if unknown:
            raise ValueError(f'policy: "{name}" says how a method trains ({", ".join(unknown)}); set it in its table')
        strategy = policy.get("strategy")
        if strategy is not None:
            if said.get("strategy", strategy) != strategy:
                raise ValueError(f'policy: "{name}" has strategy = "{strategy}"; found {said["strategy"]!r} beside it')
            for key in SIZES:
                if key in said and key not in READ[strategy]:
                    raise ValueError(f'policy: {key} has no effect beside "{name}", strategy "{strategy}"; remove it')
            if "beams" in said:  # all of which a search returns
                said.setdefault("n", said["beams"])
        return {**policy, **said}

    @property
    def drawn(self) -> bool:
        """Whether the samples are drawn, not searched for."""
        return self.strategy in (None, "sample")

    def responses(self, sizes: Mapping[str, int]) -> int:
        """k, the responses a prompt; 0 where nothing was said about them. ``sizes``: those of the named sources."""
        own = {**sizes, "model": self.n or 0}
        return sum(own.get(source, 1) for source in self.sources or ())


class MethodSettings(CandidateSettings):
    """One row of the tables. `kind` names the method in the registry; the key of the table names the row."""

    requires: ClassVar[frozenset[Requirement]]
    # A method that trains on no candidates names here the keys of CandidateSettings that it reads, and the reason for
    # which the loader refuses the others.
    candidate_keys: ClassVar[frozenset[str]] = frozenset()
    why_unread: ClassVar[str] = "this kind trains on no candidates"

    kind: str
    initial: str | None = None  # the initial policy, of [policies]; none: [policy]
    rounds: Annotated[int, Field(ge=1, le=99)] | None = None  # n of IP-n
    refresh: Annotated[int, Field(ge=1)] | None = None  # k of OP-k, optimiser steps
    reward_kl: Annotated[float, Field(ge=0.0)] | None = None  # of OP-k+KL
    scored_by: Scorer | None = None  # whose scores rank its candidates; none: the reward model's

    @property
    def family(self) -> Family:
        """The family that the registry gives the method."""
        return find(self.kind).family

    @property
    def needs(self) -> frozenset[Requirement]:
        """What this row requires: its kind's requirements, and those of sampling while it trains."""
        online: tuple[Requirement, ...] = ()
        if self.refresh is not None:
            online = ("sampler", "reward", "reference") if self.reward_kl else ("sampler", "reward")
        return self.requires.union(online)

    def models_in_memory(self) -> tuple[str, ...]:
        """The full-size models resident while this method trains (2304.05302 Figure 1 counts them)."""
        raise AssertionError("every method states its models")

    def budget(self, prompts: int, responses: int) -> str:
        """The batch arithmetic on that many training prompts with k responses each, in words."""
        return "no training"


def sampling_policy(settings: MethodSettings) -> str | None:
    """The sampling policy of 2304.05302 that a row's candidates follow, such as "DP", "IP-2" or "OP-8+KL"; None where
    they follow none. The inverse of ``expand_policy``, for a row that has inherited what it does not say.

    How OP-k samples is left open: the paper searches for diverse beams on HH and draws on IMDB. "reply", a data set's
    single one, takes the place of the two of a pair.
    """
    pair = {"reply": ("chosen", "rejected")}
    sources = tuple(name for source in settings.sources or () for name in pair.get(source, (source,)))
    if settings.refresh is not None:
        same = (sources, settings.n) == (POLICIES["SP"]["sources"], POLICIES["SP"]["n"])
        published = not settings.reward_kl or settings.reward_kl in (ONLINE_KL, REVIEWS_KL)
        return f"OP-{settings.refresh}" + ("+KL" if settings.reward_kl else "") if same and published else None
    for name in POLICIES if settings.rounds is None else (f"IP-{settings.rounds}",):
        policy = {"rounds": None, **(expand_policy(name) or {})}
        read = ("strategy", *READ[policy["strategy"]]) if "strategy" in policy else ()
        found = {"sources": sources, **{key: getattr(settings, key) for key in ("rounds", *read)}}
        if all(policy[key] == value for key, value in found.items()):
            return name
    return None


class LoraSettings(Settings):
    """Low-rank adapters (2106.09685): W + alpha / rank * B A, where W stays as it is."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    targets: Names | Literal["all-linear"] = "all-linear"  # names of layers; all-linear: all but the LM head


FLOAT32_MAX = 3.4028234663852886e38
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimiserSettings(MethodSettings):
    """AdamW and its schedule, for methods that change weights."""

    lora: LoraSettings | None = None  # none: all weights train

    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    schedule: Schedule = "linear"  # to 0 over the whole budget
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05  # share of all optimiser steps
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0  # of the global norm
    max_length: Annotated[int, Field(ge=2)] | None = None  # prompt + response tokens; none: the model's context

    @model_validator(mode="after")
    def _first_step_fits(self) -> Self:
        highest = FLOAT32_MAX * (1.0 - self.betas[0])
        if self.lr > highest:
            raise ValueError(
                f"lr: found {self.lr:g}; expected at most {highest:.3g}, or AdamW's first step, lr / (1 - betas[0]), "
                "is beyond float32; lower lr"
            )
        return self


class OfflineSettings(OptimiserSettings):
    """The one offline loop: epochs over fixed examples."""

    epochs: Annotated[int, Field(ge=1)] = 3
    batch_prompts: Annotated[int, Field(ge=1)] = 16  # examples (prompts) an optimiser step

    def models_in_memory(self) -> tuple[str, ...]:
        # With adapters the reference is the policy with these off.
        others: Mapping[Requirement, str] = {} if self.lora else {"reference": "reference"}
        others = {**others, "reward": "reward model"}
        return ("policy", *(model for need, model in others.items() if need in self.needs))

    def budget(self, prompts: int, responses: int) -> str:
        steps, rest = self.epochs * math.ceil(prompts / self.batch_prompts), prompts % self.batch_prompts
        examples = f"{prompts} prompts x {responses or 1} responses"
        last = f" (an epoch's last: {rest})" if rest else ""
        return f"{examples}, {self.epochs} epochs of {self.batch_prompts} prompts a step{last} = {steps} steps"
