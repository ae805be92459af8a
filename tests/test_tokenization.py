"""Text to ids and back: a reply is written as it would be sampled, whatever a tokenizer does at the start of a text."""

from __future__ import annotations

import pytest
from conftest import TEXTS

from rrhf_bench.data.dialogue import Template
from rrhf_bench.policy.policy import Tokenization

REPLIES = (" First, mix the flour.", "No space before it.", " :) smile", "(well)", "  two", "\n\nlines", "")


def sentencepiece_like():
    """As LLaMA's: a space before any text, none at the start of what is decoded, spaces kept as marks in the tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    words = [word for text in TEXTS for word in text.split(" ")]
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        words * 20, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@pytest.fixture(params=["byte-level", "sentencepiece-like"])
def tokenization(request, tokenizer):
    return Tokenization(tokenizer if request.param == "byte-level" else sentencepiece_like(), Template(), "here")


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_comes_back_as_it_was(tokenization, reply):
    assert tokenization.decode(tokenization.response_ids(reply, ended=True)) == reply


def test_a_reply_has_the_tokens_that_it_has_after_its_prompt(tokenization):
    prompt, reply = "\n\nHuman: How do I bake bread?\n\nAssistant:", " First, mix the flour."
    whole = tokenization.tokenizer(prompt + reply, add_special_tokens=False)["input_ids"]
    ids = tokenization.response_ids(reply, ended=False)
    assert tuple(whole[-len(ids) :]) == ids
    assert tokenization.decode(whole[-len(ids) :]) == reply
