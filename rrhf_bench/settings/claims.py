"""Settings of the claims that a run tests: tables [claims.NAME] of an experiment file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rrhf_bench.settings.methods import Settings

BASE = "base"
Margin = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Some = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class ClaimSettings(Settings):
    """One claim. ``margin`` says how much is asked for, or forgiven; each class says of what, and in which unit.

    Keys that name rows hold names of [methods], "base", or the name of an initial policy.
    """

    decoded: ClassVar[bool] = True  # one result a decoding; False: replies do not enter

    kind: str
    margin: Margin

    @property
    def sentence(self) -> str:
        """What is claimed, in our words."""
        raise AssertionError("every claim has its sentence")

    def rows(self) -> tuple[str, ...]:
        """The rows it names, each once, in the order of its keys."""
        return tuple(dict.fromkeys(self._named()))

    def _named(self) -> Iterator[str]:
        raise AssertionError("every claim names its rows")


class _Reaches(ClaimSettings):
    """Rows of two methods, of each of which the best on the dev prompts stands for it."""

    rrhf: Some
    ppo: Some

    def _named(self) -> Iterator[str]:
        yield from (*self.rrhf, *self.ppo)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        both = [row for row in self.rrhf if row in self.ppo]
        if both:
            raise ValueError(f"ppo: found {both[0]!r} on both sides; a row cannot be compared with itself")
        return self


class _Pair(ClaimSettings):
    """A row against another."""

    row: str
    reference: str

    def _named(self) -> Iterator[str]:
        yield from (self.row, self.reference)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.row == self.reference:
            raise ValueError(f"reference: found {self.row!r} on both sides; a row cannot be compared with itself")
        return self


class RRHFReachesPPOSettings(_Reaches):
    """``margin``: proxy reward by which RRHF may stay below PPO and still count as level with it."""

    kind: Literal["rrhf_reaches_ppo"] = "rrhf_reaches_ppo"

    @property
    def sentence(self) -> str:
        return f"RRHF ({', '.join(self.rrhf)}) reaches the reward of PPO ({', '.join(self.ppo)})."


class BestOfNLearnerSettings(ClaimSettings):
    """``margin``: proxy reward by which the model may miss its best candidate, on either side, and count as equal."""

    kind: Literal["best_of_n_learner"] = "best_of_n_learner"
    row: str

    @property
    def sentence(self) -> str:
        return f"{self.row} learns best-of-n: its reward comes to the best of its candidates (Eq. 7)."

    def _named(self) -> Iterator[str]:
        yield self.row


class _OverRows(ClaimSettings):
    margin: Annotated[float, Field(ge=0.0, lt=1.0)]
    over: Annotated[tuple[str, ...], Field(strict=False, min_length=3)]  # rows that are trained on candidates

    def _named(self) -> Iterator[str]:
        yield from self.over


class BestOfNOverRowsSettings(_OverRows):
    """``margin``: the rank correlation, over rows, that must be exceeded."""

    kind: Literal["best_of_n_over_rows"] = "best_of_n_over_rows"

    @property
    def sentence(self) -> str:
        return "The test reward follows the mean of the best candidates (Eq. 7 over sampling policies)."


class SamplingQualitySettings(_OverRows):
    """``margin``: the rank correlation, over rows, that must be exceeded."""

    kind: Literal["reward_rises_with_sampling_quality"] = "reward_rises_with_sampling_quality"

    @property
    def sentence(self) -> str:
        return "The better the candidates are on average, the higher the test reward."


class OrderedSettings(ClaimSettings):
    """``margin``: reward by which ``higher`` must exceed ``lower``; 0 asks for any excess."""

    kind: Literal["ordered"] = "ordered"
    higher: str
    lower: str
    measure: Literal["reward", "gold"] = "reward"  # the proxy, which methods optimise, or the gold reward
    says: str | None = None  # the claim in words, where the order of two rows is not what one wants to say

    @property
    def sentence(self) -> str:
        what = "proxy" if self.measure == "reward" else "gold"
        return self.says or f"{self.higher} has a higher {what} reward than {self.lower}."

    def _named(self) -> Iterator[str]:
        yield from (self.higher, self.lower)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.higher == self.lower:
            raise ValueError(f"lower: found {self.lower!r} on both sides; a row cannot be compared with itself")
        return self


class OveroptimisesSettings(_Pair):
    """``margin``: reward, proxy gained and gold lost alike; ``nll_margin``: nats a token."""

    kind: Literal["overoptimises"] = "overoptimises"
    nll_margin: Margin = 0.0

    @property
    def sentence(self) -> str:
        return (
            f"{self.row} over-optimises: against {self.reference} its proxy reward rises, and its gold reward falls "
            "or its text grows less likely."
        )


class KLRepairsSettings(_Pair):
    """``row`` has the KL penalty that ``reference`` lacks. ``margin``: gold reward; ``nll_margin``: nats a token."""

    kind: Literal["kl_repairs"] = "kl_repairs"
    nll_margin: Margin = 0.0

    @property
    def sentence(self) -> str:
        return (
            f"The KL penalty repairs over-optimisation: {self.row} has a higher gold reward or more likely text than "
            f"{self.reference}."
        )


class SpreadShrinksSettings(_Pair):
    """``margin``: reward by which the standard deviation of ``row``'s candidates must stay below ``reference``'s."""

    decoded: ClassVar[bool] = False

    kind: Literal["spread_shrinks"] = "spread_shrinks"

    @property
    def sentence(self) -> str:
        return f"The rewards of the training candidates spread less for {self.row} than for {self.reference}."


class BetterRewardModelSettings(_Pair):
    """``margin``: share of held-out pairs (0.05: five points) by which ``row``'s accuracy must exceed."""

    decoded: ClassVar[bool] = False

    kind: Literal["better_reward_model"] = "better_reward_model"
    reference: str = BASE

    @property
    def sentence(self) -> str:
        return f"As a reward model, {self.row} orders held-out pairs better than {self.reference}."


class BaseBelowChanceSettings(ClaimSettings):
    """``margin``: share of held-out pairs by which the accuracy must stay below one half."""

    decoded: ClassVar[bool] = False

    kind: Literal["base_below_chance"] = "base_below_chance"
    row: str = BASE

    @property
    def sentence(self) -> str:
        return f"As a reward model, {self.row} orders held-out pairs worse than chance."

    def _named(self) -> Iterator[str]:
        yield self.row


CLAIMS: dict[str, type[ClaimSettings]] = {
    "rrhf_reaches_ppo": RRHFReachesPPOSettings,
    "best_of_n_learner": BestOfNLearnerSettings,
    "best_of_n_over_rows": BestOfNOverRowsSettings,
    "reward_rises_with_sampling_quality": SamplingQualitySettings,
    "ordered": OrderedSettings,
    "overoptimises": OveroptimisesSettings,
    "kl_repairs": KLRepairsSettings,
    "spread_shrinks": SpreadShrinksSettings,
    "better_reward_model": BetterRewardModelSettings,
    "base_below_chance": BaseBelowChanceSettings,
}
