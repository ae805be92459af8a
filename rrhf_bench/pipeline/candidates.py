"""Candidates put together from samples and from the data set's own replies. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rrhf_bench.records import Candidates, Preference, Response


def pair_candidates(pairs: Sequence[Preference]) -> list[Candidates]:
    """The data set's own two replies as candidates."""
    return [
        Candidates(pair.prompt, (Response(pair.chosen, "chosen"), Response(pair.rejected, "rejected")))
        for pair in pairs
    ]


def assemble(
    sources: Sequence[str], sampled: Sequence[Candidates] | None, pairs: Sequence[Candidates]
) -> list[Candidates]:
    """One group a prompt, its responses in the order of ``sources``: "model" (all samples), "chosen", "rejected"."""
    by_prompt = {row.prompt: row.responses for row in sampled or ()}
    groups = []
    for row in pairs:
        pool: Mapping[str, tuple[Response, ...]] = {
            "model": by_prompt.get(row.prompt, ()),
            **{response.source: (response,) for response in row.responses},
        }
        groups.append(Candidates(row.prompt, tuple(response for source in sources for response in pool[source])))
    return groups
