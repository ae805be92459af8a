"""Every method that ships conforms to the suite that authors of methods run theirs through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.dpo import DPO
from baselines.dpo_settings import DPOSettings
from rrhf_bench import registry, testing
from rrhf_bench.errors import DataError
from rrhf_bench.records import Candidates, Preference, Response
from rrhf_bench.registry import METHODS, settings_class
from rrhf_bench.testing import PROMPTS
from rrhf_bench.training.method import LossOutput, MethodBatch, TrainInputs

pytestmark = pytest.mark.usefixtures("one_thread")


def cases() -> Iterator[Any]:
    for kind in METHODS:
        settings = settings_class(kind)(kind=kind)
        for check in testing.checks(settings):
            marks = [pytest.mark.slow] if check is testing.learns else []  # a minute for all methods
            yield pytest.param(settings, check, id=f"{kind}-{check.__name__}", marks=marks)


@pytest.mark.parametrize(("settings", "check"), list(cases()))
def test_every_method_conforms(settings: Any, check: testing.Check) -> None:
    check(settings)


class Swapped(DPO):
    """DPO with the two replies of a pair swapped."""

    def examples(self, inputs: TrainInputs) -> Any:
        return [replace(e, responses=e.responses[::-1]) for e in super().examples(inputs)]


class OverThePaddedWidth(DPO):
    """DPO whose scores are sums over the width of the batch, divided by it."""

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        assert batch.reference_RT is not None
        width = logp_RT.shape[1] / 4
        return super().loss(logp_RT / width, replace(batch, reference_RT=batch.reference_RT / width))


class WeightOfOne(DPO):
    """DPO whose weight does not count the pairs, so that a step in passes is another step."""

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        return replace(super().loss(logp_RT, batch), weight=1.0)


class FirstOfItsBatch(DPO):
    """DPO that trains on the first pair of a batch alone."""

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        first = torch.arange(len(logp_RT)) < 2
        return super().loss(torch.where(first[:, None], logp_RT, logp_RT.detach()), batch)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Swapped, testing.prefers_the_better_reply),
        (Swapped, testing.learns),
        (OverThePaddedWidth, testing.ignores_padding),
        (WeightOfOne, testing.is_cut_into_passes),
        (FirstOfItsBatch, testing.ignores_order),
    ],
)
def test_a_broken_method_does_not(broken: type[DPO], check: testing.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baselines.dpo.DPO", broken)
    with pytest.raises(AssertionError):
        check(DPOSettings())


UNPAIRED = TrainInputs([Preference(PROMPTS[0], " Yes.", None)])
LONE = Candidates(PROMPTS[0], (Response(" Yes.", "model", score=1.0),))
TIED = Candidates(PROMPTS[1], (Response(" Yes.", "model", score=1.0), Response(" No.", "model", score=1.0)))


@pytest.mark.parametrize("kind", [kind for kind in METHODS if METHODS[kind].family == "offline"])
def test_inputs_without_two_replies_that_differ_are_refused(kind: str) -> None:
    method = registry.build(settings_class(kind)(kind=kind))
    inputs = [TrainInputs(), *(TrainInputs(candidates=groups) for groups in ([LONE], [TIED], [LONE, TIED]))]
    if kind != "sft":  # SFT trains on the chosen reply alone
        inputs.append(UNPAIRED)
    for given in inputs:
        with pytest.raises(DataError, match=f"^{'candidates' if kind == 'rrhf' else kind}: "):
            method.examples(given)
