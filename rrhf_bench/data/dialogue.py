"""Dialogues as text: HH transcripts, chat templates, stop strings. The only place where any of them is spelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rrhf_bench.errors import DataError
from rrhf_bench.records import Prompt

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# Without the blank lines: undertrained models write "toAssistant:" as well.
STOP_STRINGS = ("Human:", "Assistant:")

Role = Literal["user", "assistant"]
TemplateKind = Literal["hh", "chat", "raw"]


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str  # as between the markers, its leading space included


def turns(transcript: str, where: str = "transcript") -> tuple[Turn, ...]:
    """The turns of an HH transcript. Raises DataError where it does not start with a Human or Assistant turn."""
    pieces: list[Turn] = []
    rest = "\n\n" + transcript.lstrip("\n")
    if not rest.startswith((HUMAN, ASSISTANT)):
        raise DataError(f"{where}: found {transcript[:40]!r}; expected a transcript that starts with 'Human:'")
    while rest:
        role: Role = "user" if rest.startswith(HUMAN) else "assistant"
        rest = rest[len(HUMAN if role == "user" else ASSISTANT) :]
        ends = [end for end in (rest.find(HUMAN), rest.find(ASSISTANT)) if end >= 0]
        end = min(ends, default=len(rest))
        pieces.append(Turn(role, rest[:end]))
        rest = rest[end:]
    return tuple(pieces)


def transcript_of(dialogue: Sequence[Turn]) -> str:
    """The HH transcript of some turns; the inverse of ``turns``."""
    return "".join((HUMAN if turn.role == "user" else ASSISTANT) + turn.text for turn in dialogue)


def split_transcript(transcript: str, where: str = "transcript") -> tuple[Prompt, str]:
    """(prompt up to the last ``Assistant:``, last reply). Raises DataError unless the last turn is the assistant's."""
    dialogue = turns(transcript, where)
    if dialogue[-1].role != "assistant":
        raise DataError(f"{where}: ends with a Human turn; expected the last turn to be the assistant's")
    return prompt_of(dialogue[:-1]), dialogue[-1].text


def prompt_of(dialogue: Sequence[Turn]) -> Prompt:
    """The prompt that asks for the assistant's next turn."""
    return Prompt(transcript_of(dialogue) + ASSISTANT)


def as_prompt(text: str, where: str = "prompt") -> Prompt:
    """A prompt from a user's text: a transcript that ends with ``Assistant:``, or a bare question, which becomes one.

    Raises DataError for a transcript whose last turn is neither open nor the Human's.
    """
    if not text.strip():
        raise DataError(f"{where}: the prompt is empty; expected a question or a transcript ending with 'Assistant:'")
    if not text.lstrip("\n").startswith(("Human:", "Assistant:")):
        return prompt_of([Turn("user", " " + text.strip())])
    dialogue = turns(text.rstrip(), where)
    if dialogue[-1].role == "user":
        return prompt_of(dialogue)
    if dialogue[-1].text:
        raise DataError(f"{where}: ends with a finished assistant turn; expected it to end with 'Assistant:'")
    return prompt_of(dialogue[:-1])


def as_reply(text: str) -> str:
    """A reply from a user's file with the one leading space that a transcript has after ``Assistant:``."""
    return text if text[:1].isspace() else " " + text


def cut_at_stop(text: str, stops: Sequence[str] = STOP_STRINGS) -> tuple[str, bool]:
    """(the text before the first stop string, whether there was one); white space before the cut goes with it."""
    ends = [end for end in map(text.find, stops) if end >= 0]
    return (text[: min(ends)].rstrip(), True) if ends else (text, False)


@dataclass(frozen=True, slots=True)
class Template:
    """How a model wants a dialogue: ``hh`` as the transcript itself, ``chat`` through its tokenizer's chat template.

    ``raw`` knows of no dialogue: a prompt is whatever text it is, such as a review's beginning, its ids are those that
    ``tokenizer(text)`` gives, and a reply is what goes on from there, read as it was generated.
    """

    kind: TemplateKind = "hh"

    def render_prompt(self, prompt: Prompt, tokenizer: Any) -> tuple[str, bool]:
        """(text, whether the tokenizer is still to add special tokens). Raises DataError without a chat template."""
        if self.kind != "chat":
            return prompt.text, True
        if tokenizer.chat_template is None:
            raise DataError("template 'chat': this tokenizer has no chat template; use template = \"hh\"")
        messages = [{"role": t.role, "content": t.text.strip()} for t in turns(prompt.text)[:-1]]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), False

    def render_response(self, text: str) -> str:
        """What the model is to write: after a chat template's header there is no leading space."""
        return text.removeprefix(" ") if self.kind == "chat" else text

    def read_response(self, text: str) -> str:
        """Sampled text as a Response holds it; the inverse of ``render_response``."""
        return " " + text if self.kind == "chat" else text
