"""Text to token ids and back, as a policy is trained on them and samples them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rrhf_bench.data.dialogue import RefusedDialogue, Template, Turn, render_chat
from rrhf_bench.errors import DataError
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.records import Prompt, Response

# Beginnings of replies that some tokenizers encode differently without the prompt before them.
BEGINNINGS = (" a", "a", "  a", "\n\na")
JUNK = "\ufffd"  # the text of bytes that are no character


class Tokenization:
    """A tokenizer with the dialogue template that its model expects: the one place where text becomes ids.

    Prompt and response are encoded apart and joined, in training, sampling and scoring alike, so that a policy is
    trained on the tokens that it would have sampled. Only the prompt gets a leading special token.

    ``end_ids`` are the ids that end a reply, whichever of them a model samples. The first of them, ``eos_id``, is the
    one that training appends: the special token that the chat template writes behind a reply, else the tokenizer's
    end-of-text token. The others are the tokenizer's own and ``model_end_ids``, those of the model's generation
    configuration: Llama 3 and Gemma have two.

    Raises DataError for a tokenizer without an end-of-text token.
    """

    def __init__(self, tokenizer: Any, template: Template, where: str, model_end_ids: Sequence[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{where}: the tokenizer has no EOS token, so no reply could end; name it in tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.template = template
        self._special = special_tokens(tokenizer)
        before, behind = _around_reply(tokenizer, template.cue) if template.kind == "chat" else (":", "")
        # Find the token that a chat template writes behind a reply: in Llama 3 <|eot_id|>, in Gemma <end_of_turn>. Base
        # models of Qwen end a text with <|endoftext|> and a turn with <|im_end|>.
        turn_end = max(filter(behind.startswith, self._special), key=len, default=None)
        first = tokenizer.eos_token_id if turn_end is None else tokenizer.convert_tokens_to_ids(turn_end)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((first, tokenizer.eos_token_id, *model_end_ids)))
        self.eos_id = self.end_ids[0]
        # A reply is encoded and decoded behind this text if that makes a difference.
        self._before = "" if before.rstrip().endswith(tuple(self._special)) else before[-1:]
        self._before_ids: list[int] = tokenizer(self._before, add_special_tokens=False)["input_ids"]
        if not (self._before and self._changes_beginnings()):
            self._before, self._before_ids = "", []
        # Training encodes the same texts in every epoch. An array holds 4 bytes a token, a tuple of integers 36.
        self._prompt_ids = lru_cache(1 << 16)(lambda prompt: array("I", self._encode_prompt(prompt)))
        self._text_ids = lru_cache(1 << 18)(lambda text: array("I", self._encode_text(text)))

    def __deepcopy__(self, memo: Any) -> Tokenization:
        return self  # never changes

    def with_cue(self, cue: str) -> Tokenization:
        """Return the same tokenization with another text behind every prompt."""
        return Tokenization(self.tokenizer, replace(self.template, cue=cue), "cue", self.end_ids)

    def has_vocabulary_of(self, other: Tokenization) -> bool:
        """Return True if both tokenizers have the same tokens with the same ids."""
        return self is other or bool(self.tokenizer.get_vocab() == other.tokenizer.get_vocab())

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the ids of the rendered prompt, with the tokenizer's own leading special token if it adds one.

        The ids of a raw prompt are those of ``tokenizer(text)``.
        """
        return tuple(self._prompt_ids(prompt))

    def _encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        text, add_special_tokens = self.template.render_prompt(prompt, self.tokenizer)
        # A rendered chat holds the template's special tokens; a transcript holds none but those that a user has typed.
        parse = self.template.kind == "chat"
        ids = self._encode(text, add_special_tokens=add_special_tokens, parse_special_tokens=parse)
        # Some tokenizers append EOS to every text. A model cannot continue a prompt that has ended.
        closed = ids and ids[-1] == self.tokenizer.eos_token_id and self.template.kind != "raw"
        return tuple(ids[:-1] if closed else ids)

    def response_ids(self, text: str, *, ended: bool) -> tuple[int, ...]:
        """Return the ids of a response; ``eos_id`` is its last token if it ended, and absent if the token cap cut it.

        The name of a special token within the text, such as ``</s>``, is encoded as the characters that it is written
        with: only ``ended`` adds an end.
        """
        return tuple(self._text_ids(text)) + ((self.eos_id,) if ended else ())

    def names_special_token(self, text: str) -> bool:
        """Return True if a text contains the name of a special token, such as ``</s>``."""
        return any(token in text for token in self._special)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        rendered = self.template.render_response(text)
        joined = self._encode_behind(rendered)
        return tuple(self._encode(rendered) if joined is None else joined)

    def _encode_behind(self, text: str) -> list[int] | None:
        """Return the ids of a text behind ``_before``, or None if a token reaches over the two."""
        ids = self._encode(self._before + text)
        length = len(self._before_ids)
        return ids[length:] if ids[:length] == self._before_ids else None

    def _encode(self, text: str, *, add_special_tokens: bool = False, parse_special_tokens: bool = False) -> list[int]:
        split = {} if parse_special_tokens or not self.names_special_token(text) else {"split_special_tokens": True}
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, **split)["input_ids"]
        return ids

    def _changes_beginnings(self) -> bool:
        """Return True if the tokenizer reads or writes the beginning of a text differently behind ``_before``.

        LLaMA's tokenizer puts a space before a text and removes one when it decodes. Without its prompt, a reply would
        be encoded with a space too many and decoded with one too few. Behind the colon of ``Assistant:`` it is not.
        """
        for text in BEGINNINGS:
            apart, joined = self._encode(text), self._encode_behind(text)
            if joined is not None and (joined != apart or self._decode(apart) != text):
                return True
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled ids without special tokens and with its spaces unchanged."""
        return self._decode([*self._before_ids, *ids]).removeprefix(self._before)

    def decode_cut(self, ids: Sequence[int]) -> str:
        """Return the text of ids that the token cap cut, without the bytes of a character that is not whole.

        A byte-level tokenizer decodes these bytes to one U+FFFD. A tokenizer with tokens of single bytes, such as
        ``<0xE4>``, decodes each byte to one, and each byte of the whole characters directly before them.
        """
        text = self.decode(ids)
        if not text.endswith(JUNK):
            return text
        byte_tokens = str(self.tokenizer.convert_ids_to_tokens(ids[-1])).startswith("<0x")  # None beyond the vocabulary
        shorter = (self.decode(ids[:-n]) for n in range(1, 4) if byte_tokens)
        return next((text for text in shorter if not text.endswith(JUNK)), text.removesuffix(JUNK))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def batch(self, rows: Iterable[tuple[Prompt, Response]], max_length: int | None = None) -> ResponseBatch:
        """Return a batch of records.

        ``max_length`` bounds prompt + response in tokens: a longer response is cut on the right and then has no EOS.
        Raises DataError if a prompt leaves no room for a response token.
        """
        pairs = []
        for prompt, response in rows:
            prompt_ids = self.prompt_ids(prompt)
            response_ids = self.response_ids(response.text, ended=response.ended)
            if max_length is not None:
                if len(prompt_ids) >= max_length:
                    raise DataError(
                        f"prompt {prompt.id}: has {len(prompt_ids)} tokens; at most {max_length - 1} leave room for a "
                        f"response within max_length {max_length}; drop it or raise max_length"
                    )
                response_ids = response_ids[: max_length - len(prompt_ids)]
            pairs.append((prompt_ids, response_ids))
        return ResponseBatch.of_pairs(pairs)


@lru_cache(8)
def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Return the special tokens of a tokenizer: those with a role, such as EOS, and those without, as Llama 3 has."""
    tokens = tokenizer.added_tokens_decoder  # of mistral-common's class a method, which raises
    added = [] if callable(tokens) else [token.content for token in tokens.values() if token.special]
    return frozenset((*tokenizer.all_special_tokens, *added))


def _around_reply(tokenizer: Any, cue: str) -> tuple[str, str]:
    """Return the text that a prompt ends with if a reply stands directly behind it, and the text behind a reply.

    The first text is empty if the chat template writes more between a prompt and a reply. That may be a space, which
    LLaMA's tokenizer puts there in any case. Both texts are empty if the chat template does not render the dialogue.
    """
    question, reply = Turn("user", "a"), "zebra"
    try:
        prompt = render_chat((question,), tokenizer, add_generation_prompt=True)
        before, _, behind = render_chat((question, Turn("assistant", reply)), tokenizer).rpartition(reply)
    except RefusedDialogue:
        return "", ""
    return prompt + cue if before == prompt else "", behind.lstrip()
