"""Text to ids and back: a reply is written as it would be sampled, whatever a tokenizer does at the start of a text."""

from __future__ import annotations

import json

import pytest
from conftest import TEXTS, make_tokenizer

from rrhf_bench.data.dialogue import Template
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Prompt
from rrhf_bench.sampling.sampler import SamplingSpec, to_response

REPLIES = (" First, mix the flour.", "No space before it.", " :) smile", "(well)", "  two", "\n\nlines", "")


def sentencepiece_like():
    """As LLaMA's: a space before any text, none at the start of what is decoded, spaces kept as marks in the tokens.
    A character without a token of its own is written with a token for each of its bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence(list(parts))
    letters = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    words = [word for text in TEXTS for word in text.split(" ")]
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        words * 20, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters)
    )
    written = json.loads(core.to_str())
    written["model"]["byte_fallback"] = True
    for byte in range(256):
        written["model"]["vocab"][f"<0x{byte:02X}>"] = len(written["model"]["vocab"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )


def llama_class(folder):
    """The same vocabulary in a folder whose tokenizer class is LLaMA's, which transformers builds in its own way."""
    from transformers import AutoTokenizer

    sentencepiece_like().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["byte-level", "sentencepiece-like", "llama"])
def tokenization(request, tokenizer, tmp_path):
    made = {"byte-level": lambda: tokenizer, "sentencepiece-like": sentencepiece_like}
    made["llama"] = lambda: llama_class(tmp_path)
    return Tokenization(made[request.param](), Template(), "here")


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_comes_back_as_it_was(tokenization, reply):
    assert tokenization.decode(tokenization.response_ids(reply, ended=True)) == reply


def test_a_reply_has_the_tokens_that_it_has_after_its_prompt(tokenization):
    prompt, reply = "\n\nHuman: How do I bake bread?\n\nAssistant:", " First, mix the flour."
    whole = tokenization.tokenizer(prompt + reply, add_special_tokens=False)["input_ids"]
    ids = tokenization.response_ids(reply, ended=False)
    assert tuple(whole[-len(ids) :]) == ids
    assert tokenization.decode(whole[-len(ids) :]) == reply


@pytest.mark.parametrize("make", [sentencepiece_like, llama_class], ids=["sentencepiece-like", "llama"])
@pytest.mark.parametrize(
    ("kind", "prompt", "reply"),
    [
        ("chat", "\n\nHuman: How do I bake bread?\n\nAssistant:", " First, mix the flour."),
        ("raw", "How do I bake", " bread and mix the flour."),
        ("raw", "How do I bake bread", "? First, mix the flour."),
    ],
)
def test_a_sampled_reply_follows_any_prompt_as_its_text_does(make, kind, prompt, reply, tmp_path):
    """Training reads the sampled ids, also if the tokenizer puts a space before every text and removes one."""
    tokenizer = make(tmp_path) if make is llama_class else make()
    tokenizer.chat_template = ZEPHYR
    tokenization = Tokenization(tokenizer, Template(kind), "here")
    text, add_special_tokens = tokenization.template.render_prompt(Prompt(prompt), tokenizer)
    text += tokenization.template.render_response(reply)
    prompt_ids = tokenization.prompt_ids(Prompt(prompt))
    ids = tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    assert ids[: len(prompt_ids)] == prompt_ids
    sampled = ids[len(prompt_ids) :]
    spec = SamplingSpec(n=1, temperature=1.0, max_new_tokens=99, seed=0, purpose="test")
    assert to_response(tokenization, spec, sampled, None).text == reply
    assert tokenization.response_ids(reply, ended=False) == sampled


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str = CHATML):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_model_is_trained_to_end_its_turn_and_may_end_by_any_of_its_ends():
    """The tokenizer's end of text is <eos>; the template ends a turn with <|im_end|>, and the model lists a third."""
    tokenizer = chat_tokenizer()
    turn, third = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    chat = Tokenization(tokenizer, Template("chat"), "here", (tokenizer.eos_token_id, third))
    assert chat.end_ids == (turn, tokenizer.eos_token_id, third)
    assert chat.response_ids(" Mix it.", ended=True)[-1] == turn
    transcript = Tokenization(tokenizer, Template(), "here", (third,))
    assert transcript.end_ids == (tokenizer.eos_token_id, third)
    spec = SamplingSpec(n=1, temperature=1.0, max_new_tokens=9, seed=0, purpose="test")
    words = chat.response_ids(" Mix it.", ended=False)
    for end in chat.end_ids:
        reply = to_response(chat, spec, (*words, end), None)
        assert (reply.finish, reply.text) == ("eos", " Mix it.")
    assert to_response(transcript, spec, (*words, turn), None).finish == "length"


def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer):
    tokenization = Tokenization(tokenizer, Template(), "here")
    end, pad = tokenization.eos_id, tokenizer.pad_token_id
    for text in (" Mix flour.<eos>", "<eos> Mix", f" Mix {tokenizer.pad_token} it"):
        ids = tokenization.response_ids(text, ended=True)
        assert (ids.count(end), ids[-1]) == (1, end)
        assert pad not in ids[:-1]
        assert tokenization.decode(ids) == text
        assert tokenization.names_special_token(text)
        assert end not in tokenization.prompt_ids(Prompt(f"\n\nHuman: {text}\n\nAssistant:"))
    assert not tokenization.names_special_token(" Mix <eo s>.")


@pytest.mark.parametrize("before", [" mix ", " mix 好", " \N{GRINNING FACE}好"])
@pytest.mark.parametrize(("character", "missing"), [("好", 1), ("好", 2), ("\N{GRINNING FACE}", 3)])
def test_a_reply_that_the_cap_cuts_within_a_character_is_the_text_before_it(tokenization, before, character, missing):
    spec = SamplingSpec(n=1, temperature=1.0, max_new_tokens=9, seed=0, purpose="test")
    ids = tokenization.response_ids(before + character, ended=False)
    assert to_response(tokenization, spec, ids, None).text == before + character
    cut = to_response(tokenization, spec, ids[:-missing], None)
    assert (cut.text, cut.token_ids, cut.finish) == (before, ids[:-missing], "length")
    kept = tokenization.response_ids(cut.text, ended=False)
    assert ids[: len(kept)] == kept  # what is trained was sampled


def test_bytes_that_are_no_character_are_kept_as_sampled(tokenization):
    """Four bytes that begin no character are no cut character: they lose one mark at the end, as a cut one would."""
    tokens = tokenization.tokenizer.get_vocab()
    byte = tokens.get("<0xFF>", tokens.get("ÿ"))
    spec = SamplingSpec(n=1, temperature=1.0, max_new_tokens=9, seed=0, purpose="test")
    ids = (*tokenization.response_ids(" mix", ended=False), *[byte] * 5)
    assert to_response(tokenization, spec, ids, None).text == " mix" + 4 * "\ufffd"
    padding = max(tokens.values()) + 1  # a model's vocabulary may be larger than its tokenizer's
    assert to_response(tokenization, spec, (*ids, padding), None).text == " mix" + 4 * "\ufffd"


def test_a_chat_template_that_writes_the_date_gives_the_same_tokens_every_day():
    dated = "{{ strftime_now('%d %b %Y') }} " + CHATML
    tokenization = Tokenization(chat_tokenizer(dated), Template("chat"), "here")
    text = tokenization.tokenizer.decode(tokenization.prompt_ids(Prompt("\n\nHuman: Hi\n\nAssistant:")))
    assert text.startswith("26 Jul 2024 <|im_start|>")
