"""The policy that every method trains and every sampler samples from, and its transformers implementation."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError
from rrhf_bench.policy.batching import PaddedLayout, ResponseBatch, original_order, padded, passes
from rrhf_bench.policy.logprobs import gather_logprobs
from rrhf_bench.records import Prompt, Response

# Positions a pass: enough to keep the device busy, few enough that rows of one pass are of like length.
PASS_TOKENS = {"cpu": 2048, "cuda": 65536}


@dataclass(frozen=True)
class ResponseStates:
    """Token log-probs and, from the same pass, the last hidden states at the positions that predict those tokens."""

    logp_BT: Tensor  # float32, 0 beyond each row's end
    hidden_BTD: Tensor  # the model's dtype, 0 beyond each row's end


class Tokenization:
    """A tokenizer with the dialogue template its model expects: the one place where text becomes ids.

    Prompt and response are encoded apart and joined, in training, sampling and scoring alike, so that the tokens a
    policy is trained on are the tokens it would have sampled. A leading special token is added to the prompt only.
    Raises DataError for a tokenizer without an end-of-text token, or without a pad token, which only the ``raw``
    template, that of sampling, does without.
    """

    def __init__(self, tokenizer: Any, template: Template, where: str) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{where}: the tokenizer has no EOS token, so no reply could end; name it in tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None and template.kind != "raw":
            raise DataError(
                f"{where}: the tokenizer has no pad token; name one of its tokens with policy.pad_token (--pad-token)"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # LLaMA's tokenizer puts a space before any text and takes one off when decoding: apart from its prompt, a reply
        # would be written with a space too many and read with one too few. Behind a colon, as in a transcript, neither.
        self._colon_ids: list[int] = tokenizer(":", add_special_tokens=False)["input_ids"]
        after_colon = tokenizer(": a", add_special_tokens=False)["input_ids"][len(self._colon_ids) :]
        apart = tokenizer(" a", add_special_tokens=False)["input_ids"]
        self._adds_space = template.kind == "hh" and after_colon != apart

    @cached_property
    def identity(self) -> str:
        """What decides text to ids and back: the vocabulary and the template."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{self.template.kind} {vocabulary}".encode()).hexdigest()

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of the rendered prompt, with the tokenizer's own leading special token if it adds one; of a raw prompt
        ``tokenizer(text)``, whatever that is."""
        text, add_special_tokens = self.template.render_prompt(prompt, self.tokenizer)
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        # Some tokenizers close every text with EOS; a prompt that has ended cannot be continued.
        closed = ids and ids[-1] == self.eos_id and self.template.kind != "raw"
        return tuple(ids[:-1] if closed else ids)

    def response_ids(self, text: str, *, ended: bool) -> tuple[int, ...]:
        """Ids of a response; EOS is its last scored token if it ended, and is absent if the token cap cut it."""
        rendered = self.template.render_response(text)
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if self._adds_space:
            colon = len(self._colon_ids)
            joined = self.tokenizer(":" + rendered, add_special_tokens=False)["input_ids"]
            ids = joined[colon:] if joined[:colon] == self._colon_ids else ids
        return tuple(ids) + ((self.eos_id,) if ended else ())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, special tokens dropped, spaces as they are."""
        ids = [*self._colon_ids, *ids] if self._adds_space else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(":") if self._adds_space else text

    def batch(self, rows: Iterable[tuple[Prompt, Response]], max_length: int | None = None) -> ResponseBatch:
        """A batch from records. ``max_length`` bounds prompt + response: the response is cut on the right (it then
        has no EOS), and at least one of its tokens must fit. Raises DataError where the prompt leaves no room."""
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


class Policy(Protocol):
    """What every training method is written against, and nothing wider."""

    tokenization: Tokenization

    def token_logprobs(self, batch: ResponseBatch) -> Tensor:
        """(B, T) float32 log-probs of the response tokens given prompt and earlier tokens; 0 beyond each row's end."""
        ...

    def response_states(self, batch: ResponseBatch) -> ResponseStates:
        """The same log-probs with the last hidden states at the predicting positions, one pass for both."""
        ...

    def parameters(self) -> Iterable[torch.nn.Parameter]: ...

    def state(self) -> Mapping[str, Tensor]:
        """The weights under transformers' names: what a sampler syncs from."""
        ...

    def save(self, folder: Path) -> None:
        """Write a transformers folder (safetensors, config, tokenizer)."""
        ...


