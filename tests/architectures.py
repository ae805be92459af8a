"""Small random models of the architectures that packing is checked on, and a tokenizer that reads no text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models

from rrhf_bench.data.dialogue import Template
from rrhf_bench.policy.tokenization import Tokenization

VOCABULARY = 97


def sizes(head_size: int = 8) -> dict[str, Any]:
    """Four heads, and large weights: attention to the wrong tokens shows, where the usual small ones would hide it in
    the rounding."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 4 * head_size,
        "intermediate_size": 6 * head_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }


def gpt_sizes(head_size: int = 8) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "n_embd": 4 * head_size, "n_layer": 3, "n_head": 4, "n_positions": 256,
        "initializer_range": 0.3,
    }  # fmt: skip


def packed(head_size: int = 8) -> dict[str, Callable[[], Any]]:
    """The architectures that packing holds for."""
    plain, gpt = sizes(head_size), gpt_sizes(head_size)
    grouped = {**plain, "num_key_value_heads": 2}
    return {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**grouped)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**grouped)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**grouped, head_dim=head_size)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**grouped)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt)),
        "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**plain)),
        "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**grouped, head_dim=head_size)),
        "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**grouped, head_dim=head_size)),
        "opt": lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=4 * head_size,
                ffn_dim=6 * head_size,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=256,
                word_embed_proj_dim=4 * head_size,
                init_std=0.3,
                dropout=0.1,
            )
        ),
    }


SIZES = sizes()
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
GPT = gpt_sizes()
PACKED = packed()
PADDED: dict[str, tuple[Callable[[], Any], str]] = {
    "gptj": (lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=8)), "attention is eager"),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)),
        "attention is eager",
    ),
    "falcon with ALiBi": (
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True
            )
        ),
        "",  # what its own code says about such inputs
    ),
    "gemma2": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8)),
        "soft-capped, which only eager attention",
    ),
    "mistral with a window of 6": (
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=6)),
        "log-probs differ",
    ),
}


def made(make: Callable[[], Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model in evaluation mode; its weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype).eval()


def tokenization() -> Tokenization:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2}, unk_token="<unk>"))
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return Tokenization(fast, Template(), "here")
