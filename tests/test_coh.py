"""Chain of Hindsight: the text of its rows, what is scored in them, and the marker of the trained policy."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from baselines.coh import CoH
from baselines.coh_settings import CoHSettings
from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import read_jsonl
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.scheduler import run_plan
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.pipeline.stage_graph import Plan, make_plan
from rrhf_bench.pipeline.store import Store
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Evaluated, Preference, Prompt, Response
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.training.method import TrainInputs
from tests.losses import by_response, random_batch
from tests.test_services import EXPERIMENT, Counting
from tests.test_training import PAIRS, context

PAIR = Preference(Prompt("\n\nHuman: Hi.\n\nAssistant:"), " Hello.", " No.")
X, GOOD, BAD = PAIR.prompt.text, " A helpful answer:", " An unhelpful answer:"


def rows(pairs: list[Preference], **keys: Any) -> list[tuple[str, str]]:
    made = CoH(CoHSettings.model_validate(keys)).examples(TrainInputs(pairs))
    return [(e.prompt.text, e.responses[0].text) for e in made]


def test_the_rows_of_a_pair() -> None:
    good, bad = (X + GOOD, " Hello."), (X + BAD, " No.")
    chain, other = (X + GOOD + " Hello." + BAD, " No."), (X + BAD + " No." + GOOD, " Hello.")
    assert rows([PAIR], mix="all") == [good, bad, good, chain, bad, other]
    assert rows([PAIR] * 5) == [good, bad, good, chain, bad, other, good]  # one form a pair, in turn
    assert rows([PAIR] * 2, forms=["bad", "good"]) == [bad, good]
    repeated = (X + GOOD + " Hello." + X + BAD, " No.")
    assert rows([PAIR], forms=["good-bad"], repeat_prompt=True) == [good, repeated]


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
def test_replies_and_their_ends_are_scored_and_no_marker_is(policy: TransformersPolicy, reduction: Any) -> None:
    method, tokenization = CoH(CoHSettings(reduction=reduction)), policy.tokenization
    logp_RT, batch = random_batch(method, TrainInputs(PAIRS), tokenization)
    for ids in batch.responses.response_ids:
        assert ids[-1] == tokenization.eos_id
        assert tokenization.decode(ids[:-1]) in {text for pair in PAIRS for text in (pair.chosen, pair.rejected)}
    tokens = [row for ((row,),) in by_response(batch, logp_RT)]
    losses = {
        "token": -statistics.mean(x for row in tokens for x in row),
        "sequence": -statistics.mean(statistics.mean(row) for row in tokens),
        "sum": -statistics.mean(sum(row) for row in tokens),
    }
    assert method.loss(logp_RT, batch).loss.item() == pytest.approx(losses[reduction], rel=1e-5)
    assert len({round(x, 4) for x in losses.values()}) == 3


def test_a_chained_row_has_the_log_probs_of_its_whole_text(policy: TransformersPolicy) -> None:
    """The slow definition: one pass over prompt, marker, reply, marker, reply; the second reply's tokens are last."""
    example = CoH(CoHSettings(forms=("good-bad",))).examples(TrainInputs([PAIR]))[1]
    tokenization = policy.tokenization
    logp_T = policy.token_logprobs(tokenization.batch([(example.prompt, example.responses[0])]))[0]
    text = tokenization.tokenizer(X + GOOD + " Hello." + BAD)["input_ids"]
    ids = text + list(tokenization.response_ids(" No.", ended=True))
    logp_LV = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logp_LV[t - 1, ids[t]] for t in range(len(text), len(ids))]
    torch.testing.assert_close(logp_T, torch.stack(expected), rtol=0, atol=1e-5)


