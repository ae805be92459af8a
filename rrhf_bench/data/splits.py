"""Training, dev and test sets whose prompts are disjoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rrhf_bench.data.dialogue import ASSISTANT, HUMAN, SYSTEM
from rrhf_bench.data.rows import format_counts
from rrhf_bench.data.texts import WORD, LabelledText
from rrhf_bench.errors import DataError
from rrhf_bench.records import Preference
from rrhf_bench.seeding import derive_seed

Item = TypeVar("Item", Preference, LabelledText)

_MARKER = re.compile("|".join((SYSTEM, HUMAN, ASSISTANT)))


@dataclass(frozen=True, slots=True)
class Split(Generic[Item]):
    """Disjoint sets with one item a prompt; no dev or test prompt occurs anywhere in the training text."""

    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    test: tuple[Item, ...]
    counts: Mapping[str, int]


def split_preferences(preferences: Iterable[Preference], *, dev: int, test: int, seed: int) -> Split[Preference]:
    """Return test, dev and training sets, in the order of a hash of (seed, prompt): file order changes nothing.

    Prompts are distinct (of several pairs with one prompt the first is taken). A training pair whose text, replies
    included, contains a dev or test prompt as an exact string is left out. Counts: ``pairs``, ``duplicate_prompt`` and
    ``overlap`` (left out for containing a held-out prompt). Raises DataError with the counts when there are not enough.
    """
    return _split(list(preferences), "pairs", _prompts_inside, dev, test, seed)


def split_texts(texts: Iterable[LabelledText], *, dev: int, test: int, seed: int) -> Split[LabelledText]:
    """Split texts in the same way; their prompts must all have one number of words.

    No dev or test prompt is a run of whole words in a training text. The first count is ``texts``.
    """
    return _split(list(texts), "texts", _beginnings_inside, dev, test, seed)


def _split(
    items: Sequence[Item],
    what: str,
    prompts_inside: Callable[[Item, Collection[int]], Iterator[str]],
    dev: int,
    test: int,
    seed: int,
) -> Split[Item]:
    by_prompt: dict[str, Item] = {}
    for item in items:
        by_prompt.setdefault(item.prompt.text, item)
    shuffled: list[Item] = sorted(by_prompt.values(), key=lambda item: derive_seed(seed, "split", item.prompt.id))
    test_set, dev_set, rest = shuffled[:test], shuffled[test : test + dev], shuffled[test + dev :]
    held_out = {item.prompt.text for item in shuffled[: test + dev]}
    lengths = {len(text) for text in held_out}
    clean = [item for item in rest if held_out.isdisjoint(prompts_inside(item, lengths))]
    counts = {
        what: len(items),
        "duplicate_prompt": len(items) - len(shuffled),
        "overlap": len(rest) - len(clean),
    }
    if len(test_set) < test or len(dev_set) < dev or not clean:
        raise DataError(
            f"not enough prompts: found {len(test_set)} for test, {len(dev_set)} for dev and {len(clean)} for "
            f"training; expected {test}, {dev} and at least one ({format_counts(counts)}); "
            "ask for fewer or give more data"
        )
    return Split(tuple(clean), tuple(dev_set), tuple(test_set), counts)


def _beginnings_inside(item: LabelledText, lengths: Collection[int]) -> Iterator[str]:
    """Yield every run of words inside a text that is as long as its prompt and has one of these lengths in characters,
    as an exact string."""
    text = item.prompt.text + item.reply
    words = list(WORD.finditer(text))
    count = len(item.prompt.text.split())
    for first, last in zip(words, words[count - 1 :], strict=False):
        if last.end() - first.start() in lengths:
            yield text[first.start() : last.end()]


def _prompts_inside(pair: Preference, lengths: Collection[int]) -> Iterator[str]:
    """Yield every string inside a pair's text that could be a prompt of one of these lengths.

    A prompt starts with a turn marker and ends with the marker of an assistant's turn. In a long dialogue nearly all
    such strings have other lengths, and none of those is built.
    """
    for reply in filter(None, (pair.chosen, pair.rejected)):
        text = "\n\n" + (pair.prompt.text + reply).lstrip("\n")  # as ``turns`` reads it
        starts: list[int] = []
        for marker in _MARKER.finditer(text):
            starts.append(marker.start())
            if marker[0] == ASSISTANT:
                yield from (text[start : marker.end()] for start in starts if marker.end() - start in lengths)
