"""The embedded worlds as data: what the models learn from, and the prompts that they are judged on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np

from rrhf_bench.data.toy import grammar, labeller
from rrhf_bench.data.toy.grammar import Topic
from rrhf_bench.errors import DataError
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.seeding import generator

# Of the 42 different last human turns of each topic, those that only held-out prompts end with.
HELD_OUT_TURNS = 10
# No alignment method trains on this many of the 15 topics of each kind. Every fourth test prompt is on one of them.
HELD_OUT_TOPICS = 4
HELD_OUT_EVERY = 4
# Quality of the replies, Beta(a, b). The labelled pairs are somewhat worse than what the initial policy learns from:
# in arXiv 2304.05302 too, SFT on the chosen replies falls below its starting point. Raw text is worse than both.
CORPUS_QUALITY = (2.0, 1.4)
PAIR_QUALITY = (1.4, 1.9)
RAW_QUALITY = (1.0, 2.0)
# A raw text is prose this often; otherwise a dialogue, which after each reply goes on this often with another turn, but
# not more than so many times: the longest then fit a context of 512 tokens.
PROSE, RUN_ON, FURTHER_TURNS = 0.25, 0.5, 3
# Give up on distinct held-out prompts after this many draws for each one asked for.
DRAWS_PER_PROMPT = 50

T = TypeVar("T")
Ways = Mapping[str, Sequence[str]]  # topic name -> human turns that ask about it


@dataclass(frozen=True)
class World:
    """The texts of one world of dialogues, or of reviews."""

    corpus: tuple[str, ...]  # dialogues (prompt + reply) or reviews that an initial policy learns from
    perplexity_corpus: tuple[str, ...]  # another draw of the same kind, for the perplexity model
    # Labelled pairs; prompts repeat. The reward model learns from all, the policies from the first distinct prompts.
    preferences: tuple[Preference, ...]
    dev: tuple[Preference, ...]  # held out: curves and tuning
    test: tuple[Preference, ...]  # held out: the evaluation prompts with their pairs; any first n are a fair sample
    # The clusters of the pairs that no policy may be aligned on; the models that come before know these topics.
    held_out_topics: tuple[str, ...] = ()
    raw_corpus: tuple[str, ...] = ()  # poor dialogues that run on, and prose: what a model reads before instruction


def build_world(
    *,
    seed: int,
    raw_corpus: int = 8000,
    corpus: int = 8000,
    perplexity_corpus: int = 6000,
    preferences: int = 8000,
    dev: int = 100,
    test: int = 1000,
) -> World:
    """Write the world of ``seed``; the other arguments are how many dialogues, pairs and held-out prompts it has.

    Held out means that the last human turn of a dev or test prompt occurs nowhere in the training text (the corpora and
    the pairs): each topic keeps 10 of its 42 last turns (greeting and question) for held-out prompts, whatever the
    sizes are. Only the combination of greeting, template and topic is new in such a turn.

    Held-out topics, 4 of the 15 of each kind, are new to the alignment methods alone: the corpora and the labelled
    pairs ask about all topics, and the prompts that policies are aligned on leave out the pairs whose last question is
    on one (stage "prompts"; an earlier turn may be). Dev prompts are on the other topics, so that nothing is tuned on
    held-out ones. Test prompts 3, 7, 11, ... are on held-out topics, the rest on the other topics: the first n have the
    same shares in every world if n is a multiple of 4.

    One skew remains: dev and test prompts are distinct, and few held-out prompts have no earlier turn (440 on the other
    topics, 160 on held-out ones), so the more prompts are drawn, the more of them have earlier turns (more than half
    at the default sizes, 40% in training). Their order is random within both groups: dev, test and the first n of test
    have the same mixture.

    Raises DataError if a size is not a positive whole number or more distinct prompts are asked for than were found.
    """
    require_sizes(
        "world",
        raw_corpus=raw_corpus,
        corpus=corpus,
        perplexity_corpus=perplexity_corpus,
        preferences=preferences,
        dev=dev,
        test=test,
    )
    trained_on, held_out = _split(generator("toy world", seed, "split"))
    unseen = _held_out_topics(generator("toy world", seed, "held-out topics"))
    seen = tuple(topic for topic in grammar.TOPICS if topic not in unseen)
    of_unseen = iter(_held_out_pairs(seed, "held out, topics too", test // HELD_OUT_EVERY, held_out, unseen))
    of_seen = iter(_held_out_pairs(seed, "held out", dev + test - test // HELD_OUT_EVERY, held_out, seen))
    rng = generator("toy world", seed, "preferences")
    return World(
        corpus=_dialogues(seed, "corpus", corpus, trained_on),
        perplexity_corpus=_dialogues(seed, "perplexity corpus", perplexity_corpus, trained_on),
        preferences=tuple(_labelled_pair(rng, *_draw_prompt(rng, trained_on)) for _ in range(preferences)),
        dev=tuple(islice(of_seen, dev)),
        test=tuple(next(of_unseen if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else of_seen) for i in range(test)),
        held_out_topics=tuple(topic.name for topic in unseen),
        raw_corpus=_raw_texts(seed, raw_corpus, trained_on),
    )


def require_sizes(world: str, **sizes: int) -> None:
    """Raise DataError if a size is not a positive whole number."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise DataError(f"embedded {world}: {name} = {size!r}; expected a whole number of at least 1")