def test_the_trained_policy_is_prompted_with_the_marker_and_compared_with_the_initial_one_without(
    policy: TransformersPolicy,
) -> None:
    cued = policy.with_cue(CoHSettings().cue)
    marked = policy.tokenization.prompt_ids(Prompt(X + GOOD))
    assert cued.tokenization.prompt_ids(PAIR.prompt) == marked != policy.tokenization.prompt_ids(PAIR.prompt)
    assert policy.with_cue(CoHSettings(prompted="none").cue) is policy
    reply = Response(" No.", "model", "eos", policy.tokenization.response_ids(" No.", ended=True))
    (found,) = stage_helpers.log_ratios(cued, policy, [(PAIR.prompt, reply)], 1.0, 8)
    logp = [
        policy.token_logprobs(policy.tokenization.batch([(prompt, reply)])).sum().item()
        for prompt in (Prompt(X + GOOD), PAIR.prompt)
    ]
    assert found == pytest.approx(logp[0] - logp[1], abs=1e-4)
    assert abs(found) > 1e-2  # the policy heeds the marker, and one prompt for both would give 0


def test_it_learns_which_marker_each_reply_has(policy: TransformersPolicy, tmp_path: Path) -> None:
    settings = CoHSettings(epochs=6, batch_prompts=8, lr=3e-3)
    stage_helpers.trainer(settings, 512).fit(policy, TrainInputs(PAIRS), context(tmp_path))
    batch = policy.tokenization.batch(
        [(Prompt(pair.prompt.text + m), Response(pair.chosen, "chosen")) for pair in PAIRS for m in (GOOD, BAD)]
    )
    good_B, bad_B = policy.token_logprobs(batch).sum(-1).reshape(-1, 2).unbind(1)
    assert (good_B > bad_B).all()


def test_templates_and_keys_that_lose_the_markers_are_refused(tokenizer: Any, policy: TransformersPolicy) -> None:
    method = CoH(CoHSettings())
    for template in (Template("chat"), Template("hh", GOOD)):
        with pytest.raises(DataError, match="coh: "):
            method.examples(TrainInputs(PAIRS, tokenization=Tokenization(tokenizer, template, "test")))
    method.examples(TrainInputs(PAIRS, tokenization=policy.tokenization))
    for keys in ({"good": BAD}, {"good": "A helpful answer:"}, {"bad": " A bad answer"}, {"forms": []}):
        with pytest.raises(ValidationError):
            CoHSettings.model_validate(keys)


def test_a_tokenizer_that_splits_its_markers_is_refused() -> None:
    """One knows no word of them; one joins the prompt's end with the marker's beginning."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "Human": 3, ":": 4, "Assistant": 5, "A": 6}
    unknowing = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    unknowing.pre_tokenizer = pre_tokenizers.Whitespace()
    joined = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "whole text": 2, "<unk>": 3}, unk_token="<unk>"))
    for core in (unknowing, joined):
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        tokenization = Tokenization(PreTrainedTokenizerFast(tokenizer_object=core, **special), Template(), "test")
        with pytest.raises(DataError, match="marker"):
            CoH(CoHSettings()).examples(TrainInputs(PAIRS, tokenization=tokenization))


def test_an_experiment_evaluates_the_policy_behind_the_marker(tmp_path: Path) -> None:
    file, row = tmp_path / "coh.toml", '[methods.row]\nkind = "rrhf"\ncandidates = { rounds = 10 }\n'
    assert row in EXPERIMENT
    file.write_text(EXPERIMENT.replace(row, '[methods.row]\nkind = "coh"\n'))
    plan = make_plan(load_experiment(file))
    (wanted,) = [stage for stage in plan.wanted if stage.name.startswith("evaluate row")]
    store = Store(tmp_path / "store")
    run_plan(Plan(plan.experiment, plan.backend, (wanted,)), store, Counting(WeakSet()))
    ref = ModelRef.read(store.folder(wanted.inputs["trained"].key))
    assert ref.cue == GOOD
    services = Services(RuntimeSettings(device="cpu"))
    plain = services.policy(replace(ref, cue=""))
    spec = SamplingSpec(1, 0.0, 4, seed=0, purpose="test", stop=("Human:", "Assistant:"))
    records = read_jsonl(store.folder(wanted.key) / "evaluated.jsonl", Evaluated)
    marked = [Prompt(record.prompt.text + GOOD) for record in records]
    rows = services.sampler(plain, ref, "transformers").sample(marked, spec)
    assert [record.response for record in records] == [group.responses[0].text for group in rows]
