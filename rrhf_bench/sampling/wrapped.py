"""A sampler that draws in another way from the weights of another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rrhf_bench.errors import DataError
from rrhf_bench.policy.policy import Policy
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.sampling.sampler import Sampler, SamplingSpec


class WrappedSampler:
    """A sampler whose replies ``draw`` makes of those of another sampler.

    Draws alone can differ from that sampler's. ``greedy`` says why greedy replies do not: asking for them is an error.
    """

    def __init__(
        self,
        sampler: Sampler,
        how: str,
        draw: Callable[[Sequence[Prompt], SamplingSpec], list[Candidates]],
        *,
        greedy: str,
    ) -> None:
        self.tokenization = sampler.tokenization
        self.identity = f"{how} of {sampler.identity}"
        self._sampler, self._draw, self._greedy = sampler, draw, greedy

    def sync(self, policy: Policy) -> None:
        self._sampler.sync(policy)
        self.tokenization = self._sampler.tokenization

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        """Return spec.n responses a prompt. Raises DataError for greedy decoding."""
        if spec.greedy:
            raise DataError(f"{self._greedy}; sample at a temperature above 0")
        return self._draw(prompts, spec)
