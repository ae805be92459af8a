"""Random Llamas, and prompts with ragged responses and rewards, on which the training step is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rrhf_bench.data.dialogue import Template
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.seeding import generator, torch_seed

PAD, EOS = 0, 1  # ids of the vocabulary that no text here has
SHORTEST, LONGEST = 32, 128  # tokens of a response


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    tied: bool
    vocabulary: int = 32000


# 14.5 million parameters with one matrix for embedding and head, as small models have it; 58.5 million with two, as in
# the Llamas that RRHF trained.
SHAPES: Mapping[str, Shape] = {
    "15M": Shape(hidden=256, layers=6, heads=4, ffn=1024, tied=True),
    "60M": Shape(hidden=512, layers=8, heads=8, ffn=1408, tied=False),
    "tiny": Shape(hidden=64, layers=2, heads=2, ffn=128, tied=True, vocabulary=512),
}


@dataclass(frozen=True)
class Group:
    """A prompt with k responses and their rewards, no two of them equal: what one step trains on."""

    query: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]

    @property
    def batch(self) -> ResponseBatch:
        """Made anew each time: nothing that it remembers is carried from step to step."""
        return ResponseBatch((self.query,), self.responses, (0,) * len(self.responses))

    @property
    def padded_length(self) -> int:
        """L, the longest query + response: what the released code pads to and divides by."""
        return len(self.query) + max(map(len, self.responses))


@dataclass(frozen=True)
class Workload:
    """Steps over one prompt each, one for every length in ``queries``; their times and losses are added up.

    ``cut`` bounds query + response as the released code does, in tokens.
    """

    name: str
    words: str
    model: str  # of SHAPES
    k: int
    queries: tuple[int, ...]
    cut: int | None = None
    dtype: torch.dtype = torch.float32
    responses: tuple[int, int] = (SHORTEST, LONGEST)  # bounds of their lengths, in tokens, both possible
    vocabulary: int | None = None  # another than the model's

    @property
    def shape(self) -> Shape:
        shape = SHAPES[self.model]
        return replace(shape, vocabulary=self.vocabulary) if self.vocabulary else shape

    def quick(self) -> Workload:
        """The same at a size that says whether everything runs, and nothing about speed."""
        return replace(
            self,
            model="tiny",
            k=min(self.k, 4),
            queries=tuple(max(2, n // 16) for n in self.queries),
            cut=self.cut and self.cut // 16,
            responses=(1, 8),
            vocabulary=None,
        )

    def groups(self, seed: int) -> list[Group]:
        """The prompts of the steps. Lengths of responses are uniform within bounds, then cut; tokens are uniform."""
        return [self._group(generator(seed, "benchmark", self.name, step), n) for step, n in enumerate(self.queries)]

    def _group(self, random: Any, query: int) -> Group:
        low, high = self.responses
        lengths = random.integers(low, high + 1, self.k)
        if self.cut is not None:
            lengths = lengths.clip(max=self.cut - query)

        def tokens(n: int) -> tuple[int, ...]:
            return tuple(random.integers(EOS + 1, self.shape.vocabulary, n).tolist())

        rewards = tuple(float(rank) for rank in random.permutation(self.k))
        return Group(tokens(query), tuple(map(tokens, lengths)), rewards)


def make_model(shape: Shape, *, seed: int, dtype: torch.dtype, device: torch.device, context: int = 4096) -> Any:
    """A random Llama under PyTorch's scaled-dot-product attention, the same for the same seed.

    Weights are drawn twice as wide as Llama's default: attention and predictions are then far enough from uniform for a
    wrong mask or position to show in the loss.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.04,
        attn_implementation="sdpa",
    )
    with torch_seed(seed, "benchmark", "weights"):
        return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def make_tokenization(vocabulary: int) -> Tokenization:
    """A tokenizer of that many made-up words, for a policy that is fed ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return Tokenization(tokenizer, Template(), "benchmark")


def padded_rows(group: Group, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels), each (k, L): the prompt repeated before every response, padded on the right.

    ``labels[i, t]`` is the token that position t of row i predicts where that is one of a response, else IGNORE.
    """
    rows = [torch.tensor(group.query + response) for response in group.responses]
    pad = torch.nn.utils.rnn.pad_sequence
    ids_KL = pad(rows, batch_first=True, padding_value=PAD)
    attention_KL = pad([torch.ones_like(row) for row in rows], batch_first=True)
    labels = [row.roll(-1) for row in rows]
    for label in labels:
        label[: len(group.query) - 1] = IGNORE
        label[-1] = IGNORE
    label_KL = pad(labels, batch_first=True, padding_value=IGNORE)
    return ids_KL.to(device), attention_KL.to(device), label_KL.to(device)


IGNORE = -100  # the label of a position that is not scored


def total_tokens(groups: Sequence[Group]) -> dict[str, int]:
    """Return the tokens that the steps of a workload feed to a model in padded rows and in packs."""
    return {
        "padded_tokens": sum(group.padded_length * len(group.responses) for group in groups),
        "packed_tokens": sum(group.batch.fed(packed=True) for group in groups),
    }
