"""Beam search and diverse (group) beam search, on any causal language model of transformers.

Token for token and score for score what transformers 4.46 returns for ``generate(num_beams, num_beam_groups,
diversity_penalty, num_return_sequences=num_beams, max_new_tokens)`` with its defaults ``length_penalty=1.0``,
``early_stopping=False`` and ``do_sample=False``; later releases have no groups. Diverse beam search is 1610.02424 with
the Hamming penalty.

There is no temperature: without ``do_sample`` that release has none in beam search, so the 0.8 which 2304.05302 names
for its diverse beams changed nothing.

Letters: P prompts still searched, G groups of a prompt, W beams of a group, V vocabulary, C candidates of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rrhf_bench.sampling.cached import CachedRows

# At first a group's beams hold the same text, so all but one start where nothing of theirs is chosen.
UNUSED = -1e9


@dataclass(frozen=True)
class Hypothesis:
    """A reply found by search."""

    token_ids: tuple[int, ...]  # end-of-text included where it ended
    score: float  # sum of log-probs less diversity penalties, over the number of tokens
    ended: bool


class _Beam(NamedTuple):
    """A reply being written."""

    total: float  # of log-probs less diversity penalties
    token_ids: tuple[int, ...] = ()
    parent: int = 0  # the beam of its group that it continues


class _Group:
    """The W beams of one group of one prompt, and its best W replies that have ended."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.beams = [_Beam(0.0)] + [_Beam(UNUSED)] * (width - 1)
        self.found: list[Hypothesis] = []
        self.done = False

    def advance(self, candidates: Sequence[tuple[float, int, int]], eos_ids: Sequence[int]) -> None:
        """Advance by one step. The candidates are (total, parent, token), best first: those that end are found, and the
        first W of the others are the new beams."""
        before, self.beams = self.beams, []
        for rank, (total, parent, token) in enumerate(candidates):
            if token not in eos_ids:
                self.beams.append(_Beam(total, (*before[parent].token_ids, token), parent))
            elif rank < self.width:  # an ending counts only among the best W of all
                # Whichever token ended it, the first is written.
                self._find(total, (*before[parent].token_ids, eos_ids[0]), ended=True)
            if len(self.beams) == self.width:
                break
        # early_stopping=False: done once the worst found is as good as the best candidate at its present length.
        best, length = candidates[0][0], len(self.beams[0].token_ids)
        self.done = len(self.found) == self.width and self._worst().score >= best / length

    def pad(self, pad_id: int) -> None:
        """Advance a group that is done: padding, as in any row of a batch that has ended."""
        self.beams = [_Beam(0.0, (pad_id,))] * self.width

    def close(self) -> list[Hypothesis]:
        """Return the W replies of the group, including those cut by the length cap unless it is done."""
        for beam in [] if self.done else self.beams:
            self._find(beam.total, beam.token_ids, ended=False)
        return self.found

    def _find(self, total: float, token_ids: tuple[int, ...], *, ended: bool) -> None:
        new = Hypothesis(token_ids, total / len(token_ids), ended)
        if len(self.found) == self.width:
            worst = self._worst()
            if new.score <= worst.score:
                return
            self.found.remove(worst)
        self.found.append(new)

    def _worst(self) -> Hypothesis:
        return min(self.found, key=lambda hypothesis: hypothesis.score)


@torch.no_grad()
def beam_search(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    beams: int,
    groups: int = 1,
    diversity_penalty: float = 0.0,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
) -> list[list[Hypothesis]]:
    """Return ``beams`` replies to each prompt, those of all its groups together, best first.

    In every step the groups choose one after the other: a token costs ``diversity_penalty`` for each beam of the
    prompt's earlier groups that has chosen it in this step, the ``pad_id`` of groups that are done included.
    """
    assert beams % groups == 0, (beams, groups)
    width = beams // groups
    searches = [[_Group(width) for _ in range(groups)] for _ in prompt_ids]
    going = searches
    rows = CachedRows(model, prompt_ids)
    logits_NV = rows.next_logits().repeat_interleave(beams, 0)  # the prompt once for all its beams
    rows.repeat(beams)
    for length in range(1, max_new_tokens + 1):
        logp_PGWV = logits_NV.float().log_softmax(-1).view(len(going), groups, width, -1)
        vocabulary = logp_PGWV.shape[-1]
        chosen_PV = torch.zeros_like(logp_PGWV[:, 0, 0])  # by how many beams of the groups so far
        for g in range(groups):
            column = [search[g] for search in going]
            total_PW = logp_PGWV.new_tensor([[beam.total for beam in group.beams] for group in column])
            total_PWV = logp_PGWV[:, g] - diversity_penalty * chosen_PV[:, None] + total_PW[..., None]
            # So many that W of them do not end, whatever does.
            total_PC, place_PC = total_PWV.flatten(1).topk(max(2, 1 + len(eos_ids)) * width)
            for group, total_C, place_C in zip(column, total_PC.tolist(), place_PC.tolist(), strict=True):
                if group.done:
                    group.pad(pad_id)
                else:
                    candidates = [(t, *divmod(place, vocabulary)) for t, place in zip(total_C, place_C, strict=True)]
                    group.advance(candidates, eos_ids)
            token_PW = place_PC.new_tensor([[beam.token_ids[-1] for beam in group.beams] for group in column])
            chosen_PV.scatter_add_(1, token_PW, chosen_PV.new_ones(token_PW.shape))
        open_P = [p for p, search in enumerate(going) if not all(group.done for group in search)]
        if not open_P or length == max_new_tokens:
            break
        places = [(p, g, beam) for p in open_P for g in range(groups) for beam in going[p][g].beams]
        rows.extend(
            [(p * groups + g) * width + beam.parent for p, g, beam in places],
            [beam.token_ids[-1] for _, _, beam in places],
        )
        going = [going[p] for p in open_P]
        logits_NV = rows.next_logits()
    # Equal scores: the one found last is first, as there.
    return [
        sorted((found for group in search for found in group.close()), key=lambda found: found.score)[::-1]
        for search in searches
    ]
