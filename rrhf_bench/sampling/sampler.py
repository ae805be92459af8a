"""The sampling request, and the interface that vLLM and transformers implement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rrhf_bench.data.dialogue import cut_at_stop
from rrhf_bench.errors import DataError
from rrhf_bench.policy.policy import Policy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates, Finish, Prompt, Response
from rrhf_bench.seeding import derive_seed
from rrhf_bench.settings.candidates import Strategy


@dataclass(frozen=True)
class SamplingSpec:
    """A request for n responses to each prompt. The seed of one of them is derived from (seed, purpose, prompt text,
    index), so it depends on no other prompt, order, batch or number of workers.

    The strategies "beam" and "diverse-beam" search instead: their n = ``beams`` responses come best first, and
    temperature, top-p and top-k have no effect. Stop strings cut what they found.
    """

    n: int
    temperature: float  # 0 is greedy
    max_new_tokens: int
    seed: int
    purpose: str
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    stop: tuple[str, ...] = ()
    logprobs: bool = False  # of the sampled tokens, under the distribution sampled from
    strategy: Strategy = "sample"
    source: str = "model"  # the name that the responses carry
    beams: int = 4
    groups: int = 1  # of equal size; 1 is plain beam search
    diversity_penalty: float = 1.0  # between groups

    def __post_init__(self) -> None:
        assert self.strategy == "sample" or (self.n == self.beams and not self.logprobs), "a search returns its beams"
        assert self.strategy != "beam" or self.groups == 1, "plain beam search has one group"

    def request_seed(self, prompt: Prompt, index: int) -> int:
        return derive_seed(self.seed, self.purpose, prompt.id, index)

    @property
    def greedy(self) -> bool:
        """True if each token is the most likely one, so that nothing is drawn."""
        return self.temperature == 0.0

    @property
    def truncated(self) -> bool:
        """True if top-k or top-p leaves tokens out, so that draws are not from the policy's own distribution."""
        return self.top_k > 0 or self.top_p < 1.0


Progress = Callable[[int, int], None]  # (done, total)


class Sampler(Protocol):
    """A policy's weights behind an engine that generates from them."""

    @property
    def tokenization(self) -> Tokenization:
        """Return the tokenization of the policy whose weights it holds."""
        ...

    @property
    def identity(self) -> str:
        """Backend and version: part of an artifact's key, beside the identity of the weights."""
        ...

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        """Return n responses to each prompt, in order. Raises DataError for a prompt that leaves no room to reply."""
        ...

    def sync(self, policy: Policy) -> None:
        """Load weights and tokenization of a policy of the same architecture, and forget what the old ones computed."""
        ...


def fitting_ids(tokenization: Tokenization, prompt: Prompt, max_new_tokens: int, limit: int) -> tuple[int, ...]:
    """Return the prompt's ids. Raises DataError if there are none, or no room for the reply within ``limit``."""
    ids = tokenization.prompt_ids(prompt)
    if not ids:
        raise DataError(f"prompt {prompt.id}: has no tokens, so nothing can follow; drop it")
    if len(ids) + max_new_tokens > limit:
        raise DataError(
            f"prompt {prompt.id}: {len(ids)} tokens and {max_new_tokens} new ones exceed the context of {limit}; "
            "drop the prompt or lower max_new_tokens"
        )
    return ids


def to_response(
    tokenization: Tokenization,
    spec: SamplingSpec,
    ids: Sequence[int],
    logprobs: Sequence[float] | None,
    *,
    ended: bool | None = None,
) -> Response:
    """Return the record of sampled ids: text decoded, cut at the first stop string, and how it ended.

    The ids are kept uncut, because a ratio of probabilities must be computed on them. Without ``ended``, the reply has
    ended if its last id is one of the tokenization's ``end_ids``.
    """
    if ended is None:
        ended = bool(ids) and ids[-1] in tokenization.end_ids
    text = tokenization.decode(ids[:-1]) if ended else tokenization.decode_cut(ids)
    text, cut = cut_at_stop(tokenization.template.read_response(text), spec.stop)
    finish: Finish = "stop" if cut else "eos" if ended else "length"
    return Response(text, spec.source, finish, tuple(ids), None if logprobs is None else tuple(logprobs))
