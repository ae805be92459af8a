"""DPO, cDPO, robust DPO, IPO, APO, RPO and WPO against numbers worked by hand, and in the loop that trains them."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from baselines.dpo import DPO, dpo_loss, wpo_weight
from baselines.dpo_settings import DPOSettings
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.training.method import TrainInputs
from rrhf_bench.training.offline import OfflineTrainer, with_reference
from rrhf_bench.training.reference import response_logprobs
from tests.losses import by_response, random_batch
from tests.test_training import CANDIDATES, PAIRS, context

# Summed log-probs of a pair: chosen -12 against -13 in the reference, rejected -10 against -9. D = 1 - (-1) = 2.
PAIR = tuple(torch.tensor([x]) for x in (-12.0, -10.0, -13.0, -9.0))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.1}, 0.598139),  # -log sigmoid(0.2)
        ({"beta": 0.1, "label_smoothing": 0.1}, 0.618139),  # 0.9 x 0.598139 + 0.1 x 0.798139
        ({"beta": 0.1, "label_smoothing": 0.1, "kind": "robust"}, 0.573139),  # (0.9 x ... - 0.1 x ...) / 0.8
        ({"beta": 0.1, "kind": "ipo"}, 9.0),  # (2 - 5)^2
        # h_w = 1, h_l = -1.
        ({"beta": 0.1, "kind": "apo_zero"}, 0.950042),  # 1 - sigmoid(.1) + sigmoid(-.1) = 2 x .475021
        ({"beta": 0.1, "kind": "apo_down"}, 0.975145),  # sigmoid(.1) + 1 - sigmoid(.2) = .524979 + .450166
        ({"beta": 0.1, "weight_B": torch.tensor([0.5])}, 0.299070),  # 0.5 x 0.598139
    ],
)
def test_the_losses_are_those_worked_by_hand(settings: dict[str, Any], expected: float) -> None:
    assert dpo_loss(*PAIR, **settings).item() == pytest.approx(expected, abs=1e-6)


def test_ipo_on_means_over_tokens() -> None:
    # 6 and 4 tokens: D = 1/6 + 1/4 = 0.416667; (0.416667 - 5)^2 = 21.006944.
    length = torch.tensor([6.0, 4.0, 6.0, 4.0])
    means = [value / n for value, n in zip(PAIR, length, strict=True)]
    assert dpo_loss(*means, beta=0.1, kind="ipo").item() == pytest.approx(21.006944, abs=1e-5)
    assert dpo_loss(*means, beta=0.1).item() == pytest.approx(0.672531, abs=1e-6)  # -log sigmoid(0.0416667)


def test_apo_moves_each_side_by_itself() -> None:
    """Zero raises the chosen and lowers the rejected reply; down lowers both where the pair is ordered."""
    for kind, signs in (("apo_zero", (-1, 1)), ("apo_down", (1, 1))):
        chosen, rejected = torch.tensor([20.0], requires_grad=True), torch.tensor([-20.0], requires_grad=True)
        dpo_loss(chosen, rejected, torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1, kind=kind).backward()
        assert (chosen.grad.sign().item(), rejected.grad.sign().item()) == signs


@pytest.mark.parametrize("kind", ["dpo", "robust", "ipo"])
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(kind: Any) -> None:
    chosen, rejected = PAIR[0].clone().requires_grad_(), PAIR[1].clone().requires_grad_()
    dpo_loss(chosen, rejected, PAIR[2], PAIR[3], beta=0.1, kind=kind).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() < 0.0
    assert rejected.grad.item() == -chosen.grad.item()


@pytest.mark.parametrize("length_norm", ["none", "response"])
def test_a_batch_has_the_loss_of_its_pairs_one_by_one(policy: TransformersPolicy, length_norm: Any) -> None:
    """The slow definition: sums (or means) of one response at a time; responses are of 4 lengths."""
    settings = DPOSettings(beta=0.3, label_smoothing=0.2, length_norm=length_norm)
    logp_RT, batch = random_batch(DPO(settings), TrainInputs(PAIRS), policy.tokenization)
    assert batch.reference_RT is not None
    found = DPO(settings).loss(logp_RT, batch)
    score = statistics.mean if length_norm == "response" else sum
    losses = []
    for (p, p_ref), (q, q_ref) in by_response(batch, logp_RT, batch.reference_RT):
        values = [torch.tensor([score(tokens)]) for tokens in (p, q, p_ref, q_ref)]
        losses.append(dpo_loss(*values, beta=0.3, label_smoothing=0.2).item())
    assert found.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.weight == len(PAIRS)


@pytest.mark.parametrize("nll", ["sum", "mean"])
def test_rpo_adds_the_likelihood_of_the_chosen_reply(policy: TransformersPolicy, nll: Any) -> None:
    logp_RT, batch = random_batch(DPO(DPOSettings()), TrainInputs(PAIRS), policy.tokenization)
    plain = DPO(DPOSettings()).loss(logp_RT, batch).loss.item()
    found = DPO(DPOSettings(nll_weight=0.2, nll=nll)).loss(logp_RT, batch).loss.item()
    chosen = [tokens for (tokens,), _ in by_response(batch, logp_RT)]
    added = statistics.mean(-sum(tokens) / (len(tokens) if nll == "mean" else 1) for tokens in chosen)
    assert found == pytest.approx(plain + 0.2 * added, rel=1e-5)


def test_wpo_weighs_a_pair_by_the_slow_definition(policy: TransformersPolicy) -> None:
    """W = exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2), from the whole distribution at each token."""
    weights = []
    for pair in PAIRS:
        logs = []
        for reply in (pair.chosen, pair.rejected):
            prompt, ids = (
                policy.tokenization.prompt_ids(pair.prompt),
                policy.tokenization.response_ids(reply, ended=True),
            )
            logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp_TV = logits.log_softmax(-1)
            logs.append((logp_TV[range(len(ids)), ids] - (2 * logp_TV).logsumexp(-1)).mean().item())
        weights.append(math.exp(sum(logs)))
    reference = response_logprobs(policy, CANDIDATES, max_length=512)
    for weighting, cap in (("wpo", 1.0), ("wpo_uncapped", math.inf)):
        settings = DPOSettings.model_validate({"weights": weighting})
        trainer = OfflineTrainer(DPO(settings), settings)
        examples = with_reference(DPO(settings).examples(TrainInputs(PAIRS)), reference)
        policy.pass_tokens = 80
        metrics, _ = trainer.accumulate(policy, examples)
        expected = statistics.mean(min(cap, weight) for weight in weights)
        assert metrics["weights/mean"] == pytest.approx(expected, rel=1e-4)
        assert metrics["loss"] == pytest.approx(expected * math.log(2), rel=1e-3)  # the policy is its reference
    one_hot = torch.zeros(1)  # log pi(y) = log sum_v pi(v)^2 = 0
    assert wpo_weight(one_hot, one_hot).item() == 1.0
    assert wpo_weight(one_hot + 1.0, one_hot).item() == 1.0
    assert wpo_weight(one_hot + 1.0, one_hot, capped=False).item() == pytest.approx(math.e)


def test_it_learns_to_prefer_the_chosen_replies(policy: TransformersPolicy) -> None:
    """From log 2, where policy and reference agree; several passes a step."""
    policy.pass_tokens = 80
    log: list[Any] = []
    settings = DPOSettings(epochs=6, batch_prompts=4, lr=3e-3)
    reference = response_logprobs(policy, CANDIDATES, max_length=512)
    inputs = TrainInputs(PAIRS, reference=reference)
    stage_helpers.trainer(settings, 512).fit(policy, inputs, context(log=log.append))
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert log[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert log[-1]["loss"] < 0.3
    assert log[-1]["rewards/accuracies"] == 1.0
    assert log[-1]["rewards/margins"] == pytest.approx(
        log[-1]["rewards/chosen"] - log[-1]["rewards/rejected"], abs=1e-5
    )


def test_keys_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="label_smoothing"):
        DPOSettings(variant="ipo", label_smoothing=0.1)
    with pytest.raises(ValidationError, match="label_smoothing"):
        DPOSettings(variant="apo_zero", label_smoothing=0.1)
    with pytest.raises(ValidationError, match="nll"):
        DPOSettings(nll="mean")
