"""Build tiny replicas of model families: tokenizer, architecture, generation settings and weight files.

A policy learns three replies by heart, so that greedy decoding ends: the first with the end of turn, the second with
the family's other end token where there are two, the third only after the length cap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

from families import tokens
from families.plain import Plain
from families.tokens import DIALOGUES, REPLIES, trained, write_json

CAP = 24  # new tokens at most: the third reply is longer in every tokenizer
CONTEXT = 192

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # vLLM on a CPU knows heads of 32 and up
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.05,
}
GPT_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}


# Weight files


def in_shards(model: Any, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder, max_shard_size="200KB")


def in_one(model: Any, folder: Path, state: Mapping[str, Any] | None = None, pickle: str | None = None) -> None:
    """Write one file of weights, under the model's own names if no others are given."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in (state or model.state_dict()).items()}
    if pickle is not None:
        torch.save(state, folder / pickle)
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})


def old_masks(layer: str, layers: int) -> dict[str, Any]:
    """Return the buffers that old versions of transformers stored with each layer of GPT-2's kind."""
    masks: dict[str, Any] = {f"{layer}.bias": torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool).tril()}
    masks[f"{layer}.masked_bias"] = torch.tensor(-1e9)
    return {name.format(i): value for i in range(layers) for name, value in masks.items()}


def as_pickle(model: Any, folder: Path) -> None:
    in_one(model, folder, pickle="pytorch_model.bin")


def as_gpt2(model: Any, folder: Path) -> None:
    """Write the body alone, the head being tied."""
    in_one(model, folder, {**model.transformer.state_dict(), **old_masks("h.{}.attn", 2)})


def as_pythia(model: Any, folder: Path) -> None:
    state = model.half().state_dict()
    inverses = {f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    in_one(model, folder, {**state, **old_masks("gpt_neox.layers.{}.attention", 2), **inverses})


def as_opt(model: Any, folder: Path) -> None:
    """Write the decoder alone, the head being tied."""
    in_one(model.half(), folder, model.model.state_dict(), "pytorch_model.bin")


# The families


@dataclass(frozen=True)
class Family:
    """A policy's family. ``ends`` are the tokens that end a reply, the template's own first."""

    name: str
    model_type: str
    tokenizer: Callable[[Path], None]
    model: Callable[..., Any]  # of a vocabulary and the tokens' ids
    reward: str
    save: Callable[[Any, Path], None] = in_one
    template: str = "hh"
    ends: tuple[str, ...] = ("</s>",)
    padded_to: int = 1  # the vocabulary's size is a multiple of this
    generation: Mapping[str, Any] = field(default_factory=dict)
    aside: str = ""  # what the template writes before a reply and does not prompt for
    repeats: bool = False  # much of what another family shows: its costly steps are slow tests

    def __str__(self) -> str:
        return self.name


def made(name: str, **more: Any) -> Callable[..., Any]:
    """Return the maker of a model by the name of its class. The class is imported when the model is made."""

    def make(vocabulary: int, **ids: Any) -> Any:
        model = getattr(tf, name)
        return model(model.config_class(**{**SIZES, "vocab_size": vocabulary, **ids, **more}))

    return make


GROUPED = {"num_key_value_heads": 1}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3}
ENDOFTEXT = ("<|endoftext|>",)

