"""What the benchmarks of the training step work on: random Llamas, and prompts with ragged responses and rewards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    """A Llama: its parameters are those of embedding, layers and head together."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    tied: bool
    vocabulary: int = 32000

    @property
    def trunk_products(self) -> int:
        """Weights of the linear layers between embedding and head: each is one multiplication a token."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)

    @property
    def head_products(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.trunk_products + norms + self.head_products * (1 if self.tied else 2)


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

    @property
    def response_tokens(self) -> int:
        return sum(map(len, self.responses))

    @property
    def distinct_tokens(self) -> int:
        return len(self.query) + self.response_tokens

    def silent(self, score_K: Tensor) -> frozenset[int]:
        """The responses for which RRHF's loss has no gradient at these scores: not the best, and in as many violated
        pairs on one side as on the other."""
        found = []
        others = list(zip(self.rewards, score_K.tolist(), strict=True))
        for i, (reward, score) in enumerate(others):
            below = sum(r < reward and s > score for r, s in others)  # worse, and yet more probable
            above = sum(r > reward and s < score for r, s in others)
            if below == above and i != self.rewards.index(max(self.rewards)):
                found.append(i)
        return frozenset(found)

    def contradicting(self, score_K: Tensor) -> Group:
        """The same prompt and responses, the best where the score is lowest, and so on: every pair is violated, and of
        an even number of responses none is silent."""
        return replace(self, rewards=tuple((-score_K).argsort().argsort().double().tolist()))

    def first(self, k: int) -> Group:
        """The same prompt with its first k responses."""
        return Group(self.query, self.responses[:k], self.rewards[:k])


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


def model_flops(shape: Shape, query: int, responses: Sequence[int]) -> float:
    """Floating-point operations of a step as 2204.02311 (appendix B) counts them, from the tokens of a query and of its
    responses, each fed once: all of them forward and backward through everything, whoever leaves some of it out.

    6 x (trunk weights x fed tokens + head weights x response tokens) + 12 x layers x hidden x (sum over fed tokens of
    the tokens that each attends to): 2 for each multiply-add, once forward and twice backward; attention has two
    products of ``hidden`` multiply-adds a pair of tokens. Fed are the query once and every response but for its last
    token; only positions that predict a response token meet the head. Norms, softmax, rotations are not counted.
    """
    return _flops(shape, query, query * (query + 1) / 2, 0) + sum(_of_response(shape, query, n) for n in responses)


def useful_flops(shape: Shape, group: Group, silent: Collection[int] = ()) -> float:
    """Those of them that no way to compute the step can do without: responses in ``silent``, by index, have no gradient
    and go forward only, and of the query but its last token the last layer needs keys and values only."""
    query, responses = len(group.query), [len(response) for response in group.responses]
    unasked = query - 1
    beside_keys_and_values = 2 * shape.hidden**2 + 3 * shape.hidden * shape.ffn
    return (
        model_flops(shape, query, responses)
        - sum(_of_response(shape, query, responses[index]) * 2 / 3 for index in silent)
        - 6.0 * beside_keys_and_values * unasked
        - 12.0 * shape.hidden * unasked * (unasked + 1) / 2
    )


def _of_response(shape: Shape, query: int, response: int) -> float:
    fed = response - 1
    return _flops(shape, fed, fed * query + fed * (fed + 1) / 2, response)


def _flops(shape: Shape, fed: int, attended: float, predicted: int) -> float:
    products = shape.trunk_products * fed + shape.head_products * predicted
    return 6.0 * products + 12.0 * shape.layers * shape.hidden * attended


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
    """What the steps of a workload are made of, for the record."""
    return {
        "distinct_tokens": sum(group.distinct_tokens for group in groups),
        "response_tokens": sum(group.response_tokens for group in groups),
        "padded_tokens": sum(group.padded_length * len(group.responses) for group in groups),
    }
