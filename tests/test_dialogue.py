"""Transcripts, prompts, stop strings and chat templates are read and written as HH does."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rrhf_bench.data.dialogue import (
    RefusedDialogue,
    Template,
    Turn,
    as_prompt,
    as_reply,
    cut_at_stop,
    prompt_of,
    prompt_of_messages,
    repair_transcript,
    transcript_of,
    turns,
    turns_of_messages,
)
from rrhf_bench.errors import DataError
from rrhf_bench.records import Prompt

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"</s>": 0}, unk_token="</s>")))


def test_a_transcript_splits_into_turns() -> None:
    text = "\n\nHuman: Hi\n\nthere\n\nAssistant: Human: no marker\n\nAssistant:  two in a row\n\nHuman:"
    assert turns(text) == (
        Turn("user", " Hi\n\nthere"),
        Turn("assistant", " Human: no marker"),
        Turn("assistant", "  two in a row"),
        Turn("user", ""),
    )
    assert turns(text.lstrip("\n")) == turns(text)


@pytest.mark.parametrize("text", ["Hello", "", "User: Hi\n\nAssistant: Ho"])
def test_text_without_a_first_marker_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"row 3: found .*starts with 'Human:'"):
        turns(text, "row 3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        ("Human: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("  What is bread?\n", "\n\nHuman: What is bread?\n\nAssistant:"),
        ("\r\n\r\nHuman: Hi\r\n\r\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        (" \t\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        ("\ufeffHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        ("Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),  # begins in the middle of a Human turn
        ("System: Be brief.\n\nHuman: Hi", "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: a\r\nb", "\n\nHuman: a\r\nb\n\nAssistant:"),  # no marker after CRLF: text like any other
    ],
)
def test_a_text_becomes_a_prompt(text: str, expected: str) -> None:
    assert as_prompt(text) == Prompt(expected)
    assert as_prompt(expected).text == expected  # a prompt stays what it is


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n", "the prompt is empty"),
        ("\n\nHuman: Hi\n\nAssistant: Ho", "finished assistant turn"),
        ("A talk.\n\nHuman: Hi\n\nAssistant:", "before the first 'Human:'"),
        ("Human: Hi\nAssistant:", "without a blank line"),
        ("Human: Hi\nAssistant: Ho\nHuman: Go", "without a blank line"),
        ("Hi\nAssistant:", "without a blank line"),
        ("System: Be brief.", "System turn alone"),
    ],
)
def test_a_text_that_is_no_prompt_is_refused_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"p.jsonl:7: .*{reason}"):
        as_prompt(text, "p.jsonl:7")


WHOLE = "\n\nHuman: How do I bake bread?\n\nAssistant: First, mix the flour.\n\nHuman: And then?\n\nAssistant:"


@pytest.mark.parametrize(
    ("cut", "first"),
    [
        (9, "Human: How do I bake bread?"),
        (24, "Human: read?"),
        (44, "Assistant: rst, mix the flour."),
        (60, "Assistant: ur."),
    ],
)
def test_a_dialogue_cut_on_the_left_begins_with_the_rest_of_its_turn(cut: int, first: str) -> None:
    text = as_prompt(WHOLE[cut:], cut_on_the_left=True).text
    assert text.startswith(f"\n\n{first}\n\n")
    assert text.endswith(WHOLE[cut:].lstrip().split("\n\n", 1)[1])
    roles = [turn.role for turn in turns(text)]
    assert all(one != other for one, other in pairwise(roles))


@given(st.integers(0, len(WHOLE) - len("And then?\n\nAssistant:") - 1))
def test_no_cut_repeats_a_marker(cut: int) -> None:
    text = as_prompt(WHOLE[cut:], cut_on_the_left=True).text
    assert text.count("Assistant:") <= 2
    assert text.endswith(" And then?\n\nAssistant:")
    assert as_prompt(text) == Prompt(text)


def test_only_the_first_turn_is_a_system_turn() -> None:
    text = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nSystem: x\n\nAssistant:"
    assert turns(text) == (
        Turn("system", " Be brief."),
        Turn("user", " Hi\n\nSystem: x"),
        Turn("assistant", ""),
    )
    assert transcript_of(turns(text)) == text


def test_repair_leaves_a_readable_transcript_as_it_is() -> None:
    for text in ("What?\r\nThat.", " What?", "Human: Hi", "\n\n\nHuman: a\r\n"):
        assert repair_transcript(text) == text


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_messages_become_a_transcript() -> None:
    messages = [
        message("system", "Be brief.\n"),
        message("user", " Hi "),
        message("assistant", "Ho"),
        message("user", "Go"),
    ]
    text = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Go\n\nAssistant:"
    assert prompt_of_messages(messages) == Prompt(text)
    assert turns_of_messages([*messages, message("assistant", "\nNo. \n")], "x")[-1] == Turn("assistant", " \nNo. \n")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([message("user", "a"), message("system", "b"), message("user", "c")], r"x\[1\]: found a system message"),
        ([message("user", "a\n\nAssistant: b"), message("user", "c")], r"x\[0\]: the content contains"),
        ([message("user", "a"), message("assistant", "b")], "the last message is the assistant's"),
        ([message("system", "a")], "the last message is the system's"),
        ([message("user", " \n")], "the last message is empty"),
    ],
)
def test_messages_without_a_question_or_with_a_marker_are_refused(messages: list[dict[str, str]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        prompt_of_messages(messages, "x")


def test_a_reply_begins_with_white_space() -> None:
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
def test_a_reply_ends_at_the_first_stop_string(text: str, expected: tuple[str, bool]) -> None:
    assert cut_at_stop(text) == expected


def test_the_hh_template_is_the_transcript(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt("\n\nHuman: Hi\n\nAssistant:")
    assert Template("hh").render_prompt(prompt, tokenizer) == (prompt.text, True)
    assert Template("hh").render_response(" Ho") == " Ho"
    assert Template("hh").read_response(" Ho") == " Ho"


def test_a_chat_template_renders_the_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    prompt = prompt_of([Turn("user", " Hi "), Turn("assistant", " Ho"), Turn("user", " Go\n\non")])
    text, add_special_tokens = Template("chat").render_prompt(prompt, tokenizer)
    assert text == "<user>Hi</s><assistant>Ho</s><user>Go\n\non</s><assistant>"
    assert not add_special_tokens  # the template has written them
    assert Template("chat").render_response(" Ho") == "Ho"
    assert Template("chat").read_response("Ho") == " Ho"


def test_a_missing_chat_template_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        Template("chat").render_prompt(Prompt("\n\nHuman: Hi\n\nAssistant:"), tokenizer)


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: Hi\n\nAssistant: Ho\n\nAssistant: Still there?\n\nHuman: Yes\n\nAssistant:",
        "\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant:",
        "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:",
        "\n\nAssistant:",
    ],
)
def test_a_dialogue_that_the_chat_template_refuses_is_named(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(RefusedDialogue, match=f"prompt {Prompt(text).id}: .*refuses the dialogue"):
        Template("chat").render_prompt(Prompt(text), tokenizer)
    assert Template("hh").render_prompt(Prompt(text), tokenizer)[0] == text


def test_a_system_message_is_rendered_or_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt("\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:")
    tokenizer.chat_template = CHAT_TEMPLATE
    assert Template("chat").render_prompt(prompt, tokenizer)[0] == "<system>Be brief.</s><user>Hi</s><assistant>"
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with pytest.raises(RefusedDialogue, match="leaves the system message out"):
        Template("chat").render_prompt(prompt, tokenizer)
