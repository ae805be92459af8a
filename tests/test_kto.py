"""KTO against numbers worked by hand and a slow definition; its reference point."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from baselines.kto import KTO, kto_loss
from baselines.kto_settings import KTOSettings
from rrhf_bench import testing
from rrhf_bench.errors import DataError
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from rrhf_bench.training.offline import OfflineTrainer, with_reference
from rrhf_bench.training.reference import response_logprobs
from tests.losses import by_response, random_batch
from tests.test_training import PAIRS

GOOD, BAD = torch.tensor([True]), torch.tensor([False])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_losses_are_those_worked_by_hand() -> None:
    # h_w = 1, h_l = -1, z = 0.3: 1 - sigmoid(0.1 x 0.7) = .482507 and 1 - sigmoid(0.1 x 1.3) = .467546.
    z = torch.tensor([0.3])
    assert kto_loss(torch.tensor([1.0]), GOOD, z, beta=0.1).item() == pytest.approx(0.482507, abs=1e-6)
    assert kto_loss(torch.tensor([-1.0]), BAD, z, beta=0.1).item() == pytest.approx(0.467546, abs=1e-6)
    both = kto_loss(torch.tensor([1.0, -1.0]), torch.cat([GOOD, BAD]), z, beta=0.1, undesirable_weight=2.0)
    assert both.item() == pytest.approx((0.482507 + 2 * 0.467546) / 2, abs=1e-6)
    # A label on the wrong side shows: 1 - sigmoid(-0.07) = .517493.
    assert kto_loss(torch.tensor([1.0]), BAD, z, beta=0.1).item() == pytest.approx(0.517493, abs=1e-6)


def test_the_reference_point_is_not_negative_and_has_no_gradient() -> None:
    h, z = torch.tensor([1.0]), torch.tensor([-3.0, 1.0], requires_grad=True)
    assert kto_loss(h, GOOD, z, beta=0.1).item() == pytest.approx(1 - sigmoid(0.1))  # mean -1, so 0
    assert kto_loss(h, GOOD, z[:0], beta=0.1).item() == pytest.approx(1 - sigmoid(0.1))
    assert not kto_loss(h, GOOD, z, beta=0.1).requires_grad


@pytest.mark.parametrize(("baseline", "step"), [("next", 1), ("previous", -1), ("none", 0)])
def test_a_batch_has_the_loss_of_the_slow_definition(policy: TransformersPolicy, baseline: str, step: int) -> None:
    method = KTO(KTOSettings.model_validate({"baseline": baseline, "beta": 0.3, "undesirable_weight": 1.5}))
    examples = method.examples(TrainInputs(PAIRS))
    if step:
        other = PAIRS[(2 + step) % len(PAIRS)]
        assert [r.text for r in examples[2].responses[2:]] == [other.chosen, other.rejected]
    logp_RT, batch = random_batch(method, TrainInputs(PAIRS), policy.tokenization)
    logp_RT = 0.5 * logp_RT  # likelier than the reference, so that the reference point is positive
    assert batch.reference_RT is not None
    h = [[sum(p) - sum(q) for p, q in group] for group in by_response(batch, logp_RT, batch.reference_RT)]
    z = max(0.0, statistics.mean(x for group in h for x in group[2:])) if step else 0.0
    assert (z > 0.1) == bool(step)
    losses = [1 - sigmoid(0.3 * (group[0] - z)) for group in h] + [1.5 * (1 - sigmoid(0.3 * (z - g[1]))) for g in h]
    assert method.loss(logp_RT, batch).loss.item() == pytest.approx(statistics.mean(losses), rel=1e-5)


def test_the_cut_into_passes_does_not_move_the_reference_point(policy: TransformersPolicy) -> None:
    """The reference is another model here, so the point is not 0."""
    settings = KTOSettings(beta=0.5)
    examples = KTO(settings).examples(TrainInputs(PAIRS))
    reference = response_logprobs(policy, examples, max_length=512)  # type: ignore[arg-type]
    for parameter in policy.parameters():
        parameter.data.mul_(0.7)
    losses, gradients = [], []
    for tokens in (1, 4096):
        policy.pass_tokens = tokens
        metrics, weight = OfflineTrainer(KTO(settings), settings).accumulate(
            policy, with_reference(examples, reference)
        )
        losses.append((metrics["loss"], metrics["objective/kl"]))
        gradients.append(torch.cat([p.grad.flatten() / weight for p in policy.parameters() if p.grad is not None]))
        for parameter in policy.parameters():
            parameter.grad = None
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][1] > 0.1
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 1e-4


def test_a_reference_point_of_each_pass_does_not_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conformance suite notices a loss that needs the whole step and does not say so."""
    monkeypatch.setattr(KTOSettings, "requires", KTOSettings.requires - {"whole step"})
    with pytest.raises(AssertionError, match="differs by"):
        testing.is_cut_into_passes(KTOSettings())


def test_one_prompt_has_no_baseline_and_is_refused() -> None:
    with pytest.raises(DataError, match="kto: "):
        KTO(KTOSettings()).examples(TrainInputs(PAIRS[:1]))
    assert len(KTO(KTOSettings(baseline="none")).examples(TrainInputs(PAIRS[:1]))) == 1
