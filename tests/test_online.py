"""Candidates sampled while training (OP-k, OP-k+KL), on small real models and real samplers."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError, StageError
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.services import DistinctTexts
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Prompt, Response
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import Sampler, SamplingSpec, to_response
from rrhf_bench.sampling.transformers import TransformersSampler
from rrhf_bench.settings.candidates import CANDIDATE_KEYS
from rrhf_bench.testing import FunctionReward
from rrhf_bench.training.method import Progress, TrainContext, TrainInputs, TrainResult
from rrhf_bench.training.offline import FixedExamples, OfflineTrainer, batches
from rrhf_bench.training.online import OnlineExamples
from rrhf_bench.training.rrhf import RRHF
from rrhf_bench.training.rrhf_settings import RRHFSettings

PROMPTS = [Prompt(f"\n\nHuman: What is number {i}?{' Tell me more.' * (i % 3)}\n\nAssistant:") for i in range(8)]
GIVEN = [
    Candidates(
        prompt, (Response(f" It is {i}.", "chosen", score=3.0 + i), Response(" No.", "rejected", score=-2.0 - i))
    )
    for i, prompt in enumerate(PROMPTS)
]
INPUTS = TrainInputs(candidates=GIVEN)
UNGIVEN = [Candidates(prompt, ()) for prompt in PROMPTS]
STOP = ("e",)  # frequent, so that some samples are cut
CONTEXT = 128

needs_vllm = pytest.mark.skipif(choose_backend("vllm", device="cpu").name != "vllm", reason="no vLLM for CPUs here")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def other(llama_folder) -> TransformersPolicy:
    """A policy of the same architecture with other weights."""
    return TransformersPolicy.load(llama_folder(1), template=Template())


class Spied:
    """A real sampler that records its requests, and the optimiser step of each sync."""

    def __init__(self, sampler: Sampler, step: Callable[[], int]) -> None:
        self.sampler = sampler
        self.step = step
        self.tokenization = sampler.tokenization
        self.identity = sampler.identity
        self.syncs: list[int] = []
        self.asked: list[tuple[SamplingSpec, Sequence[Prompt]]] = []

    def sync(self, policy) -> None:
        self.syncs.append(self.step())
        self.sampler.sync(policy)

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        self.asked.append((spec, prompts))
        return self.sampler.sample(prompts, spec)


def share_of_letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / (1 + len(text))


class Run:
    """A policy with all inputs of a trainer, and the log of the trainer."""

    def __init__(
        self,
        policy: TransformersPolicy,
        reward: Callable[[str], float] = share_of_letters,
        *,
        sampler: Sampler | None = None,
        reference: TransformersPolicy | None = None,
        stop: tuple[str, ...] = STOP,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.policy = TransformersPolicy(copy.deepcopy(policy.model), policy.tokenization)
        self.log: list[Mapping[str, float]] = []
        self.kept: list[Sequence[Candidates]] = []
        self.watched: list[Progress] = []
        self.reward = FunctionReward(reward)

        def watched(progress: Progress, policy) -> None:
            self.watched.append(progress)
            watch(progress)

        self.sampler = Spied(
            sampler or TransformersSampler(self.policy, max_model_len=CONTEXT), lambda: self.watched[-1].step
        )
        self.context = TrainContext(
            seed=5,
            sampler=self.sampler,
            reward=self.reward,
            reference=reference,
            max_new_tokens=8,
            stop=stop,
            watch=watched,
            log=self.log.append,
            keep=self.kept.append,
        )

    def fit(self, settings: RRHFSettings, inputs: TrainInputs = INPUTS) -> TrainResult:
        return stage_helpers.trainer(settings, CONTEXT).fit(self.policy, inputs, self.context)

    def supply(self, settings: RRHFSettings, inputs: TrainInputs = INPUTS) -> OnlineExamples:
        self.watched.append(Progress(0.0, 0, 0))
        return OnlineExamples(RRHF(settings), settings, self.policy, inputs, self.context)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.policy.parameters()])

    @property
    def refreshes(self) -> list[Mapping[str, float]]:
        return [line for line in self.log if "refresh" in line]


def online(**changes: Any) -> RRHFSettings:
    """Return settings of two epochs of 8 prompts, 3 a step: 6 steps, of which the third of each epoch is smaller."""
    of_candidates = {"refresh": 2, "n": 3, "temperature": 0.9}
    if changes.get("strategy", "sample") != "sample":
        of_candidates = {"refresh": 2}
    of_candidates |= {key: changes.pop(key) for key in [*changes] if key in CANDIDATE_KEYS}
    base: dict[str, Any] = {"epochs": 2, "batch_prompts": 3, "lr": 1e-3}
    return RRHFSettings(**(base | changes), candidates=of_candidates)


def texts(groups: Sequence[Candidates], source: str = "model") -> list[tuple[str, ...]]:
    return [tuple(r.text for r in group.responses if r.source == source) for group in groups]


@pytest.fixture(scope="module")
def engine(llama_folder):
    from rrhf_bench.sampling.vllm import VLLMSampler

    policy = TransformersPolicy.load(llama_folder(0), template=Template())
    return VLLMSampler(llama_folder(0), policy.tokenization, max_model_len=CONTEXT, kv_cache_mib=32)


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=needs_vllm)])
def test_a_refresh_samples_from_the_weights_of_its_moment(backend, request, policy, other):
    """The policy's weights are exchanged after step 3, when the second refresh is due, and after step 4, when none is:
    the second refresh samples from the exchanged weights, and the third from what step 6 left."""
    sampler = None if backend == "transformers" else request.getfixturevalue("engine")
    last = other.frozen_copy()
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(0.7)
    held: dict[int, TransformersPolicy] = {}

    def exchange(progress: Progress) -> None:
        if progress.step in (3, 4):
            run.policy.model.load_state_dict((other if progress.step == 3 else last).model.state_dict())
        held[progress.step] = run.policy.frozen_copy()

    run = Run(policy, sampler=sampler, watch=exchange)
    run.fit(online(refresh=3, epochs=1, batch_prompts=1))
    assert run.sampler.syncs == [0, 3, 6]

    def sampled(weights: TransformersPolicy, refresh: int) -> list[tuple[str, ...]]:
        fresh = run.sampler.sampler if sampler else TransformersSampler(weights, max_model_len=CONTEXT)
        fresh.sync(weights)
        spec = SamplingSpec(3, 0.9, 8, 5, f"online/{refresh}", stop=STOP)
        return texts(fresh.sample([group.prompt for group in run.kept[refresh]], spec))

    assert texts(run.kept[0]) == sampled(policy, 0) != sampled(other, 0)
    assert texts(run.kept[1]) == sampled(other, 1) != sampled(policy, 1)
    assert texts(run.kept[2]) == sampled(held[6], 2) != sampled(other, 2)


@pytest.mark.parametrize("refresh", [3, 100])
def test_one_refresh_for_the_whole_run_is_offline_training(policy, refresh):
    run = Run(policy)
    settings = online(refresh=refresh, epochs=1)
    result = run.fit(settings)

    sampler = TransformersSampler(policy, max_model_len=CONTEXT)
    sampled = sampler.sample(PROMPTS, SamplingSpec(3, 0.9, 8, 5, "online/0", stop=STOP))
    scored = stage_helpers.score_shared_candidates(DistinctTexts(run.reward), sampled, "reward")
    groups = [Candidates(row.prompt, row.responses + given.responses) for row, given in zip(scored, GIVEN, strict=True)]
    offline = Run(policy)
    expected = offline.fit(online(refresh=0, epochs=1), TrainInputs(candidates=groups))
    assert torch.equal(run.weights(), offline.weights())
    assert not torch.equal(run.weights(), Run(policy).weights())
    assert [line for line in run.log if "loss" in line] == offline.log
    assert result.counts == {**expected.counts, "refreshes": 1, "groups": 8}
    assert offline.sampler.syncs == []
    assert (expected.steps, expected.sampled_tokens) == (result.steps, 0)


def fed(policy: TransformersPolicy, group: Candidates) -> int:
    """Return the tokens of a prompt and, without the last one of each, of its different replies."""
    tokenization = policy.tokenization
    replies = {tokenization.response_ids(reply.text, ended=reply.ended) for reply in group.responses}
    return len(tokenization.prompt_ids(group.prompt)) + sum(len(ids) - 1 for ids in replies)


@pytest.mark.parametrize("refresh", [1, 2, 4, 6, 100])
def test_refreshes_and_sampled_tokens_are_counted(policy, refresh):
    run = Run(policy)
    result = run.fit(online(refresh=refresh))
    assert result.steps == 6
    assert result.counts["refreshes"] == len(run.kept) == len(run.refreshes) == math.ceil(6 / refresh)
    assert run.sampler.syncs == [line["step"] for line in run.refreshes] == list(range(0, 6, refresh))
    assert [line["refresh"] for line in run.refreshes] == list(range(1, 1 + len(run.kept)))

    lengths = [[len(r.token_ids) for g in groups for r in g.responses if r.source == "model"] for groups in run.kept]
    sampled = np.cumsum([sum(part) for part in lengths]).tolist()
    assert [line["sampled_tokens"] for line in run.refreshes] == sampled
    assert run.watched[0] == Progress(0.0, 0, 0)
    assert run.watched[1:] == [Progress((s + 1) / 6, s + 1, sampled[s // refresh]) for s in range(6)]
    assert result.sampled_tokens == sampled[-1]
    assert result.trained_tokens == sum(fed(policy, group) for groups in run.kept for group in groups)
    assert [line["completions/mean_length"] for line in run.refreshes] == [sum(p) / len(p) for p in lengths]

    # Groups are those of the offline order of prompts, and each is sampled once an epoch.
    order = [prompt for batch in batches(PROMPTS, online(), 5) for prompt in batch]
    assert [group.prompt for groups in run.kept for group in groups] == order
    assert result.counts["groups"] == 16
    assert (result.counts["examples"], result.counts["prompts_too_long"]) == (8, 0)


def test_a_prompt_that_comes_twice_in_a_refresh_is_sampled_twice(policy):
    run = Run(policy)
    run.fit(online(refresh=6))
    assert [(spec.purpose, len(prompts)) for spec, prompts in run.sampler.asked] == [("online/0", 8), ("online/0/1", 8)]
    for prompt in PROMPTS:
        first, second = texts([group for group in run.kept[0] if group.prompt == prompt])
        assert first != second


@pytest.mark.parametrize("max_length", [None, 40])
def test_shaped_rewards_are_those_of_the_slow_definition(policy, other, max_length):
    """One pass a response, its log-softmax and its shift by hand; the reference is another model, and so every
    log-ratio is far from 0."""
    twins = [
        Candidates(row.prompt, (*row.responses, Response(" No.", "twin", score=row.responses[1].score)))
        for row in GIVEN
    ]
    run = Run(policy, reference=other.frozen_copy())
    settings = online(refresh=3, epochs=1, reward_kl=0.25, max_length=max_length)
    examples = [e for batch in run.supply(settings, TrainInputs(candidates=twins)) for e in batch]
    groups = run.kept[0]
    assert [e.prompt for e in examples] == [g.prompt for g in groups]

    def log_prob(model: TransformersPolicy, prompt: Prompt, reply: Response) -> float:
        prompt_ids = list(policy.tokenization.prompt_ids(prompt))
        ids = policy.tokenization.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
        ids += [] if reply.finish == "length" else [policy.tokenization.eos_id]
        ids = ids[: max_length - len(prompt_ids)] if max_length else ids
        with torch.no_grad():
            logits = model.model(torch.tensor([prompt_ids + ids])).logits[0].double().log_softmax(-1)
        return sum(logits[len(prompt_ids) - 1 + t, token].item() for t, token in enumerate(ids))

    ratios = []
    for example, group in zip(examples, groups, strict=True):
        assert [(r.text, r.finish) for r in example.responses] == [(r.text, r.finish) for r in group.responses]
        assert [r.source for r in group.responses] == ["model"] * 3 + ["chosen", "rejected", "twin"]
        for reward, reply in zip(example.rewards, group.responses, strict=True):
            ratio = log_prob(policy, group.prompt, reply) - log_prob(other, group.prompt, reply)
            # At most 9 float32 log-probs of each model, each right to 1e-5 (test_training), times 0.25.
            assert reward == pytest.approx(reply.score - 0.25 * ratio, abs=5e-5)
            ratios += [ratio] if reply.source == "model" else []
        assert example.rewards[-2] == example.rewards[-1]  # equal replies tie, to the last bit
    assert run.log[0]["objective/log_ratio"] == pytest.approx(np.mean(ratios), abs=2e-4)
    assert np.std(ratios) > 1.0
    finishes = {r.finish for group in groups for r in group.responses}
    assert finishes >= {"length", "stop", "given"}
    if max_length:  # prompts have 20, 33 and 46 tokens
        counts = run.supply(settings).counts
        assert (counts["examples"], counts["prompts_too_long"]) == (6, 2) == (len(groups), 8 - len(groups))


def test_kept_candidates_hold_the_scores_of_the_reward_model(policy, other):
    run = Run(policy, reference=other.frozen_copy())
    run.fit(online(reward_kl=0.25))
    assert sum(map(len, run.kept)) == 16
    for groups, line in zip(run.kept, run.refreshes, strict=True):
        drawn = []
        for group in groups:
            assert [r.source for r in group.responses] == ["model"] * 3 + ["chosen", "rejected"]
            assert group.responses[3:] == GIVEN[PROMPTS.index(group.prompt)].responses
            drawn.append([share_of_letters(r.text) for r in group.responses[:3]])
            assert list(group.scores[:3]) == drawn[-1]
        assert line["reward/mean"] == pytest.approx(np.mean(drawn))
        assert line["reward/max"] == pytest.approx(np.max(drawn, axis=1).mean())
        cut = [r.finish == "length" for group in groups for r in group.responses[:3]]
        assert line["completions/clipped_ratio"] == np.mean(cut)
    assert all("objective/log_ratio" in line for line in run.refreshes)


def test_a_kl_term_keeps_the_policy_near_its_reference(policy):
    """Paid for letters, with and without a price on leaving the reference."""
    logs = []
    for reward_kl in (1e-9, 1.0):
        run = Run(policy, reference=policy.frozen_copy(), stop=())
        settings = online(epochs=8, batch_prompts=4, lr=1e-2, n=4, variant="intended", reward_kl=reward_kl)
        run.fit(settings, TrainInputs(candidates=UNGIVEN))
        logs.append(run.refreshes)
    free, priced = logs
    assert free[0]["objective/log_ratio"] == priced[0]["objective/log_ratio"] == 0.0
    assert free[-1]["reward/mean"] > free[0]["reward/mean"] + 0.3
    # Of four random models the ratio lies between 0.50 and 0.70; without the price it is 1.
    assert priced[-1]["objective/log_ratio"] < 0.75 * free[-1]["objective/log_ratio"]


def test_same_seed_same_weights_whatever_the_global_state(policy):
    def disturbing(text: str) -> float:
        random.random(), torch.rand(3), np.random.seed(len(text))
        return share_of_letters(text)

    runs = [Run(policy), Run(policy, disturbing), Run(policy)]
    runs[2].context = replace(runs[2].context, seed=6)
    for run in runs:
        run.fit(online())
    assert torch.equal(runs[0].weights(), runs[1].weights())
    assert runs[0].log == runs[1].log
    assert runs[0].kept == runs[1].kept
    assert runs[0].kept[0] != runs[2].kept[0]


def test_a_reward_that_is_not_finite_stops_with_its_step(policy):
    run = Run(policy, lambda text: share_of_letters(text) if len(run.kept) < 1 else math.nan)
    # The second refresh: the last 2 prompts of the first epoch and 3 of the second, 3 samples each.
    with pytest.raises(StageError, match="refresh 2, step 3 of 6: 15 of 15 rewards are not finite, the first nan for"):
        run.fit(online())
    assert len(run.kept) == 1


def test_a_log_ratio_that_is_not_finite_stops_with_its_step(policy):
    broken = policy.frozen_copy()
    broken.model.get_input_embeddings().weight.fill_(math.nan)
    run = Run(policy, reference=broken)
    with pytest.raises(StageError, match="refresh 1, step 1 of 6, less reward_kl x log-ratio: 30 of 30 rewards"):
        run.fit(online(reward_kl=0.1))


def test_ties_stop_a_run_only_at_its_start(policy):
    with pytest.raises(DataError, match="none of 6 prompts has two responses with different scores"):
        Run(policy, lambda text: 0.5).fit(online(), TrainInputs(candidates=UNGIVEN))

    later = Run(policy, lambda text: 0.5 if later.kept else -share_of_letters(text))  # as when a policy collapses
    result = later.fit(online(), TrainInputs(candidates=UNGIVEN))
    assert result.steps == 6
    assert 10 <= result.counts["groups_all_equal"] <= result.counts["groups_with_ties"] <= 16
    losses = [line for line in later.log if "loss" in line]
    assert losses[0]["loss/rank"] > 0.0 == losses[2]["loss/rank"] < losses[2]["loss/sft"]


class Muted:
    """A real sampler, of which some samples are pad tokens up to the length cap: ``silent(prompt, index)`` of them."""

    def __init__(self, run: Run, silent: Callable[[Prompt, int], bool]) -> None:
        self.sampler = run.sampler.sampler
        self.tokenization = run.sampler.tokenization
        self.identity = run.sampler.identity
        self.silent = silent

    def sync(self, policy) -> None:
        self.sampler.sync(policy)

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        pad = self.tokenization.tokenizer.pad_token_id
        nothing = to_response(self.tokenization, spec, (pad,) * spec.max_new_tokens, None)
        assert (nothing.text, nothing.finish) == ("", "length")
        return [
            replace(
                row, responses=tuple(nothing if self.silent(row.prompt, i) else r for i, r in enumerate(row.responses))
            )
            for row in self.sampler.sample(prompts, spec)
        ]


def test_samples_without_text_are_scored_and_kept_but_in_no_example(policy, other):
    """The second of three samples of every prompt, and all of one prompt that has no given candidates."""
    run = Run(policy, reference=other.frozen_copy())
    run.sampler.sampler = Muted(run, lambda prompt, i: i == 1 or prompt == PROMPTS[0])
    settings = online(refresh=3, epochs=1, reward_kl=0.25)
    supply = run.supply(settings, TrainInputs(candidates=[UNGIVEN[0], *GIVEN[1:]]))
    drawn = list(supply)
    assert sorted(map(len, drawn)) in ([1, 3, 3], [2, 2, 3])  # 8 prompts less one, by where that one stands
    examples = {example.prompt: example for step in drawn for example in step}
    assert set(examples) == set(PROMPTS[1:])
    kept = {group.prompt: group for group in run.kept[0]}
    assert len(kept) == 8
    for prompt, example in examples.items():
        samples = kept[prompt].responses
        assert [r.text for r in example.responses] == [r.text for i, r in enumerate(samples) if i != 1]
        assert (samples[1].text, samples[1].score, len(samples)) == ("", 0.0, 5)
        assert len(example.rewards) == 4
    assert supply.counts["responses_empty"] == 7 + 3
    assert (supply.counts["groups"], supply.counts["examples"]) == (8, 8)
    assert run.log[0]["completions/mean_length"] * 24 == supply.sampled_tokens
    of_samples = [
        (reply.score - reward) / 0.25
        for prompt, example in examples.items()
        for reply, reward in zip([r for r in kept[prompt].responses if r.text], example.rewards, strict=True)
        if reply.source == "model"
    ]
    assert len(of_samples) == 14
    assert run.log[0]["objective/log_ratio"] == pytest.approx(np.mean(of_samples), abs=1e-9)  # float64 on both sides

    trained = Run(policy, reference=other.frozen_copy())
    trained.sampler.sampler = Muted(trained, lambda prompt, i: i == 1 or prompt == PROMPTS[0])
    assert trained.fit(settings, TrainInputs(candidates=[UNGIVEN[0], *GIVEN[1:]])).steps == 3


@pytest.mark.parametrize("loud", [0, 1])
@pytest.mark.parametrize("reward_kl", [0.0, 0.25])
def test_a_policy_without_text_stops_unless_candidates_are_given(policy, loud, reward_kl):
    """From the first refresh or the second on. With given candidates it goes on with these."""
    runs = [Run(policy, reference=policy.frozen_copy()) for _ in range(2)]
    for run in runs:
        run.sampler.sampler = Muted(run, lambda prompt, i, run=run: len(run.kept) >= loud)
    alone, beside = runs
    with pytest.raises(StageError, match=rf"refresh {loud + 1}, step {2 * loud + 1} of 6: no candidate has a token"):
        alone.fit(online(reward_kl=reward_kl), TrainInputs(candidates=UNGIVEN))
    assert len(alone.kept) == loud + 1

    result = beside.fit(online(reward_kl=reward_kl))
    assert result.steps == 6
    first = 3 * len(beside.kept[0]) if loud else 0
    assert result.counts["responses_empty"] == 16 * 3 - first
    logged = ["objective/log_ratio" in line for line in beside.refreshes]
    assert logged == [loud > i and bool(reward_kl) for i in range(3)]
    assert not any("objective/kl" in line for line in beside.refreshes)


@pytest.mark.parametrize(
    ("search", "read"),
    [
        ({"strategy": "beam", "beams": 3}, {"beams": 3, "groups": 1}),
        (
            {"strategy": "diverse-beam", "beams": 3, "groups": 3, "diversity_penalty": 0.7},
            {"beams": 3, "groups": 3, "diversity_penalty": 0.7},
        ),
        ({"strategy": "sample", "top_p": 0.8, "top_k": 7}, {"temperature": 0.9, "top_p": 0.8, "top_k": 7}),
    ],
)
def test_candidates_are_sampled_as_the_settings_state(policy, search, read):
    run = Run(policy)
    next(iter(run.supply(online(**search))))
    (spec, prompts), (kept,) = run.sampler.asked[0], run.kept
    expected = {"strategy": search["strategy"], "n": 3, "max_new_tokens": 8, "stop": STOP, "seed": 5, **read}
    assert {name: getattr(spec, name) for name in expected} == expected
    again = TransformersSampler(policy, max_model_len=CONTEXT).sample(prompts, spec)
    assert texts(kept) == texts(again)


def test_a_trainer_without_refresh_samples_nothing(policy):
    trainer = stage_helpers.trainer(online(refresh=0), CONTEXT)
    assert isinstance(trainer, OfflineTrainer)
    assert trainer.supply is FixedExamples
    assert stage_helpers.trainer(online(), CONTEXT).supply is OnlineExamples
