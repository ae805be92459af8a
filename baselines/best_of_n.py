"""Best-of-n: draw n responses from the initial policy and keep the one with the highest score.

The estimator and the KL bound stand in ``rrhf_bench/evaluation/statistics.py`` and are offered here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.best_of_n_settings import BestOfNSettings
from rrhf_bench.evaluation.statistics import best_of_n_kl, expected_best_of_n
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.rewards.reward import RewardModel, require_finite
from rrhf_bench.sampling.sampler import Sampler, SamplingSpec
from rrhf_bench.sampling.wrapped import WrappedSampler

__all__ = ["BestOfN", "best_of_n_kl", "expected_best_of_n"]


class BestOfN:
    """Best-of-n as an InferenceMethod: wraps any sampler in one that draws n and keeps the best-scored."""

    def __init__(self, settings: BestOfNSettings) -> None:
        self.settings = settings

    def wrap(self, sampler: Sampler, reward: RewardModel) -> Sampler:
        n = self.settings.n

        def draw(prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
            """Return spec.n responses a prompt, each the best of n draws of its own; of equal scores the first.

            They carry no log-probs, because those of the draws are not those of best-of-n. Raises Diverged if a score
            is not finite.
            """
            drawn = sampler.sample(prompts, replace(spec, n=spec.n * n, logprobs=False))
            pairs = [(row.prompt, response) for row in drawn for response in row.responses]
            asked, texts = [prompt for prompt, _ in pairs], [response.text for _, response in pairs]
            scores = require_finite(reward.score(asked, texts), asked, "best_of_n", texts)
            best = scores.reshape(len(drawn), spec.n, n).argmax(-1)
            return [
                replace(row, responses=tuple(row.responses[i * n + b] for i, b in enumerate(best_of_row)))
                for row, best_of_row in zip(drawn, best.tolist(), strict=True)
            ]

        return WrappedSampler(sampler, f"best of {n}", draw, greedy="best_of_n: greedy decoding gives n equal replies")
