"""What stages share: no text goes beyond a model's context (GPT-2, whose positions are a table, would fail at the first
that does), and no policy samples through another's tokenizer."""

from __future__ import annotations

import json
import locale
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines.sft_settings import SFTSettings
from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.pipeline.stage_context import Job
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Preference, Prompt, Response
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.training.method import TrainContext, TrainInputs
from rrhf_bench.training.rrhf_settings import RRHFSettings

CONTEXT = 64
QUESTION = Prompt("\n\nHuman: How do I bake bread?\n\nAssistant:")
PAIRS = [
    Preference(QUESTION, " First, mix the flour and the water." * 8, " Then let it rest."),
    Preference(
        Prompt("\n\nHuman: What is a glacier?\n\nAssistant:"), " A slow river of ice.", " I hope this helps!" * 9
    ),
]


@pytest.fixture
def gpt2(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=64, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TransformersPolicy(GPT2LMHeadModel(config), Tokenization(tokenizer, Template(), "here"))


def test_an_artifact_is_utf8_whatever_the_locale(tmp_path) -> None:
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        job = Job(
            "data", {}, {"own": tmp_path}, tmp_path, Services(RuntimeSettings()), "transformers", lambda i, n: None
        )
        job.write_json("a.json", "é")
        assert job.read_json("own", "a.json") == "é"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (tmp_path / "a.json").read_bytes() == '"é"'.encode()


def context_of_training(tmp_path) -> TrainContext:
    return TrainContext(
        seed=0,
        sampler=None,
        reward=None,
        reference=None,
        watch=lambda progress, policy: None,
        log=lambda line: None,
        max_new_tokens=8,
        stop=(),
    )


@pytest.mark.parametrize("max_length", [None, CONTEXT, 10 * CONTEXT])
def test_training_cuts_replies_at_the_context_and_counts_them(gpt2, tmp_path, max_length):
    trainer = stage_helpers.trainer(SFTSettings(epochs=1, max_length=max_length), CONTEXT)
    result = trainer.fit(gpt2, TrainInputs(preferences=PAIRS), context_of_training(tmp_path))
    assert result.counts["responses_truncated"] == 1


def test_a_shorter_max_length_holds(gpt2, tmp_path):
    trainer = stage_helpers.trainer(SFTSettings(epochs=1, max_length=12), CONTEXT)
    with pytest.raises(DataError, match="max_length 12: none of 2 prompts leaves room"):
        trainer.fit(gpt2, TrainInputs(preferences=PAIRS), context_of_training(tmp_path))


def test_what_a_method_is_asked_for_is_not_changed():
    settings = RRHFSettings()
    stage_helpers.trainer(settings, CONTEXT)
    assert settings.max_length is None


def test_judging_shortens_the_prompt_and_keeps_the_reply(gpt2):
    reply = Response(" First, mix the flour.", "chosen")
    ids = gpt2.tokenization.response_ids(reply.text, ended=True)
    long = Prompt(QUESTION.text.replace("bread", "bread " * 80))
    (_, tokens), (_, again) = stage_helpers.reply_nll(gpt2, [(QUESTION, reply), (long, reply)], 2)
    assert tokens == again == len(ids)
    scored = stage_helpers.score_pairs_by_likelihood("row", 0, gpt2, PAIRS, 2)
    assert all(pair.chosen < 0 and pair.rejected < 0 for pair in scored)


def test_a_reply_that_was_cut_before_it_said_anything_has_no_likelihood(gpt2):
    said = (QUESTION, Response(" Then let it rest.", "model", "length"))
    found = stage_helpers.reply_nll(gpt2, [(QUESTION, Response("", "model", "length")), said], batch=8)
    assert found == [(0.0, 0), *stage_helpers.reply_nll(gpt2, [said], batch=8)]
    assert found[1][0] > 0


@pytest.fixture
def other_vocabulary(llama_folder, tmp_path: Path) -> Path:
    """The folder of a policy in which two tokens have each other's id."""
    folder = tmp_path / "other"
    shutil.copytree(llama_folder(1), folder)
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = text["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    (folder / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    return folder


def test_policies_of_one_shape_with_other_tokenizers_do_not_share_an_engine(llama_folder, other_vocabulary) -> None:
    """An engine decodes with the tokenizer that it was started with: sharing it would garble the other's text."""
    services = Services(RuntimeSettings(device="cpu"))
    refs = [ModelRef(str(folder)) for folder in (llama_folder(0), llama_folder(1), other_vocabulary)]
    one, same, other = (services.sampler(services.policy(ref), ref, "transformers") for ref in refs)
    assert one.engine is same.engine
    assert other.engine is not one.engine
    for one_of_two, letter in (one, "A"), (other, "B"):
        assert one_of_two.tokenization.decode([one.tokenization.tokenizer.get_vocab()["A"]]) == letter


@pytest.mark.parametrize(
    ("drawn", "initial", "estimated"),
    [
        ({}, "same vocabulary", True),
        ({"temperature": 0.7}, "same vocabulary", True),
        ({"temperature": 0.0}, "same vocabulary", False),
        ({"top_k": 5}, "same vocabulary", False),
        ({"top_p": 0.9}, "same vocabulary", False),
        ({}, "other vocabulary", False),
        ({}, None, False),
    ],
)
def test_a_kl_is_estimated_from_draws_of_the_policy_alone(
    llama_folder, other_vocabulary, drawn, initial, estimated
) -> None:
    services = Services(RuntimeSettings(device="cpu"))
    ref = ModelRef(str(llama_folder(0)))
    policy = services.policy(ref)
    folders = {"same vocabulary": llama_folder(1), "other vocabulary": other_vocabulary}
    reference = None if initial is None else services.fixed_policy(ModelRef(str(folders[initial])))
    spec = SamplingSpec(**{"n": 1, "temperature": 1.0, "max_new_tokens": 6, "seed": 0, "purpose": "test", **drawn})
    sampler = services.sampler(policy, ref, "transformers")
    prompts = [QUESTION, PAIRS[1].prompt]
    records = stage_helpers.evaluate(
        "row", 0, sampler, prompts, stage_helpers.Judges(Length()), {"sample": spec}, policy, reference
    )
    assert [record.kl is not None for record in records] == [estimated] * 2


class Length:
    """A reward model that pays for characters."""

    identity = "length"

    def score(self, prompts, responses):
        return np.array([float(len(response)) for response in responses])
