"""The embedded twin of the IMDB task (arXiv 2304.05302 Table 10): film reviews begun, to be gone on with.

A review is an opening without opinion, perhaps a second sentence, and a completion of three to six sentences. The
prompt is the review up to the completion, which starts with a space (template ``raw``). Its writer liked the film to a
degree q in [0, 1]: an opinion is praise at probability q, and stronger the further q is from 1/2.

The tables are read backwards to judge any text. It is split on ``.!?``, and each sentence counts once:

* praise and blame, mild or strong (which weighs twice); a mixed sentence is one of each, mild. A sentence that was said
  before, in the prompt or in the completion, is repeated and nothing else.
* what the tables do not know is garbled, except a last sentence that breaks off while it could still become one of
  theirs: a policy is cut off after 48 tokens.

True sentiment is (P + 1/2) / (P + N + 1) of the weights P of praise and N of blame: 1/2 without opinion, 3/4 for one
mild praise. The gold reward is the true sentiment less ``PENALTY``, which was chosen before any model was trained: a
sentence repeated or garbled costs about as much as one more mild opinion can win.

No sentence of the tables has ``.``, ``!`` or ``?`` before its end, and no two are equal after ``normalise``.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Literal

import numpy as np

from rrhf_bench.data.toy.grammar import sentences
from rrhf_bench.data.toy.world import World, draw_distinct, require_sizes
from rrhf_bench.errors import DataError
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.seeding import derive_seed, generator

OPENINGS = ("I saw this {} {} {}.", "I watched this {} {} {}.", "I finally caught this {} {} {}.")
GENRES = (
    "thriller", "comedy", "western", "heist film", "war film", "road movie", "love story", "crime drama",
    "fantasy film", "ghost story",
)  # fmt: skip
COMPANY = (
    "with my sister", "with two friends", "on my own", "with my father", "with a colleague", "at a festival",
    "on a long flight", "in a packed cinema",
)  # fmt: skip
TIMES = ("last night", "last weekend", "on Monday", "a week ago", "in the spring", "yesterday")

NEUTRAL = sentences(
    "It runs for about two hours. The story is set in a small town. It is based on an old novel. "
    "The director has made three films before. Most of it takes place at night. It came out in the autumn. "
    "There is a short scene after the credits. It was filmed in the mountains. A dog appears in many scenes. "
    "The lead plays a retired teacher. There are subtitles in some scenes. The poster shows a red door. "
    "The first scene shows a train station. Half of the cast is new to me. The hero has a brother in the army. "
    "It is the second part of a series."
)
ASPECTS = (
    "acting", "plot", "music", "dialogue", "camera work", "ending", "pacing", "lead actor", "editing", "humour",
)  # fmt: skip
GOOD = ("good", "solid", "charming", "clever", "warm", "lovely")
GREAT = ("brilliant", "superb", "outstanding", "stunning", "wonderful")
BAD = ("weak", "flat", "dull", "clumsy", "cold", "silly")
AWFUL = ("awful", "terrible", "dreadful", "unbearable", "painful")

# Said of the film as a whole, so they fit anywhere: any one of them makes a completion by itself.
_STOCK = {
    "praise": sentences(
        "It is well worth a ticket. It kept me interested. I left in a good mood. I would watch it again. "
        "My friends should see it."
    ),
    "strong_praise": sentences(
        "A masterpiece from start to finish! I loved every minute of it. It deserves every award there is. "
        "This is one of the best films I have ever seen. Do not miss it!"
    ),
    "blame": sentences(
        "It is hardly worth a ticket. It lost me halfway through. I looked at my watch a lot. "
        "I would not watch it again. My friends should skip it."
    ),
    "strong_blame": sentences(
        "A complete waste of time. I wanted my money back. It insults the audience. "
        "This is one of the worst films I have ever seen. Avoid it at all costs!"
    ),
}

# Of 480 openings with each template, the share that only held-out prompts begin with.
HELD_OUT_SHARE = 0.2
# How much a writer liked the film, Beta(a, b), mirrored for one who did not: some are of two minds.
LIKED = (9.0, 1.5)

# What features counts in a completion.
FEATURES = (
    "praise",  # sentences, the strong ones included; a mixed sentence is praise and blame
    "strong_praise",
    "blame",
    "strong_blame",
    "neutral",
    "repeated",  # sentences that were said before, in the prompt or in the completion
    "garbled",  # sentences that no reviewer of this world writes
    "unfinished",  # 0 or 1: a last sentence that was cut short
    "empty",  # 0 or 1: no sentence at all
    "words",  # whitespace-separated
)
PENALTY = {"repeated": 0.1, "garbled": 0.1, "empty": 0.5}

_END = re.compile("[.!?]")


def build_reviews(
    *,
    seed: int,
    corpus: int = 8000,
    perplexity_corpus: int = 6000,
    preferences: int = 8000,
    dev: int = 100,
    test: int = 1000,
) -> World:
    """Write the reviews of ``seed``; the other arguments are how many texts, pairs and held-out prompts there are.

    The corpora are whole reviews, half of them by people who liked the film. A pair holds two completions of one
    prompt: ``chosen`` by somebody who liked the film, ``rejected`` by somebody who did not; ``own_reply`` says which of
    them the data set would hold by itself. The opinions of the prompt are drawn apart from who writes the completion.

    Held-out prompts begin with openings that occur nowhere in the training text (a fifth of all, whatever the sizes
    are); only the combination of genre, company and time is new. As in ``build_world`` they are distinct, so the more
    are drawn, the fewer are an opening alone.

    Raises DataError if a size is not a positive whole number or more distinct prompts are asked for than were found.
    """
    require_sizes(
        "reviews", corpus=corpus, perplexity_corpus=perplexity_corpus, preferences=preferences, dev=dev, test=test
    )
    trained_on, held_out = _split(generator("toy reviews", seed, "split"))
    judged = _held_out_pairs(seed, dev + test, held_out)
    rng = generator("toy reviews", seed, "preferences")
    return World(
        corpus=_whole(seed, "corpus", corpus, trained_on),
        perplexity_corpus=_whole(seed, "perplexity corpus", perplexity_corpus, trained_on),
        preferences=tuple(_pair(rng, write_prompt(rng, trained_on)) for _ in range(preferences)),
        dev=judged[:dev],
        test=judged[dev:],
    )


def own_reply(pair: Preference) -> Literal["chosen", "rejected"]:
    """Return which completion of a pair is the data set's own: a coin named by the prompt."""
    return "chosen" if derive_seed("toy reviews", "own reply", pair.prompt.id) % 2 else "rejected"


