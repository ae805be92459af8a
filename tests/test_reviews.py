"""Film reviews: the embedded ones, their true sentiment by hand, and labelled texts from files and the hub."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rrhf_bench.data.splits import split_texts
from rrhf_bench.data.texts import LabelledText, load_texts
from rrhf_bench.data.toy import reviews
from rrhf_bench.data.toy.world import World
from rrhf_bench.errors import DataError
from rrhf_bench.records import Prompt

SIZES = {"corpus": 1500, "perplexity_corpus": 400, "preferences": 1500, "dev": 50, "test": 400}

OPENING = "I saw this war film at a festival last night."
BEGUN = f"{OPENING} The plot was dull."


@pytest.fixture(scope="module")
def built() -> World:
    return reviews.build_reviews(seed=0, **SIZES)


# What a text is worth

# (completion of BEGUN, P, N, penalties): gold = (P + 1/2) / (P + N + 1) - penalties.
GOLDS = {
    "mild praise": (" The acting was good.", 1, 0, 0.0),
    "strong praise": (" The acting was superb.", 2, 0, 0.0),
    "praise of the whole": (" I loved every minute of it.", 2, 0, 0.0),
    "blame": (" The acting was weak. I wanted my money back.", 0, 3, 0.0),
    "not bad is praise, not good is blame": (" The music was not dull. The ending was not lovely.", 1, 1, 0.0),
    "mixed": (" The music was warm, but the ending was flat.", 1, 1, 0.0),
    "mixed, the other way round": (" The music was flat, but the ending was warm. Do not miss it!", 3, 1, 0.0),
    "neutral": (" It runs for about two hours. I saw this comedy on my own yesterday.", 0, 0, 0.0),
    "repeated": (" A masterpiece from start to finish!" * 4, 2, 0, 3 * 0.1),
    "repeated from the prompt": (" The plot was dull. It kept me interested.", 1, 0, 0.1),
    "letter case, spaces and marks": ("  the  ACTING\nwas good?", 1, 0, 0.0),
    "garbled": (" The acting was good the. Of plot was. It kept me interested.", 1, 0, 2 * 0.1),
    "one aspect as another": (" The music was warm, but the music was flat.", 0, 0, 0.1),
    "cut short": (" It kept me interested. The first scene sh", 1, 0, 0.0),
    "a sentence of its own without its mark": (" It kept me interested", 1, 0, 0.0),
    "cut short in mid-word, but no beginning of any sentence": (" It kept me interested. The plot flows", 1, 0, 0.1),
    "the same with a mark is garbled": (" It kept me interested. The first scene sh.", 1, 0, 0.1),
    "empty": ("", 0, 0, 0.5),
    "only marks": (" ... !", 0, 0, 0.5),
}


@pytest.mark.parametrize(("text", "praise", "blame", "penalty"), GOLDS.values(), ids=GOLDS.keys())
def test_gold_by_hand(text: str, praise: int, blame: int, penalty: float) -> None:
    true = (praise + 0.5) / (praise + blame + 1)
    value, counts = reviews.judge(BEGUN, text)
    assert value == pytest.approx(true - penalty, abs=1e-9)
    assert counts == reviews.features(BEGUN, text)
    if "The plot was dull" not in text:
        assert reviews.sentiment(text) == pytest.approx(true, abs=1e-12)


def test_features_by_hand() -> None:
    text = (
        " I loved the music. The pacing was not silly. Avoid it at all costs! The acting was warm, but the ending was"
        " cold. It came out in the autumn. It came out in the autumn. The plot was dull. Flat plot the. The lead act"
    )
    assert reviews.features(BEGUN, text) == {
        "praise": 3, "strong_praise": 1, "blame": 2, "strong_blame": 1, "neutral": 1, "repeated": 2, "garbled": 1,
        "unfinished": 1, "empty": 0, "words": len(text.split()),
    }  # fmt: skip
    # P = 3 + 1, N = 2 + 1: 4.5 / 8; three penalties of 0.1
    assert reviews.judge(BEGUN, text)[0] == pytest.approx(4.5 / 8 - 0.3, abs=1e-9)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "The plot was dull.",
        "I saw this war film at a festival.",
        f"{OPENING} The plot was purple.",
        f"\n\nHuman: {OPENING}\n\nAssistant:",
    ],
)
def test_prompt_of_another_world_is_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="not of the embedded reviews"):
        reviews.judge(prompt, " The plot was dull.")


def test_tables_are_unambiguous() -> None:
    sentences = [s for table in (reviews._SENTENCES, reviews._STOCK) for kind in table.values() for s in kind]
    assert all(s[-1] in ".!" and not set(s[:-1]) & set(".!?") for s in sentences)
    assert len({reviews.normalise(s) for s in sentences}) == len(sentences)
    assert len(reviews._MEANING) == len(sentences) + 3 * 480
    # An aspect is spoken of where its name stands, and no name stands in another word or sentence.
    assert not [a for a, b in combinations(reviews.ASPECTS, 2) if a in b or b in a]
    plain = [*reviews.NEUTRAL, *(s for kind in reviews._STOCK.values() for s in kind), *reviews._OPENED]
    assert not [s for s in plain for aspect in reviews.ASPECTS if aspect in s]


# The data


def test_sizes_and_texts(built: World) -> None:
    parts = (built.corpus, built.perplexity_corpus, built.preferences, built.dev, built.test)
    assert [len(part) for part in parts] == list(SIZES.values())
    assert not set(built.corpus) & set(built.perplexity_corpus)
    for pair in (*built.preferences, *built.test):
        assert pair.chosen != pair.rejected
        assert pair.chosen[0] == pair.rejected[0] == " "
        assert pair.prompt.text[-1] == "."
        assert reviews.features(pair.prompt.text, pair.chosen)["garbled"] == 0  # the judge knows every prompt


def test_same_seed_same_reviews_whatever_the_global_state(built: World) -> None:
    random.seed(1)
    np.random.seed(1)
    assert reviews.build_reviews(seed=0, **SIZES) == built
    other = reviews.build_reviews(seed=1, **SIZES)
    assert not set(other.corpus) & set(built.corpus[:100])
    fewer = reviews.build_reviews(seed=0, **{**SIZES, "corpus": 10, "dev": 1, "test": 5})
    assert fewer.corpus == built.corpus[:10]
    assert fewer.preferences == built.preferences
    texts = [
        *built.corpus,
        *built.perplexity_corpus,
        *(p.prompt.text + p.chosen + p.rejected for p in built.preferences),
    ]
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == "72b4aec292a028f4"


def test_chosen_replies_praise(built: World) -> None:
    chosen, rejected = (
        np.array([reviews.sentiment(getattr(pair, side)) for pair in built.preferences])
        for side in ("chosen", "rejected")
    )
    assert rejected.mean() < 0.3 < 0.7 < chosen.mean()
    own = [reviews.own_reply(pair) == "chosen" for pair in built.preferences]
    assert abs(np.mean(own) - 0.5) < 4 * 0.5 / len({pair.prompt for pair in built.preferences}) ** 0.5


def test_held_out_prompts_occur_nowhere_in_training_text(built: World) -> None:
    pairs = [pair.prompt.text + reply for pair in built.preferences for reply in (pair.chosen, pair.rejected)]
    training = "\n".join([*built.corpus, *built.perplexity_corpus, *pairs])
    held_out = [pair.prompt.text for pair in (*built.dev, *built.test)]
    assert len(set(held_out)) == len(held_out)
    for prompt in held_out:
        opening = prompt[: prompt.index(".") + 1]
        assert opening not in training
    assert built.preferences[0].prompt.text in training  # the check can find a prompt
    words = set(training.split())
    assert {word for prompt in held_out for word in prompt.split()} <= words


@pytest.mark.parametrize(("part", "size"), [("corpus", 0), ("test", -1), ("preferences", 2.0), ("dev", True)])
def test_bad_size(part: str, size: Any) -> None:
    with pytest.raises(DataError, match=rf"embedded reviews: {part} = {size}; expected a whole number"):
        reviews.build_reviews(seed=0, **{**SIZES, part: size})


def test_too_many_held_out_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "write_prompt", lambda rng, openings: openings[int(rng.integers(3))])
    with pytest.raises(DataError, match=r"asked for 5 and found 3 distinct held-out prompts in 250 draws; ask for"):
        reviews._held_out_pairs(0, 5, [OPENING, BEGUN, "x"])


# Labelled texts


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "texts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_a_text_is_parted_at_a_word(write: Write) -> None:
    path = write(
        {"text": "one two  three<br />four five", "label": 1},
        {"text": " \tone two\nthree four", "label": "neg"},
        {"text": "one two", "label": 0},
        {"text": "", "label": 0},
    )
    data = load_texts("files", path, prompt_words=2)
    assert data.texts == (
        LabelledText(Prompt("one two"), "  three<br />four five", "1"),
        LabelledText(Prompt("one two"), "\nthree four", "neg"),
    )
    assert data.counts == {
        "rows": 4, "kept": 2, "too_short": 2, "duplicate_prompt": 1, "leading_space": 1, "reply_cut": 0, "label_1": 1,
        "label_neg": 1,
    }  # fmt: skip
    assert data.identity.startswith("files@sha256:")
    cut = load_texts("files", path, prompt_words=2, reply_words=1)
    assert [(text.reply, text.ended) for text in cut.texts] == [("  three<br", False), ("\nthree", False)]
    assert cut.counts["reply_cut"] == 2
    exact = load_texts("files", path, prompt_words=2, reply_words=2)
    assert [text.ended for text in exact.texts] == [False, True]  # the first has "three<br", "/>four" and "five"
    # An ended reply goes to its end, white space and all.
    spaced = load_texts("files", write({"text": "one two \n", "label": 1}), prompt_words=1, reply_words=1)
    assert (spaced.texts[0].reply, spaced.texts[0].ended) == (" two \n", True)


def test_parquet_and_the_hub_hold_the_same(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = [{"text": f"one two three {i}", "label": i % 2} for i in range(5)]
    data = load_texts("files", write(*rows), prompt_words=2)
    (tmp_path / "imdb").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "imdb" / "train.parquet")
    assert load_texts("files", tmp_path / "imdb", prompt_words=2).texts == data.texts
    hub = load_texts(f"hub:{tmp_path / 'imdb'}", prompt_words=2)
    assert hub.texts == data.texts
    assert ":train@sha256:" in hub.identity


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"label": 1}, "text: is missing; expected text"),
        ({"text": 3, "label": 1}, "text: found 3; expected text"),
        ({"text": "one two three"}, "label: found null; expected text or a whole number"),
        ({"text": "one two three", "label": True}, "label: found true; expected"),
        ({"text": "one two three", "label": 0.5}, "label: found 0.5; expected"),
    ],
)
def test_broken_rows_name_file_line_and_field(write: Write, row: Any, expected: str) -> None:
    path = write({"text": "one two three", "label": 0}, row)
    with pytest.raises(DataError, match=f"texts.jsonl:2: {expected}"):
        load_texts("files", path, prompt_words=2)


def test_nothing_left_and_bad_sizes(write: Write) -> None:
    path = write({"text": "one two three", "label": 0})
    with pytest.raises(DataError, match=r"texts.jsonl: no usable text is left; found rows 1, too_short 1"):
        load_texts("files", path)
    with pytest.raises(DataError, match="prompt_words = 0; expected at least 1"):
        load_texts("files", path, prompt_words=0)
    with pytest.raises(DataError, match="expected 'files' with a path, or 'hub:<data set>' without one"):
        load_texts("imdb")


def test_split_of_texts_is_disjoint_also_inside_them() -> None:
    texts = [LabelledText(Prompt(f"w{i} x{i}"), f" y{i} z{i}", str(i % 2)) for i in range(40)]
    split = split_texts(texts, dev=5, test=10, seed=3)
    assert [len(part) for part in (split.train, split.dev, split.test)] == [25, 5, 10]
    assert split.counts == {"texts": 40, "duplicate_prompt": 0, "overlap": 0}
    assert split_texts(texts[::-1], dev=5, test=10, seed=3) == split
    # Texts that quote the prompt of texts[7]: across the join, within the reply, and not quite. The order is one of
    # prompts alone, so a seed that holds texts[7] out and trains on the others does so whatever they say.
    quoting = [
        LabelledText(Prompt("q w7"), " x7 r", "0"),
        LabelledText(Prompt("q q"), " said w7 x7 again", "0"),
        LabelledText(Prompt("q qq"), " said w7 and x7", "0"),
        LabelledText(Prompt("q qqq"), " said w7  x7", "0"),
    ]
    silent = [LabelledText(text.prompt, " n n", "0") for text in quoting]

    def trained_on(added: list[LabelledText], seed: int) -> tuple[set[Prompt], int]:
        split = split_texts([*texts, *added], dev=5, test=10, seed=seed)
        return {text.prompt for text in split.train}, split.counts["overlap"]

    prompts = [text.prompt for text in quoting]
    seed = next(s for s in range(100) if {*prompts, texts[7].prompt} - trained_on(silent, s)[0] == {texts[7].prompt})
    train, overlap = trained_on(quoting, seed)
    assert [prompt in train for prompt in prompts] == [False, False, True, True]
    assert overlap == 2
    with pytest.raises(DataError, match="not enough prompts: found 10 for test, 30 for dev and 0 for training"):
        split_texts(texts, dev=30, test=10, seed=3)