class TransformersPolicy:
    """A causal language model of transformers as a Policy. Dropout is always off: ratios of probabilities need it."""

    def __init__(self, model: Any, tokenization: Tokenization) -> None:
        self.model = model.eval()
        self.tokenization = tokenization
        self._head = model.get_output_embeddings()
        self._body = model.base_model
        if self._head is None or self._body is model:
            raise DataError(f"{type(model).__name__}: has no language-model head; give a causal language model")
        self._head_is_plain = self._check_head()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        template: Template,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        pad_token: str | None = None,
    ) -> TransformersPolicy:
        """From a hub id or a folder. Raises DataError naming the source if it cannot be loaded."""
        tokenizer, model = load_causal_lm(source, dtype=dtype, revision=revision, pad_token=pad_token)
        return cls(model.to(device), Tokenization(tokenizer, template, str(source)))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def _check_head(self) -> bool:
        """Whether logits are head(last hidden state): not so where a model caps or scales its logits."""
        ids = torch.arange(4, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(self._head(hidden), self.model(input_ids=ids, use_cache=False).logits)

    def token_logprobs(self, batch: ResponseBatch) -> Tensor:
        return self._forward(batch)[0]

    def response_states(self, batch: ResponseBatch) -> ResponseStates:
        logp_BT, hidden_ND = self._forward(batch)
        mask_BT = batch.mask_BT.to(self.device)
        return ResponseStates(logp_BT, _scatter(hidden_ND, mask_BT))

    def _forward(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """((B, T) log-probs, (N, D) hidden states of the N response tokens, row by row)."""
        parts = passes(batch, PASS_TOKENS[self.device.type])
        pieces = [self._hidden_and_logits(padded(batch, part, self.tokenization.pad_id, self.device)) for part in parts]
        order_N = original_order(batch, parts).to(self.device)
        token_N = batch.token_BT[batch.mask_BT].to(self.device)
        taken_N = token_N.new_empty(token_N.shape).index_copy(0, order_N, token_N).split([len(h) for h, _ in pieces])
        logp_N = torch.cat(
            [
                gather_logprobs(logits, taken, batch.temperature)
                for (_, logits), taken in zip(pieces, taken_N, strict=True)
            ]
        )[order_N]
        hidden_ND = torch.cat([hidden for hidden, _ in pieces])[order_N]
        return _scatter(logp_N, batch.mask_BT.to(self.device)), hidden_ND

    def _hidden_and_logits(self, layout: PaddedLayout) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": layout.input_ids_BL, "attention_mask": layout.attention_mask_BL, "use_cache": False}
        if self._head_is_plain:
            # Only predicting rows go through the head: prompt and padding positions never meet the vocabulary.
            hidden_ND = self._body(**inputs).last_hidden_state[layout.predict_BL]
            return hidden_ND, self._head(hidden_ND)
        output = self.model(**inputs, output_hidden_states=True)
        return output.hidden_states[-1][layout.predict_BL], output.logits[layout.predict_BL]

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.model.parameters()

    def state(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenization.tokenizer.save_pretrained(folder)

    def frozen_copy(self) -> TransformersPolicy:
        """A reference model: the same weights, no gradients."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return TransformersPolicy(model, self.tokenization)


def _scatter(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """(N, ...) values at the True positions of (B, T), zeros elsewhere; differentiable."""
    empty = value_N.new_zeros((*mask_BT.shape, *value_N.shape[1:]))
    return empty.masked_scatter(mask_BT.reshape(*mask_BT.shape, *(1,) * (value_N.dim() - 1)).expand_as(empty), value_N)


def load_causal_lm(
    source: str | Path, *, dtype: torch.dtype, revision: str | None = None, pad_token: str | None = None
) -> tuple[Any, Any]:
    """(tokenizer, model) from a hub id or a folder, or a DataError that names the source and the reason.

    ``pad_token`` names a token of the vocabulary for a tokenizer that has none. For a policy any will do, EOS included:
    padding is masked and every EOS that is scored was put there by hand.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{source}: cannot be loaded as a causal language model ({reason})") from error
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise DataError(f"{source}: pad_token {pad_token!r} is not in the tokenizer's vocabulary; name one that is")
        tokenizer.pad_token = pad_token
    return tokenizer, model
