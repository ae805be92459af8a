"""Define the tables that say where a row's training candidates come from, and the recipes of the RRHF paper.

One table holds the keys that its ``strategy`` reads and no others, so a key that changes nothing is an unknown key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from rrhf_bench.settings.base import Names, Settings, Switch

Strategy = Literal["sample", "beam", "diverse-beam"]
Scorer = Literal["reward model", "judge", "file"]
Width = Annotated[int, Field(ge=1, le=1024)]
LOWEST_TEMPERATURE = 0.01  # but for 0, which is greedy: vLLM samples at 0.01 where less is asked for


# --- Samples of a model --------------------------------------------------------------------------------------------


class Draw(Settings):
    """Responses that are drawn from the policy."""

    table: ClassVar[str] = ' with strategy = "sample"'
    strategy: Literal["sample"] = "sample"
    n: Width = 4  # responses a prompt
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: off

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.temperature == 0.0 and self.n > 1:
            raise ValueError(f"temperature: 0 gives {self.n} equal samples; raise it or set n = 1")
        if 0.0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature: found {self.temperature:g}; expected 0 (greedy) or at least {LOWEST_TEMPERATURE:g}"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of SamplingSpec that decide the samples. They enter cache keys."""
        return {"n": self.n, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


class Search(Settings):
    """The likeliest responses that a search finds, all of which are candidates."""

    beams: Width = 4

    @property
    def n(self) -> int:
        return self.beams

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of SamplingSpec that decide the samples. They enter cache keys."""
        return {"n": self.beams, **self.model_dump(include=set(STRATEGY_KEYS))}


class Beams(Search):
    """Beam search."""

    table: ClassVar[str] = ' with strategy = "beam"'
    strategy: Literal["beam"] = "beam"


class DiverseBeams(Search):
    """Beam search in groups of equal size, each of which is pushed away from the groups before it."""

    table: ClassVar[str] = ' with strategy = "diverse-beam"'
    strategy: Literal["diverse-beam"] = "diverse-beam"
    groups: Annotated[int, Field(ge=1)] = 4
    diversity_penalty: Annotated[float, Field(ge=0.0)] = 1.0  # between groups

    @model_validator(mode="after")
    def _divide(self) -> Self:
        if self.beams % self.groups:
            raise ValueError(
                f"groups: {self.beams} beams do not divide into {self.groups} groups of equal size; change beams or "
                "groups"
            )
        return self


Sampling: TypeAlias = Draw | Beams | DiverseBeams
STRATEGIES: Mapping[str, type[Sampling]] = {"sample": Draw, "beam": Beams, "diverse-beam": DiverseBeams}


# --- The candidates of a row ---------------------------------------------------------------------------------------


class CandidateSettings(Settings):
    """The keys of every table of candidates."""

    sources: Names = ("model", "chosen", "rejected")  # or "reply", or tables of [sources]
    scored_by: Scorer = "reward model"  # whose scores rank the candidates
    permute_rewards: Switch = False  # train on the scores permuted within each prompt: a control

    @model_validator(mode="after")
    def _once(self) -> Self:
        twice = [source for i, source in enumerate(self.sources) if source in self.sources[:i]]
        if twice:
            raise ValueError(f"sources: found {twice[0]!r} twice; a source may stand once only")
        return self


class GivenCandidates(CandidateSettings):
    """Candidates without samples of the policy: the data set's own replies, and those of [sources]."""

    table: ClassVar[str] = ' without "model" in sources'
    strategy: ClassVar[Strategy] = "sample"
    n: ClassVar[int] = 0
    rounds: ClassVar[int] = 1
    refresh: ClassVar[int] = 0
    reward_kl: ClassVar[float] = 0.0


class SampledCandidates(CandidateSettings):
    """Candidates with samples of the policy, and when the policy is sampled."""

    rounds: Annotated[int, Field(ge=1, le=99)] = 1  # n of IP-n: each samples the model that the one before trained
    refresh: Annotated[int, Field(ge=0)] = 0  # k of OP-k: sampled every k optimiser steps; 0: before training
    reward_kl: Annotated[float, Field(ge=0.0)] = 0.0  # of OP-k+KL, per nat of the summed log-ratio

    @model_validator(mode="after")
    def _one_time(self) -> Self:
        if self.refresh and self.rounds > 1:
            raise ValueError(
                "rounds: has no effect beside refresh, which samples the policy all the time; remove one of the two"
            )
        if self.reward_kl and not self.refresh:
            raise ValueError("reward_kl: is of online sampling only; set refresh (k of OP-k), or remove it")
        if self.refresh and self.permute_rewards:
            raise ValueError(
                "permute_rewards: is of candidates that are scored before training; remove it, or refresh (k of OP-k)"
            )
        if self.refresh and self.scored_by != "reward model":
            raise ValueError(
                f"scored_by: found {self.scored_by!r}; the reward model scores online candidates; remove the key"
            )
        return self


class DrawnCandidates(Draw, SampledCandidates):
    """Candidates some of which are drawn from the policy."""


class BeamCandidates(Beams, SampledCandidates):
    """Candidates some of which a beam search finds."""


class DiverseBeamCandidates(DiverseBeams, SampledCandidates):
    """Candidates some of which a diverse beam search finds."""


STRATEGY_KEYS = frozenset(key for samples in STRATEGIES.values() for key in samples.model_fields)
SAMPLE_KEYS = STRATEGY_KEYS | set(SampledCandidates.model_fields) - set(CandidateSettings.model_fields)
CANDIDATE_KEYS = SAMPLE_KEYS | set(CandidateSettings.model_fields)
_OF_RECIPE = CANDIDATE_KEYS - {"scored_by", "permute_rewards"} | {"recipe"}


def merge(below: Mapping[str, Any], above: Mapping[str, Any], *, row: bool) -> dict[str, Any]:
    """Return one table of candidate keys over another, without what the upper table makes meaningless.

    A recipe replaces all keys below it but those about scores. A strategy drops the keys below that it does not
    read. In the table of a row, sources without "model" drop all keys below about samples of the model.
    """
    unread: frozenset[str] = frozenset()
    strategy, sources = above.get("strategy"), above.get("sources", below.get("sources"))
    if "recipe" in above:
        unread = _OF_RECIPE
    elif isinstance(strategy, str) and strategy in STRATEGIES:
        unread = STRATEGY_KEYS - set(STRATEGIES[strategy].model_fields)
    if row and isinstance(sources, list | tuple) and "model" not in sources:
        unread |= SAMPLE_KEYS
    return {key: value for key, value in below.items() if key not in unread} | dict(above)


# --- Recipes of the paper ------------------------------------------------------------------------------------------

_BEAM: Mapping[str, Any] = {"strategy": "beam", "beams": 4}
_DIVERSE: Mapping[str, Any] = {"strategy": "diverse-beam", "beams": 4, "groups": 4, "diversity_penalty": 1.0}
_TOP_P: Mapping[str, Any] = {"strategy": "sample", "n": 4, "temperature": 0.8, "top_p": 1.0, "top_k": 0}
_WITH_PAIR = {"sources": ("model", "chosen", "rejected")}

# The offline sampling policies of 2304.05302 (Tables 1, 6 and 10; SP is v3's), each with the keys it stands for.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "BP": {**_WITH_PAIR, **_BEAM},
    "DP": {**_WITH_PAIR, **_DIVERSE},
    "SP": {**_WITH_PAIR, **_TOP_P},
    "D": {"sources": ("model",), **_DIVERSE},
    "P": {"sources": ("chosen", "rejected")},
    "B": {"sources": ("model",), **_BEAM},
}
RECIPE_NAMES = (*RECIPES, "IP-n", "OP-k", "OP-k+KL")
ONLINE_KL = 0.01  # of OP-k+KL, per nat of the summed log-ratio (2304.05302 section 5)
REVIEWS_KL = 0.1  # the same on IMDB (Table 10)


