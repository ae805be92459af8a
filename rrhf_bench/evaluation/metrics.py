"""What a table prints, computed from records alone: no model, no random draw.

Shares lie in [0, 1], lengths are in tokens, log-likelihoods and KL in nats. What was not measured is None, never 0; a
quantity measured on some replies of a row and not on others raises DataError, because a mean over the rest would
compare different prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rrhf_bench.errors import DataError
from rrhf_bench.records import Candidates, Evaluated


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``pooled`` = exp(total nll / total tokens), the primary one; ``per_text`` the mean of each text's own perplexity;
    ``empty`` texts have no token, so they are in neither."""

    pooled: float
    per_text: float
    empty: int


@dataclass(frozen=True, slots=True)
class CandidateStatistics:
    """What a method had to learn from (arXiv 2304.05302, Table 6) and how much of it carried no ranking signal."""

    prompts: int
    responses: int
    mean: float  # over all responses pooled
    max: float  # mean over prompts of the prompt's best score
    std: float  # population std of all responses pooled
    within_std: float  # mean over prompts of the population std of the prompt's own scores
    pairs: int  # unordered pairs of responses to the same prompt
    ties: int  # of these, those with equal scores: no term in a ranking loss
    all_equal: int  # prompts without any ranked pair: all scores equal, or a single response
    duplicates: int  # responses that repeat the text of an earlier one to the same prompt


def distinct_n(texts: Iterable[str], n: int = 2) -> float | None:
    """Distinct n-grams over all n-grams of all texts together, words split at white space (arXiv 1510.03055).

    None where no text has n words. It falls with the amount of text, so compare only rows on the same prompts, and look
    at the lengths beside it.
    """
    if n < 1:
        raise DataError(f"distinct_n: found n = {n}; expected at least 1")
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        counts.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(counts) / counts.total() if counts else None


def perplexity(evaluated: Sequence[Evaluated]) -> Perplexity | None:
    """Perplexity of the replies given their prompts, under the perplexity model, per token of *its* tokenizer.

    None where no reply was measured, or none has a token. Raises DataError on no replies, or only some measured.
    """
    nll = _all_or_none("nll", evaluated)
    tokens = _all_or_none("nll_tokens", evaluated)
    if nll is None or tokens is None or not sum(tokens):
        return None
    full = [(loss, count) for loss, count in zip(nll, tokens, strict=True) if count]
    return Perplexity(
        pooled=math.exp(math.fsum(loss for loss, _ in full) / sum(tokens)),
        per_text=math.fsum(math.exp(loss / count) for loss, count in full) / len(full),
        empty=len(nll) - len(full),
    )


def fake_turn_share(evaluated: Sequence[Evaluated]) -> float:
    """Share of replies that went on to write the next speaker's turn and were cut there (finish "stop")."""
    return _mean("fake_turn_share", [reply.finish == "stop" for reply in evaluated])


def length_share(evaluated: Sequence[Evaluated]) -> float:
    """Share of replies that the token cap cut (finish "length")."""
    return _mean("length_share", [reply.finish == "length" for reply in evaluated])


def mean_length(evaluated: Sequence[Evaluated]) -> float:
    """Mean length of the replies in the policy's tokens, end-of-text included."""
    return _mean("mean_length", [reply.tokens for reply in evaluated])


def mean_kl(evaluated: Sequence[Evaluated]) -> float | None:
    """Mean over replies of the summed log-ratio to the initial policy (k1): an estimate of the KL per reply, which can
    be negative by chance. None where it was not measured."""
    kl = _all_or_none("kl", evaluated)
    return None if kl is None else _mean("mean_kl", kl)


def feature_means(evaluated: Sequence[Evaluated]) -> dict[str, float]:
    """Mean of each feature, in the records' order; {} where they hold none. Raises DataError where replies differ in
    which features they have."""
    features: list[Mapping[str, int]] | None = _all_or_none("features", evaluated)
    if features is None:
        return {}
    names = list(features[0])
    for counts in features:
        if set(counts) != set(names):
            raise DataError(
                f"feature_means: found features {sorted(counts)} beside {sorted(names)}; expected the same everywhere"
            )
    return {name: _mean("feature_means", [counts[name] for counts in features]) for name in names}


def candidate_statistics(candidates: Sequence[Candidates]) -> CandidateStatistics:
    """Scores of the training responses.

    Table 6's std must be over all responses pooled: with k = 2 the within-prompt population std is half the gap, so its
    mean would be max - mean = 0.22 in the P rows, where the paper prints 0.79. Both std here are population ones
    (divided by the number of responses): they describe this set. Raises DataError on no candidates, or a prompt without
    responses.
    """
    groups = _scores(candidates)
    pooled = np.concatenate(groups)
    repeats = [Counter(group.tolist()).values() for group in groups]
    return CandidateStatistics(
        prompts=len(groups),
        responses=len(pooled),
        mean=float(pooled.mean()),
        max=_mean("candidate_statistics", [group.max() for group in groups]),
        std=float(pooled.std()),
        within_std=_mean("candidate_statistics", [group.std() for group in groups]),
        pairs=sum(math.comb(len(group), 2) for group in groups),
        ties=sum(math.comb(count, 2) for counts in repeats for count in counts),
        all_equal=sum(len(counts) == 1 for counts in repeats),
        duplicates=sum(len(c.responses) - len({response.text for response in c.responses}) for c in candidates),
    )


def _scores(candidates: Sequence[Candidates]) -> list[np.ndarray]:
    for group in candidates:
        if not group.responses:
            where = f"the prompt that ends {group.prompt.text[-40:]!r}"
            raise DataError(f"candidates: found no response to {where}; expected at least one")
    if not candidates:
        raise DataError("candidates: found no prompts; expected at least one")
    return [np.array(group.scores) for group in candidates]


def _all_or_none(name: str, evaluated: Sequence[Evaluated]) -> list[Any] | None:
    """The field of every reply, or None where no reply has it."""
    if not evaluated:
        raise DataError(f"{name}: found no replies; expected at least one")
    values = [getattr(reply, name) for reply in evaluated]
    missing = sum(value is None for value in values)
    if 0 < missing < len(values):
        raise DataError(
            f"{name}: found {missing} of {len(values)} replies without it; expected all or none; evaluate them alike"
        )
    return None if missing else values


def _mean(where: str, values: Sequence[float]) -> float:
    if not values:
        raise DataError(f"{where}: found no values; expected at least one")
    return math.fsum(values) / len(values)
