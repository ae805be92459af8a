"""Report the losses behind a run's numbers: responses that were dropped or cut, rows that failed or collapsed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from rrhf_bench.evaluation.metrics import candidate_statistics
from rrhf_bench.report.table import Table, markdown, number
from rrhf_bench.report.view import View
from rrhf_bench.settings.online import MOST_CLIPPED, OnPolicySettings

# Sizes of what was read or made; every other count is of something that was left out, cut or tied.
SIZES = {
    "examples", "groups", "judged", "kept", "pairs", "prompts", "queries", "refreshes", "responses", "rollouts", "rows",
    "texts",
}  # fmt: skip

RATIO = 0.01  # of the mean ratio before the first step of an iteration, which is 1: ten times what bfloat16 rounds to
KL = 4.0  # nats a token: the initial policy gives an average token under 2% (exp -4) of what the policy gives it
SURE = 0.05  # nats a token: an average token is drawn with 95% (exp -0.05), so no two rollouts differ
VARIED = 0.1  # nats a token, from which falling below SURE is a fall
SHORT = 0.25  # of the first iteration's length
ENDLESS = 0.9  # share of rollouts that the length cap cuts: the policy has forgotten how to end
EXPLAINED = -1.0  # of the returns' variance: the values' errors vary twice as much as guessing the mean would


def collapses(log: Sequence[Mapping[str, float]], most_clipped: float = MOST_CLIPPED) -> list[str]:
    """Return the collapses that an online run's metrics show, in words. ``log`` has one mapping an iteration.

    ``most_clipped`` is the largest sound share of clipped tokens.

    The ratio and the clip fraction are checked in every iteration, the other metrics in the last one. A metric that was
    not recorded is not checked.
    """
    if not log:
        return []
    first, last = log[0], log[-1]
    found = [
        f"{name} is {line[name]} in iteration {i}"
        for i, line in enumerate(log, 1)
        for name in line
        if not math.isfinite(line[name])
    ][:1]

    def worst(name: str, size: str = "largest") -> tuple[int, float] | None:
        """(iteration, value) of the largest deviation or value; None where nothing finite was recorded."""
        distance = (lambda x: abs(x - 1)) if size == "from 1" else (lambda x: x)
        values = [(i, line[name]) for i, line in enumerate(log, 1) if math.isfinite(line.get(name, math.nan))]
        return max(values, key=lambda pair: distance(pair[1]), default=None)

    def both(name: str) -> tuple[float, float] | None:
        """The first and the last value; None where one is missing or not finite."""
        pair = first.get(name, math.nan), last.get(name, math.nan)
        return pair if all(map(math.isfinite, pair)) else None

    ratio = worst("val/ratio", "from 1")
    if ratio and abs(ratio[1] - 1) > RATIO:
        found.append(
            f"the ratio before any step is {ratio[1]:.3f} in iteration {ratio[0]} and must be 1: the log-probs of "
            "rollouts and of updates disagree"
        )
    clipped = worst("policy/clipfrac_avg")
    if clipped and clipped[1] > most_clipped:
        found.append(
            f"{100 * clipped[1]:.0f}% of the tokens are clipped in iteration {clipped[0]}, more than "
            f"{100 * most_clipped:.0f}%: the steps are too large"
        )
    kl, length = both("objective/kl"), both("completions/mean_length")
    if kl and length and length[1] > 0 and kl[1] / length[1] > KL:
        found.append(
            f"the KL ends at {kl[1]:.1f} nats a reply, {kl[1] / length[1]:.1f} a token, more than {KL:g}: the initial "
            "policy would hardly write any of it"
        )
    entropy = both("policy/entropy_estimate")
    if entropy and entropy[0] >= VARIED and entropy[1] < SURE:
        found.append(
            f"the entropy falls from {entropy[0]:.2f} to {entropy[1]:.3f} nats a token, below {SURE:g}: the policy "
            "says one thing only"
        )
    if length and length[1] < SHORT * length[0]:
        found.append(f"the replies shrink from {length[0]:.1f} to {length[1]:.1f} tokens, below a quarter")
    endless = both("completions/clipped_ratio")
    if endless and endless[1] > ENDLESS >= endless[0]:
        found.append(
            f"the length cap cuts {100 * endless[1]:.0f}% of the replies at the end, and cut {100 * endless[0]:.0f}% "
            "at first: the policy no longer ends them"
        )
    explained = last.get("val/explained_variance", math.nan)
    if explained < EXPLAINED:
        found.append(
            f"the values explain {explained:.1f} of the returns' variance at the end, below {EXPLAINED:g}: they "
            "mislead more than a constant would"
        )
    return found


def health_sentences(view: View) -> Iterator[str]:
    """Yield the rows that failed, then the collapses of rows that sample while they train, as Markdown sentences."""
    for row in view.failures:
        yield f"**{markdown(row)} failed**: {markdown(view.failed_words(row))}."
    for row in view.trained:
        settings = view.methods[row]
        if "sampler" in settings.needs:
            most_clipped = settings.most_clipped if isinstance(settings, OnPolicySettings) else MOST_CLIPPED
            logs = {seed: _rollouts(log) for (name, seed), log in view.records.training.items() if name == row}
            found = {number: collapses(log, most_clipped) for number, log in logs.items()}
            name = view.experiment.repetition_words
            parts = [f"{name(number)}: {', '.join(words)}" for number, words in found.items() if words]
            if parts:
                yield f"**{markdown(row)} did not train soundly** ({markdown('; '.join(parts))})."


def _rollouts(log: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the lines of a training log that describe sampled replies; lines of optimiser steps describe none."""
    return [line for line in log if any(name.startswith("completions/") for name in line)]


