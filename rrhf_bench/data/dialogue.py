"""Define dialogues as text: HH transcripts, lists of messages, chat templates and stop strings, each only here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, get_args

from rrhf_bench.errors import DataError
from rrhf_bench.records import STOP_STRINGS, Prompt

SYSTEM = "\n\nSystem:"
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# The day that chat templates with a date are rendered on: the one that Llama 3's template falls back to.
TEMPLATE_DATE = date(2024, 7, 26)

Role = Literal["system", "user", "assistant"]
TemplateKind = Literal["hh", "chat", "raw"]

_MARKERS: dict[Role, str] = {"system": SYSTEM, "user": HUMAN, "assistant": ASSISTANT}
_WORDS = ("Human:", "Assistant:", "System:")
_BEFORE = " \t\r\n\ufeff"  # what may stand before the first marker of a transcript: white space, a byte order mark
_MARKER_AFTER_CR = re.compile(r"\r\n(?:Human|Assistant|System):")
_MARKER_ON_A_LINE = re.compile(r"^(?:Human|Assistant):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str  # as between the markers, its leading space included


class RefusedDialogue(DataError):
    """A dialogue that the chat template of a tokenizer does not render."""


def turns(transcript: str, where: str = "transcript") -> tuple[Turn, ...]:
    """Return the turns of an HH transcript.

    A ``System:`` marker starts a turn only at the beginning of the transcript, and is text like any other after it.
    Raises DataError if the transcript does not start with a marker.
    """
    pieces: list[Turn] = []
    rest = "\n\n" + transcript.lstrip("\n")
    if not rest.startswith(tuple(_MARKERS.values())):
        raise DataError(f"{where}: found {transcript[:40]!r}; expected a transcript that starts with 'Human:'")
    while rest:
        role, marker = next((role, marker) for role, marker in _MARKERS.items() if rest.startswith(marker))
        rest = rest[len(marker) :]
        ends = [end for end in (rest.find(HUMAN), rest.find(ASSISTANT)) if end >= 0]
        end = min(ends, default=len(rest))
        pieces.append(Turn(role, rest[:end]))
        rest = rest[end:]
    return tuple(pieces)


def transcript_of(dialogue: Sequence[Turn]) -> str:
    """Return the HH transcript of some turns; the inverse of ``turns``."""
    return "".join(_MARKERS[turn.role] + turn.text for turn in dialogue)


def prompt_of(dialogue: Sequence[Turn]) -> Prompt:
    """Return the prompt that asks for the assistant's next turn."""
    return Prompt(transcript_of(dialogue) + ASSISTANT)


def repair_transcript(text: str) -> str:
    """Return a transcript with the line ends and the beginning that ``turns`` expects; any other text is unchanged.

    CRLF becomes LF throughout the text if a marker follows a CRLF. White space and a byte order mark before the first
    marker are removed.
    """
    if _MARKER_AFTER_CR.search(text):
        text = text.replace("\r\n", "\n")
    start = text.lstrip(_BEFORE)
    before = text[: len(text) - len(start)]
    return "\n\n" + start if start.startswith(_WORDS) and before.strip("\n") else text


def as_prompt(text: str, where: str = "prompt", *, cut_on_the_left: bool = False) -> Prompt:
    """Return the prompt that a user's text means.

    The text is a transcript that ends with ``Assistant:`` or a Human turn, or a bare question. Text before a first
    ``Assistant:`` marker is a Human turn. Text before a first ``Human:`` marker is the end of an assistant turn if
    ``cut_on_the_left`` says that the beginning of the dialogue may be missing.

    Raises DataError if the dialogue does not wait for the assistant, if text stands before a first ``Human:`` marker
    in a dialogue that is not cut, and if a marker without a blank line before it would become part of a turn.
    """
    if not text.strip(_BEFORE):
        raise DataError(f"{where}: the prompt is empty; expected a question or a transcript ending with 'Assistant:'")
    text = repair_transcript(text)
    if not text.lstrip("\n").startswith(_WORDS):
        text = _with_first_marker(text, where, cut_on_the_left)
    dialogue = turns(text.rstrip(), where)
    last = dialogue[-1]
    if last.role == "assistant":
        if last.text:
            raise DataError(f"{where}: ends with a finished assistant turn; expected it to end with 'Assistant:'")
        return prompt_of(dialogue[:-1])
    if last.role == "system":
        raise DataError(f"{where}: found a System turn alone; expected a Human turn or 'Assistant:' after it")
    if _MARKER_ON_A_LINE.search(last.text) or last.text.endswith("Assistant:"):
        raise DataError(
            f"{where}: found a marker such as 'Assistant:' without a blank line before it; expected blank lines "
            "between turns"
        )
    return prompt_of(dialogue)


def starts_inside_turn(text: str) -> bool:
    """Return True for a text that is neither a bare question nor a transcript from its first marker on."""
    text = repair_transcript(text)
    return not text.lstrip("\n").startswith(_WORDS) and (HUMAN in text or ASSISTANT in text)


def _with_first_marker(text: str, where: str, cut_on_the_left: bool) -> str:
    """Return a text that starts in the middle of a turn, or is a question, with the marker of its first turn."""
    human, assistant = (text.find(marker) for marker in (HUMAN, ASSISTANT))
    if human < 0 or 0 <= assistant < human:
        end = len(text) if assistant < 0 else assistant
        return f"{HUMAN} {text[:end].lstrip(_BEFORE).strip()}{text[end:]}"
    if not cut_on_the_left:
        raise DataError(
            f"{where}: found {text[:40]!r} before the first 'Human:'; expected a transcript that starts with 'Human:', "
            "or with 'System:' if this text is an instruction"
        )
    return f"{ASSISTANT} {text[:human].strip()}{text[human:]}"