def write_prompt(rng: np.random.Generator, openings: Sequence[str]) -> str:
    """Return one of the openings; 75% have a second sentence: neutral (half of them), or a mild or mixed opinion."""
    opening = _one(rng, openings)
    if rng.random() < 0.25:
        return opening
    draw = rng.random()
    kind = "neutral" if draw < 0.5 else "mixed" if draw < 0.6 else "praise" if draw < 0.8 else "blame"
    return f"{opening} {_one(rng, _SENTENCES[kind])}"


def write_completion(rng: np.random.Generator, prompt_text: str, liking: float) -> str:
    """Return three to six sentences by somebody who liked the film to a degree in [0, 1].

    None was said before, and no aspect occurs twice.
    """
    review = prompt_text
    for _ in range(3 + int(rng.binomial(3, 0.5))):
        told = [aspect for aspect in ASPECTS if aspect in review]
        while (sentence := _write(rng, liking)) in review or any(aspect in sentence for aspect in told):
            pass
        review += " " + sentence
    return review.removeprefix(prompt_text)


def _write(rng: np.random.Generator, liking: float) -> str:
    draw = rng.random()
    if draw < 0.35:
        return _one(rng, _SENTENCES["neutral" if draw < 0.25 else "mixed"])
    side = "praise" if rng.random() < liking else "blame"
    strength = "strong_" if rng.random() < 0.2 + 0.5 * abs(2 * liking - 1) else ""
    return _one(rng, (_STOCK if rng.random() < 0.35 else _SENTENCES)[strength + side])


def _liking(rng: np.random.Generator, liked: bool) -> float:
    liking = float(rng.beta(*LIKED))
    return liking if liked else 1 - liking


def _openings(template: str) -> list[str]:
    return [template.format(*filling) for filling in product(GENRES, COMPANY, TIMES)]


