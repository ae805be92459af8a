"""HH transcripts, prompts, stop strings and chat templates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rrhf_bench.data.dialogue import (
    Template,
    Turn,
    as_prompt,
    as_reply,
    cut_at_stop,
    prompt_of,
    split_transcript,
    transcript_of,
    turns,
)
from rrhf_bench.errors import DataError
from rrhf_bench.records import Prompt

# Blank lines inside turns and the words of the markers without their blank lines are text like any other.
LINES = st.text(st.sampled_from("ab ,é’:"), max_size=6) | st.sampled_from(["Human:", "Assistant", "so Assistant: x"])
TEXTS = st.lists(LINES, min_size=1, max_size=3).map("\n".join) | LINES.map(lambda line: " x\n\n" + line + "y")
DIALOGUES = st.lists(
    st.builds(Turn, st.sampled_from(["user", "assistant"]), TEXTS.filter(lambda text: "\n\nHuman:" not in text)),
    min_size=1,
    max_size=5,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"</s>": 0}, unk_token="</s>")))


@given(DIALOGUES)
def test_turns_and_transcript_are_inverse(dialogue: list[Turn]) -> None:
    assert turns(transcript_of(dialogue)) == tuple(dialogue)


@given(DIALOGUES)
def test_a_transcript_is_its_prompt_and_its_last_reply(dialogue: list[Turn]) -> None:
    transcript = transcript_of(dialogue)
    if dialogue[-1].role == "user":
        with pytest.raises(DataError, match="here: ends with a Human turn"):
            split_transcript(transcript, "here")
    else:
        prompt, reply = split_transcript(transcript)
        assert prompt.text + reply == transcript
        assert reply == dialogue[-1].text


def test_turns_of_a_hand_written_transcript() -> None:
    text = "\n\nHuman: Hi\n\nthere\n\nAssistant: Human: no marker\n\nAssistant:  two in a row\n\nHuman:"
    assert turns(text) == (
        Turn("user", " Hi\n\nthere"),
        Turn("assistant", " Human: no marker"),
        Turn("assistant", "  two in a row"),
        Turn("user", ""),
    )
    assert turns(text.lstrip("\n")) == turns(text)


@pytest.mark.parametrize("text", ["Hello", "", "User: Hi\n\nAssistant: Ho"])
def test_what_is_no_transcript_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"row 3: found .*starts with 'Human:'"):
        turns(text, "row 3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        ("Human: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("  What is bread?\n", "\n\nHuman: What is bread?\n\nAssistant:"),
    ],
)
def test_as_prompt(text: str, expected: str) -> None:
    assert as_prompt(text) == Prompt(expected)
    assert as_prompt(expected).text == expected  # a prompt stays what it is


@pytest.mark.parametrize(
    ("text", "reason"), [(" \n", "the prompt is empty"), ("\n\nHuman: Hi\n\nAssistant: Ho", "finished assistant turn")]
)
def test_as_prompt_refuses(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"p.jsonl:7: .*{reason}"):
        as_prompt(text, "p.jsonl:7")


def test_as_reply_adds_one_space_where_there_is_none() -> None:
    assert [as_reply(text) for text in ("yes", " yes", "\nyes", "")] == [" yes", " yes", "\nyes", " "]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Sure.\n\nHuman: and?", (" Sure.", True)),
        (" SureAssistant: oh", (" Sure", True)),
        (" Ask a human: they know", (" Ask a human: they know", False)),
        ("Human:", ("", True)),
        (" a Assistant: b Human: c", (" a", True)),  # the earlier stop string, whichever comes first in the list
        (" keeps its end \n", (" keeps its end \n", False)),
    ],
)
def test_cut_at_stop(text: str, expected: tuple[str, bool]) -> None:
    assert cut_at_stop(text) == expected


@given(st.lists(st.sampled_from(["Human:", "Assistant:", "Hum", "an:", " ", "\n", "x"]), max_size=8).map("".join))
def test_a_cut_text_has_no_stop_string_and_is_its_beginning(text: str) -> None:
    kept, cut = cut_at_stop(text)
    assert "Human:" not in kept
    assert "Assistant:" not in kept
    assert text.startswith(kept)
    assert cut == (kept != text)
    assert cut_at_stop(kept) == (kept, False)


def test_hh_template_is_the_transcript_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt("\n\nHuman: Hi\n\nAssistant:")
    assert Template("hh").render_prompt(prompt, tokenizer) == (prompt.text, True)
    assert Template("hh").render_response(" Ho") == " Ho"
    assert Template("hh").read_response(" Ho") == " Ho"


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    prompt = prompt_of([Turn("user", " Hi "), Turn("assistant", " Ho"), Turn("user", " Go\n\non")])
    text, add_special_tokens = Template("chat").render_prompt(prompt, tokenizer)
    assert text == "<user>Hi</s><assistant>Ho</s><user>Go\n\non</s><assistant>"
    assert not add_special_tokens  # the template has written them
    assert Template("chat").render_response(" Ho") == "Ho"
    assert Template("chat").read_response("Ho") == " Ho"


def test_chat_template_missing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        Template("chat").render_prompt(Prompt("\n\nHuman: Hi\n\nAssistant:"), tokenizer)
