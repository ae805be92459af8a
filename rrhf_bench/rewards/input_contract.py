"""The input contract of a reward model: how prompt and response become ids, and which of them is scored.

A score is only comparable with a published one under the same contract, so the contract is data: stored beside the
models trained here, part of a reward model's identity, and listed for known models of the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rrhf_bench.data.dialogue import Template, TemplateKind, Turn, render_chat, turns
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import read_jsonl, write_jsonl
from rrhf_bench.policy.tokenization import special_tokens
from rrhf_bench.records import Prompt

CONTRACT_FILE = "reward_contract.json"

Layout = Literal["classifier", "value-head"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class RecordedText:
    """A text with the ids and the score that a model gave it after training."""

    prompt: Prompt
    response: str
    ids: tuple[int, ...]
    score: float
    max_length: int | None = None  # tokens that it was cut to; none: the model's own limit


@dataclass(frozen=True, slots=True)
class Record:
    """The texts that a later load of a trained model must reproduce: ids exactly, scores within rounding."""

    texts: tuple[RecordedText, ...]
    dtype: Dtype = "float32"  # of the computation of the scores
    label: str | None = None  # whose probability they are, of a model with several


@dataclass(frozen=True, slots=True)
class RewardContract:
    """The input of a reward model: how text is assembled and truncated, and where the score is read.

    Raises DataError for a position that the ids may not have.
    """

    template: TemplateKind = "hh"  # chat: the whole conversation through the chat template; raw: prompt and response
    join: Literal["", " "] = ""  # between prompt and response; a Response's text has its leading space already
    strip_response: bool = False
    append_eos: bool = True  # one EOS, also where the tokenizer or the template has written it
    eos_token: str | None = None  # none: the tokenizer's own
    truncation_side: Literal["left", "right"] = "left"  # left keeps the response; BOS or CLS, EOS or SEP stay
    max_length: int | None = None  # tokens, EOS included; none: the model's context
    dtype: Dtype = "float32"
    position: Literal["last", "first-eos"] = "last"  # of the token whose hidden state is scored
    padding_side: Literal["right", "left"] = "right"  # of the batches of a class that pools by itself
    record: Record | None = field(default=None, compare=False, repr=False)  # decides no score

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise DataError(f"reward contract: max_length: found {self.max_length}; expected at least 2 tokens")
        if self.position == "first-eos" and not (self.append_eos and self.truncation_side == "left"):
            raise DataError(
                "reward contract: position 'first-eos' without a certain EOS; expected append_eos = true and "
                'truncation_side = "left"'
            )

    @classmethod
    def default(cls, template: TemplateKind) -> RewardContract:
        """Return the contract of a model without one: EOS after a transcript; a chat template writes its own end of
        turn, and the tokenizer of a classifier of plain text adds its own marks ([CLS] and [SEP], or nothing)."""
        return cls(template=template, append_eos=template == "hh")

    @classmethod
    def read(cls, folder: Path) -> RewardContract | None:
        """Return the contract stored in a model's folder, or None. Raises DataError naming file and field."""
        path = folder / CONTRACT_FILE
        if not path.is_file():
            return None
        found = read_jsonl(path, cls)
        if len(found) != 1:
            raise DataError(f"{path}: found {len(found)} lines; expected the contract, one JSON object on one line")
        return found[0]

    def write(self, folder: Path) -> None:
        write_jsonl(folder / CONTRACT_FILE, [self])

    def eos_id(self, tokenizer: Any, where: str) -> int:
        """Return the id of this contract's EOS. Raises DataError if the tokenizer has none."""
        if self.eos_token is None:
            if tokenizer.eos_token_id is None:
                raise DataError(f"{where}: the tokenizer has no EOS token; name one with the contract's eos_token")
            return tokenizer.eos_token_id
        if self.eos_token not in tokenizer.get_vocab():
            raise DataError(f"{where}: eos_token {self.eos_token!r} is not in the vocabulary; name a token that is")
        return tokenizer.convert_tokens_to_ids(self.eos_token)

    def text(self, prompt: Prompt, response: str, tokenizer: Any) -> tuple[str, bool]:
        """Return (text without an appended EOS, True if the tokenizer must add its special tokens)."""
        template = Template(self.template)
        response = response.strip() if self.strip_response else response
        rendered, add_special_tokens = template.render_prompt(prompt, tokenizer)
        if self.template != "chat":
            return rendered + self.join + template.render_response(response), add_special_tokens
        dialogue = (*turns(prompt.text)[:-1], Turn("assistant", response))
        return render_chat(dialogue, tokenizer, f"prompt {prompt.id}"), add_special_tokens

    def encode(self, prompt: Prompt, response: str, tokenizer: Any, max_length: int | None) -> tuple[list[int], bool]:
        """Return (ids, True if they were cut to ``max_length``). Prompt and response are encoded as one text.

        The name of a special token within the text, such as ``</s>``, is encoded as the characters that it is written
        with, as a policy reads it. There are two exceptions: a rendered chat, which holds the template's own special
        tokens, and the published layout that scores the first EOS wherever it stands.
        """
        text, add_special_tokens = self.text(prompt, response, tokenizer)
        literal = self.template != "chat" and self.position == "last"
        names_special_token = literal and any(token in text for token in special_tokens(tokenizer))
        split = {"split_special_tokens": True} if names_special_token else {}
        ids: list[int] = list(tokenizer(text, add_special_tokens=add_special_tokens, **split)["input_ids"])
        eos_id = self.eos_id(tokenizer, "reward model") if self.append_eos else None
        if eos_id is not None and ids[-1:] != [eos_id]:
            ids.append(eos_id)
        if max_length is None or len(ids) <= max_length:
            return ids, False
        if self.truncation_side == "right":
            tail = ids[-1:] if ids[-1] in (eos_id, tokenizer.sep_token_id) else []
            return ids[: max_length - len(tail)] + tail, True
        head = ids[:1] if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
        return head + ids[len(ids) - max_length + len(head) :], True

    def index(self, ids: Sequence[int], eos_id: int | None) -> int:
        """Return the position of the score in the unpadded ids."""
        if self.position == "last":
            return len(ids) - 1
        assert eos_id is not None
        return list(ids).index(eos_id)


