"""The sentences of a report, made from its numbers and its experiment file: nothing here knows a result beforehand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.records import Decoding
from rrhf_bench.report.comparisons import Comparison, comparisons
from rrhf_bench.report.health import health_sentences
from rrhf_bench.report.table import (
    DECODING_WORDS,
    deciding_digits,
    interval,
    markdown,
    number,
)
from rrhf_bench.report.tables import accuracy
from rrhf_bench.report.view import MEASURE_WORDS, View
from rrhf_bench.settings.experiment import Experiment

MANY = 8  # rows beyond which a sentence names the first and the last only


def standing(experiment: Experiment) -> str:
    """Return what kind of numbers these are."""
    if experiment.data.source == "toy":
        return (
            "These are numbers of the embedded world: a small model trained from scratch on generated dialogues, a "
            "reward model trained on noisy labels, and a gold reward that knows the truth. Only the order of methods "
            "and the shape of curves may hold for larger models."
        )
    if experiment.data.source == "toy-reviews":
        return (
            "These are numbers of the embedded film reviews: a small model trained from scratch on generated text, and "
            "a sentiment classifier as its reward. Only the order of methods may hold for larger models."
        )
    scratch = [
        words
        for words, model in (("policy", experiment.policy), ("reward model", experiment.reward_model))
        if model.from_scratch
    ]
    if scratch:
        return (
            f"The {' and the '.join(scratch)} of this run {'are small models' if scratch[1:] else 'is a small model'} "
            "trained from scratch on the data's own text. "
            "The numbers show that the comparison runs on these data. They say little about the methods at scale."
        )
    return f"The reward is that of {experiment.reward_model.source}: another reward model has another scale."


def findings(view: View) -> list[str]:
    """Return what holds and what is inside noise, as Markdown sentences."""
    compared = comparisons(view)
    shown = compared
    if len(view.methods) > MANY:  # what each row gained
        shown = [c for c in compared if c.b in view.policies]
    rest = "The comparisons of these rows with each other stand in the table of differences."
    return [
        *health_sentences(view),
        *(sentence for b in dict.fromkeys(c.b for c in shown) for sentence in _against(view, shown, b)),
        *([rest] if len(shown) < len(compared) else []),
        *trades(compared),
        *_accuracies(view),
    ]


def _against(view: View, compared: Sequence[Comparison], b: str) -> Iterator[str]:
    """Yield one sentence per decoding and measure: the rows that are higher than ``b``, lower, inside noise, and those
    that were compared without a verdict."""
    for decoding in view.decodings:
        for measure in view.measures:
            family = [c for c in compared if (c.b, c.decoding, c.measure) == (b, decoding, measure)]
            parts = []
            for words in ("higher", "lower", "inside noise", "one seed", "exploratory"):
                some = [c for c in family if c.standing == words]
                some.sort(key=lambda c: -_value(c))
                words = "one seed, no verdict" if words == "one seed" else words
                parts += [f"{words}: {_list(list(map(_difference, some)))}"] if some else []
            if parts:
                where = f"{MEASURE_WORDS[measure]}, {DECODING_WORDS[decoding]}"
                yield f"Against **{markdown(b)}** on the {where}, {'; '.join(parts)}."


def _list(parts: Sequence[str]) -> str:
    """Return all parts, or if there are many their number, the first and the last."""
    return ", ".join(parts) if len(parts) <= MANY else f"{len(parts)} rows, from {parts[0]} to {parts[-1]}"


def _difference(c: Comparison) -> str:
    """Return the difference with its interval, at as many digits as it takes to show on which side of 0 each end lies;
    with the adjusted p if there is a verdict, and what could have been detected if the difference is inside noise."""
    assert isinstance(c.estimate, Estimate)
    found = c.estimate
    digits = deciding_digits((found.value, found.low, found.high), 2, 0.0)
    text = f"{markdown(c.a)} by {signed(found.value, digits)} {interval(found.low, found.high, digits)}"
    if c.p is None:
        return text
    words = [f"p {_p_words(c.p)}"]
    if c.verdict == "inside noise" and c.detectable is not None:
        words.append(f"detectable: {number(c.detectable, 2)}")
    return f"{text} ({', '.join(words)})"


def _p_words(p: float) -> str:
    """Return p with the digit that decides whether it is below 0.05."""
    return "< 0.001" if p < 0.001 else number(p, deciding_digits((p,), 3, 0.05))


def trades(compared: Sequence[Comparison]) -> Iterator[str]:
    """Yield the rows that beat another on the proxy and lose to it on the gold reward, by verdict on both."""
    gold = {(c.a, c.b, c.decoding): c.verdict for c in compared if c.measure == "gold"}
    beaten: dict[tuple[str, Decoding], list[str]] = defaultdict(list)
    for c in compared:
        if c.measure == "reward" and c.verdict == "higher" and gold.get((c.a, c.b, c.decoding)) == "lower":
            beaten[c.a, c.decoding].append(c.b)
    if len(beaten) > MANY:
        for decoding in dict.fromkeys(decoding for _, decoding in beaten):
            some = [markdown(a) for a, where in beaten if where == decoding]
            yield (
                f"**{len(some)} rows trade gold for proxy reward** ({DECODING_WORDS[decoding]}): each is higher than "
                f"another row on the proxy and lower on gold: {', '.join(some)}."
            )
        return
    for (a, decoding), rows in beaten.items():
        yield (
            f"**{markdown(a)} trades gold for proxy reward** ({DECODING_WORDS[decoding]}): it is higher than "
            f"{markdown(' and '.join(rows))} on the proxy and lower on gold."
        )


def _accuracies(view: View) -> Iterator[str]:
    shares = {row: share for row in view.rows if isinstance(share := accuracy(view, row), Estimate)}
    if len(shares) > MANY:
        shares = dict(sorted(shares.items(), key=lambda item: -item[1].value))
    parts = [
        f"{markdown(row)} {100 * share.value:.1f}% {interval(100 * share.low, 100 * share.high, 1)}"
        for row, share in shares.items()
    ]
    if parts:
        yield f"As a reward model, p_i orders held-out pairs as their labels do in: {_list(parts)}."


def _value(c: Comparison) -> float:
    return c.estimate.value if isinstance(c.estimate, Estimate) else 0.0


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, also if the number is positive."""
    text = number(value, digits)
    return text if text.startswith("-") or float(text.replace(",", "")) == 0 else f"+{text}"