def keys_of_recipe(name: str) -> dict[str, Any] | None:
    """Return the keys that a recipe of 2304.05302 stands for, or None if there is no recipe of that name.

    IP-n: DP in n rounds, each of which samples the model that the round before trained. OP-k: the policy in training
    samples anew every k optimiser steps; drawn as in SP, where the paper searches for diverse beams (strategy =
    "diverse-beam" beside the recipe). OP-k+KL: its rewards less 0.01 x log-ratio to the initial policy.
    """
    if name in RECIPES:
        return dict(RECIPES[name])
    if found := re.fullmatch(r"IP-([1-9]\d?)", name):
        return {**RECIPES["DP"], "rounds": int(found[1])}
    if found := re.fullmatch(r"OP-([1-9]\d*)(\+KL)?", name):
        return {**RECIPES["SP"], "refresh": int(found[1])} | ({"reward_kl": ONLINE_KL} if found[2] else {})
    return None


def expand(table: Any) -> Any:
    """Return a table of candidate keys with its recipe replaced by what that stands for, under the keys beside it."""
    if isinstance(table, Settings):
        return table
    if not isinstance(table, dict):
        raise ValueError(f'found {table!r}; expected a table, such as {{ recipe = "DP" }}')
    if "recipe" in table:
        recipe = keys_of_recipe(table["recipe"]) if isinstance(table["recipe"], str) else None
        if recipe is None:
            allowed = ", ".join(RECIPE_NAMES)
            raise ValueError(f"recipe: found {table['recipe']!r}; allowed are {allowed} (n rounds, k optimiser steps)")
        beside = {key: value for key, value in table.items() if key != "recipe"}
        table = merge(recipe, beside, row=True)
    return table


