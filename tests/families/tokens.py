"""Build the families' tokenizers: their classes, special tokens and chat templates, on the embedded world's text."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from tokenizers import processors

from families.plain import Message, transcript
from rrhf_bench.data.toy.world import build_world

DIALOGUES: tuple[tuple[Message, ...], ...] = (
    (("user", "How do I bake bread?"),),
    (("user", "Hi there! What is a glacier?"),),
    (("user", "I feel sad today."), ("assistant", "Why is that?"), ("user", "It rains.")),
)
REPLIES = (
    " First, mix the flour and the water.",
    " It is a slow river of ice.",
    " I am sorry to hear that. Maybe a walk in the rain would help you, or a talk with a friend who knows you. Then "
    "drink a cup of tea and read a good book until the sun is back.",
)
PROMPTS = tuple(map(transcript, DIALOGUES))


def chat(turn: str, ask: str, first: str = "{{ bos_token }}") -> str:
    """Return a chat template with the structure of a family's, without its longer texts."""
    turns = "{% for message in messages %}" + turn + "{% endfor %}"
    return first + turns + "{% if add_generation_prompt %}" + ask + "{% endif %}"


LLAMA3 = chat(
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
QWEN2 = chat(
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n",
    "<|im_start|>assistant\n",
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}",
)
NO_THOUGHT = "<think>\n\n</think>\n\n"  # what Qwen 3's template writes before the last reply, and does not prompt for
QWEN3 = chat(
    "<|im_start|>{{ message.role }}\n{% if loop.last and message.role == 'assistant' %}" + NO_THOUGHT + "{% endif %}"
    "{{ message.content }}<|im_end|>\n",
    "<|im_start|>assistant\n",
    "",
)
MISTRAL = chat(
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% else %} {{ message.content }}"
    "{{ eos_token }}{% endif %}",
    "",
)
GEMMA = chat(
    "{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}<end_of_turn>\n",
    "<start_of_turn>model\n",
)


@cache
def corpus() -> tuple[str, ...]:
    """Return some text of the embedded world, and the replies that the replicas learn."""
    sizes = {"raw_corpus": 1, "corpus": 1, "perplexity_corpus": 1, "preferences": 12, "dev": 1, "test": 1}
    world = build_world(seed=0, **sizes)
    own = [prompt + reply for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    return (*(pair.prompt.text + pair.chosen for pair in world.preferences), *own)


# Tokenizers: each writes its files into a folder that has a config.json with the model's type


def trained(tokenizer: Any, *tokens: str, vocabulary: int = 480, template: str | None = None) -> Any:
    """Return a tokenizer of the same class, trained on the corpus, with further special tokens."""
    made = tokenizer.train_new_from_iterator(
        [corpus()], vocabulary, new_special_tokens=list(tokens), show_progress=False
    )
    made.chat_template = template
    return made


@cache
def sentencepiece_model() -> bytes:
    """Return a real SentencePiece model of LLaMA's kind, cut to the pieces that occur in the corpus."""
    proto2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    pytest.importorskip("mistral_common")
    model = proto2.ModelProto.FromString((files("mistral_common") / "data" / "tokenizer.model.v1").read_bytes())
    text = " " + " ".join((*corpus(), " [INST] [/INST]"))
    kept = [piece for piece in model.pieces if piece.type != piece.NORMAL or piece.piece.replace("▁", " ") in text]
    del model.pieces[:]
    model.pieces.extend(kept)
    model.trainer_spec.vocab_size = len(kept)
    return model.SerializeToString()


LLAMA_CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True, "add_eos_token": False, "legacy": True, "clean_up_tokenization_spaces": False,
}  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def llama_slow(folder: Path) -> None:
    """Write tokenizer.model alone, as Alpaca and Vicuna have it, and a pad token that was added."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(folder / "tokenizer_config.json", {**LLAMA_CONFIG, "pad_token": "[PAD]"})


def llama_fast(folder: Path, template: str | None = None) -> None:
    """Write tokenizer.json with the normaliser and the decoder that the files of Llama 2 and Mistral have."""
    made = _llama_core()
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    made["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, mark]}
    made["pre_tokenizer"] = None
    write_json(folder / "tokenizer.json", made)
    more = {} if template is None else {"chat_template": template}
    write_json(folder / "tokenizer_config.json", {**LLAMA_CONFIG, **more})


def _llama_core() -> dict[str, Any]:
    """Return the tokenizer.json that transformers makes of the SentencePiece model."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(sentencepiece_model())
        write_json(Path(folder, "tokenizer_config.json"), LLAMA_CONFIG)
        write_json(Path(folder, "config.json"), {"model_type": "llama"})
        return json.loads(tf.AutoTokenizer.from_pretrained(folder)._tokenizer.to_str())


def gemma(folder: Path) -> None:
    model = _llama_core()["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)[3:]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate([*special, "<mask>", "<start_of_turn>", "<end_of_turn>", *pieces])}
    merges = [tuple(merge) for merge in model["merges"]]
    made = tf.GemmaTokenizer(vocab=vocabulary, merges=merges)
    made.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    made.chat_template = GEMMA
    made.save_pretrained(folder)


def llama3(folder: Path) -> None:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    core = trained(tf.Qwen2Tokenizer(), *names)._tokenizer
    core.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", special_tokens=[(names[0], core.token_to_id(names[0]))]
    )
    made = tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=names[0], eos_token=names[1])
    made.chat_template = LLAMA3
    made.save_pretrained(folder)


def qwen(folder: Path, template: str) -> None:
    made = trained(
        tf.Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>"), "<|im_start|>", template=template
    )
    made.save_pretrained(folder)


def opt(folder: Path) -> None:
    """Write </s> in the roles of BOS, EOS and the unknown token, with BOS before every text."""
    same = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    trained(tf.GPT2Tokenizer(**same, pad_token="<pad>", add_bos_token=True)).save_pretrained(folder)


def roberta(folder: Path) -> None:
    """Write the special tokens with RoBERTa's ids: positions count from the pad token's on."""
    tokens = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    trained(tf.RobertaTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)