def draw_distinct(world: str, rng: np.random.Generator, count: int, draw: Callable[[], T]) -> Iterator[T]:
    """Yield ``count`` different draws in random order, because common ones are drawn first."""
    found: dict[T, None] = {}
    for _ in range(DRAWS_PER_PROMPT * count):
        found[draw()] = None
        if len(found) == count:
            break
    if len(found) < count:
        raise DataError(
            f"embedded {world}: asked for {count} and found {len(found)} distinct held-out prompts in "
            f"{DRAWS_PER_PROMPT * count} draws; ask for fewer"
        )
    prompts = list(found)
    yield from (prompts[i] for i in rng.permutation(count))


def _split(rng: np.random.Generator) -> tuple[Ways, Ways]:
    """Return each topic's ways to be asked: (those of the training text, those of held-out prompts)."""
    trained_on, held_out = {}, {}
    for topic in grammar.TOPICS:
        ways = grammar.ways_to_ask(topic)
        distinct = list(dict.fromkeys(ways))
        kept_back = {distinct[i] for i in rng.permutation(len(distinct))[:HELD_OUT_TURNS]}
        trained_on[topic.name] = [turn for turn in ways if turn not in kept_back]
        held_out[topic.name] = [turn for turn in ways if turn in kept_back]
    return trained_on, held_out


def _held_out_topics(rng: np.random.Generator) -> tuple[Topic, ...]:
    """Return HELD_OUT_TOPICS random topics of each kind."""
    of_kind: dict[str, list[Topic]] = defaultdict(list)
    for topic in grammar.TOPICS:
        of_kind[topic.kind].append(topic)
    return tuple(
        topics[i] for topics in of_kind.values() for i in sorted(rng.permutation(len(topics))[:HELD_OUT_TOPICS])
    )


def _draw_prompt(rng: np.random.Generator, ways: Ways, topics: Sequence[Topic] = grammar.TOPICS) -> tuple[str, Topic]:
    topic = grammar.draw_topic(rng, topics)
    return grammar.write_prompt(rng, topic, ways), topic


def _dialogues(seed: int, part: str, count: int, ways: Ways) -> tuple[str, ...]:
    rng = generator("toy world", seed, part)
    drawn = (_draw_prompt(rng, ways) for _ in range(count))
    return tuple(text + grammar.write_reply(rng, topic, rng.beta(*CORPUS_QUALITY)) for text, topic in drawn)


def _raw_texts(seed: int, count: int, ways: Ways) -> tuple[str, ...]:
    rng = generator("toy world", seed, "raw corpus")
    return tuple(
        grammar.write_article(rng) if rng.random() < PROSE else _running_dialogue(rng, ways) for _ in range(count)
    )


def _running_dialogue(rng: np.random.Generator, ways: Ways) -> str:
    """Return a dialogue by one poor writer, which goes on to further questions, whatever they are about."""
    quality = rng.beta(*RAW_QUALITY)
    text, topic = _draw_prompt(rng, ways)
    text += grammar.write_reply(rng, topic, quality)
    for _ in range(FURTHER_TURNS):
        if rng.random() >= RUN_ON:
            break
        topic = grammar.draw_topic(rng)
        text += grammar.write_turn(rng, topic, ways) + grammar.write_reply(rng, topic, quality)
    return text


def _held_out_pairs(seed: int, part: str, count: int, ways: Ways, topics: Sequence[Topic]) -> tuple[Preference, ...]:
    """Return ``count`` pairs of distinct prompts on some topics."""
    rng = generator("toy world", seed, part)
    drawn = draw_distinct("world", rng, count, lambda: _draw_prompt(rng, ways, topics))
    return tuple(_labelled_pair(rng, *prompt) for prompt in drawn)


def _labelled_pair(rng: np.random.Generator, text: str, topic: Topic) -> Preference:
    """Write two different replies of independent quality and label them; the topic is the pair's cluster."""
    first = second = grammar.write_reply(rng, topic, rng.beta(*PAIR_QUALITY))
    while second == first:
        second = grammar.write_reply(rng, topic, rng.beta(*PAIR_QUALITY))
    return replace(labeller.label(rng, Prompt(text), first, second), cluster=topic.name)