def turns_of_messages(messages: Sequence[Mapping[str, Any]], where: str) -> tuple[Turn, ...]:
    """Return the turns of a list of messages ``{"role", "content"}``, the white space around each text removed.

    The last turn keeps its white space if it is the assistant's: a reply is not changed. Raises DataError if a system
    message is not the first, and if a text before the last reply contains a marker that would split it into two turns.
    """
    dialogue: list[Turn] = []
    for i, message in enumerate(messages):
        role, text = message["role"], message["content"]
        reply = role == "assistant" and i == len(messages) - 1
        if role == "system" and i > 0:
            raise DataError(f"{where}[{i}]: found a system message; expected it to be the first message")
        if not reply and any(marker in text.strip() for marker in (HUMAN, ASSISTANT)):
            raise DataError(
                f"{where}[{i}]: the content contains 'Human:' or 'Assistant:' after a blank line, which would start "
                "another turn; expected text without such a line"
            )
        dialogue.append(Turn(role, " " + (text if reply else text.strip())))
    return tuple(dialogue)


def is_message(value: Any) -> bool:
    """Return True for an object with a role that transcripts have and a content that is text."""
    return isinstance(value, Mapping) and value.get("role") in get_args(Role) and isinstance(value.get("content"), str)


def prompt_of_messages(messages: Sequence[Mapping[str, Any]], where: str = "prompt") -> Prompt:
    """Return the prompt of a list of messages. Raises DataError if its last message is not the user's."""
    dialogue = turns_of_messages(messages, where)
    if dialogue[-1].role != "user":
        raise DataError(f"{where}: the last message is the {dialogue[-1].role}'s; expected the user's")
    if not dialogue[-1].text.strip():
        raise DataError(f"{where}: the last message is empty; expected a question")
    return prompt_of(dialogue)


def as_reply(text: str) -> str:
    """Return a reply from a user's file with the one leading space that a transcript has after ``Assistant:``."""
    return text if text[:1].isspace() else " " + text


def cut_at_stop(text: str, stops: Sequence[str] = STOP_STRINGS) -> tuple[str, bool]:
    """Return (the text before the first stop string, True if there was one); the text loses the white space at its end
    if it was cut."""
    ends = [end for end in map(text.find, stops) if end >= 0]
    return (text[: min(ends)].rstrip(), True) if ends else (text, False)


def render_chat(
    dialogue: Sequence[Turn], tokenizer: Any, where: str = "dialogue", *, add_generation_prompt: bool = False
) -> str:
    """Return a dialogue as the tokenizer's chat template writes it, the white space around each text removed.

    Raises RefusedDialogue if the template raises an error, such as "roles must alternate", and if the template leaves
    a system message out.
    """
    messages = [{"role": turn.role, "content": turn.text.strip()} for turn in dialogue]
    # A template that writes the day's date would give a prompt other tokens every day.
    clock = {"strftime_now": TEMPLATE_DATE.strftime} if "strftime_now" in str(tokenizer.chat_template) else {}
    try:
        if not messages:
            raise ValueError("the dialogue has no message before the assistant's reply")
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **clock
        )
    except Exception as error:  # whatever the template's own code raises
        roles = ", ".join(turn.role for turn in dialogue) or "none"
        raise RefusedDialogue(
            f"{where}: the chat template refuses the dialogue ({' '.join(str(error).split())[:200]}); found the roles "
            f'{roles}; change the dialogue, leave it out, or use template = "hh"'
        ) from error
    if messages[0]["role"] == "system" and messages[0]["content"] not in text:
        raise RefusedDialogue(
            f"{where}: the chat template leaves the system message out; remove it, move its text into the first user "
            'message, or use template = "hh"'
        )
    return text


@dataclass(frozen=True, slots=True)
class Template:
    """The text of a dialogue for a model: ``hh`` is the transcript itself, ``chat`` the tokenizer's chat template.

    With ``raw`` a prompt is any text, such as a review's beginning, and a reply is what follows, as it was generated.
    ``cue`` is text behind every prompt that a model was trained to be given, such as a word of praise.
    """

    kind: TemplateKind = "hh"
    cue: str = ""

    def render_prompt(self, prompt: Prompt, tokenizer: Any) -> tuple[str, bool]:
        """Return (the text of a prompt, True if the tokenizer must add special tokens to it).

        Raises DataError without a chat template, and RefusedDialogue if the chat template does not render the prompt.
        """
        if self.kind != "chat":
            return prompt.text + self.cue, True
        if tokenizer.chat_template is None:
            raise DataError("template 'chat': this tokenizer has no chat template; use template = \"hh\"")
        text = render_chat(turns(prompt.text)[:-1], tokenizer, f"prompt {prompt.id}", add_generation_prompt=True)
        return text + self.cue, False

    def render_response(self, text: str) -> str:
        """Return the text that the model must write: after a chat template's header it has no leading space."""
        return text.removeprefix(" ") if self.kind == "chat" else text

    def read_response(self, text: str) -> str:
        """Return sampled text as a Response holds it; the inverse of ``render_response``."""
        return " " + text if self.kind == "chat" else text
