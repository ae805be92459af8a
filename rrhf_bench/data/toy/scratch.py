"""A small tokenizer and Llama trained on given texts, from nothing or on from such a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from rrhf_bench.errors import StageError
from rrhf_bench.schedule import batch_order, lr_factor
from rrhf_bench.seeding import generator, torch_seed
from rrhf_bench.settings.experiment import ScratchSettings

PAD, EOS = "<|pad|>", "<|end|>"

# Architecture in ScratchSettings -> in a Llama's config.
ARCHITECTURE = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "context": "max_position_embeddings",
}


def train_language_model(
    texts: Sequence[str],
    settings: ScratchSettings,
    *,
    seed: int,
    folder: Path,
    device: str,
    log: Callable[[Mapping[str, float]], None],
    progress: Callable[[int, int], None],
    start: Path | None = None,
) -> None:
    """Write a transformers folder with a Llama trained on whole texts, each closed by EOS and cut to the context.

    ``start`` is a folder that this function wrote: training starts from its tokenizer and weights, with a fresh
    optimiser. Raises StageError if ``start`` holds no such model or another architecture than ``settings``, and if the
    loss is not finite.
    """
    tokenizer, model = _build(texts, settings, seed) if start is None else _load(start, settings)
    model = model.to(device)
    rows = [[*ids, tokenizer.eos_token_id][: settings.context] for ids in tokenizer(list(texts))["input_ids"]]
    lengths = [len(row) for row in rows]
    order = [
        batch
        for epoch in range(settings.epochs)
        for batch in batch_order(lengths, settings.batch, generator(seed, "corpus order", epoch), bucket=50)
    ]
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    warmup = max(1, round(settings.warmup * len(order)))
    model.train()
    for step, batch in enumerate(order):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * lr_factor(step, len(order), warmup=warmup, schedule="cosine")
        loss = _loss(model, [rows[i] for i in batch], tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == len(order) - 1:
            if not torch.isfinite(loss):
                raise StageError(f"training a model from scratch: loss {loss.item()} at step {step}; lower scratch.lr")
            log({"step": step + 1, "loss": loss.item()})
        progress(step + 1, len(order))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build(texts: Sequence[str], settings: ScratchSettings, seed: int) -> tuple[Any, Any]:
    """Return (tokenizer of byte-level BPE made from the texts, Llama with random weights)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, model_max_length=settings.context
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **{theirs: getattr(settings, ours) for ours, theirs in ARCHITECTURE.items()},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch_seed(seed, "initial weights"):
        return tokenizer, LlamaForCausalLM(config)


def _load(folder: Path, settings: ScratchSettings) -> tuple[Any, Any]:
    """Return (tokenizer, model) of a folder. Raises StageError if the settings describe another model."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if not (folder / "config.json").is_file():
        raise StageError(f"training from {folder}: found no config.json; expected the folder of a trained small model")
    config = LlamaConfig.from_pretrained(folder)
    differing = [name for name in ARCHITECTURE if getattr(config, ARCHITECTURE[name]) != getattr(settings, name)]
    if differing:
        found = ", ".join(f"{name} = {getattr(config, ARCHITECTURE[name])}" for name in differing)
        asked = ", ".join(f"{name} = {getattr(settings, name)}" for name in differing)
        raise StageError(f"training from {folder}: its model has {found}; scratch asks for {asked}; make them agree")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PreTrainedTokenizerFast.from_pretrained(folder), model


def _loss(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Return the mean cross-entropy over all tokens but the first of each row."""
    tensors = [torch.tensor(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_id).to(model.device)
    length = torch.tensor([len(row) for row in rows], device=model.device)
    real = torch.arange(ids.shape[1], device=model.device) < length[:, None]
    hidden = model.model(input_ids=ids[:, :-1], attention_mask=real[:, :-1].long(), use_cache=False).last_hidden_state
    return cross_entropy(model.lm_head(hidden[real[:, 1:]]).float(), ids[:, 1:][real[:, 1:]])
