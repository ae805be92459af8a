"""Settings of Chain of Hindsight (arXiv 2302.02676)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from rrhf_bench.settings.methods import PairSettings

Form = Literal["good", "bad", "good-bad", "bad-good"]
Marker = Annotated[str, Field(pattern=r"^ .*\S:$")]  # replies are encoded as they stand behind a colon


class CoHSettings(PairSettings):
    """Cross-entropy on replies behind markers. The defaults are the markers of the released code.

    ``forms`` are the rows that a pair can make: one reply, or both in a chain. ``repeat_prompt`` repeats the dialogue
    before the second reply, as the released code does for dialogues and the paper's text does not. ``reduction`` says
    what the loss is a mean over: the code's is the mean over rows of each one's token mean.
    """

    kind: Literal["coh"] = "coh"
    good: Marker = " A helpful answer:"
    bad: Marker = " An unhelpful answer:"
    forms: Annotated[tuple[Form, ...], Field(min_length=1, strict=False)] = get_args(Form)
    mix: Literal["in turn", "all"] = "in turn"  # whether a pair makes one row or one of each form
    repeat_prompt: bool = False
    reduction: Literal["token", "sequence", "sum"] = "sequence"
    prompted: Literal["good", "bad", "none"] = "good"  # the marker behind the prompts of the trained policy

    @property
    def cue(self) -> str:
        """Return the marker behind the prompts of the trained policy."""
        return {"good": self.good, "bad": self.bad, "none": ""}[self.prompted]

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.good == self.bad:
            raise ValueError(f"bad: found {self.bad!r}, the marker of good replies too; the two must differ")
        if self.repeat_prompt and not any("-" in form for form in self.forms):
            raise ValueError("repeat_prompt: is of forms of two replies; remove it, or add such a form to forms")
        return self

    def budget(self, prompts: int, responses: int) -> str:
        each = [form.count("-") + 1 for form in self.forms]
        examples = prompts * sum(each) if self.mix == "all" else sum(each[i % len(each)] for i in range(prompts))
        steps = self.epochs * math.ceil(examples / self.batch_prompts)
        return (
            f"{prompts} pairs in {examples} examples, {self.epochs} epochs of {self.batch_prompts} examples a step = "
            f"{steps} steps"
        )
