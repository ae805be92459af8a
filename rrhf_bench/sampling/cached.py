"""Left-padded rows that grow by a token at a time, with their KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MEASURED_TOKENS = 4  # of the pass that shows how large a model's KV cache is


@torch.no_grad()
def cache_bytes(model: Any, length: int) -> int:
    """Return the bytes of keys and values of one sequence of ``length`` tokens in the model's own dtype.

    The result is 0 for a model that caches no keys and values. Layers with a sliding window count as if they kept all.
    """
    ids_1L = torch.zeros((1, MEASURED_TOKENS), dtype=torch.long, device=model.device)
    cache = getattr(model(input_ids=ids_1L, use_cache=True), "past_key_values", None)
    parts = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor)) * length // MEASURED_TOKENS


class CachedRows:
    """N sequences of token ids under a causal language model, of which the cache holds all but the last tokens.

    Shapes: N rows, L positions, V vocabulary.
    """

    def __init__(self, model: Any, prompt_ids: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache

        width = max(map(len, prompt_ids))
        left_N = torch.tensor([width - len(ids) for ids in prompt_ids])
        self.model = model
        # Any id pads: what is masked has no weight. A tokenizer without a pad token can be sampled from.
        self._new_NL = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompt_ids])
        self._mask_NL = (torch.arange(width) >= left_N[:, None]).long()
        self._cache: Any = DynamicCache(config=model.config)

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Return the (N, V) logits of each row's next token."""
        device = self.model.device
        position_NL = (self._mask_NL.cumsum(-1) - 1).clamp(min=0)[:, -self._new_NL.shape[1] :]
        return self.model(
            input_ids=self._new_NL.to(device),
            attention_mask=self._mask_NL.to(device),
            position_ids=position_NL.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def repeat(self, times: int) -> None:
        """Repeat each row, its copies side by side."""
        index = torch.arange(len(self._mask_NL)).repeat_interleave(times)
        self._new_NL = self._new_NL[index]
        self._select(index)

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Continue with the given rows in their order, each by its token; rows may be left out or repeated."""
        if list(rows) != list(range(len(self._mask_NL))):
            self._select(torch.tensor(rows, dtype=torch.long))
        self._mask_NL = torch.cat([self._mask_NL, self._mask_NL.new_ones(len(rows), 1)], -1)
        self._new_NL = torch.tensor(tokens)[:, None]

    def _select(self, index: Tensor) -> None:
        """Replace the rows that mask and cache hold by some of them."""
        self._mask_NL = self._mask_NL[index]
        # The cache's other ways to do so know no states but keys and values: not those of linear attention or Mamba.
        self._cache.reorder_cache(index.to(self.model.device))
