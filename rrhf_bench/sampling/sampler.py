"""What sampling is: the request, and the interface that vLLM and transformers implement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rrhf_bench.data.dialogue import cut_at_stop
from rrhf_bench.policy.policy import Policy, Tokenization
from rrhf_bench.records import Candidates, Finish, Prompt, Response
from rrhf_bench.seeding import derive_seed


@dataclass(frozen=True)
class SamplingSpec:
    """n responses a prompt. The seed of one of them is derived from (seed, purpose, prompt text, index): it depends on
    no other prompt, no order, no batch and no number of workers."""

    n: int
    temperature: float  # 0 is greedy
    max_new_tokens: int
    seed: int
    purpose: str
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    stop: tuple[str, ...] = ()
    logprobs: bool = False  # of the sampled tokens, under the distribution sampled from
    strategy: Literal["sample"] = "sample"
    source: str = "model"  # the name that the responses carry

    def request_seed(self, prompt: Prompt, index: int) -> int:
        return derive_seed(self.seed, self.purpose, prompt.id, index)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


Progress = Callable[[int, int], None]  # (done, total)


class Sampler(Protocol):
    """A policy's weights behind an engine that generates from them."""

    tokenization: Tokenization

    @property
    def identity(self) -> str:
        """Backend and version: part of an artifact's key, beside the identity of the weights."""
        ...

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        """n responses to each prompt, order kept. Raises DataError for a prompt that leaves no room in the context."""
        ...

    def sync(self, policy: Policy) -> None:
        """Take the policy's weights and forget everything computed under the old ones."""
        ...


def to_response(
    tokenization: Tokenization, spec: SamplingSpec, ids: Sequence[int], logprobs: Sequence[float] | None
) -> Response:
    """A record from sampled ids: text decoded, cut at the first stop string, and how it ended.

    Both samplers go through here, so a reply is cut in one way whichever engine wrote it. The ids are kept uncut: they
    are what was sampled, and what a ratio of probabilities must be computed on.
    """
    ended = bool(ids) and ids[-1] == tokenization.eos_id
    text = tokenization.template.read_response(tokenization.decode(ids[:-1] if ended else ids))
    text, cut = cut_at_stop(text, spec.stop)
    finish: Finish = "stop" if cut else "eos" if ended else "length"
    return Response(text, spec.source, finish, tuple(ids), None if logprobs is None else tuple(logprobs))
