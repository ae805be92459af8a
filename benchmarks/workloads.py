"""Random Llamas, and prompts with ragged responses and rewards, on which the training step is measured.

Letters: K responses of a prompt, L the longest prompt + response.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rrhf_bench.data.dialogue import Template
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.seeding import generator, torch_seed

PAD, EOS = 0, 1  # ids of the vocabulary that no text here has
IGNORE = -100  # the label of a position that is not scored
CONTEXT = 4096


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
    """A prompt with K responses and their rewards, no two of them equal: the data of one step."""

    query: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]

    @property
    def batch(self) -> ResponseBatch:
        """Return a new batch at each call, so that nothing that a batch caches is carried from step to step."""
        return ResponseBatch((self.query,), self.responses, (0,) * len(self.responses))

    @property
    def padded_length(self) -> int:
        """Return L, to which the released code pads and by which it divides."""
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
    responses: tuple[int, int] = (32, 128)  # bounds of their lengths, in tokens, both possible
    vocabulary: int | None = None  # another than the model's

    @property
    def shape(self) -> Shape:
        shape = SHAPES[self.model]
        return replace(shape, vocabulary=self.vocabulary) if self.vocabulary else shape

    def quick(self) -> Workload:
        """Return the workload at a size that shows if everything runs, and nothing about speed."""
        queries, cut = tuple(max(2, n // 16) for n in self.queries), self.cut and self.cut // 16
        return replace(
            self, model="tiny", k=min(self.k, 4), queries=queries, cut=cut, responses=(1, 8), vocabulary=None
        )

    def groups(self, seed: int) -> list[Group]:
        """Return the data of the steps. Lengths of responses are uniform within bounds, then cut; tokens uniform."""
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


def make_model(shape: Shape, *, seed: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a random Llama under PyTorch's scaled-dot-product attention, the same for the same seed.

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
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.04,
        attn_implementation="sdpa",
    )
    with torch_seed(seed, "benchmark", "weights"):
        return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def make_tokenization() -> Tokenization:
    """Return a tokenization for a policy that is fed ids: it knows the special tokens and no word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return Tokenization(tokenizer, Template(), "benchmark")


def padded_rows(group: Group, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, attention mask, labels), each (K, L): the prompt before every response, padded on the right.

    ``label_KL[i, t]`` is the token that position t of row i predicts if that token is one of a response, else IGNORE.
    """
    rows = [torch.tensor(group.query + response) for response in group.responses]
    labels = [row.roll(-1) for row in rows]
    for label in labels:
        label[: len(group.query) - 1] = IGNORE
        label[-1] = IGNORE
    ids_KL, attention_KL, label_KL = (
        torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=value).to(device)
        for found, value in ((rows, PAD), ([torch.ones_like(row) for row in rows], 0), (labels, IGNORE))
    )
    return ids_KL, attention_KL, label_KL
