"""PPO's loop on a real, tiny model with a real sampler."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from baselines.ppo import PPO, RewardScale
from baselines.ppo_settings import PPOSettings
from rrhf_bench.errors import DataError, Diverged, StageError
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import Policy
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.testing import PROMPTS, Run, share_of_d, tiny_tokenization
from rrhf_bench.training.method import Progress, TrainInputs
from rrhf_bench.training.on_policy import OnPolicyTrainer
from rrhf_bench.training.rollouts import cycle_prompts
from tests.losses import draw_first_rollouts
from tests.test_health import START

INPUTS = TrainInputs(preferences=[Preference(prompt, " a", " b") for prompt in PROMPTS])


pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> PPOSettings:
    base = {"iterations": 2, "rollouts": 16, "minibatch": 8, "update_epochs": 2, "lr": 3e-3}
    return PPOSettings(**{**base, **changes})


def trainer(made: PPOSettings) -> OnPolicyTrainer:
    return OnPolicyTrainer(PPO(made), made)


class Iteration:
    """The first iteration of a run, taken apart."""

    def __init__(self, run: Run, made: PPOSettings, prompts: Sequence[Prompt] = PROMPTS) -> None:
        self.trainer, self.state, self.rollouts = draw_first_rollouts(run, made, prompts)
        self.advantages = self.trainer.method.advantages(self.rollouts, made.kl_coefficient)
        self.metrics = {**self.rollouts.metrics, **self.advantages.metrics}

    def accumulate(self, policy: Policy, rows: Sequence[int]) -> Mapping[str, float]:
        return self.trainer.accumulate(policy, self.rollouts, self.advantages, rows, self.state)


def test_reward_rises_and_the_run_reports_it() -> None:
    run = Run()
    made = settings(iterations=8, rollouts=48, minibatch=16, update_epochs=4, lr=5e-3, kl_coefficient=0.02)
    result = trainer(made).fit(run.policy, INPUTS, run.context)
    rewards = [row["reward/mean"] for row in run.log]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2, rewards
    assert result.steps == 8 * 4 * 3 == run.log[-1]["step"]
    assert result.sampled_tokens == run.log[-1]["sampled_tokens"]
    assert result.counts["rollouts"] == 8 * 48
    assert run.watched[0] == Progress(0.0, 0, 0)
    assert [progress.fraction for progress in run.watched] == [i / 8 for i in range(9)]
    assert run.watched[-1] == Progress(1.0, result.steps, result.sampled_tokens)
    assert all(np.isfinite(list(row.values())).all() for row in run.log)
    assert run.log[-1]["objective/kl"] > 0.1
    assert set(START) <= set(run.log[0])  # what a report looks at to see a collapse


@pytest.mark.slow
def test_replies_shorten_where_length_is_charged_for() -> None:
    run = Run(lambda text: -float(len(text)))
    made = settings(
        iterations=8, rollouts=48, minibatch=16, update_epochs=4, lr=5e-3, kl_coefficient=0.02, missing_eos="none"
    )
    trainer(made).fit(run.policy, INPUTS, run.context)
    assert run.log[0]["completions/mean_length"] > 6.0
    assert run.log[-1]["completions/mean_length"] < 4.0


@pytest.mark.parametrize(("value", "temperature"), [("head", 0.7), ("separate", 1.0)])
def test_every_fresh_rollout_starts_at_ratio_1(value: str, temperature: float, onednn: str) -> None:
    run = Run(stop=("ad",))
    assert (run.policy.onednn_layers > 0) == (onednn == "on")
    run.policy.pass_tokens = 60  # three or four rollouts
    trainer(settings(iterations=3, value=value, temperature=temperature)).fit(run.policy, INPUTS, run.context)
    for row in run.log:
        assert row["val/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert row["val/ratio_deviation"] < 1e-5
        # The engine's log-probs are those of the same weights, at the same temperature.
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert run.log[0]["objective/kl"] == 0.0
    assert run.log[0]["policy/approxkl_avg"] > 0.0
    assert run.log[1]["objective/kl"] != 0.0
    assert run.log[-1]["loss/value_avg"] > 0.0


def test_log_probs_at_another_temperature_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    method = trainer(settings(iterations=1, temperature=0.7))
    monkeypatch.setattr("rrhf_bench.training.rollouts.Rollouts.batch", lambda self, rows: _at_temperature_1(self, rows))
    method.fit(run.policy, INPUTS, run.context)
    assert run.log[0]["val/ratio_deviation"] > 1e-2


def _at_temperature_1(rollouts: Any, rows: Sequence[int]) -> ResponseBatch:
    return ResponseBatch.of_pairs([rollouts.pairs[row] for row in rows])


def test_same_seed_same_weights_whatever_the_global_generators_do() -> None:
    def disturbing(text: str) -> float:
        torch.rand(3)
        random.random()
        np.random.seed(len(text))
        return share_of_d(text)

    first, second, other = Run(), Run(disturbing), Run(seed=1)
    torch.manual_seed(123)
    for run in (first, second, other):
        trainer(settings()).fit(run.policy, INPUTS, run.context)
    assert all(torch.equal(a, b) for a, b in zip(first.weights().values(), second.weights().values(), strict=True))
    assert first.log == second.log
    assert first.log != other.log


@pytest.mark.usefixtures("onednn")
def test_a_separate_value_model_leaves_the_value_gradient_out_of_the_policy() -> None:
    run = Run()
    before = run.weights()
    # Without clipped policy updates (advantages 0) only the value loss is left to change anything.
    made = settings(value="separate", iterations=1, kl_coefficient=0.0, reward_scale="none", missing_eos="none")
    run.context.reward.function = lambda text: 0.0  # type: ignore[union-attr]
    trainer(made).fit(run.policy, INPUTS, run.context)
    assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())

    state = trainer(made).start(run.policy)
    shared = trainer(settings()).start(run.policy)
    count = sum(1 for _ in run.policy.parameters())
    assert len(state.optimiser.parameters) == 2 * count + 2
    assert len(shared.optimiser.parameters) == count + 2


class PromptReward:
    """A reward that the prompt alone decides: nothing for the policy to learn, everything for the value function."""

    identity = "prompt"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        return np.array([float("ab" in prompt.text) for prompt in prompts])


@pytest.mark.parametrize("value", ["head", "separate"])
def test_the_value_function_learns(value: str) -> None:
    run = Run()
    made = settings(iterations=6, rollouts=32, value=value, lr=1e-2, kl_coefficient=0.0, missing_eos="none")
    trainer(made).fit(run.policy, INPUTS, replace(run.context, reward=PromptReward()))
    assert run.log[0]["val/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a head of zeros explains nothing
    assert max(row["val/explained_variance"] for row in run.log) > 0.4


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("penalty", lambda missing: 0.5 - 2.0 * missing),
        ("replace", lambda missing: 0.5 * (1 - missing) - 2.0 * missing),
        ("none", lambda missing: 0.5),
    ],
)
def test_a_missing_end_costs(mode: str, expected: Callable[[float], float]) -> None:
    run = Run(lambda text: 0.5, stop=("ad", "da"))
    cost = {} if mode == "none" else {"missing_eos_penalty": -2.0}
    made = settings(missing_eos=mode, reward_scale="none", **cost)
    first = Iteration(run, made)
    metrics = first.metrics
    missing = metrics["completions/clipped_ratio"]
    assert 0.0 < missing < 1.0
    assert first.state.missing_ends == missing * 16
    assert metrics["reward/mean"] == 0.5
    assert metrics["objective/scores"] == pytest.approx(expected(missing))
    assert metrics["objective/rlhf_reward"] == pytest.approx(expected(missing), abs=1e-6)  # the KL is still 0


def test_a_stop_string_is_an_ending_and_its_tokens_stay() -> None:
    texts: list[str] = []
    run = Run(lambda text: texts.append(text) or 0.0, stop=("ad", "da"))  # type: ignore[func-returns-value]
    made = settings(rollouts=64, minibatch=8, reward_scale="none")
    first = Iteration(run, made)
    rollouts = first.rollouts
    assert not any("ad" in text or "da" in text for text in texts)
    sampled = [tiny_tokenization().decode(ids) for _, ids in rollouts.pairs]
    stopped = [n for n, text in enumerate(sampled) if "ad" in text or "da" in text]
    assert stopped, "no stop string occurred"
    mask = rollouts.batch(range(64)).mask_BT
    last = mask.sum(-1) - 1
    assert first.advantages.return_NT is not None
    final_return = first.advantages.return_NT.gather(1, last[:, None]).squeeze(1)
    for n in stopped:
        assert len(rollouts.pairs[n][1]) <= 8
        assert final_return[n] == 0.0  # the score of a reply that ended, at its last sampled token: no penalty
    unended = [
        n for n, (_, ids) in enumerate(rollouts.pairs) if ids[-1] != tiny_tokenization().eos_id and n not in stopped
    ]
    assert all(final_return[n] == -1.0 for n in unended)


def test_a_prompt_that_comes_twice_gets_two_replies() -> None:
    run = Run()
    made = settings(rollouts=8, minibatch=8)
    rollouts = Iteration(run, made, PROMPTS[:1]).rollouts
    assert len({ids for _, ids in rollouts.pairs}) > 4


def test_rollouts_come_from_the_present_weights() -> None:
    run = Run()
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(0.5)
    made = settings()
    metrics = Iteration(run, made).metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["objective/kl"] != 0.0


def test_prompts_come_in_rounds() -> None:
    drawn = [cycle_prompts(PROMPTS, start, 5, 3, "ppo") for start in range(0, 60, 5)]
    flat = [prompt for part in drawn for prompt in part]
    orders = [flat[i : i + 12] for i in range(0, 60, 12)]
    assert all(set(order) == set(PROMPTS) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert flat == cycle_prompts(PROMPTS, 0, 60, 3, "ppo")


def test_an_adaptive_coefficient_moves() -> None:
    run = Run()
    trainer(settings(iterations=3, kl="adaptive", kl_target=50.0, kl_horizon=16)).fit(run.policy, INPUTS, run.context)
    # The KL is far below 50: 1 - .2 * 16 / 16 each iteration.
    assert [row["kl_coefficient"] for row in run.log] == pytest.approx([0.1, 0.08, 0.064])


def test_reward_scales() -> None:
    first, second = np.array([1.0, 2.0, 6.0]), np.array([10.0, -3.0])
    scale = RewardScale("first-batch")
    np.testing.assert_allclose(scale.scale(first), (first - 3.0) / np.sqrt(14 / 3))
    np.testing.assert_allclose(scale.scale(second), (second - 3.0) / np.sqrt(14 / 3))
    running = RewardScale("running")
    np.testing.assert_allclose(running.scale(first), first / first.std())
    np.testing.assert_allclose(running.scale(second), second / np.concatenate([first, second]).std())
    np.testing.assert_array_equal(RewardScale("none").scale(first), first)
    with pytest.raises(StageError, match="no scale"):
        RewardScale("first-batch").scale(np.full(7, 0.1))


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    run = Run()
    with torch.no_grad():
        next(iter(run.policy.parameters())).fill_(torch.nan)
    made = settings()
    good = Run()
    first = Iteration(good, made)
    with pytest.raises(StageError, match=r"iteration 1, step 1: the loss is nan"):
        first.accumulate(run.policy, range(8))


def test_a_sampler_without_ids_and_a_run_without_prompts_are_refused() -> None:
    run = Run()
    with pytest.raises(DataError, match="no training prompts"):
        trainer(settings()).fit(run.policy, TrainInputs(), run.context)

    class Silent:
        identity = "silent"
        tokenization = tiny_tokenization()

        def sample(self, prompts: Sequence[Prompt], spec: Any) -> list[Candidates]:
            return [Candidates(prompt, (Response("", "model", "eos", ()),)) for prompt in prompts]

        def sync(self, policy: Policy) -> None: ...

    with pytest.raises(StageError, match="no token ids"):
        trainer(settings()).fit(run.policy, INPUTS, replace(run.context, sampler=Silent()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 66, "replies": 4}, "multiple of replies"),
        ({"candidates": {}}, "unknown key"),
        ({"top_k": 5}, "unknown key"),  # its ratios need log-probs of the full distribution
        ({"max_length": 64}, "unknown key"),  # it trains on all that it sampled
        ({"temperature": 0.0}, "greater than 0"),
        ({"minibatch": 256}, "at most rollouts"),
        ({"kl": "adaptive"}, "kl_target"),
        ({"kl": "adaptive", "kl_coefficient": 0.0, "kl_target": 6.0, "kl_horizon": 10}, "never leaves 0"),
        ({"kl_target": 6.0}, "reads no kl_target"),
        ({"kl": "adaptive", "kl_target": 6.0, "kl_horizon": 25}, "more than 0.2 x rollouts"),  # of 128: 25.6
        ({"missing_eos": "none", "missing_eos_penalty": -2.0}, "missing_eos_penalty"),
        ({"missing_eos": "ignore"}, "penalty"),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PPOSettings(**changes)


def test_models_in_memory() -> None:
    assert PPOSettings().models_in_memory() == ("policy", "reference", "reward model")
    assert PPOSettings(value="separate").models_in_memory() == ("policy", "reference", "reward model", "value model")
    assert PPOSettings().requires == {"sampler", "reward", "reference"}


def test_an_iteration_is_taken_apart() -> None:
    run = Run()
    took: list[Mapping[str, float]] = []
    trainer(settings(iterations=2)).fit(run.policy, INPUTS, replace(run.context, took=took.append))
    assert len(took) == 2
    for seconds in took:
        assert set(seconds) == {"sync", "sample", "score", "logprobs", "update", "iteration"}
        parts = sum(seconds.values()) - seconds["iteration"]
        assert 0.0 < parts <= seconds["iteration"]


def test_what_diverged_is_told_with_its_rollouts() -> None:
    rewards = iter([*map(float, range(16)), math.nan, *[1.0] * 15])
    run = Run(lambda text: next(rewards))
    with pytest.raises(Diverged, match="iteration 2, step 5: 1 of 16 rewards are not finite, the first nan") as caught:
        trainer(settings()).fit(run.policy, INPUTS, run.context)
    assert [row["reward"] for row in caught.value.evidence] == ["nan", *[1.0] * 15]
    run = Run()
    with pytest.raises(Diverged, match=r"ppo, iteration 1, step [23]: the (loss|gradient)") as caught:
        trainer(settings(lr=1e30, warmup=0.0)).fit(run.policy, INPUTS, run.context)
    assert len(caught.value.evidence) == 8
    assert all(row["prompt"] in {prompt.text for prompt in PROMPTS} for row in caught.value.evidence)
