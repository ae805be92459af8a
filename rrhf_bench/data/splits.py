"""Training, dev and test sets whose prompts are disjoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rrhf_bench.data.dialogue import SYSTEM, prompt_of, turns
from rrhf_bench.data.rows import format_counts
from rrhf_bench.data.texts import WORD, LabelledText
from rrhf_bench.errors import DataError
from rrhf_bench.records import Preference
from rrhf_bench.seeding import derive_seed

Item = TypeVar("Item", Preference, LabelledText)


@dataclass(frozen=True, slots=True)
class Split(Generic[Item]):
    """Disjoint sets with one item a prompt; no dev or test prompt occurs anywhere in the training text."""

    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    test: tuple[Item, ...]
    counts: Mapping[str, int]


def split_preferences(
    preferences: Iterable[Preference], *, train: int | None, dev: int, test: int, seed: int
) -> Split[Preference]:
    """Return test, dev and training sets, in the order of a hash of (seed, prompt): file order changes nothing.

    Prompts are distinct (of several pairs with one prompt the first is taken). A training pair whose text, replies
    included, contains a dev or test prompt as an exact string is left out. ``train`` None takes all that remain.
    Counts: ``pairs``, ``duplicate_prompt``, ``overlap`` (left out for containing a held-out prompt), ``unused``.
    Raises DataError with the counts when there are not enough.
    """
    return _split(list(preferences), "pairs", _prompts_inside, train, dev, test, seed)


def split_texts(
    texts: Iterable[LabelledText], *, train: int | None, dev: int, test: int, seed: int
) -> Split[LabelledText]:
    """Split texts in the same way; their prompts must all have one number of words.

    No dev or test prompt is a run of whole words in a training text. The first count is ``texts``.
    """
    return _split(list(texts), "texts", _beginnings_inside, train, dev, test, seed)


def _split(
    items: Sequence[Item],
    what: str,
    prompts_inside: Callable[[Item], Iterator[str]],
    train: int | None,
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
    clean = [item for item in rest if held_out.isdisjoint(prompts_inside(item))]
    counts = {
        what: len(items),
        "duplicate_prompt": len(items) - len(shuffled),
        "overlap": len(rest) - len(clean),
        "unused": 0 if train is None else max(0, len(clean) - train),
    }
    if len(test_set) < test or len(dev_set) < dev or len(clean) < (1 if train is None else train):
        raise DataError(
            f"not enough prompts: found {len(test_set)} for test, {len(dev_set)} for dev and {len(clean)} for "
            f"training; expected {test}, {dev} and {'at least one' if train is None else train} "
            f"({format_counts(counts)}); ask for fewer or give more data"
        )
    return Split(tuple(clean[:train]), tuple(dev_set), tuple(test_set), counts)


def _beginnings_inside(item: LabelledText) -> Iterator[str]:
    """Yield every run of words inside a text that is as long as its prompt, as an exact string."""
    text = item.prompt.text + item.reply
    words = list(WORD.finditer(text))
    length = len(item.prompt.text.split())
    for first, last in zip(words, words[length - 1 :], strict=False):
        yield text[first.start() : last.end()]


def _prompts_inside(pair: Preference) -> Iterator[str]:
    """Yield every string inside a pair's text that could be a prompt: runs of whole turns before an assistant's turn.

    A prompt starts and ends with a turn marker, and ``turns`` parts a text at every marker but the System marker.
    """
    for reply in filter(None, (pair.chosen, pair.rejected)):
        dialogue = turns(pair.prompt.text + reply)
        for end, turn in enumerate(dialogue):
            if turn.role == "assistant":
                for start in range(end + 1):
                    yield prompt_of(dialogue[start:end]).text
                    # Inside a turn a System marker is text, but a prompt may start with it.
                    before = dialogue[start - 1].text if start > 0 else ""
                    for marker in re.finditer(re.escape(SYSTEM), before):
                        yield before[marker.start() :] + prompt_of(dialogue[start:end]).text
