"""Which preference pairs a model could itself have written, by the perplexity of their replies (arXiv 2410.01789).

The paper's thresholds are not published; ``quantile`` and ``ratio`` are options, each beside a random subset of equal
size. Shape letters: P pairs; 2 is (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.errors import DataError
from rrhf_bench.records import Preference
from rrhf_bench.settings.reward import PerplexityFilterSettings


def typical_pairs(nll_P2: NDArray[np.float64], settings: PerplexityFilterSettings) -> NDArray[np.bool_]:
    """Return (P,): True for the pairs that pass. ``nll_P2`` is the mean negative log-likelihood of a token.

    ``quantile``: neither reply is above that quantile of all 2P replies. ``ratio``: the higher perplexity of the pair
    is at most so many times the lower. A pair that stays passes both.
    """
    kept_P = np.ones(len(nll_P2), dtype=bool)
    if settings.quantile is not None:
        kept_P &= nll_P2.max(axis=1) <= np.quantile(nll_P2, settings.quantile)
    if settings.ratio is not None:
        kept_P &= np.ptp(nll_P2, axis=1) <= np.log(settings.ratio)
    return kept_P


def filter_pairs(
    pairs: Sequence[Preference],
    nll_P2: NDArray[np.float64],
    settings: PerplexityFilterSettings,
    rng: np.random.Generator,
) -> tuple[list[Preference], dict[str, Any]]:
    """Return (the pairs that stay, in their order; what the pairs were before and after).

    Raises DataError if no pair passes.
    """
    kept_P = typical_pairs(nll_P2, settings)
    count = int(kept_P.sum())
    if count == 0:
        keys = ", ".join(f"{key} = {value}" for key in ("quantile", "ratio") if (value := getattr(settings, key)))
        raise DataError(f"filter: found no pair of {len(pairs)} that passes {keys}; raise them, or remove the filter")
    if settings.keep == "random":
        kept_P = np.zeros(len(pairs), dtype=bool)
        kept_P[rng.choice(len(pairs), size=count, replace=False)] = True
    everything = np.ones_like(kept_P)
    about = {"before": _describe(pairs, nll_P2, everything), "after": _describe(pairs, nll_P2, kept_P)}
    return [pair for pair, kept in zip(pairs, kept_P, strict=True) if kept], about


def _describe(pairs: Sequence[Preference], nll_P2: NDArray[np.float64], of_P: NDArray[np.bool_]) -> dict[str, float]:
    words_P2 = np.array([[len(reply.split()) for reply in (p.chosen, p.rejected or "")] for p in pairs])
    medians = np.exp(np.median(nll_P2[of_P], axis=0)).tolist()
    return {
        "pairs": int(of_P.sum()),
        **dict(zip(("chosen_perplexity", "rejected_perplexity"), medians, strict=True)),
        **dict(zip(("chosen_words", "rejected_words"), words_P2[of_P].mean(axis=0).tolist(), strict=True)),
        "chosen_likelier": float((nll_P2[of_P, 0] < nll_P2[of_P, 1]).mean()),
    }
