"""Sampling with transformers: slower than vLLM, everywhere at hand, each request from its own generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rrhf_bench.errors import DataError
from rrhf_bench.policy.policy import Policy, TransformersPolicy
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import SamplingSpec, to_response


@dataclass
class _Request:
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    place: tuple[int, int]  # (prompt, sample)
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

    def sync(self, policy: Policy) -> None:
        self.policy.model.load_state_dict(dict(policy.state()))

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        requests = []
        for p, prompt in enumerate(prompts):
            ids = self.tokenization.prompt_ids(prompt)
            if len(ids) + spec.max_new_tokens > self.max_model_len:
                raise DataError(
                    f"prompt {prompt.id}: {len(ids)} tokens and {spec.max_new_tokens} new ones exceed the context of "
                    f"{self.max_model_len}; drop the prompt or lower max_new_tokens"
                )
            for index in range(spec.n):
                rng = np.random.default_rng(spec.request_seed(prompt, index))
                requests.append(_Request(prompt, ids, (p, index), rng))
        queue = sorted(requests, key=lambda request: len(request.prompt_ids))  # rows of like length pad less
        for start in range(0, len(queue), self.batch):
            self._finish(queue[start : start + self.batch], spec)
            if self.progress is not None:
                self.progress(min(start + self.batch, len(queue)), len(queue))
        rows = iter(sorted(requests, key=lambda request: request.place))
        return [
            Candidates(
                prompt,
                tuple(
                    to_response(self.tokenization, spec, row.ids, row.logprobs if spec.logprobs else None)
                    for row in islice(rows, spec.n)
                ),
            )
            for prompt in prompts
        ]

    @torch.no_grad()
    def _finish(self, rows: list[_Request], spec: SamplingSpec) -> None:
        """Generate until every row has ended."""
        from transformers import DynamicCache

        model = self.policy.model
        width = max(len(row.prompt_ids) for row in rows)
        left = torch.tensor([width - len(row.prompt_ids) for row in rows])
        ids = torch.tensor(
            [[self.tokenization.pad_id] * int(n) + list(row.prompt_ids) for n, row in zip(left, rows, strict=True)]
        )
        mask = (torch.arange(width) >= left[:, None]).long()
        cache: Any = DynamicCache(config=model.config)
        while rows:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            device = self.policy.device
            logits = model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens, logprobs = _draw(logits, spec, [row.generator for row in rows])
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
            going = [i for i, row in enumerate(rows) if not self._ended(row, spec)]
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                mask, tokens = mask[going], tokens[going]
                cache.batch_select_indices(torch.tensor(going, dtype=torch.long, device=device))
            ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)

    def _ended(self, row: _Request, spec: SamplingSpec) -> bool:
        if row.ids[-1] == self.tokenization.eos_id or len(row.ids) >= spec.max_new_tokens:
            return True
        # A stop string that has just been completed lies in the last few tokens.
        return bool(spec.stop) and any(stop in self.tokenization.decode(row.ids[-12:]) for stop in spec.stop)


def _draw(logits_BV: Tensor, spec: SamplingSpec, generators: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
    """(token_B, logp_B) drawn from softmax(logits / temperature) after top-k and top-p; logp under what was drawn from.

    Inversion in float64 with one uniform number a row and token: a row's draw depends on its own generator alone.
    """
    logits_BV = logits_BV.double().cpu()
    if spec.greedy:
        return logits_BV.argmax(-1), logits_BV.log_softmax(-1).amax(-1)
    logits_BV = logits_BV / spec.temperature
    if 0 < spec.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(spec.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if spec.top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
        drop_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= spec.top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, -torch.inf)
    logp_BV = logits_BV.log_softmax(-1)
    uniform_B1 = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
    cumulative_BV = logp_BV.exp().cumsum(-1)
    token_B = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True).squeeze(-1)
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)
