"""The slow definitions: what plain transformers says of a folder, one row at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf

Message = tuple[str, str]  # (role, text)
NAMES = {"user": "Human", "assistant": "Assistant"}


def transcript(messages: Sequence[Message]) -> str:
    """Return the HH transcript that asks for the next reply."""
    return "".join(f"\n\n{NAMES[role]}: {text}" for role, text in messages) + "\n\nAssistant:"


class Plain:
    """A causal language model and its tokenizer, used as transformers' documentation uses them."""

    def __init__(self, tokenizer: Any, model: Any, end_ids: Sequence[int], chat: bool, aside: str = "") -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.end_ids = list(end_ids)  # the one that the template writes comes first
        self.chat = chat
        self.aside = aside

    @classmethod
    def load(cls, folder: Path, family: Any) -> Plain:
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        end_ids = tokenizer.convert_tokens_to_ids(list(family.ends))
        return cls(tokenizer, model, end_ids, family.template == "chat", family.aside)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        if not self.chat:
            return self.tokenizer(transcript(messages))["input_ids"]
        turns = [{"role": role, "content": text} for role, text in messages]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    def reply_ids(self, messages: Sequence[Message], reply: str) -> list[int]:
        """Return the ids that follow the prompt's in the whole conversation, up to the end of the reply."""
        if self.chat:
            turns = [{"role": role, "content": text} for role, text in (*messages, ("assistant", reply.lstrip()))]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False).replace(self.aside, "")
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = [*self.tokenizer(transcript(messages) + reply)["input_ids"], self.end_ids[0]]
        prompt_ids = self.prompt_ids(messages)
        assert ids[: len(prompt_ids)] == prompt_ids
        ids = ids[len(prompt_ids) :]
        return ids[: ids.index(self.end_ids[0]) + 1]

    def greedy(self, messages: Sequence[Message], cap: int) -> tuple[str, str, list[int]]:
        """Return (text as it stands behind the prompt, how it ended, ids)."""
        prompt_ids = self.prompt_ids(messages)
        # The folder's own sampling settings have no say.
        self.model.generation_config = tf.GenerationConfig(
            do_sample=False, max_new_tokens=cap, eos_token_id=self.end_ids, pad_token_id=self.end_ids[0]
        )
        mask = torch.ones(1, len(prompt_ids), dtype=torch.long)
        out = self.model.generate(torch.tensor([prompt_ids]), attention_mask=mask)[0].tolist()
        ids = out[len(prompt_ids) :]
        ended = ids[-1] in self.end_ids
        said = self._decode([*prompt_ids, *(ids[:-1] if ended else ids)])
        text = said.removeprefix(self._decode(prompt_ids))
        assert text != said
        return (" " + text.removeprefix(" ") if self.chat else text), "eos" if ended else "length", ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def logprobs(self, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> torch.Tensor:
        """Return the (T,) log-probs of the reply's tokens."""
        logits = self.logits([*prompt_ids, *reply_ids])[len(prompt_ids) - 1 : -1]
        return logits.log_softmax(-1)[range(len(reply_ids)), list(reply_ids)]

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([list(ids)])).logits[0]


class PlainReward:
    """A reward model by its own class's forward."""

    def __init__(self, folder: Path, family: Any) -> None:
        self.family = family
        self.tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        if family.layout == "value-head":
            state = torch.load(folder / "hf_ckpt.pt", weights_only=True)
            self.head_D = state.pop("v_head.weight").float()[0]
            config = tf.AutoConfig.from_pretrained(folder)
            self.model = tf.GPTJModel(config).eval()
            own = self.model.state_dict().keys()
            state = {name.removeprefix("transformer."): tensor.float() for name, tensor in state.items()}
            self.model.load_state_dict({name: state[name] for name in own})
        else:
            self.model = tf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, messages: Sequence[Message], reply: str) -> list[int]:
        if self.family.template == "chat":
            turns = [{"role": role, "content": text} for role, text in (*messages, ("assistant", reply.strip()))]
            return self.tokenizer.apply_chat_template(turns, return_dict=False)
        if self.family.layout == "value-head":  # as RRHF's and trlX's code put it together
            return self.tokenizer(transcript(messages) + " " + reply.strip() + "<|endoftext|>")["input_ids"]
        ids = self.tokenizer(transcript(messages) + reply)["input_ids"]
        return ids if ids[-1] == self.tokenizer.eos_token_id else [*ids, self.tokenizer.eos_token_id]

    def score(self, messages: Sequence[Message], reply: str) -> float:
        return self.score_ids(self.ids(messages, reply))

    @torch.no_grad()
    def score_ids(self, ids: list[int]) -> float:
        row = torch.tensor([ids])
        if self.family.layout == "value-head":
            return (self.model(row).last_hidden_state[0, ids.index(self.tokenizer.eos_token_id)] @ self.head_D).item()
        return self.model(row, attention_mask=torch.ones_like(row)).logits[0, 0].item()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