@dataclass(frozen=True, slots=True)
class KnownLayout:
    """A reward model of the hub whose files do not describe its use."""

    layout: Layout
    contract: RewardContract
    revision: str | None = None
    body: str | None = None  # whose configuration it has, where its own folder holds none
    tokenizer: str | None = None


# Dahoas/gptj-rm-static: as trlX's examples/hh/ppo_hh.py loads it, and as RRHF's data_generation scores with it.
# Skywork: its model card renders the conversation with the chat template, which ends the turn, and adds nothing.
# distilbert-imdb: a text classifier, fed the text alone, as in RL4LMs (2210.01241) and TRL's sentiment example.
KNOWN_LAYOUTS = {
    "Dahoas/gptj-rm-static": KnownLayout(
        layout="value-head",
        contract=RewardContract(join=" ", strip_response=True, max_length=1024, dtype="float16", position="first-eos"),
        revision="676bfd4d",
        body="EleutherAI/gpt-j-6B",
        tokenizer="openai-community/gpt2",
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": KnownLayout(
        layout="classifier", contract=RewardContract(template="chat", append_eos=False, dtype="bfloat16")
    ),
    "lvwerra/distilbert-imdb": KnownLayout(
        layout="classifier", contract=RewardContract(template="raw", append_eos=False)
    ),
}


def minimum(*lengths: int | None) -> int | None:
    """Return the least of the lengths that are not None, or None if all are."""
    return min((length for length in lengths if length is not None), default=None)


def length_limit(max_length: int | None, config: Any) -> int | None:
    """Return the lesser of ``max_length`` and the model's context, or None if there is neither."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return minimum(max_length, context if context is not None and context > 0 else None)  # XLNet, without one, has -1


def length_batches(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Return indices of rows in batches of like length, longest first (too large a batch fails at once).

    Rows of one length are ordered by content, so the batches, and with them the scores to the last bit, are the same
    whatever order the rows come in.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