FAMILIES = (
    Family(
        "llama2", "llama", tokens.llama_fast, made("LlamaForCausalLM", tie_word_embeddings=False),
        "llama-rm", in_shards, repeats=True,
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096},
    ),
    Family(
        "alpaca", "llama", tokens.llama_slow, made("LlamaForCausalLM", tie_word_embeddings=False),
        "gptj-rm", as_pickle, generation={"temperature": 0.9, "top_p": 0.6},
    ),
    Family(
        "llama3", "llama", tokens.llama3,
        made("LlamaForCausalLM", tie_word_embeddings=False, **GROUPED),
        "llama-rm", in_shards, template="chat", ends=("<|eot_id|>", "<|end_of_text|>"),
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    Family(
        "mistral", "mistral", lambda folder: tokens.llama_fast(folder, tokens.MISTRAL),
        made("MistralForCausalLM", sliding_window=None, **GROUPED),
        "qwen-rm", in_shards, template="chat", repeats=True,
    ),
    Family(
        "qwen2.5", "qwen2", lambda folder: tokens.qwen(folder, tokens.QWEN2),
        made("Qwen2ForCausalLM", tie_word_embeddings=True, **GROUPED),
        "qwen-rm", in_shards, template="chat", ends=("<|im_end|>", "<|endoftext|>"), padded_to=128, generation=SAMPLED,
        repeats=True,
    ),
    Family(
        "qwen3", "qwen3", lambda folder: tokens.qwen(folder, tokens.QWEN3),
        made("Qwen3ForCausalLM", tie_word_embeddings=True, head_dim=32, **GROUPED),
        "qwen-rm", in_shards, template="chat", ends=("<|im_end|>", "<|endoftext|>"), padded_to=128,
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, aside=tokens.NO_THOUGHT,
    ),
    Family(
        "gemma", "gemma", tokens.gemma, made("GemmaForCausalLM", head_dim=32, **GROUPED),
        "roberta-rm", in_shards, template="chat", ends=("<end_of_turn>", "<eos>"),
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
    ),
    Family(
        "gpt2", "gpt2", lambda folder: trained(tf.GPT2Tokenizer()).save_pretrained(folder),
        made("GPT2LMHeadModel", **GPT_SIZES),
        "gptj-rm", as_gpt2, ends=ENDOFTEXT,
    ),
    Family(
        "pythia", "gpt_neox", lambda folder: trained(tf.GPTNeoXTokenizer()).save_pretrained(folder),
        made("GPTNeoXForCausalLM", rotary_pct=0.25, tie_word_embeddings=False),
        "deberta-rm", as_pythia, ends=ENDOFTEXT, padded_to=128,
    ),
    Family(
        "opt", "opt", tokens.opt, made("OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=64, init_std=0.05),
        "roberta-rm", as_opt,
    ),
)  # fmt: skip


# The reward models


@dataclass(frozen=True)
class RewardFamily:
    """A reward model's family."""

    name: str
    model_type: str
    tokenizer: Callable[[Path], None]
    model: Callable[..., Any]
    save: Callable[[Any, Path], None] = in_one
    template: str = "hh"
    layout: str = "classifier"
    pad_token: str | None = None
    places: int = CONTEXT  # tokens that it can read

    def __str__(self) -> str:
        return self.name


SCORING = {"num_labels": 1, "initializer_range": 0.3}  # large weights: scores far apart


def as_value_head(model: Any, folder: Path) -> None:
    """Write the layout of Dahoas/gptj-rm-static, with its body's configuration beside it."""
    state = {f"transformer.{name}": tensor for name, tensor in model.half().state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state["v_head.weight"] = torch.randn(1, 64).half()
    in_one(model, folder, {**state, **old_masks("transformer.h.{}.attn", 2)}, "hf_ckpt.pt")


# Positions relative to one another, shared keys and no types, as of version 3.
DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
}  # fmt: skip

REWARDS = (
    RewardFamily(
        "llama-rm", "llama", tokens.llama_fast, made("LlamaForSequenceClassification", **SCORING, **GROUPED),
        in_shards, pad_token="<unk>",
    ),
    RewardFamily(
        "qwen-rm", "qwen3", lambda folder: tokens.qwen(folder, tokens.QWEN3),
        made("Qwen3ForSequenceClassification", **SCORING, head_dim=32, **GROUPED), in_shards, template="chat",
    ),
    RewardFamily(
        "gptj-rm", "gptj", lambda folder: trained(tf.GPT2Tokenizer()).save_pretrained(folder),
        made("GPTJModel", **GPT_SIZES, initializer_range=0.3, rotary_dim=8), as_value_head, layout="value-head",
    ),
    RewardFamily(
        "roberta-rm", "roberta", tokens.roberta,
        made(
            "RobertaForSequenceClassification", **SCORING, type_vocab_size=1, max_position_embeddings=CONTEXT + 2
        ),
    ),
    RewardFamily(
        "deberta-rm", "deberta-v2",
        lambda folder: trained(tf.DebertaV2Tokenizer(), vocabulary=300).save_pretrained(folder),
        made("DebertaV2ForSequenceClassification", **SCORING, **DEBERTA), as_pickle,
    ),
)  # fmt: skip


def build_reward(family: RewardFamily, folder: Path) -> Path:
    """Write a reward model's folder with random weights."""
    family.save(_drawn(family, folder)[0], folder)
    return folder


def _drawn(family: Family | RewardFamily, folder: Path, padded_to: int = 1) -> tuple[Any, Any]:
    """Write the tokenizer of a family; return (model with random weights, tokenizer)."""
    write_json(folder / "config.json", {"model_type": family.model_type})
    family.tokenizer(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return family.model(-(-len(tokenizer) // padded_to) * padded_to, **ids).eval(), tokenizer


def build(family: Family, folder: Path) -> Path:
    """Write a policy's folder."""
    model, tokenizer = _drawn(family, folder, family.padded_to)
    end_ids = tokenizer.convert_tokens_to_ids(list(family.ends))
    plain = Plain(tokenizer, model, end_ids, family.template == "chat", family.aside)
    other = [end_ids[0], end_ids[-1], end_ids[0]]
    rows = []
    for messages, reply, end in zip(DIALOGUES, REPLIES, other, strict=True):
        reply_ids = [*plain.reply_ids(messages, reply)[:-1], end]
        rows.append((plain.prompt_ids(messages), reply_ids[: CAP + 1]))
    learn_by_heart(model, rows)
    family.save(model, folder)
    eos = sorted(end_ids) if len(end_ids) > 1 else end_ids[0]
    write_json(folder / "generation_config.json", {"eos_token_id": eos, **family.generation})
    return folder


def learn_by_heart(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Train until every token of every reply is nearly certain."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.tensor([[*prompt, *reply, *[0] * (width - len(prompt) - len(reply))] for prompt, reply in rows])
    labels = torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(rows):
        labels[row, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    for _ in range(300):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # padding is behind: nothing sees it
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        if loss.max() < 0.3:
            return
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    raise AssertionError(f"{type(model).__name__}: did not learn its replies, the loss is {loss.max():.2f}")
