"""Sampling and beam search with transformers, each request from its own generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from rrhf_bench.policy.logprobs import outside_top_p
from rrhf_bench.policy.policy import Policy, TransformersPolicy
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.beam import beam_search
from rrhf_bench.sampling.cached import CachedRows, cache_bytes
from rrhf_bench.sampling.sampler import SamplingSpec, fitting_ids, to_response

# Keys and values of a batch take at most this many bytes, or one prompt is sampled at a time. 7B weights in bfloat16
# cache 0.5 MiB a token: 32,768 tokens, 128 rows of 256. Models of a few million parameters are far below the bound.
CACHE_BYTES = 16 << 30


@dataclass
class _Request:
    prompt_ids: tuple[int, ...]
    generator: np.random.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersSampler:
    """A Sampler over a transformers policy: left-padded batches with a KV cache, rows dropped as they end.

    It holds weights of its own, like any engine: ``sync`` copies a policy's into it.
    """

    def __init__(
        self,
        policy: TransformersPolicy,
        *,
        max_model_len: int,
        batch: int = 128,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.policy = policy.frozen_copy()
        self.tokenization = policy.tokenization
        self.max_model_len = max_model_len
        self.batch = batch
        self.progress = progress
        self.identity = f"{choose_backend('transformers').identity} {policy.model.dtype}".replace("torch.", "")

    def resize(self, max_model_len: int) -> None:
        """Set the most tokens of prompt + reply."""
        self.max_model_len = max_model_len

    @torch.no_grad()
    def sync(self, policy: Policy) -> None:
        """Copy the policy's weights one by one. Both must have the same weights, by name and shape."""
        own = self.policy.model.state_dict()  # references: copying into them changes the model
        for name, value in policy.state():
            weight = own.pop(name)
            assert weight.shape == value.shape, f"{name}: {tuple(value.shape)} into {tuple(weight.shape)}"
            weight.copy_(value)
        assert not own, f"not synced: {', '.join(own)}"
        self.tokenization = policy.tokenization

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        prompt_ids = [
            fitting_ids(self.tokenization, prompt, spec.max_new_tokens, self.max_model_len) for prompt in prompts
        ]
        if spec.strategy != "sample":
            return self._search(prompts, prompt_ids, spec)
        requests = [
            _Request(ids, np.random.default_rng(spec.request_seed(prompt, index)))
            for prompt, ids in zip(prompts, prompt_ids, strict=True)
            for index in range(spec.n)
        ]
        queue = sorted(requests, key=lambda request: len(request.prompt_ids))  # rows of like length pad less
        for part in self._batches([len(request.prompt_ids) + spec.max_new_tokens for request in queue]):
            self._finish(queue[part], spec)
            if self.progress is not None:
                self.progress(part.stop, len(queue))
        replies = iter(
            to_response(self.tokenization, spec, row.ids, row.logprobs if spec.logprobs else None) for row in requests
        )
        return [Candidates(prompt, tuple(islice(replies, spec.n))) for prompt in prompts]

    def _batches(self, lengths: Sequence[int], rows: int = 1) -> Iterator[slice]:
        """Yield the batches of a queue whose items have ``rows`` rows each, of ascending lengths in tokens.

        A batch has at most ``batch`` rows, and the cache of all its tokens takes at most CACHE_BYTES.
        """
        tokens = CACHE_BYTES // max(1, cache_bytes(self.policy.model, 1))
        start = 0
        while start < len(lengths):
            end = min(start + max(1, self.batch // rows), len(lengths))
            while end - start > 1 and (end - start) * rows * lengths[end - 1] > tokens:
                end -= 1
            yield slice(start, end)
            start = end

    def _search(
        self, prompts: Sequence[Prompt], prompt_ids: Sequence[tuple[int, ...]], spec: SamplingSpec
    ) -> list[Candidates]:
        """Return the replies that beam search finds; a group that is done is padded as ``generate`` pads it."""
        model = self.policy.model
        eos_ids = self.tokenization.end_ids
        vocabulary = range(model.config.get_text_config().vocab_size)
        pad_id = model.generation_config.pad_token_id
        pad_id = pad_id if pad_id in vocabulary else eos_ids[0]
        found: dict[int, Candidates] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))  # rows of like length pad less
        for batch in self._batches([len(prompt_ids[i]) + spec.max_new_tokens for i in order], spec.beams):
            part = order[batch]
            replies = beam_search(
                model,
                [prompt_ids[i] for i in part],
                beams=spec.beams,
                groups=spec.groups,
                diversity_penalty=spec.diversity_penalty,
                max_new_tokens=spec.max_new_tokens,
                eos_ids=eos_ids,
                pad_id=pad_id,
            )
            for i, beams in zip(part, replies, strict=True):
                texts = (to_response(self.tokenization, spec, b.token_ids, None, ended=b.ended) for b in beams)
                found[i] = Candidates(prompts[i], tuple(texts))
            if self.progress is not None:
                self.progress(len(found) * spec.beams, len(prompts) * spec.beams)
        return [found[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _finish(self, rows: list[_Request], spec: SamplingSpec) -> None:
        """Generate until every row has ended."""
        cached = CachedRows(self.policy.model, [row.prompt_ids for row in rows])
        while True:
            tokens, logprobs = _draw(cached.next_logits(), spec, [row.generator for row in rows])
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
            going = [i for i, row in enumerate(rows) if not self._ended(row, spec)]
            if not going:
                return
            rows = [rows[i] for i in going]
            cached.extend(going, tokens[going].tolist())

    def _ended(self, row: _Request, spec: SamplingSpec) -> bool:
        if row.ids[-1] in self.tokenization.end_ids or len(row.ids) >= spec.max_new_tokens:
            return True
        if not spec.stop:
            return False
        # A stop string that has just been completed lies in the last tokens, which write a byte each or more.
        last = 12 + max(len(stop.encode()) for stop in spec.stop)
        text = self.tokenization.decode(row.ids[-last:])
        return any(stop in text for stop in spec.stop)


def _draw(logits_BV: Tensor, spec: SamplingSpec, generators: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
    """Return (token_B, logp_B) drawn from softmax(logits / temperature) after top-k and top-p.

    ``logp_B`` is under that truncated distribution. Inversion in float64 with one uniform number a row and token.
    """
    logits_BV = logits_BV.double().cpu()
    if spec.greedy:
        return logits_BV.argmax(-1), logits_BV.log_softmax(-1).amax(-1)
    logits_BV = logits_BV / spec.temperature
    if 0 < spec.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(spec.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if spec.top_p < 1.0:
        logits_BV = logits_BV.masked_fill(outside_top_p(logits_BV, spec.top_p), -torch.inf)
    logp_BV = logits_BV.log_softmax(-1)
    uniform_B1 = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
    cumulative_BV = logp_BV.exp().cumsum(-1)
    token_B = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True).squeeze(-1)
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)