def append_loss_footnotes(view: View, tables: Iterable[Table]) -> list[Table]:
    """Return tables with footnotes on the rows that failed and on what was dropped, cut and tied."""
    lost = [f"{row} failed: {view.failed_words(row)}." for row in view.failures]
    notes = (*lost, count_losses(view))
    return [replace(table, footnotes=(*table.footnotes, *notes)) for table in tables]


def count_losses(view: View) -> str:
    """Return what carries no ranking, was cut or left out, summed over all rows and seeds."""
    groups = [group for block in view.candidates.values() for group in block.items]
    parts = []
    if groups:
        found = candidate_statistics(groups)
        parts.append(
            f"{_of(found.duplicates, found.responses)} training candidates repeat another to their prompt and "
            f"{_of(found.ties, found.pairs)} of their pairs tie"
        )
    replies = [reply for reply in view.records.evaluated if reply.decoding != "given"]
    if replies:
        cut = Counter(reply.finish for reply in replies)
        empty = sum(not reply.response.strip() for reply in replies)
        parts.append(
            f"of {number(len(replies), 0)} replies {number(cut['length'], 0)} were cut at the length cap, "
            f"{number(cut['stop'], 0)} at a fake turn, {number(empty, 0)} say nothing"
        )
    ways: Counter[str] = Counter()
    every = (view.records.data_counts, view.records.counts, view.records.judge_counts)
    for counts in chain.from_iterable(counted.values() for counted in every):
        ways.update({what: count for what, count in counts.items() if what not in SIZES and not _label(what)})
    lost = ", ".join(f"{what.replace('_', ' ')} {number(count, 0)}" for what, count in ways.items() if count)
    parts.append(f"on the way: {lost or 'nothing left out'} (table of counts)")
    return f"Counted over all rows and seeds: {'; '.join(parts)}."


def _label(what: str) -> bool:
    """Return True if a count is of texts with a label, none of which is lost."""
    return what.startswith("label_")


def _of(some: int, all_: int) -> str:
    return f"{number(some, 0)} of {number(all_, 0)}"