def of_strategy(classes: Mapping[str, type[Settings]], table: Mapping[str, Any]) -> Any:
    """Return the settings of a table by the class of its strategy. Raises ValueError for an unknown strategy."""
    strategy = table.get("strategy", "sample")
    if not isinstance(strategy, str) or strategy not in classes:
        raise ValueError(f"strategy: found {strategy!r}; allowed are {', '.join(STRATEGIES)}")
    return classes[strategy].model_validate(table)


_OF_STRATEGY: Mapping[str, type[Settings]] = {
    "sample": DrawnCandidates,
    "beam": BeamCandidates,
    "diverse-beam": DiverseBeamCandidates,
}


def _defaults(table: Any) -> Any:
    table = expand(table)
    return table if isinstance(table, Settings) else of_strategy(_OF_STRATEGY, table)


def _of_row(table: Any) -> Any:
    table = expand(table)
    if isinstance(table, Settings):
        return table
    sources = table.get("sources", ("model",))
    given = isinstance(sources, list | tuple) and "model" not in sources
    return GivenCandidates.model_validate(table) if given else of_strategy(_OF_STRATEGY, table)


# The candidates of a row. Its sources, and then its strategy, decide which keys the table has.
Candidates = Annotated[
    GivenCandidates | DrawnCandidates | BeamCandidates | DiverseBeamCandidates, BeforeValidator(_of_row)
]
# [candidates]: the defaults of all rows and of the models of [sources], so its sources need not name the policy.
CandidateDefaults = Annotated[DrawnCandidates | BeamCandidates | DiverseBeamCandidates, BeforeValidator(_defaults)]


_of_recipe = cache(lambda name: _of_row({"recipe": name}))


def recipe_of(settings: Candidates) -> str | None:
    """Return the recipe of 2304.05302 that a row's candidates follow, such as "DP", "IP-2" or "OP-8+KL", or None.

    How OP-k samples is left open: the paper searches for diverse beams on HH and draws on IMDB. "reply", a data set's
    single one, takes the place of the two of a pair.
    """
    pair = {"reply": ("chosen", "rejected")}
    sources = tuple(name for source in settings.sources for name in pair.get(source, (source,)))
    if settings.refresh:
        same = (sources, settings.n) == (RECIPES["SP"]["sources"], RECIPES["SP"]["n"])
        published = settings.reward_kl in (0.0, ONLINE_KL, REVIEWS_KL)
        return f"OP-{settings.refresh}" + ("+KL" if settings.reward_kl else "") if same and published else None
    found = settings.model_copy(update={"sources": sources, "scored_by": "reward model"})
    names = RECIPES if settings.rounds == 1 else (f"IP-{settings.rounds}",)
    return next((name for name in names if _of_recipe(name) == found), None)
