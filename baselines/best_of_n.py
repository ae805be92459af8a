"""Best-of-n: draw n responses from the initial policy and keep the one with the highest score.

Letters: B prompts, N samples drawn per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import rankdata

from baselines.best_of_n_settings import BestOfNSettings
from rrhf_bench.errors import DataError
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.rewards.reward import RewardModel, require_finite

if TYPE_CHECKING:  # the estimator above all serves the report, which loads no torch
    from rrhf_bench.policy.policy import Policy
    from rrhf_bench.sampling.sampler import Sampler, SamplingSpec


def expected_best_of_n(score_BN: ArrayLike, n: int, *, value_BN: ArrayLike | None = None) -> NDArray[np.float64]:
    """Expected value of the best of n by ``score``, per prompt, (B,): the unbiased estimate from N >= n samples.

    The mean over all C(N, n) subsets of the ``value`` (the score itself by default, or a gold reward) of the subset's
    best by score: sum_i C(i-1, n-1) / C(N, n) value_(i), the samples sorted by score (arXiv 2112.09332). Tied scores
    share their weight equally, which is the average over all orders of the tied, so the result does not depend on the
    order of the samples. Its variance grows as n nears N: for claims keep n <= N / 4. Takes arrays or CPU tensors.
    Raises DataError on other shapes than (B, N), values that are not finite, n outside 1..N.
    """
    score_BN = _finite("score", score_BN)
    value_BN = score_BN if value_BN is None else _finite("value", value_BN)
    if score_BN.ndim != 2 or value_BN.shape != score_BN.shape:
        raise DataError(
            f"expected_best_of_n: found shapes {score_BN.shape} for score and {value_BN.shape} for value; "
            "expected (prompts, samples) for both"
        )
    drawn = score_BN.shape[1]
    if not 1 <= n <= drawn:
        raise DataError(
            f"expected_best_of_n: found n = {n} with {drawn} samples a prompt; expected 1 to {drawn}; draw more samples"
        )
    # The best of a random subset is among the k lowest samples with probability C(k, n) / C(N, n). A sample's weight is
    # the step of that at its score, divided by how many share the score; without ties it is C(i-1, n-1) / C(N, n).
    k = np.arange(n, drawn + 1)
    log_below = gammaln(k + 1) - gammaln(k - n + 1) - gammaln(drawn + 1) + gammaln(drawn - n + 1)
    below = np.concatenate([np.zeros(n), np.exp(log_below)])  # indexed by k = 0..N
    first_BN = rankdata(score_BN, method="min", axis=1).astype(int) - 1  # how many samples score lower
    last_BN = rankdata(score_BN, method="max", axis=1).astype(int)  # how many score no higher
    weight_BN = (below[last_BN] - below[first_BN]) / (last_BN - first_BN)
    return np.asarray((weight_BN * value_BN).sum(axis=1))


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: how far best-of-n is from the policy it draws from, KL(best-of-n || policy).

    Exact where scores have no ties and responses are drawn from a continuum; with ties or few distinct responses it is
    only an upper bound (arXiv 2401.01879), so never read it as a measured KL. Raises DataError on n < 1.
    """
    if n < 1:
        raise DataError(f"best_of_n_kl: found n = {n}; expected at least 1")
    return math.log(n) - (n - 1) / n


def _finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise DataError(
            f"expected_best_of_n: found {name} of shape {array.shape}, empty or not finite; expected finite numbers"
        )
    return array


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
