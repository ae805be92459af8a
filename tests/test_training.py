"""The policy interface, SFT and the offline loop on a small real Llama."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.sft import SFT, sft_loss
from baselines.sft_settings import SFTSettings
from rrhf_bench.errors import DataError, Diverged
from rrhf_bench.evaluation.metrics import candidate_statistics
from rrhf_bench.pipeline.stage_helpers import score_pairs_by_likelihood
from rrhf_bench.policy.logprobs import kl_k1, kl_k2, kl_k3, sequence_score
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.sampling.sampler import SamplingSpec, to_response
from rrhf_bench.schedule import lr_factor
from rrhf_bench.settings.methods import FLOAT32_MAX, OptimiserSettings
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, Progress, TrainContext, TrainInputs
from rrhf_bench.training.offline import OfflineTrainer, batches, tally
from rrhf_bench.training.optimiser import AdamW, learning_rate
from rrhf_bench.training.rrhf import RRHF
from rrhf_bench.training.rrhf_settings import RRHFSettings

PROMPTS = [Prompt(f"\n\nHuman: What is number {i}?{' Tell me more.' * (i % 3)}\n\nAssistant:") for i in range(8)]
PAIRS = [Preference(p, f" It is {i}." + " Really." * (i % 4), " No.") for i, p in enumerate(PROMPTS)]
CANDIDATES = [
    Candidates(
        pair.prompt,
        (
            Response(pair.chosen, "chosen", score=1.0),
            Response(pair.rejected, "rejected", score=0.0),
            Response(" I do not know what it is", "model", "length", score=float(i % 2)),
            *([Response(" Maybe", "model", "eos", score=0.5)] if i % 2 else []),
        ),
    )
    for i, pair in enumerate(PAIRS)
]


def context(tmp_path: Path | None = None, log=None, watch=None, seed: int = 0) -> TrainContext:
    return TrainContext(
        seed=seed,
        sampler=None,
        reward=None,
        reference=None,
        watch=watch or (lambda progress, policy: None),
        log=log or (lambda metrics: None),
        max_new_tokens=32,
        stop=(),
    )


def test_token_log_probs_equal_one_unpadded_pass_a_response(policy):
    """The slow definition: each response alone, log-softmax over all logits, the shift by hand."""
    tokenization = policy.tokenization
    rows = [(row.prompt, response) for row in CANDIDATES[:3] for response in row.responses]
    batch = tokenization.batch(rows)
    states = policy.response_states(batch)
    logp_BT = policy.token_logprobs(batch)
    assert torch.equal(states.logp_BT, logp_BT)
    for (prompt, response), logp_T, mask_T, hidden_TD in zip(
        rows, logp_BT, batch.mask_BT, states.hidden_BTD, strict=True
    ):
        prompt_ids = tokenization.prompt_ids(prompt)
        ids = tokenization.response_ids(response.text, ended=response.ended)
        output = policy.model(torch.tensor([prompt_ids + ids]), output_hidden_states=True)
        expected = [output.logits[0, len(prompt_ids) + t - 1].log_softmax(-1)[token] for t, token in enumerate(ids)]
        torch.testing.assert_close(logp_T[mask_T], torch.stack(expected), rtol=0, atol=1e-5)
        hidden = output.hidden_states[-1][0, len(prompt_ids) - 1 : -1]
        torch.testing.assert_close(hidden_TD[mask_T], hidden, rtol=0, atol=1e-5)
        assert logp_T[~mask_T].abs().sum() == 0
        assert (ids[-1] == tokenization.eos_id) == (response.finish != "length")


def test_a_held_out_pair_has_the_mean_log_prob_of_each_reply(policy):
    """p_i of 2304.05302 Eq. 1, each reply alone. The replies of a pair differ in length, so a sum would show."""
    found = score_pairs_by_likelihood("row", 3, policy, PAIRS, batch=3)
    assert [(scored.method, scored.seed, scored.prompt) for scored in found] == [("row", 3, p) for p in PROMPTS]
    for pair, scored in zip(PAIRS, found, strict=True):
        for text, p in ((pair.chosen, scored.chosen), (pair.rejected, scored.rejected)):
            batch = policy.tokenization.batch([(pair.prompt, Response(text, "given"))])
            expected = policy.token_logprobs(batch)[0].sum().item() / len(batch.response_ids[0])
            assert p == pytest.approx(expected, abs=1e-5)


def test_sequence_score_by_hand():
    logp = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -9.0, -9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_score(logp, mask).tolist() == [-1.5, -4.0]
    assert sequence_score(logp, mask, length_norm="none").tolist() == [-3.0, -4.0]
    assert sequence_score(logp, mask, length_norm="padded").tolist() == pytest.approx([-1.0, -4 / 3])
    with pytest.raises(ValueError, match="no tokens"):
        sequence_score(logp, torch.zeros_like(mask))


def test_kl_estimators_by_hand_and_in_expectation():
    """p = (.5, .5), q = (.8, .2): KL(p || q) = .5 log(.5/.8) + .5 log(.5/.2) = .223144 is both estimators' mean."""
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
    for estimator in (kl_k1, kl_k3):
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(0.223144, abs=1e-6)
    assert (kl_k3(p.log(), q.log()) >= 0).all()
    assert kl_k2(torch.tensor(-1.0), torch.tensor(-3.0)).item() == 2.0  # (-1 + 3)^2 / 2


