"""Experiments on texts, from the file to the records: the embedded reviews, and texts with one reply from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rrhf_bench.data.toy.reviews import own_reply
from rrhf_bench.errors import ConfigError
from rrhf_bench.jsonl import read_jsonl
from rrhf_bench.pipeline.run_folder import load_run, open_run
from rrhf_bench.pipeline.scheduler import run_plan
from rrhf_bench.pipeline.stage_graph import make_plan
from rrhf_bench.pipeline.store import Store
from rrhf_bench.records import Candidates, Preference
from rrhf_bench.settings.reading import load_experiment

WORDS = ("the", "film", "plot", "was", "good", "bad", "slow", "and", "I", "never", "ending")

TINY = """
seeds = [0]
[data]
train_prompts = 12
toy = { corpus = 60, perplexity_corpus = 40, preferences = 60 }
[policy]
template = "raw"
[policy.scratch]
vocabulary = 300
hidden = 32
heads = 1
layers = 1
ffn = 32
epochs = 1
context = 160
[perplexity_model]
template = "raw"
[perplexity_model.scratch]
vocabulary = 300
hidden = 32
heads = 1
layers = 1
ffn = 32
epochs = 1
context = 160
[reward_model]
template = "raw"
[sampling]
backend = "transformers"
max_new_tokens = 8
stop = []
[candidates]
n = 2
sources = ["model", "reply"]
[methods.rrhf]
epochs = 1
[methods.sft]
epochs = 1
[evaluation]
prompts = 4
pairs = 6
dev_prompts = 3
pool_prompts = 2
pool_samples = 2
decoding = ["sample"]
top_k = 20
max_new_tokens = 8
curve_points = 1
[runtime]
device = "cpu"
workers = 1
"""


class Silent:
    def __getattr__(self, name: str):
        return lambda *_: None


def run(folder: Path, overrides: Sequence[str]):
    file = folder / "tiny.toml"
    file.write_text(TINY)
    plan, store = make_plan(load_experiment(file, overrides)), Store(folder / "runs" / "store")
    run_plan(plan, store, Silent())
    return plan, store, load_run(open_run(plan, folder / "runs", "rrhf-bench run tiny.toml"), store)


def test_reviews_train_a_classifier_and_offer_their_own_completion(tmp_path: Path) -> None:
    overrides = ["data.source=toy-reviews", "reward_model.training.objective=classification"]
    plan, store, records = run(tmp_path, overrides)
    for record in records.evaluated:
        assert 0 < record.reward < 1  # a probability
        assert record.gold is not None
        assert record.gold <= 1
        assert set(record.features or ()) >= {"praise", "blame"}
    (prompts,) = (stage for stage in plan.stages if stage.kind == "prompts")
    pairs = {p.prompt: p for p in read_jsonl(store.folder(prompts.key) / "train.jsonl", Preference)}
    for group in records.candidates["rrhf", 0]:
        assert [r.source for r in group.responses] == ["model", "model", "reply"]
        pair = pairs[group.prompt]
        assert group.responses[-1].text == getattr(pair, own_reply(pair))
    assert {record.method for record in records.evaluated} == {"base", "rrhf", "sft", "chosen", "rejected"}


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Overrides that read 120 texts of 30 words from a file."""
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, 30)), "label": i % 2} for i in range(120)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["data.source=files", f"data.path={path}", "data.rows=texts", "data.prompt_words=10", "data.reply_words=12"]
    return [*own, "policy.source=scratch", "perplexity_model.source=scratch"]


def test_texts_have_one_reply_that_methods_learn_from(tmp_path: Path, texts: list[str], llama_folder) -> None:
    """As IMDB from the hub: no pairs, so no p_i and no reward model of one's own; a cut reply has no end."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    classifier = AutoModelForSequenceClassification.from_pretrained(llama_folder(0), num_labels=2, id2label=labels)
    folder = tmp_path / "classifier"
    classifier.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_folder(0)).save_pretrained(folder)
    plan, store, records = run(tmp_path, [*texts, f"reward_model.source={folder}", "reward_model.label=POSITIVE"])
    assert {record.method for record in records.evaluated} == {"base", "rrhf", "sft", "reply"}
    assert all(0 < record.reward < 1 and record.gold is None for record in records.evaluated)
    assert not records.pairs
    assert not records.reward_pairs
    (scores,) = (s for s in plan.stages if s.kind == "score pairs" and s.settings["split"] == "train")
    for group in read_jsonl(store.folder(scores.key) / "candidates.jsonl", Candidates):
        (reply,) = group.responses
        assert (reply.source, reply.ended, len(reply.text.split())) == ("reply", False, 12)
        assert len(group.prompt.text.split()) == 10


def test_what_texts_do_not_have_is_said_before_anything_runs(tmp_path: Path, texts: list[str]) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    pair = 'methods.rrhf.candidates.sources=["model", "chosen"]'
    with pytest.raises(ConfigError) as error:
        load_experiment(file, [*texts, "reward_model.source=scratch", pair])
    places = [line.split(": ")[1] for line in str(error.value).splitlines()]
    assert places == ["reward_model.source", "methods.rrhf.candidates.sources"]
