"""The embedded world as data: what the models learn from, and the prompts that they are judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rrhf_bench.data.toy import grammar, labeller
from rrhf_bench.data.toy.grammar import Topic
from rrhf_bench.errors import DataError
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.seeding import generator

# Of the 42 different last human turns of each topic, those that only held-out prompts end with.
HELD_OUT_TURNS = 10
# Quality of the replies, Beta(a, b). The labelled pairs are somewhat worse than what the initial policy learns from:
# in arXiv 2304.05302 too, SFT on the chosen replies falls below its starting point, Alpaca.
CORPUS_QUALITY = (2.0, 1.4)
PAIR_QUALITY = (1.4, 1.9)
# What was written before anybody was instructed is worse than both, since pairs are written by instructed models:
# density 2(1 - q), the better the rarer. The means are 0.59, 0.42 and 0.33.
RAW_QUALITY = (1.0, 2.0)
# A raw text is prose this often; otherwise a dialogue, which after each reply goes on this often with another turn, but
# not more than so many times: the longest then fit a context of 512 tokens.
PROSE, RUN_ON, FURTHER_TURNS = 0.25, 0.5, 3
# Give up on distinct held-out prompts after this many draws for each one asked for.
DRAWS_PER_PROMPT = 50

Ways = Mapping[str, Sequence[str]]  # topic name -> human turns that ask about it


@dataclass(frozen=True)
class World:
    """Texts of one world; nothing in it is a model."""

    corpus: tuple[str, ...]  # dialogues (prompt + reply) that an initial policy learns to answer from
    perplexity_corpus: tuple[str, ...]  # another draw of the same kind, for the perplexity model
    # Labelled pairs; prompts repeat. The reward model learns from all, the policies from the first distinct prompts.
    preferences: tuple[Preference, ...]
    dev: tuple[Preference, ...]  # held out: curves and tuning
    test: tuple[Preference, ...]  # held out: the evaluation prompts with their pairs; any first n are a fair sample
    # Poor dialogues that run on, and prose: what a model reads before it is instructed. A world may have none.
    raw_corpus: tuple[str, ...] = ()


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

    Held out means more than that no dev or test prompt occurs as a string in the training text (the three corpora and
    the pairs): its last human turn occurs nowhere in it. To that end each topic keeps 10 of its 42 last turns (greeting
    and question) for held-out prompts, whatever the sizes are, so the training text does not change with ``dev`` and
    ``test``. Only the combination is new in such a turn: its greeting, its template and its topic occur in training.

    The skew that remains: dev and test prompts are distinct, and only 400 held-out prompts have no earlier turn, so the
    more prompts are asked for, the more of them have earlier turns (two thirds at the default sizes, 40% in training)
    and the longer they are. Their order is random: dev, test and the first n of test have the same mixture.

    Raises DataError if a size is not a positive whole number or more distinct prompts are asked for than were found.
    """
    sizes = {
        "raw_corpus": raw_corpus,
        "corpus": corpus,
        "perplexity_corpus": perplexity_corpus,
        "preferences": preferences,
        "dev": dev,
        "test": test,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise DataError(f"embedded world: {name} = {size!r}; expected a whole number of at least 1")
    trained_on, held_out = _split(generator("toy world", seed, "split"))
    judged = _held_out_pairs(seed, dev + test, held_out)
    return World(
        corpus=_dialogues(seed, "corpus", corpus, trained_on),
        perplexity_corpus=_dialogues(seed, "perplexity corpus", perplexity_corpus, trained_on),
        preferences=_training_pairs(seed, preferences, trained_on),
        dev=judged[:dev],
        test=judged[dev:],
        raw_corpus=_raw_texts(seed, raw_corpus, trained_on),
    )


def _split(rng: np.random.Generator) -> tuple[Ways, Ways]:
    """Each topic's ways to be asked: (those of the training text, those of held-out prompts)."""
    trained_on, held_out = {}, {}
    for topic in grammar.TOPICS:
        ways = grammar.ways_to_ask(topic)
        distinct = list(dict.fromkeys(ways))
        kept_back = {distinct[i] for i in rng.permutation(len(distinct))[:HELD_OUT_TURNS]}
        trained_on[topic.name] = [turn for turn in ways if turn not in kept_back]
        held_out[topic.name] = [turn for turn in ways if turn in kept_back]
    return trained_on, held_out


def _draw_prompt(rng: np.random.Generator, ways: Ways) -> tuple[str, Topic]:
    topic = grammar.draw_topic(rng)
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
    """A dialogue by one poor writer, which goes on to further questions, whatever they are about."""
    quality = rng.beta(*RAW_QUALITY)
    text, topic = _draw_prompt(rng, ways)
    text += grammar.write_reply(rng, topic, quality)
    for _ in range(FURTHER_TURNS):
        if rng.random() >= RUN_ON:
            break
        topic = grammar.draw_topic(rng)
        text += grammar.write_turn(rng, topic, ways) + grammar.write_reply(rng, topic, quality)
    return text


def _training_pairs(seed: int, count: int, ways: Ways) -> tuple[Preference, ...]:
    rng = generator("toy world", seed, "preferences")
    drawn = (_draw_prompt(rng, ways) for _ in range(count))
    return tuple(_labelled_pair(rng, text, topic) for text, topic in drawn)


def _held_out_pairs(seed: int, count: int, ways: Ways) -> tuple[Preference, ...]:
    """Pairs with ``count`` different prompts, in random order."""
    rng = generator("toy world", seed, "held out")
    found: dict[str, Topic] = {}
    draws = 0
    while len(found) < count:
        if draws == DRAWS_PER_PROMPT * count:
            raise DataError(
                f"embedded world: dev + test = {count}; found {len(found)} distinct held-out prompts in {draws} draws; "
                "ask for fewer"
            )
        text, topic = _draw_prompt(rng, ways)
        found[text] = topic
        draws += 1
    # Common prompts are found first, so in the order of finding the first prompts would be no sample of all of them.
    prompts = list(found.items())
    return tuple(_labelled_pair(rng, *prompts[i]) for i in rng.permutation(count))


def _labelled_pair(rng: np.random.Generator, text: str, topic: Topic) -> Preference:
    """Write two different replies of independent quality and label them; the topic is the pair's cluster."""
    first = second = grammar.write_reply(rng, topic, rng.beta(*PAIR_QUALITY))
    while second == first:
        second = grammar.write_reply(rng, topic, rng.beta(*PAIR_QUALITY))
    return replace(labeller.label(rng, Prompt(text), first, second), cluster=topic.name)
