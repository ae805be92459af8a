"""Settings of the claims that a run tests: tables [claims.NAME] of an experiment file.

There is one class for each statistic: a difference, an equivalence, a correlation over rows, and a compound claim on
over-optimisation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, SerializeAsAny, model_validator

from rrhf_bench.errors import nearest
from rrhf_bench.settings.base import Settings

Margin = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def _side(value: object) -> str | float | tuple[str, ...]:
    """Return one side of a difference. pydantic would name a fault of each type of a union."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple) and value and all(isinstance(row, str) for row in value):
        return tuple(value)
    raise ValueError(f"found {repr(value)[:60]}; expected a row, a list of rows or a number")


# Serialised as it is: the serialiser of a union would warn of a list that it made of a tuple itself.
Side = Annotated[str | float | tuple[str, ...], PlainValidator(_side), PlainSerializer(lambda side: side)]

MEASURES: Mapping[str, str] = {
    "reward": "proxy reward",
    "gold": "gold reward",
    "nll": "NLL per token",
    "kl": "KL",
    "accuracy": "accuracy of p_i",
    "spread": "standard deviation of the training scores",
}
BOTH_SIDES = "found {!r} on both sides; a row cannot be compared with itself"
Measure = Literal["reward", "gold", "nll", "kl", "accuracy", "spread"]


class ClaimSettings(Settings):
    """One claim. Each class says what ``margin`` is of, and in which unit.

    Keys that name rows hold names of [methods], "base", or the name of an initial policy. Each class has the property
    ``words``, what is claimed, and the method ``named``, the rows in the order of its keys.
    """

    kind: str
    margin: Margin
    says: str | None = None  # the claim in words; by default made from the keys

    @property
    def decoded(self) -> bool:
        """Return whether replies enter, so that there is one result a decoding."""
        return True

    @property
    @abstractmethod
    def words(self) -> str:
        """Return what is claimed, made from the keys."""

    @property
    def sentence(self) -> str:
        """Return what is claimed, in words."""
        return self.says or self.words

    @abstractmethod
    def named(self) -> Sequence[str]:
        """Return the rows in the order of the claim's keys, which may repeat."""

    def rows(self) -> tuple[str, ...]:
        """Return the rows that the claim names, each once, in the order of its keys."""
        return tuple(dict.fromkeys(self.named()))


class DifferenceSettings(ClaimSettings):
    """``higher`` minus ``lower`` exceeds ``margin``, or under test = "non-inferiority" -``margin``, in the measure.

    The margin is in the unit of the measure: reward, nats a token (nll), nats (kl), share of held-out pairs (accuracy).
    """

    kind: Literal["difference"] = "difference"
    # A row, a number such as 0.5 for chance, or several rows, for which the best one on the dev prompts stands.
    higher: Side
    lower: Side
    measure: Measure = "reward"
    test: Literal["superiority", "non-inferiority"] = "superiority"

    @property
    def decoded(self) -> bool:
        return self.measure not in ("accuracy", "spread")

    @property
    def threshold(self) -> float:
        return self.margin if self.test == "superiority" else -self.margin

    @property
    def words(self) -> str:
        higher, lower = (", ".join(rows_of(side)) or f"{side:g}" for side in (self.higher, self.lower))
        more = "a higher" if self.test == "superiority" else "no lower"
        return f"{higher} has {more} {MEASURES[self.measure]} than {lower}."

    def named(self) -> Sequence[str]:
        return (*rows_of(self.higher), *rows_of(self.lower))

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        higher, lower = rows_of(self.higher), rows_of(self.lower)
        both = [row for row in higher if row in lower]
        if both:
            raise ValueError(f"lower: {BOTH_SIDES.format(both[0])}")
        if not (higher or lower):
            raise ValueError("lower: found a number on both sides; expected a row on one")
        if not (higher and lower) and self.measure == "spread":
            raise ValueError('measure: "spread" compares the candidates of two rows; name two')
        if not self.decoded and max(len(higher), len(lower)) > 1:
            raise ValueError(f'measure: "{self.measure}" has no decoding to pick a row by; name one row on each side')
        return self


class _Beside(ClaimSettings):
    """A claim on one row beside a reference, which is another row."""

    row: str
    reference: str | None

    def named(self) -> Sequence[str]:
        return (self.row,) if self.reference is None else (self.row, self.reference)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.row == self.reference:
            raise ValueError(f"reference: {BOTH_SIDES.format(self.row)}")
        return self


class EquivalenceSettings(_Beside):
    """The reward of ``row`` is within ``margin``, on either side, of ``reference``'s."""

    kind: Literal["equivalence"] = "equivalence"
    reference: str | None = None  # none: the best of the row's own candidates on the same prompts (Eq. 7)

    @property
    def words(self) -> str:
        return f"The reward of {self.row} comes to that of {self.reference or 'the best of its candidates'}."


class CorrelationSettings(ClaimSettings):
    """The rank correlation, over rows, of test reward with the training candidates exceeds ``margin``."""

    kind: Literal["correlation"] = "correlation"
    margin: Annotated[float, Field(ge=0.0, lt=1.0)]
    over: Annotated[tuple[str, ...], Field(strict=False, min_length=3)]  # rows that are trained on candidates
    measure: Literal["best_candidate", "mean_candidate"] = "mean_candidate"  # mean over prompts of the best, or of all

    @property
    def words(self) -> str:
        what = "mean of the best candidates" if self.measure == "best_candidate" else "mean of the candidates"
        return f"The test reward follows the {what}."

    def named(self) -> Sequence[str]:
        return self.over


class CompoundSettings(_Beside):
    """From ``reference`` to ``row`` the quality of the text rises or falls, and the proxy reward too if it is named.

    Quality is the gold reward, or if the run has none the likelihood of the text. ``margin``: reward, proxy and gold
    alike; ``nll_margin``: nats a token.
    """

    kind: Literal["compound"] = "compound"
    reference: str
    quality: Literal["rises", "falls"]
    proxy: Literal["rises", "falls"] | None = None
    nll_margin: Margin = 0.0

    @property
    def words(self) -> str:
        proxy = f"the proxy reward {self.proxy} and " if self.proxy else ""
        likely = "more" if self.quality == "rises" else "less"
        quality = f"the gold reward {self.quality} or the text grows {likely} likely"
        return f"From {self.reference} to {self.row} {proxy}{quality}."


def rows_of(side: str | float | tuple[str, ...]) -> tuple[str, ...]:
    """Return the rows of one side of a difference; none for a number."""
    return side if isinstance(side, tuple) else () if isinstance(side, float) else (side,)


CLAIMS: dict[str, type[ClaimSettings]] = {
    "difference": DifferenceSettings,
    "equivalence": EquivalenceSettings,
    "correlation": CorrelationSettings,
    "compound": CompoundSettings,
}


def _claim(table: Any) -> Any:
    """Return the settings of a table of [claims], whose ``kind`` is filled in."""
    if isinstance(table, ClaimSettings):
        return table
    if not isinstance(table, dict):
        raise ValueError(f"found {table!r}; expected a table of the claim's rows and margin")
    kind = table["kind"]
    if not isinstance(kind, str) or kind not in CLAIMS:
        raise ValueError(f"kind: found {kind!r}; allowed are {', '.join(CLAIMS)}{nearest(str(kind), CLAIMS)}")
    return CLAIMS[kind].model_validate(table)


Claim = Annotated[SerializeAsAny[ClaimSettings], BeforeValidator(_claim)]