def test_sft_loss_by_hand():
    """Tokens -1, -2 and -4: token mean 7/3; means of means (1.5 + 4)/2; mean of sums (3 + 4)/2."""
    logp = torch.tensor([[-1.0, -2.0], [-4.0, -9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert sft_loss(logp, mask).item() == pytest.approx(7 / 3)
    assert sft_loss(logp, mask, reduction="sequence").item() == pytest.approx(2.75)
    assert sft_loss(logp, mask, reduction="sum").item() == pytest.approx(3.5)
    assert sft_loss(logp, torch.ones_like(mask)).item() != pytest.approx(7 / 3)  # an unmasked pad would show


METHODS = [
    (RRHF, RRHFSettings(variant="official"), TrainInputs(candidates=CANDIDATES)),
    (SFT, SFTSettings(reduction="sequence"), TrainInputs(preferences=PAIRS)),
]


@pytest.mark.parametrize(("method", "settings", "inputs"), METHODS)
def test_micro_batches_of_one_give_the_gradient_of_the_whole(policy, method, settings, inputs):
    gradients = []
    for tokens in (1, 60, 4096):
        policy.pass_tokens = tokens
        trainer = OfflineTrainer(method(settings), settings)
        metrics, weight = trainer.accumulate(policy, trainer.method.examples(inputs))
        gradients.append((metrics["loss"], torch.cat([p.grad.flatten() / weight for p in policy.parameters()])))
        for parameter in policy.parameters():
            parameter.grad = None
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-5)
        assert ((gradient - gradients[0][1]).norm() / gradient.norm()).item() < 1e-5


class Spread:
    """A loss of all prompts together: the variance of their first replies' log-probs."""

    def examples(self, inputs):
        return SFT(SFTSettings()).examples(inputs)

    def loss(self, logp_RT, batch):
        return LossOutput(logp_RT.sum(-1).var(correction=0), float(batch.prompts))


class Whole(SFTSettings):
    requires = SFTSettings.requires | {"whole step"}


def test_a_loss_of_the_whole_step_does_not_depend_on_its_passes(policy):
    """Without the requirement, passes of one prompt would have no variance at all."""
    gradients = []
    for tokens in (1, 60, 4096):
        policy.pass_tokens = tokens
        trainer = OfflineTrainer(Spread(), Whole())
        metrics, weight = trainer.accumulate(policy, trainer.method.examples(TrainInputs(PAIRS)))
        gradients.append((metrics["loss"], torch.cat([p.grad.flatten() / weight for p in policy.parameters()])))
        for parameter in policy.parameters():
            parameter.grad = None
    for loss, gradient in gradients[:2]:
        assert loss == pytest.approx(gradients[2][0], rel=1e-4)
        assert ((gradient - gradients[2][1]).norm() / gradient.norm()).item() < 1e-4
    policy.pass_tokens = 60
    trainer = OfflineTrainer(Spread(), SFTSettings())
    # A loss that is taken pass by pass must differ by more than 1%: a wide tolerance is the stricter one here.
    assert trainer.accumulate(policy, trainer.method.examples(TrainInputs(PAIRS)))[0]["loss"] != pytest.approx(
        gradients[2][0], rel=1e-2
    )


@pytest.mark.parametrize("batch_prompts", [1, 3])
def test_trained_tokens_are_those_of_every_example_in_every_epoch(policy, batch_prompts):
    """A prompt is fed once for its only reply, and of the reply all tokens but the last."""
    settings = SFTSettings(epochs=2, batch_prompts=batch_prompts)
    result = OfflineTrainer(SFT(settings), settings).fit(policy, TrainInputs(PAIRS), context())
    tokenization = policy.tokenization
    fed = sum(
        len(tokenization.prompt_ids(pair.prompt)) + len(tokenization.response_ids(pair.chosen, ended=True)) - 1
        for pair in PAIRS
    )
    assert result.trained_tokens == 2 * fed


def test_rrhf_trains_towards_the_better_replies(policy):
    log: list = []
    settings = RRHFSettings(epochs=6, lr=3e-3, batch_prompts=4)
    points: list[Progress] = []
    trainer = OfflineTrainer(RRHF(settings), settings)
    result = trainer.fit(
        policy, TrainInputs(candidates=CANDIDATES), context(log=log.append, watch=lambda p, _: points.append(p))
    )
    assert result.steps == 12 == len(log)
    assert [p.step for p in points] == list(range(13))
    assert points[-1].fraction == 1.0
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["rewards/accuracies"] > log[0]["rewards/accuracies"]
    assert result.counts == {
        "examples": 8,
        "prompts_too_long": 0,
        "responses_empty": 0,
        "responses_truncated": 0,
        "responses_with_special_tokens": 0,
        "groups_with_ties": 8,  # the third reply scores as the first or the second in every group
        "groups_all_equal": 0,
    }


def test_same_seed_same_weights_whatever_the_global_state(policy):
    weights = []
    for disturbance in (0, 1, 2):
        random.seed(disturbance), np.random.seed(disturbance), torch.manual_seed(disturbance)
        copied = TransformersPolicy(copy.deepcopy(policy.model), policy.tokenization)
        settings = SFTSettings(epochs=2, batch_prompts=3)
        seed = 0 if disturbance < 2 else 1
        OfflineTrainer(SFT(settings), settings).fit(copied, TrainInputs(preferences=PAIRS), context(seed=seed))
        weights.append(torch.cat([p.detach().flatten() for p in copied.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_loss_that_is_not_finite_stops_with_its_step_and_batch(policy):
    class Broken(SFT):
        calls = 0

        def loss(self, logp_RT, batch: MethodBatch) -> LossOutput:
            Broken.calls += 1
            output = super().loss(logp_RT, batch)
            return LossOutput(output.loss * (math.nan if Broken.calls == 2 else 1.0), output.weight)

    settings = SFTSettings(batch_prompts=4)
    with pytest.raises(Diverged, match="step 2 of 6: loss nan") as caught:
        OfflineTrainer(Broken(settings), settings).fit(policy, TrainInputs(preferences=PAIRS), context())
    prompts = {row["prompt"] for row in caught.value.evidence}
    assert len(prompts) == 4
    assert prompts <= {prompt.text for prompt in PROMPTS}
    assert all(row["responses"][0]["text"] for row in caught.value.evidence)


def test_max_length_drops_and_counts(policy):
    lengths = [len(policy.tokenization.prompt_ids(p)) for p in PROMPTS]
    settings = SFTSettings(epochs=1, max_length=sorted(lengths)[4] + 2)
    result = OfflineTrainer(SFT(settings), settings).fit(policy, TrainInputs(preferences=PAIRS), context())
    assert result.counts["prompts_too_long"] == sum(length >= settings.max_length for length in lengths) > 0
    replies = [len(policy.tokenization.response_ids(pair.chosen, ended=True)) for pair in PAIRS]
    rows = [(prompt, reply) for prompt, reply in zip(lengths, replies, strict=True) if prompt < settings.max_length]
    assert result.counts["responses_truncated"] == sum(sum(row) > settings.max_length for row in rows) > 0
    nothing = SFTSettings(max_length=3)
    with pytest.raises(DataError, match="none of 8 prompts leaves room"):
        OfflineTrainer(SFT(nothing), nothing).fit(policy, TrainInputs(preferences=PAIRS), context())


def test_responses_cut_before_any_text_are_left_out_and_counted(policy):
    """A policy that says nothing but pad tokens up to the length cap leaves no token to train on; one that ends at once
    has its end."""
    pad = policy.tokenization.tokenizer.pad_token_id
    spec = SamplingSpec(1, 1.0, 4, 0, "test")
    nothing = replace(to_response(policy.tokenization, spec, (pad,) * 4, None), score=2.0)
    assert (nothing.text, nothing.finish) == ("", "length")
    ended = replace(to_response(policy.tokenization, spec, (policy.tokenization.eos_id,), None), score=-1.0)
    assert (ended.text, ended.finish) == ("", "eos")

    plain = [replace(row, responses=(*row.responses, ended)) for row in CANDIDATES[:6]]
    mixed = [replace(row, responses=(nothing, *row.responses, nothing)) for row in plain]
    mixed.insert(3, Candidates(PROMPTS[6], (nothing,)))
    settings = RRHFSettings(epochs=2, batch_prompts=4)
    weights, counts = [], []
    for candidates in (plain, mixed):
        copied = TransformersPolicy(copy.deepcopy(policy.model), policy.tokenization)
        result = OfflineTrainer(RRHF(settings), settings).fit(copied, TrainInputs(candidates=candidates), context())
        weights.append(torch.cat([p.detach().flatten() for p in copied.parameters()]))
        counts.append(result.counts)
    assert torch.equal(*weights)
    assert counts[1] == {**counts[0], "responses_empty": 13}
    assert (counts[0]["examples"], counts[0]["responses_empty"]) == (6, 0)

    silent = TrainInputs(candidates=[Candidates(prompt, (nothing, nothing)) for prompt in PROMPTS])
    with pytest.raises(DataError, match="none of 16 responses has a token to train on"):
        OfflineTrainer(RRHF(settings), settings).fit(policy, silent, context())


NEAR = (10.0, 10.0 + 1e-9)  # two rewards that are equal in float32


@pytest.mark.parametrize("better", [0, 1])
def test_rewards_that_float32_would_tie_are_ranked(policy, better):
    """The pair gives a ranking term, an accuracy and a best response, and nothing counts a tie.

    By hand: with margin m, the ranking term is max(0, p_worse - p_better + m), for the ranks differ by 1. The paper's
    L_ft is minus the summed log-prob of the better response.
    """
    assert torch.tensor(NEAR[0]) == torch.tensor(NEAR[1])
    replies = (Response(" It is 3. Really.", "model"), Response(" No.", "model"))
    rewards = NEAR if better == 1 else NEAR[::-1]
    example = Example(PROMPTS[0], replies, rewards)
    batch = MethodBatch.of([example], policy.tokenization, None)
    with torch.no_grad():
        logp_RT = policy.token_logprobs(batch.responses)
        output = RRHF(RRHFSettings(margin=50.0)).loss(logp_RT, batch)
    p = sequence_score(logp_RT, batch.responses.mask_BT).tolist()
    assert output.metrics["loss/rank"] == pytest.approx(p[1 - better] - p[better] + 50.0, abs=1e-4)
    assert output.metrics["loss/sft"] == pytest.approx(-logp_RT.sum(-1)[better].item(), rel=1e-6)
    assert output.metrics["rewards/accuracies"] == float(p[better] > p[1 - better])
    assert output.loss.dtype == logp_RT.dtype == torch.float32
    scored = tuple(replace(reply, score=reward) for reply, reward in zip(replies, rewards, strict=True))
    group = Candidates(PROMPTS[0], scored)
    counts = tally([example], [group], policy.tokenization, None)
    assert (counts["groups_with_ties"], counts["groups_all_equal"]) == (0, 0)
    found = candidate_statistics([group])
    assert (found.pairs, found.ties) == (1, 0)


def test_nothing_to_rank_is_refused():
    equal = [Candidates(PROMPTS[0], (Response(" a", "m", score=1.0), Response(" b", "m", score=1.0)))]
    with pytest.raises(DataError, match="nothing can be ranked"):
        RRHF(RRHFSettings()).examples(TrainInputs(candidates=equal))
    assert RRHF(RRHFSettings(rank_weight=0.0)).examples(TrainInputs(candidates=equal))


def test_every_example_once_an_epoch():
    settings = SFTSettings(epochs=2, batch_prompts=3)
    examples = list(SFT(settings).examples(TrainInputs(preferences=PAIRS)))
    seen = [example.prompt.id for batch in batches(examples, settings, 0) for example in batch]
    assert sorted(seen[:8]) == sorted(seen[8:]) == sorted(p.id for p in PROMPTS)
    assert seen[:8] != seen[8:]


def test_schedules_by_hand():
    """10 steps, warm-up .2: factors 1/2, 1, then 8/8, 7/8, ... 1/8; the cosine halfway through the rest is 1/2."""
    factors = [lr_factor(s, 10, warmup=2, schedule="linear") for s in (0, 1, 2, 3, 9)]
    assert factors == [0.5, 1.0, 1.0, 0.875, 0.125]
    assert lr_factor(6, 10, warmup=2, schedule="cosine") == pytest.approx(0.5)
    assert lr_factor(9, 10, warmup=0, schedule="constant") == 1.0
    # A warm-up of 0.15 of 10 steps is 2 of them, rounded up.
    assert learning_rate(0, 10, SFTSettings(warmup=0.15, lr=0.4)) == 0.2


def test_a_step_is_adamw_of_the_clipped_gradient() -> None:
    """The slow definition: divide by the weight, clip the global norm, then Algorithm 2 of AdamW (1711.05101)."""
    keys: dict[str, Any] = {"betas": (0.6, 0.8), "eps": 0.05, "weight_decay": 0.2, "grad_clip": 1.5}
    (beta1, beta2), eps, decay, grad_clip = keys.values()
    rng = np.random.default_rng(0)
    expected, first, second = rng.normal(size=7), np.zeros(7), np.zeros(7)
    parameters = [torch.nn.Parameter(torch.tensor(part)) for part in (expected[:3], expected[3:])]
    optimiser = AdamW(parameters, OptimiserSettings(kind="sft", **keys))
    for step, (lr, scale) in enumerate([(0.1, 20.0), (0.05, 0.5), (0.02, 8.0)], 1):  # the second is not clipped
        gradient = scale * rng.normal(size=7)
        for parameter, part in zip(parameters, (gradient[:3], gradient[3:]), strict=True):
            parameter.grad = torch.tensor(part)
        norm = np.linalg.norm(gradient / 4)
        assert optimiser.clip(4.0) == pytest.approx(norm)
        assert (norm > grad_clip) == (scale > 1.0)
        optimiser.step(lr)
        gradient *= min(1.0, grad_clip / norm) / 4
        first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
        moment, spread = first / (1 - beta1**step), second / (1 - beta2**step)
        expected = expected * (1 - lr * decay) - lr * moment / (np.sqrt(spread) + eps)
        # PyTorch adds 1e-6 to the norm that it divides by.
        found = torch.cat([parameter.detach() for parameter in parameters]).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_step_has_the_rate_of_the_schedule_and_the_mean_gradient(policy) -> None:
    """If both betas are 0, AdamW moves a weight by lr times the sign of its gradient, so the largest move is lr."""
    settings = SFTSettings(epochs=2, batch_prompts=3, lr=1e-3, warmup=0.3, schedule="cosine", betas=(0.0, 0.0))
    trainer, log, weights = OfflineTrainer(SFT(settings), settings), [], []
    first = next(batches(trainer.method.examples(TrainInputs(PAIRS)), settings, 0))
    _, weight = trainer.accumulate(policy, first)
    norm = torch.cat([p.grad.flatten() / weight for p in policy.parameters()]).norm().item()
    for parameter in policy.parameters():
        parameter.grad = None

    def watch(progress: Progress, policy: TransformersPolicy) -> None:
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))

    trainer.fit(policy, TrainInputs(PAIRS), context(log=log.append, watch=watch))
    rates = [learning_rate(step, 6, settings) for step in range(6)]
    assert len(set(rates)) == 4
    assert [line["lr"] for line in log] == rates
    moves = [(after - before).abs().max().item() for before, after in pairwise(weights)]
    assert moves == pytest.approx(rates, rel=1e-3)
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_the_highest_rate_that_is_accepted_can_be_stepped(beta: float) -> None:
    """At 1.03 times this rate AdamW raises an error of its own."""
    settings = OptimiserSettings(kind="sft", lr=FLOAT32_MAX * (1 - beta) * 0.999, betas=(beta, 0.999))
    weight = torch.nn.Parameter(torch.ones(2))
    optimiser = AdamW([weight], settings)
    for _ in range(2):
        weight.sum().backward()
        optimiser.clip()
        optimiser.step(settings.lr)
    assert weight.abs().min() > settings.lr  # two steps of about the rate