def _split(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return (openings of the training text, openings of held-out prompts)."""
    parts: tuple[list[str], list[str]] = ([], [])
    for template in OPENINGS:
        openings = _openings(template)
        kept_back = set(rng.permutation(len(openings))[: round(HELD_OUT_SHARE * len(openings))].tolist())
        for place, opening in enumerate(openings):
            parts[place in kept_back].append(opening)
    return parts


def _whole(seed: int, part: str, count: int, openings: Sequence[str]) -> tuple[str, ...]:
    rng = generator("toy reviews", seed, part)
    reviews = []
    for _ in range(count):
        prompt = write_prompt(rng, openings)
        reviews.append(prompt + write_completion(rng, prompt, _liking(rng, rng.random() < 0.5)))
    return tuple(reviews)


def _held_out_pairs(seed: int, count: int, openings: Sequence[str]) -> tuple[Preference, ...]:
    rng = generator("toy reviews", seed, "held out")
    return tuple(
        _pair(rng, prompt) for prompt in draw_distinct("reviews", rng, count, lambda: write_prompt(rng, openings))
    )


def _pair(rng: np.random.Generator, prompt: str) -> Preference:
    chosen = rejected = write_completion(rng, prompt, _liking(rng, True))
    while rejected == chosen:
        rejected = write_completion(rng, prompt, _liking(rng, False))
    # Prompts with one opening differ in their second sentence alone, so the opening is the cluster.
    return Preference(Prompt(prompt), chosen=chosen, rejected=rejected, cluster=prompt.partition(".")[0])


def _one(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


# What a text is worth


def judge(prompt_text: str, text: str) -> tuple[float, dict[str, int]]:
    """Return the gold reward of any text as the completion of a prompt, and its feature counts (see FEATURES)."""
    counts = features(prompt_text, text)
    return reward(counts), counts


def reward(counts: Mapping[str, int]) -> float:
    """Return the gold reward of feature counts, at most 1: true sentiment less penalties, rounded for exact ties."""
    return round(_share(counts) - sum(weight * counts[name] for name, weight in PENALTY.items()), 9)


def sentiment(text: str) -> float:
    """Return the true sentiment of a text in [0, 1], 1/2 if it has no opinion; see the top of the file."""
    return _share(_count(text, ""))


def features(prompt_text: str, text: str) -> dict[str, int]:
    """Return the FEATURES of any text as the completion of a prompt. Raises DataError for a prompt of another world."""
    known = _sentences(prompt_text)
    if not known or known[0] not in _OPENED or any(sentence not in _MEANING for sentence in known[1:]):
        raise DataError(
            f"the prompt {prompt_text[:80]!r} is not of the embedded reviews; expected the beginning of one; "
            'their gold reward exists only for data.source = "toy-reviews"'
        )
    return _count(text, prompt_text)


def normalise(sentence: str) -> str:
    """Return a sentence as it is looked up: lower case, single spaces, no end mark."""
    return " ".join(sentence.lower().split()).rstrip(".!?")


def _sentences(text: str) -> list[str]:
    return [sentence for part in _END.split(text) if (sentence := normalise(part))]


def _count(text: str, prompt_text: str) -> dict[str, int]:
    counts = dict.fromkeys(FEATURES, 0)
    counts["words"] = len(text.split())
    said = set(_sentences(prompt_text))
    found = _sentences(text)
    last = normalise(_END.split(text)[-1])
    place = bisect_left(_IN_ORDER, last)
    if last and last not in _MEANING and place < len(_IN_ORDER) and _IN_ORDER[place].startswith(last):
        counts["unfinished"] = 1
        found.pop()
    for sentence in found:
        for feature in ("repeated",) if sentence in said else _MEANING.get(sentence, ("garbled",)):
            counts[feature] += 1
        said.add(sentence)
    counts["empty"] = int(not found and not counts["unfinished"])
    return counts


def _share(counts: Mapping[str, int]) -> float:
    praise = counts["praise"] + counts["strong_praise"]
    blame = counts["blame"] + counts["strong_blame"]
    return (praise + 0.5) / (praise + blame + 1)


def _said_of_aspects(form: str, words: Sequence[str] = ("",)) -> tuple[str, ...]:
    return tuple(form.format(aspect, word) for aspect, word in product(ASPECTS, words))


_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "neutral": NEUTRAL,
    # What is not good is blame: a bag of words is not enough to tell.
    "praise": _said_of_aspects("The {} was {}.", GOOD) + _said_of_aspects("The {} was not {}.", BAD),
    "blame": _said_of_aspects("The {} was {}.", BAD) + _said_of_aspects("The {} was not {}.", GOOD),
    "strong_praise": _said_of_aspects("The {} was {}.", GREAT) + _said_of_aspects("I loved the {}{}."),
    "strong_blame": _said_of_aspects("The {} was {}.", AWFUL) + _said_of_aspects("I hated the {}{}."),
    "mixed": tuple(
        f"The {one} was {first}, but the {other} was {second}."
        for pair in (product(GOOD, BAD), product(BAD, GOOD))
        for first, second in pair
        for one, other in product(ASPECTS, ASPECTS)
        if one != other
    ),
}
_COUNTS_AS: Mapping[str, tuple[str, ...]] = {
    "strong_praise": ("praise", "strong_praise"),
    "strong_blame": ("blame", "strong_blame"),
    "mixed": ("praise", "blame"),
}
_OPENED = frozenset(normalise(opening) for template in OPENINGS for opening in _openings(template))
_MEANING: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_OPENED, ("neutral",)),
    **{
        normalise(sentence): _COUNTS_AS.get(kind, (kind,))
        for table in (_SENTENCES, _STOCK)
        for kind, said in table.items()
        for sentence in said
    },
}
_IN_ORDER = sorted(_MEANING)
