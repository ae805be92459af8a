"""Candidates put together from samples and from the data set's own replies. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rrhf_bench.records import Candidates, Preference, Response
from rrhf_bench.seeding import generator


def pair_candidates(pairs: Sequence[Preference]) -> list[Candidates]:
    """The data set's own replies as candidates: "chosen" and "rejected", or the single "reply"."""
    return [
        Candidates(
            pair.prompt,
            (Response(pair.chosen, "reply", "given" if pair.ended else "length"),)
            if pair.rejected is None
            else (Response(pair.chosen, "chosen"), Response(pair.rejected, "rejected")),
        )
        for pair in pairs
    ]


def assemble(
    sources: Sequence[str], sampled: Mapping[str, Sequence[Candidates]], pairs: Sequence[Candidates]
) -> list[Candidates]:
    """One group a prompt, its responses in the order of ``sources``: names in ``sampled`` (all that it has for the
    prompt) and those of the data set's own replies. A response is called by its source; a source that has none for a
    prompt adds none, and a prompt without any is left out."""
    by_source = {
        source: {row.prompt: tuple(replace(response, source=source) for response in row.responses) for row in rows}
        for source, rows in sampled.items()
    }
    groups = []
    for row in pairs:
        pool: dict[str, tuple[Response, ...]] = {response.source: (response,) for response in row.responses}
        pool |= {source: by_prompt.get(row.prompt, ()) for source, by_prompt in by_source.items()}
        responses = tuple(response for source in sources for response in pool.get(source, ()))
        if responses:
            groups.append(Candidates(row.prompt, responses))
    return groups


def permute_rewards(groups: Sequence[Candidates], seed: int) -> list[Candidates]:
    """Return the groups with the scores of each in a random order, which the seed and the prompt name.

    It is a control: what a method still gains comes from the replies and not from their ranking.
    """
    permuted = []
    for group in groups:
        score_G = generator(seed, "permute rewards", group.prompt.id).permutation(group.scores).tolist()
        responses = (replace(r, score=score) for r, score in zip(group.responses, score_G, strict=True))
        permuted.append(replace(group, responses=tuple(responses)))
    return permuted
