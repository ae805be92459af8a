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

# Beginnings of replies on which tokenizers differ when the reply is encoded without its prompt.
BEGINNINGS = (" a", "a", "  a", "\n\na")


class Tokenization:
    """A tokenizer with the dialogue template that its model expects: the one place where text becomes ids.

    Prompt and response are encoded apart and joined, in training, sampling and scoring alike, so that a policy is
    trained on the tokens that it would have sampled. Only the prompt gets a leading special token.

    ``end_ids`` are the ids that end a reply, whichever of them a model samples. The first of them, ``eos_id``, is the
    one that training appends: the special token that the chat template writes behind a reply, else the tokenizer's
    end-of-text token. The others are the tokenizer's own and ``model_end_ids``, those of the model's generation
    configuration: Llama 3 and Gemma have two.

    Raises DataError for a tokenizer without an end-of-text token, and for one without a pad token unless the template
    is ``raw``, whose models are only sampled from.
    """

    def __init__(self, tokenizer: Any, template: Template, where: str, model_end_ids: Sequence[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{where}: the tokenizer has no EOS token, so no reply could end; name it in tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None and template.kind != "raw":
            raise DataError(
                f"{where}: the tokenizer has no pad token; name one of its tokens with the pad_token of its table "
                "(--pad-token, --perplexity-pad-token)"
            )
        self.tokenizer = tokenizer
        self.template = template
        turn_end = _end_of_turn(tokenizer) if template.kind == "chat" else None
        first = tokenizer.eos_token_id if turn_end is None else turn_end
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((first, tokenizer.eos_token_id, *model_end_ids)))
        self.eos_id = self.end_ids[0]
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._special = tuple(tokenizer.all_special_tokens)
        self._colon_ids: list[int] = tokenizer(":", add_special_tokens=False)["input_ids"]
        self._behind_colon = template.kind == "hh" and self._changes_beginnings()
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
        ids = self._encode(rendered)
        if self._behind_colon:
            colon = len(self._colon_ids)
            joined = self._encode(":" + rendered)
            ids = joined[colon:] if joined[:colon] == self._colon_ids else ids
        return tuple(ids)

    def _encode(self, text: str, *, add_special_tokens: bool = False, parse_special_tokens: bool = False) -> list[int]:
        split = {} if parse_special_tokens or not self.names_special_token(text) else {"split_special_tokens": True}
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, **split)["input_ids"]
        return ids

    def _changes_beginnings(self) -> bool:
        """Return True if the tokenizer reads or writes the beginning of a text differently behind a colon.

        LLaMA's tokenizer puts a space before a text and removes one when it decodes. Without its prompt, a reply would
        be encoded with a space too many and decoded with one too few. Behind the colon of ``Assistant:`` it is not.
        """
        colon = self._colon_ids
        for text in BEGINNINGS:
            apart, joined = self._encode(text), self._encode(":" + text)
            if joined[: len(colon)] == colon and (joined[len(colon) :] != apart or self._decode(apart) != text):
                return True
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of sampled ids without special tokens and with its spaces unchanged."""
        if self._behind_colon:
            return self._decode([*self._colon_ids, *ids]).removeprefix(":")
        return self._decode(ids)

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


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the id of the special token that the chat template writes behind an assistant's reply, or None.

    It is not always the tokenizer's end-of-text token: in Llama 3 it is ``<|eot_id|>``, in Gemma ``<end_of_turn>``, and
    base models of Qwen end a text with ``<|endoftext|>`` but a turn with ``<|im_end|>``.
    """
    reply = "zebra"
    try:
        text = render_chat((Turn("user", "a"), Turn("assistant", reply)), tokenizer)
    except RefusedDialogue:
        return None
    behind = text.rpartition(reply)[2].lstrip()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest = max((token for token in special if behind.startswith(token)), key=len, default=None)
    return None if longest is None else tokenizer.convert_tokens_to_ids(longest)
