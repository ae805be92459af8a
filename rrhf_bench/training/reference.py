"""Token log-probs of training responses under the frozen initial policy: computed once, then data.

A loss that compares the policy with its initial state reads them from its examples, so no second model is in memory
while it trains, and all methods that start from one policy compare with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rrhf_bench.policy.policy import Policy
from rrhf_bench.records import Candidates, Prompt, Response

Key = tuple[str, str]  # of a prompt, and of what decides a response's tokens


class ResponseLogprobs:
    """The (T,) float32 token log-probs of responses in nats, by prompt and response."""

    def __init__(self, rows: Mapping[Key, NDArray[np.float32]]) -> None:
        self._rows = dict(rows)

    def of(self, prompt: Prompt, response: Response) -> NDArray[np.float32]:
        """Return the log-probs of a response's tokens. Raises KeyError if they were not computed."""
        return self._rows[_key(prompt, response)]

    def __contains__(self, row: tuple[Prompt, Response]) -> bool:
        return _key(*row) in self._rows

    def __or__(self, other: ResponseLogprobs) -> ResponseLogprobs:
        return ResponseLogprobs({**self._rows, **other._rows})

    def write(self, folder: Path) -> None:
        """Write ``reference.npy``, the log-probs of all responses one behind the other, and ``reference.json``, which
        lists each response's prompt, id and number of tokens in the same order."""
        values = [*self._rows.values(), np.zeros(0, np.float32)]
        np.save(folder / "reference.npy", np.concatenate(values))
        lines = [[*key, len(value)] for key, value in self._rows.items()]
        (folder / "reference.json").write_text(json.dumps(lines), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ResponseLogprobs:
        """Return what ``write`` has written into a folder."""
        lines = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        ends = np.cumsum([length for _, _, length in lines], dtype=np.int64)[:-1]
        parts = np.split(np.load(folder / "reference.npy"), ends)
        return cls({(prompt, response): part for (prompt, response, _), part in zip(lines, parts, strict=bool(lines))})


@torch.no_grad()
def response_logprobs(
    policy: Policy,
    groups: Iterable[Candidates],
    *,
    max_length: int,
    batch: int = 64,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> ResponseLogprobs:
    """Return the log-probs of every response that has tokens under the present weights of a policy.

    Equal responses share one value: computed in two batches, they would differ by rounding and be ranked. Responses are
    cut where prompt and response exceed ``max_length`` tokens; prompts that leave no room are left out, as they are in
    training. ``batch`` is the number of responses in a pass.
    """
    tokenization = policy.tokenization
    rows = {
        _key(group.prompt, response): (group.prompt, response)
        for group in groups
        if len(tokenization.prompt_ids(group.prompt)) < max_length
        for response in group.responses
        if tokenization.response_ids(response.text, ended=response.ended)
    }
    keys, found = list(rows), {}
    for start in range(0, len(keys), batch):
        part = keys[start : start + batch]
        responses = tokenization.batch([rows[key] for key in part], max_length)
        logp_BT = policy.token_logprobs(responses).cpu()
        for key, logp_T, length in zip(part, logp_BT, responses.lengths, strict=True):
            found[key] = logp_T[:length].numpy().astype(np.float32)
        progress(start + len(part), len(keys))
    return ResponseLogprobs(found)


def _key(prompt: Prompt, response: Response) -> Key:
    return prompt.id, hashlib.sha256(f"{int(response.ended)}{response.text}".encode()).hexdigest()[:16]
