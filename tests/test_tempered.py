"""The initial policy at a lower temperature: what it draws, its KL and entropy, and what it has not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from baselines.best_of_n import BestOfN
from baselines.best_of_n_settings import BestOfNSettings
from baselines.tempered import Tempered
from baselines.tempered_settings import TemperedSettings
from rrhf_bench.errors import DataError
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.records import Prompt
from rrhf_bench.report.tables import main_table, method_costs
from rrhf_bench.report.view import View
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.transformers import TransformersSampler
from rrhf_bench.testing import FunctionReward
from tests.test_report import synthetic

PROMPTS = [Prompt(f"\n\nHuman: {i}?\n\nAssistant:") for i in range(6)]
SPEC = SamplingSpec(n=1, temperature=1.0, max_new_tokens=8, seed=0, purpose="test")
LENGTH = FunctionReward(len)


@pytest.fixture
def sampler(policy):
    return TransformersSampler(policy, max_model_len=128)


def evaluate(sampler, policy, initial, spec=SPEC):
    judges = stage_helpers.Judges(LENGTH)
    return stage_helpers.evaluate("row", 0, sampler, PROMPTS, judges, {"sample": spec}, policy, initial)


def test_it_draws_what_the_sampler_draws_at_that_temperature(sampler) -> None:
    wrapped = Tempered(TemperedSettings(temperature=0.3)).wrap(sampler, LENGTH)
    drawn = wrapped.sample(PROMPTS, SPEC)
    assert drawn == sampler.sample(PROMPTS, replace(SPEC, temperature=0.3))
    assert drawn != sampler.sample(PROMPTS, SPEC)
    with pytest.raises(DataError, match="greedy"):
        wrapped.sample(PROMPTS, replace(SPEC, temperature=0.0))


def test_its_kl_and_entropy_are_of_the_distribution_it_draws_from(sampler, policy) -> None:
    """KL: log p at 0.3 less log p at 1, entropy: minus log p at 0.3, both of the policy's own log-probs."""
    wrapped = Tempered(TemperedSettings(temperature=0.3)).wrap(sampler, LENGTH)
    records = evaluate(wrapped, None, policy)
    replies = [(row.prompt, row.responses[0]) for row in wrapped.sample(PROMPTS, SPEC)]
    ids = stage_helpers.sampled_ids(policy, replies)
    cold, warm = (stage_helpers.sampled_logprobs(policy, ids, temperature, 8) for temperature in (0.3, 1.0))
    assert [record.entropy for record in records] == pytest.approx([-logp for logp in cold], abs=1e-4)
    assert [record.kl for record in records] == pytest.approx(list(np.subtract(cold, warm)), abs=1e-4)
    assert min(record.kl for record in records) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_of_a_policy_is_minus_the_log_prob_of_its_draws(sampler, policy, temperature) -> None:
    spec = replace(SPEC, temperature=temperature)
    records = evaluate(sampler, policy, policy, spec)
    replies = [(row.prompt, row.responses[0]) for row in sampler.sample(PROMPTS, spec)]
    assert [record.response for record in records] == [reply.text for _, reply in replies]
    logps = stage_helpers.sampled_logprobs(policy, stage_helpers.sampled_ids(policy, replies), temperature, 8)
    assert [record.entropy for record in records] == pytest.approx([-logp for logp in logps], abs=1e-4)
    assert [record.kl for record in records] == [0.0] * len(PROMPTS)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}])
def test_replies_that_are_no_draws_of_the_whole_distribution_have_no_entropy(sampler, policy, changes) -> None:
    assert {record.entropy for record in evaluate(sampler, policy, policy, replace(SPEC, **changes))} == {None}


def test_best_of_n_has_neither_kl_nor_entropy(sampler, policy) -> None:
    wrapped = BestOfN(BestOfNSettings(n=3)).wrap(sampler, LENGTH)
    assert {(record.kl, record.entropy) for record in evaluate(wrapped, None, policy)} == {(None, None)}


def test_a_report_says_what_it_has_not(tmp_path) -> None:
    """The synthetic best_of_n replies as those of a tempered row, with a KL and an entropy."""
    records = synthetic(tmp_path)
    methods = {**records.experiment.methods, "best_of_n": TemperedSettings()}
    evaluated = tuple(
        replace(reply, kl=0.5 if reply.method == "best_of_n" else reply.kl, entropy=7.0)
        for reply in records.evaluated
        if (reply.method, reply.decoding) != ("best_of_n", "greedy")
    )
    experiment = records.experiment.model_copy(update={"methods": methods})
    view = View(replace(records, experiment=experiment, evaluated=evaluated))
    table = main_table(view)
    names = [column.name for column in table.columns]
    found = {(row[0].value, row[1].value): dict(zip(names, row, strict=True)) for row in table.rows}
    sampled, greedy = found["best_of_n", "sampled"], found["best_of_n", "greedy"]
    assert (sampled["KL"].value, sampled["entropy"].value, sampled["models"].value) == (0.5, 7.0, 1)
    assert greedy["proxy reward"].value is None
    assert math.isclose(found["rrhf", "sampled"]["entropy"].value, 7.0)
    assert found["rrhf", "greedy"]["entropy"].value is None
    assert sampled["p_i accuracy"].value is None
    (costs,) = (row for row in method_costs(view).rows if row[0].value == "best_of_n")
    assert costs[1].reason == "it trains nothing"
