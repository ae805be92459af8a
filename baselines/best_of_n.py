"""Best-of-n: draw n responses from the initial policy and keep the one with the highest score.

The estimator and the KL bound stand in ``rrhf_bench/evaluation/statistics.py`` and are offered here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.best_of_n_settings import BestOfNSettings
from rrhf_bench.errors import DataError
from rrhf_bench.evaluation.statistics import best_of_n_kl, expected_best_of_n
from rrhf_bench.policy.policy import Policy
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.rewards.reward import RewardModel, require_finite
from rrhf_bench.sampling.sampler import Sampler, SamplingSpec

__all__ = ["BestOfN", "best_of_n_kl", "expected_best_of_n"]


class BestOfN:
    """Best-of-n as an InferenceMethod: wraps any sampler in one that draws n and keeps the best-scored."""

    def __init__(self, settings: BestOfNSettings) -> None:
        self.settings = settings

    def wrap(self, sampler: Sampler, reward: RewardModel) -> Sampler:
        return _BestOfNSampler(sampler, reward, self.settings.n)


class _BestOfNSampler:
    def __init__(self, sampler: Sampler, reward: RewardModel, n: int) -> None:
        self.tokenization = sampler.tokenization
        self.identity = f"best of {n} of {sampler.identity}"
        self._sampler, self._reward, self._n = sampler, reward, n

    def sync(self, policy: Policy) -> None:
        self._sampler.sync(policy)

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        """Return spec.n responses a prompt, each the best of n draws of its own; of equal scores the first.

        Raises DataError for greedy decoding, Diverged if a score is not finite.
        """
        if spec.greedy:
            raise DataError("best_of_n: greedy decoding gives n equal replies; sample at a temperature above 0")
        drawn = self._sampler.sample(prompts, replace(spec, n=spec.n * self._n))
        pairs = [(row.prompt, response) for row in drawn for response in row.responses]
        asked, texts = [prompt for prompt, _ in pairs], [response.text for _, response in pairs]
        scores = require_finite(self._reward.score(asked, texts), asked, "best_of_n", texts)
        best = scores.reshape(len(drawn), spec.n, self._n).argmax(-1)
        return [
            replace(row, responses=tuple(row.responses[i * self._n + b] for i, b in enumerate(best_of_row)))
            for row, best_of_row in zip(drawn, best.tolist(), strict=True)
        ]
