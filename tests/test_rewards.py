"""Reward models: the input contract, scores against slow definitions, training on pairs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer

from rrhf_bench.errors import DataError, StageError
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards.gold import Gold, ReviewsGold
from rrhf_bench.rewards.hub import ClassifierReward
from rrhf_bench.rewards.input_contract import CONTRACT_FILE, KNOWN_LAYOUTS, RewardContract, length_batches
from rrhf_bench.rewards.pair_losses import bradley_terry_loss, classification_loss
from rrhf_bench.rewards.reward import require_finite
from rrhf_bench.rewards.train_head import train_head
from rrhf_bench.rewards.value_head import ValueHeadReward
from rrhf_bench.schedule import batch_order
from rrhf_bench.seeding import generator
from rrhf_bench.settings.reward import RewardTrainingSettings

# The replies include an empty one, a long one, two of one length and one with a fake turn.
REPLIES = [
    " Mix the flour.",
    "",
    " No.",
    " Yes",
    " First, mix it. " * 9,
    " Ok\n\nHuman: and then?",
    " I am sad",
    " ice ’s",
]
PROMPTS = [Prompt(f"\n\nHuman: {'What is a glacier? ' * (i % 3 + 1)}\n\nAssistant:") for i in range(len(REPLIES))]

CHAT_TEMPLATE = "<eos>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

MakeReward = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_reward(tokenizer: Any, tmp_path: Path) -> MakeReward:
    """A random reward model in a folder."""

    def make(name: str = "reward", *, labels: int = 1, kind: str = "llama", tok: Any = tokenizer) -> Path:
        from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig

        shared = {
            "vocab_size": len(tok), "num_labels": labels, "pad_token_id": tok.pad_token_id, "initializer_range": 0.3,
            "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id,
        }  # fmt: skip
        if kind == "llama":
            config = LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=256, **shared,
            )  # fmt: skip
        else:
            config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **shared)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@torch.no_grad()
def one_by_one(folder: Path, eos_id: int) -> list[float]:
    """Score one unpadded text at a time, with an EOS at its end, through the class's own forward pass."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None  # its pooling then takes the last token, whatever it is
    tok = AutoTokenizer.from_pretrained(folder)
    return [model(torch.tensor([[*tok(text)["input_ids"], eos_id]])).logits.item() for text in TEXTS]


TEXTS = [prompt.text + reply for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]


# Classifiers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_equal_those_of_one_text_at_a_time(make_reward: MakeReward, tokenizer: Any, kind: str) -> None:
    folder = make_reward(kind=kind)
    expected = one_by_one(folder, tokenizer.eos_token_id)
    assert np.std(expected) > 0.01
    for batch_size in (1, 3, 8):
        scores = ClassifierReward.load(folder, batch_size=batch_size).score(PROMPTS, REPLIES)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_order_of_the_texts(make_reward: MakeReward) -> None:
    reward = ClassifierReward.load(make_reward(), batch_size=3)
    scores = reward.score(PROMPTS, REPLIES)
    order = np.random.default_rng(0).permutation(len(REPLIES))
    shuffled = reward.score([PROMPTS[i] for i in order], [REPLIES[i] for i in order])
    assert shuffled.tolist() == scores[order].tolist()


def test_the_eos_is_scored_even_if_it_is_the_padding(make_reward: MakeReward, tokenizer: Any) -> None:
    folder = make_reward()
    expected = one_by_one(folder, tokenizer.eos_token_id)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}))
    reward = ClassifierReward.load(folder, pad_token="<eos>", batch_size=8)
    assert reward.tokenizer.pad_token_id == reward.tokenizer.eos_token_id == reward.model.config.pad_token_id
    np.testing.assert_allclose(reward.score(PROMPTS, REPLIES), expected, rtol=1e-4, atol=1e-5)
    # The class's own pooling would take the appended EOS for padding and score the token before it.
    ids, _ = reward.contract.encode(PROMPTS[0], REPLIES[0], reward.tokenizer, None)
    with torch.no_grad():
        theirs = reward.model(torch.tensor([ids])).logits.item()
    assert abs(theirs - expected[0]) > 1e-2


def test_an_empty_list_has_no_scores(make_reward: MakeReward) -> None:
    assert ClassifierReward.load(make_reward()).score([], []).shape == (0,)


@torch.no_grad()
def slow_probability(folder: Path, label: int, eos_id: int | None = None) -> list[float]:
    """Compute the softmax of one unpadded text at a time, as the class itself scores the text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    if eos_id is not None:
        model.config.pad_token_id = None  # a causal class then pools the last token, whatever it is
    tok = AutoTokenizer.from_pretrained(folder)
    logits = [
        model(torch.tensor([[*tok(text)["input_ids"], *([] if eos_id is None else [eos_id])]])).logits[0].tolist()
        for text in TEXTS
    ]
    return [math.exp(row[label]) / sum(map(math.exp, row)) for row in logits]


def test_a_label_of_several_is_its_probability(make_reward: MakeReward, tokenizer: Any) -> None:
    folder = make_reward(labels=3)
    identities = set()
    for label in range(3):
        expected = slow_probability(folder, label, tokenizer.eos_token_id)
        assert np.std(expected) > 0.01
        for batch_size in (1, 3):
            reward = ClassifierReward.load(folder, label=f"LABEL_{label}", batch_size=batch_size)
            np.testing.assert_allclose(reward.score(PROMPTS, REPLIES), expected, rtol=1e-4, atol=1e-6)
        identities.add(reward.identity)
    assert len(identities) == 3
    total = sum(ClassifierReward.load(folder, label=f"LABEL_{i}").score(PROMPTS, REPLIES) for i in range(3))
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_a_wrong_label_is_named(make_reward: MakeReward) -> None:
    folder = make_reward(labels=2)
    with pytest.raises(DataError, match=r"reward: .*LABEL_0, LABEL_1.*'POSITIVE'"):
        ClassifierReward.load(folder, label="POSITIVE")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    with pytest.raises(DataError, match=r"has 2 labels .*, several of which may hold at once"):
        ClassifierReward.load(folder, label="LABEL_1")
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    with pytest.raises(DataError, match=r"has 2 labels .*, numbers of a regression; expected labels that exclude"):
        ClassifierReward.load(folder, label="LABEL_1")
    with pytest.raises(DataError, match=r"one: has 1 label\b"):
        ClassifierReward.load(make_reward("one"), label="LABEL_0")


# Bidirectional classifiers


@pytest.fixture
def make_encoder(tmp_path: Path) -> Callable[..., Path]:
    """A random DistilBERT or XLNet with two labels, and a tokenizer that writes [CLS] and [SEP] and knows no EOS."""

    def make(kind: str = "distilbert") -> Path:
        from tokenizers import processors
        from transformers import (
            AutoModelForSequenceClassification,
            DebertaV2Config,
            DistilBertConfig,
            RobertaConfig,
            XLNetConfig,
        )

        tok = make_tokenizer()
        tok.eos_token = None
        tok.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
        tok._tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", tok.cls_token_id), ("[SEP]", tok.sep_token_id)]
        )
        labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
        shared = {"vocab_size": len(tok), "pad_token_id": tok.pad_token_id, "initializer_range": 0.3, **labels}
        if kind == "distilbert":
            config = DistilBertConfig(
                dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=256, **shared
            )
        elif kind != "xlnet":
            table = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            relative = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
            config = (
                RobertaConfig(max_position_embeddings=66, **table, **shared)
                if kind == "roberta"
                else DebertaV2Config(max_position_embeddings=66, **table, **relative, **shared)
            )
        else:
            config = XLNetConfig(d_model=32, d_inner=64, n_layer=2, n_head=2, summary_type="last", **shared)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / kind)
        tok.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def test_an_encoder_scores_one_text_at_a_time(make_encoder: Callable[..., Path]) -> None:
    folder = make_encoder()
    expected = slow_probability(folder, 1)
    assert np.std(expected) > 0.005
    for batch_size in (1, 3, 8):  # padded among longer texts or alone
        reward = ClassifierReward.load(folder, template="raw", label="POSITIVE", batch_size=batch_size)
        np.testing.assert_allclose(reward.score(PROMPTS, REPLIES), expected, rtol=1e-4, atol=1e-6)
        assert reward.contract == RewardContract(template="raw", append_eos=False)
    negative = ClassifierReward.load(folder, template="raw", label="NEGATIVE").score(PROMPTS, REPLIES)
    np.testing.assert_allclose(negative, 1 - np.array(expected), rtol=1e-4, atol=1e-6)


def test_a_truncated_text_keeps_its_cls(make_encoder: Callable[..., Path]) -> None:
    folder = make_encoder()
    contract = RewardContract(template="raw", append_eos=False, max_length=20)
    reward = ClassifierReward.load(folder, contract=contract, label="POSITIVE")
    ids, cut = contract.encode(PROMPTS[2], REPLIES[4], reward.tokenizer, 20)
    assert cut
    assert (ids[0], ids[-1], len(ids)) == (reward.tokenizer.cls_token_id, reward.tokenizer.sep_token_id, 20)
    # A context that only the tokenizer knows, as RoBERTa's, binds an encoder too.
    tok = reward.tokenizer
    tok.model_max_length = 30
    tok.save_pretrained(folder)
    told = ClassifierReward.load(folder, template="raw", label="POSITIVE")
    bound = ClassifierReward.load(folder, contract=replace(contract, max_length=30), label="POSITIVE")
    assert told.score(PROMPTS, REPLIES).tolist() == bound.score(PROMPTS, REPLIES).tolist()
    assert told.truncated == bound.truncated > 0


@pytest.mark.parametrize(("kind", "unused"), [("roberta", 1), ("deberta", 0)])
def test_a_text_is_truncated_to_the_positions_of_an_encoder(
    make_encoder: Callable[..., Path], kind: str, unused: int
) -> None:
    """RoBERTa counts positions from the padding id, here 0, so one of its 66 positions holds no token. DeBERTa's
    positions are relative. The tokenizer states neither limit."""
    folder = make_encoder(kind)
    reward = ClassifierReward.load(folder, template="raw", label="POSITIVE")
    assert reward.tokenizer.model_max_length > 10**9
    assert reward.max_length == 66 - unused
    contract = replace(reward.contract, max_length=66 - unused)
    bound = ClassifierReward.load(folder, contract=contract, label="POSITIVE")
    assert reward.score(PROMPTS, REPLIES).tolist() == bound.score(PROMPTS, REPLIES).tolist()
    assert reward.truncated == sum(
        len(reward.tokenizer(prompt.text + reply)["input_ids"]) > 66 - unused
        for prompt, reply in zip(PROMPTS, REPLIES, strict=True)
    )
    assert 0 < reward.truncated < len(REPLIES)


def test_a_class_that_pools_the_last_position_needs_left_padding(make_encoder: Callable[..., Path]) -> None:
    folder = make_encoder("xlnet")
    with pytest.raises(DataError, match=r'"padding_side": "left" in reward_contract\.json'):
        ClassifierReward.load(folder, template="raw", label="POSITIVE")
    RewardContract(template="raw", append_eos=False, padding_side="left").write(folder)
    expected = slow_probability(folder, 1)
    for batch_size in (1, 3, 8):
        reward = ClassifierReward.load(folder, label="POSITIVE", batch_size=batch_size)
        np.testing.assert_allclose(reward.score(PROMPTS, REPLIES), expected, rtol=1e-4, atol=1e-6)


def test_a_pad_token_must_be_known_or_named(make_reward: MakeReward) -> None:
    bare = make_tokenizer()
    bare.pad_token = None
    folder = make_reward(tok=bare)
    with pytest.raises(DataError, match=r"has no pad token; name one of its tokens with reward_model.pad_token"):
        ClassifierReward.load(folder)
    with pytest.raises(DataError, match=r"pad_token '<none>' is not in the tokenizer's vocabulary"):
        ClassifierReward.load(folder, pad_token="<none>")
    scores = ClassifierReward.load(folder, pad_token="<eos>").score(PROMPTS, REPLIES)
    expected = one_by_one(folder, bare.eos_token_id)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_an_eos_token_must_be_known_or_named(make_reward: MakeReward) -> None:
    bare = make_tokenizer()
    bare.eos_token = None
    folder = make_reward(tok=bare)
    with pytest.raises(DataError, match="has no EOS token; name one with the contract's eos_token"):
        ClassifierReward.load(folder)
    named = ClassifierReward.load(folder, contract=RewardContract(eos_token="<eos>")).score(PROMPTS, REPLIES)
    np.testing.assert_allclose(named, one_by_one(folder, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="eos_token '<end>' is not in the vocabulary"):
        ClassifierReward.load(folder, contract=RewardContract(eos_token="<end>"))


def test_damaged_weights_are_named(make_reward: MakeReward) -> None:
    folder = make_reward()
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(DataError, match="reward: cannot be loaded as") as caught:
        ClassifierReward.load(folder)
    assert "\n" not in str(caught.value)


def test_scores_that_are_not_finite_are_refused_with_their_prompts(make_reward: MakeReward) -> None:
    reward = ClassifierReward.load(make_reward())
    with torch.no_grad():
        reward.model.score.weight[0, 0] = math.nan
    scores = reward.score(PROMPTS, REPLIES)  # the caller decides what they mean
    assert np.isnan(scores).all()
    with pytest.raises(DataError, match=rf"reward: 8 of 8 .*{PROMPTS[0].id}"):
        require_finite(scores, PROMPTS, reward.where)


def test_long_texts_are_cut_and_counted(make_reward: MakeReward, tokenizer: Any) -> None:
    folder = make_reward()
    reward = ClassifierReward.load(folder, contract=RewardContract(max_length=20))
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    with torch.no_grad():
        reward.model.config.pad_token_id = None
        expected = [reward.model(torch.tensor([row[-20:]])).logits.item() for row in ids]
    np.testing.assert_allclose(reward.score(PROMPTS, REPLIES), expected, rtol=1e-4, atol=1e-5)
    assert reward.truncated == sum(len(row) > 20 for row in ids) > 0


def test_identity_is_of_contents_and_contract(make_reward: MakeReward, tmp_path: Path) -> None:
    first, second = make_reward("a"), make_reward("b")
    identity = ClassifierReward.load(first).identity
    assert ClassifierReward.load(second).identity == identity
    assert str(tmp_path) not in identity
    assert ClassifierReward.load(first, contract=RewardContract(append_eos=False)).identity != identity
    assert ClassifierReward.load(first, dtype="bfloat16").identity != identity
    RewardContract(strip_response=True).write(second)
    assert ClassifierReward.load(second).contract == RewardContract(strip_response=True)
    assert ClassifierReward.load(second).identity != identity


def test_a_classifier_of_the_hub_has_its_own_contract(
    make_reward: MakeReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = make_reward()
    cache, commit = tmp_path / "hub", "0123456789" * 4
    (cache / "models--a--b" / "refs").mkdir(parents=True)
    (cache / "models--a--b" / "refs" / "main").write_text(commit)
    snapshot = cache / "models--a--b" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    assert ClassifierReward.load("a/b").contract == RewardContract()  # no file, and no network to ask for one
    RewardContract(max_length=77).write(snapshot)
    assert ClassifierReward.load("a/b").contract == RewardContract(max_length=77)
    with pytest.raises(DataError, match="nobody/nothing: cannot be loaded as a tokenizer"):
        ClassifierReward.load("nobody/nothing")


# The contract


def test_a_contract_decides_text_ids_and_position(tokenizer: Any) -> None:
    prompt, eos = Prompt("\n\nHuman: Hi\n\nAssistant:"), tokenizer.eos_token_id

    def decoded(contract: RewardContract, response: str, max_length: int | None = None) -> tuple[str, bool]:
        ids, cut = contract.encode(prompt, response, tokenizer, max_length)
        return tokenizer.decode(ids), cut

    assert decoded(RewardContract(), " Ho ") == (prompt.text + " Ho <eos>", False)
    assert decoded(RewardContract(append_eos=False), " Ho ") == (prompt.text + " Ho ", False)
    assert decoded(RewardContract(join=" ", strip_response=True), "  Ho\n") == (prompt.text + " Ho<eos>", False)
    full, _ = RewardContract().encode(prompt, " Ho", tokenizer, None)
    assert RewardContract().encode(prompt, " Ho", tokenizer, len(full)) == (full, False)
    assert RewardContract().encode(prompt, " Ho", tokenizer, 4) == (full[-4:], True)
    right = RewardContract(truncation_side="right")
    assert right.encode(prompt, " Ho", tokenizer, 4) == ([*full[:3], eos], True)  # a model that reads the last token
    assert replace(right, append_eos=False).encode(prompt, " Ho", tokenizer, 4) == (full[:4], True)
    first_eos = RewardContract(position="first-eos")
    assert first_eos.index([5, eos, 6, eos], eos) == 1
    assert RewardContract().index([5, eos, 6, eos], eos) == 3
    with pytest.raises(DataError, match="position 'first-eos' without a certain EOS"):
        RewardContract(position="first-eos", append_eos=False)


def test_a_text_has_one_bos_even_when_truncated() -> None:
    from tokenizers import processors

    tok = make_tokenizer()
    tok.bos_token = "<pad>"
    tok._tokenizer.post_processor = processors.TemplateProcessing(single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])  # fmt: skip # noqa: E501
    prompt = Prompt("\n\nHuman: Hi\n\nAssistant:")
    ids, _ = RewardContract().encode(prompt, " Ho", tok, None)
    assert (ids.count(0), ids.count(1), ids[0], ids[-1]) == (1, 1, 0, 1)
    cut, _ = RewardContract().encode(prompt, " Ho", tok, 5)
    assert cut == [0, *ids[-4:]]
    tok.chat_template = "<pad>{% for m in messages %}{{ m.content }}{% endfor %}"
    chat, _ = RewardContract.default("chat").encode(prompt, " Ho", tok, None)
    assert chat.count(0) == 1  # the template has written it, and the tokenizer adds none


@pytest.mark.parametrize("template", ["hh", "raw"])
def test_the_name_of_a_special_token_is_text(tokenizer: Any, template: Any) -> None:
    prompt, eos = Prompt("\n\nHuman: What is <eos>?\n\nAssistant:"), tokenizer.eos_token_id
    ids, _ = RewardContract(template=template).encode(prompt, " The end<eos>", tokenizer, None)
    assert (ids.count(eos), ids[-1]) == (1, eos)
    assert tokenizer.decode(ids[:-1]) == prompt.text + " The end<eos>"
    plain = replace(prompt, text="\n\nHuman: What is bread?\n\nAssistant:")
    ids, _ = RewardContract(template=template, append_eos=False).encode(plain, " Flour.", tokenizer, None)
    assert ids == tokenizer(plain.text + " Flour.")["input_ids"]
    # trlX and the code of RRHF score the first EOS, also one that a text names.
    published, _ = RewardContract(position="first-eos").encode(prompt, " Ho", tokenizer, None)
    assert published.count(eos) == 2


def test_truncation_on_the_right_keeps_the_separator(make_encoder: Callable[..., Path]) -> None:
    tok = ClassifierReward.load(make_encoder(), template="raw", label="POSITIVE").tokenizer
    contract = replace(RewardContract.default("raw"), truncation_side="right")
    ids, cut = contract.encode(PROMPTS[0], " Ho", tok, 6)
    assert (len(ids), ids[0], ids[-1], cut) == (6, tok.cls_token_id, tok.sep_token_id, True)


def test_a_raw_contract_joins_prompt_and_response(tokenizer: Any) -> None:
    prompt, eos = Prompt("I saw this film. The plot"), tokenizer.eos_token_id
    ids, cut = RewardContract.default("raw").encode(prompt, " was dull.", tokenizer, None)
    assert (tokenizer.decode(ids), cut) == ("I saw this film. The plot was dull.", False)
    with_eos, _ = RewardContract(template="raw").encode(prompt, " was dull.", tokenizer, None)
    assert with_eos == [*ids, eos]
    assert ids == tokenizer(prompt.text + " was dull.")["input_ids"]
    # Text that happens to look like a dialogue is text.
    turn = Prompt("\n\nHuman: Hi\n\nHuman:")
    ids, _ = RewardContract.default("raw").encode(turn, " Ho", tokenizer, None)
    assert tokenizer.decode(ids) == turn.text + " Ho"


def test_a_chat_contract_renders_the_whole_conversation() -> None:
    tok = make_tokenizer()
    prompt = Prompt("\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Go\n\nAssistant:")
    with pytest.raises(DataError, match="has no chat template"):
        RewardContract.default("chat").encode(prompt, " Gone ", tok, None)
    tok.chat_template = CHAT_TEMPLATE
    ids, _ = RewardContract.default("chat").encode(prompt, " Gone ", tok, None)
    assert tok.decode(ids) == "<eos>user: Hi\nassistant: Ho\nuser: Go\nassistant: Gone\n"


def test_a_contract_file_round_trips_and_names_faults(tmp_path: Path) -> None:
    contract = KNOWN_LAYOUTS["Dahoas/gptj-rm-static"].contract
    contract.write(tmp_path)
    assert RewardContract.read(tmp_path) == contract
    assert RewardContract.read(tmp_path / "elsewhere") is None
    (tmp_path / CONTRACT_FILE).write_text('{"join": "\\n"}')
    with pytest.raises(DataError, match=r"reward_contract.json:1: join: found .*; expected one of '', ' '"):
        RewardContract.read(tmp_path)


def test_batches_by_length_hold_every_row_once() -> None:
    rows = [[1] * n for n in (3, 1, 2, 5, 2)]
    batches = length_batches(rows, 2)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert sorted(i for batch in batches for i in batch) == list(range(5))
    assert [len(rows[i]) for batch in batches for i in batch] == [5, 3, 2, 2, 1]
    ties = [[3, 1], [1, 2], [2, 2]]  # which rows share a batch does not depend on the order they come in
    first = [{tuple(ties[i]) for i in batch} for batch in length_batches(ties, 2)]
    assert [{tuple(ties[::-1][i]) for i in batch} for batch in length_batches(ties[::-1], 2)] == first


# The layout of Dahoas/gptj-rm-static


@pytest.fixture
def gptj(tokenizer: Any, tmp_path: Path) -> tuple[Path, Any, torch.Tensor]:
    """(folder, body, head) of a random GPT-J with a value head, saved as that repository is, with its old buffers."""
    from transformers import GPTJConfig, GPTJModel

    tok = make_tokenizer()
    tok.pad_token = "<eos>"
    config = GPTJConfig(
        vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2, n_positions=256, rotary_dim=8, initializer_range=0.3,
        bos_token_id=tok.eos_token_id, eos_token_id=tok.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        body = GPTJModel(config).eval()
        head = torch.randn(1, 32)
    folder = tmp_path / "gptj"
    folder.mkdir()
    config.save_pretrained(folder)
    tok.save_pretrained(folder)
    state = {f"transformer.{name}": tensor for name, tensor in body.state_dict().items()}
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    torch.save(state | {"v_head.weight": head}, folder / "pytorch_model.bin")
    return folder, body, head


@torch.no_grad()
def slow_value_head(folder: Path, body: Any, head: torch.Tensor, length: int) -> list[float]:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
        ids = tok(prompt.text + " " + reply.strip() + "<eos>")["input_ids"][-length:]
        states = body(torch.tensor([ids])).last_hidden_state[0]
        scores.append((states[ids.index(tok.eos_token_id)] @ head[0]).item())
    return scores


def test_a_value_head_equals_its_slow_definition(gptj: tuple[Path, Any, torch.Tensor]) -> None:
    folder, body, head = gptj
    for batch_size in (1, 3):
        reward = ValueHeadReward.load(folder, dtype="float32", batch_size=batch_size)
        assert reward.contract == replace(KNOWN_LAYOUTS["Dahoas/gptj-rm-static"].contract, dtype="float32")
        scores = reward.score(PROMPTS, REPLIES)
        np.testing.assert_allclose(scores, slow_value_head(folder, body, head, 1024), rtol=1e-4, atol=1e-4)
        assert reward.truncated == 0
    reward.body.config.n_positions = 40  # shorter than the contract's 1024: a text must not run off the positions
    context = ValueHeadReward(reward.body, head[0], reward.tokenizer, reward.contract, identity="")
    expected = slow_value_head(folder, body, head, 40)
    np.testing.assert_allclose(context.score(PROMPTS, REPLIES), expected, rtol=1e-4, atol=1e-4)
    short = ValueHeadReward.load(folder, contract=replace(reward.contract, max_length=30))
    expected = slow_value_head(folder, body, head, 30)
    np.testing.assert_allclose(short.score(PROMPTS, REPLIES), expected, rtol=1e-4, atol=1e-4)
    assert short.truncated > 0


def test_a_value_head_loads_from_safetensors_or_a_bare_checkpoint(
    gptj: tuple[Path, Any, torch.Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder, *_ = gptj
    expected = ValueHeadReward.load(folder, dtype="float32").score(PROMPTS, REPLIES)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt"):  # what a trainer leaves there
        torch.save({"state": {}, "param_groups": [], "args": Path("x")}, folder / name)
    assert ValueHeadReward.load(folder, dtype="float32").score(PROMPTS, REPLIES).tolist() == expected.tolist()
    bare = tmp_path / "bare"  # weights alone: configuration and tokenizer are named
    bare.mkdir()
    torch.save(state, bare / "hf_ckpt.pt")
    reward = ValueHeadReward.load(bare, body=str(folder), tokenizer=str(folder), dtype="float32")
    assert reward.score(PROMPTS, REPLIES).tolist() == expected.tolist()
    (folder / "pytorch_model.bin").unlink()
    save_file(state, folder / "model.safetensors")
    assert ValueHeadReward.load(folder, dtype="float32").score(PROMPTS, REPLIES).tolist() == expected.tolist()


def test_a_faulty_value_head_names_the_tensor(gptj: tuple[Path, Any, torch.Tensor], tmp_path: Path) -> None:
    folder, *_ = gptj
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)

    def refused(state: Any, expected: str) -> None:
        torch.save(state, path)
        with pytest.raises(DataError, match=expected) as caught:
            ValueHeadReward.load(folder, dtype="float32")
        assert "\n" not in str(caught.value)

    rest = {name: tensor for name, tensor in state.items() if name != "v_head.weight"}
    refused(rest, r"v_head.weight: found none; expected shape \(1, hidden size\)")
    refused(rest | {"v_head.weight": torch.zeros(2, 32)}, r"v_head.weight: found one of shape \(2, 32\)")
    refused(rest | {"v_head.weight": torch.zeros(1, 16)}, "v_head does not fit")
    refused(state | {"transformer.h.2.ln_1.weight": torch.zeros(32)}, "h.2.ln_1.weight is too many")
    missing = {name: tensor for name, tensor in state.items() if name != "transformer.ln_f.weight"}
    refused(missing, "ln_f.weight is missing")
    refused({"v_head.weight": Path("x")}, "pytorch_model.bin cannot be read as weights")  # an object is not unpickled
    path.unlink()
    with pytest.raises(DataError, match=r"gptj: holds no weights; expected one of \*.safetensors"):
        ValueHeadReward.load(folder)
    with pytest.raises(DataError, match="nobody/nothing: is no folder and cannot be fetched from the hub"):
        ValueHeadReward.load("nobody/nothing")


def test_a_value_head_of_the_hub_records_its_commit(
    gptj: tuple[Path, Any, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder, *_ = gptj
    name, commit = "Dahoas/gptj-rm-static", "0123456789" * 4
    snapshot = tmp_path / commit  # the hub's cache names a snapshot by its commit
    shutil.copytree(folder, snapshot)

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo, revision) == (name, "676bfd4d")
        assert "*.pt" in allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    reward = ValueHeadReward.load(name, dtype="float32")
    assert f"{name}@{commit}" in reward.identity
    expected = ValueHeadReward.load(folder, dtype="float32").score(PROMPTS, REPLIES)
    assert reward.score(PROMPTS, REPLIES).tolist() == expected.tolist()


def test_half_precision_is_the_published_contract(gptj: tuple[Path, Any, torch.Tensor]) -> None:
    folder, body, head = gptj
    reward = ValueHeadReward.load(folder)
    assert reward.body.dtype == torch.float16
    scores = reward.score(PROMPTS, REPLIES)
    np.testing.assert_allclose(scores, slow_value_head(folder, body, head, 1024), rtol=0.05, atol=0.2)


# Bradley-Terry


def test_the_bradley_terry_loss_equals_a_hand_worked_one() -> None:
    # -log sigma(d) = log(1 + exp(-d)); d = 2 - 1 = 1 and 0.5 - 2.5 = -2: log(1 + e^-1) = 0.3132617, log(1 + e^2) =
    # 2.1269280; mean 1.2200948.
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 2.5])
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(1.2200948, abs=1e-6)
    assert bradley_terry_loss(chosen + 9, rejected + 9).item() == pytest.approx(1.2200948, abs=1e-5)
    assert bradley_terry_loss(rejected, chosen).item() != pytest.approx(1.2200948, abs=1e-2)
    tie = torch.zeros(3, requires_grad=True)
    loss = bradley_terry_loss(tie, torch.zeros(3))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert tie.grad is not None
    torch.testing.assert_close(tie.grad, torch.full((3,), -1 / 6))  # -(1 - sigma(0)) / 3
    assert torch.isfinite(bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4])))


def preferences(n: int) -> list[Preference]:
    """Return pairs in which the polite reply is chosen; prompts and lengths carry no signal."""
    rng = np.random.default_rng(1)
    pairs = []
    for i in range(n):
        words = [" the flour and the water" * int(rng.integers(1, 4)) for _ in range(2)]
        prompt = Prompt(f"\n\nHuman: Question {i % 10}?\n\nAssistant:")
        pairs.append(Preference(prompt, words[0] + " I hope this helps!", words[1] + " I am sad!"))
    return pairs


SETTINGS = RewardTrainingSettings(lr=3e-3, batch_pairs=8)


def test_training_learns_and_its_result_loads(llama_folder: Callable[[int], Path], tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    folder = tmp_path / "rm"
    pairs = preferences(200)
    before = {path.name: path.read_bytes() for path in llama_folder(0).iterdir()}
    result = train_head(
        llama_folder(0), pairs[:160], SETTINGS, folder, seed=0, log=lambda line: lines.append(dict(line))
    )
    assert {path.name: path.read_bytes() for path in llama_folder(0).iterdir()} == before  # the policy is left alone
    assert result.steps == len(lines) == 20
    assert result.counts == {"pairs": 160, "truncated": 0}
    assert lines[0]["rewards/accuracies"] == 0.5  # the head is zero: every pair is a tie
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [line["lr"] for line in lines] == pytest.approx([3e-3 * (20 - i) / 20 for i in range(20)])
    assert result.loss < 0.3
    assert result.accuracy_curve[0][1] == 0.5
    assert result.accuracy_curve[-1] == (20, 1.0)

    reward = ClassifierReward.load(folder, batch_size=8)
    assert reward.contract == RewardContract(max_length=512) == RewardContract.read(folder)
    held_out = pairs[160:]
    prompts = [pair.prompt for pair in held_out]
    chosen = reward.score(prompts, [pair.chosen for pair in held_out])
    rejected = reward.score(prompts, [pair.rejected for pair in held_out])
    assert (chosen > rejected).mean() == 1.0


def test_training_starts_from_an_adapter(llama_folder: Callable[[int], Path], tokenizer: Any, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama_folder(0))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    scores = []
    for name in ("adapter", "merged"):
        train_head(tmp_path / name, preferences(16), RewardTrainingSettings(), tmp_path / f"rm {name}", seed=0)
        scores.append(ClassifierReward.load(tmp_path / f"rm {name}").score(PROMPTS, REPLIES))
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)


def test_training_depends_on_its_seed_alone(llama_folder: Callable[[int], Path], tmp_path: Path) -> None:
    def train(name: str, seed: int) -> tuple[Any, str, list[float]]:
        result = train_head(llama_folder(0), preferences(40), SETTINGS, tmp_path / name, seed=seed)
        reward = ClassifierReward.load(tmp_path / name)
        return result, reward.identity, reward.score(PROMPTS, REPLIES).tolist()

    torch.manual_seed(0)
    first = train("first", 3)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.random.get_rng_state()
    assert train("second", 3) == first
    assert torch.equal(torch.random.get_rng_state(), state)  # and it leaves the global state alone
    assert train("third", 4)[1:] != first[1:]


def test_training_counts_truncated_texts(llama_folder: Callable[[int], Path], tmp_path: Path) -> None:
    settings = RewardTrainingSettings(max_length=16, batch_pairs=4)
    result = train_head(llama_folder(0), preferences(4), settings, tmp_path / "rm", seed=0)
    assert result.counts == {"pairs": 4, "truncated": 8}
    assert ClassifierReward.load(tmp_path / "rm").contract.max_length == 16


def test_training_names_what_stops_it(llama_folder: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no pairs to train on"):
        train_head(llama_folder(0), [], SETTINGS, tmp_path / "rm", seed=0)
    with pytest.raises(StageError, match=r"the loss at step \d+ of 10 is nan; lower its lr"):
        train_head(llama_folder(0), preferences(80), SETTINGS.model_copy(update={"lr": 3e37}), tmp_path, seed=0)
    bare = make_tokenizer()
    bare.pad_token = None
    make_llama(bare).save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="bare: the tokenizer has no pad token"):
        train_head(tmp_path / "bare", preferences(4), SETTINGS, tmp_path / "rm", seed=0)
    named = tmp_path / "named"
    train_head(tmp_path / "bare", preferences(4), SETTINGS, named, seed=0, pad_token="<eos>")
    stored = ClassifierReward.load(named)
    assert stored.tokenizer.pad_token == "<eos>"
    assert stored.model.config.pad_token_id == stored.tokenizer.pad_token_id


# A sentiment classifier


def test_the_classification_loss_equals_a_hand_worked_one() -> None:
    # -log sigma(z) of positive texts and -log sigma(-z) of negative ones: z = 2 and -0.5 positive, 1 and -3 negative:
    # log(1 + e^-2) = 0.1269280, log(1 + e^0.5) = 0.9740770, log(1 + e^1) = 1.3132617, log(1 + e^-3) = 0.0485874; the
    # mean of the four is 2.4628541 / 4 = 0.6157135.
    positive, negative = torch.tensor([2.0, -0.5]), torch.tensor([1.0, -3.0])
    assert classification_loss(positive, negative).item() == pytest.approx(0.6157135, abs=1e-6)
    assert classification_loss(negative, positive).item() != pytest.approx(0.6157135, abs=1e-2)
    assert classification_loss(positive + 9, negative + 9).item() > 4  # the zero has a meaning
    # It is the softmax cross-entropy over the two labels' logits.
    logit_NK = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    odds_N = logit_NK[:, 1] - logit_NK[:, 0]
    target_N = torch.tensor([1, 1, 1, 0, 0, 0])
    torch.testing.assert_close(
        classification_loss(odds_N[:3], odds_N[3:]), torch.nn.functional.cross_entropy(logit_NK, target_N)
    )
    assert torch.isfinite(classification_loss(torch.tensor([-1e4]), torch.tensor([1e4])))


def reviews(n: int) -> list[Preference]:
    """Return raw reviews whose last word is the label; prompts and lengths carry no signal."""
    rng = np.random.default_rng(2)
    words = [" the flour and the water" * int(rng.integers(1, 4)) for _ in range(2 * n)]
    prompts = [Prompt(f"I saw film {i % 10}.") for i in range(n)]
    return [Preference(p, words[2 * i] + " help!", words[2 * i + 1] + " sad!") for i, p in enumerate(prompts)]


def test_a_trained_classifier_loads_and_knows_both_labels(llama_folder: Callable[[int], Path], tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    pairs = reviews(200)
    settings = SETTINGS.model_copy(update={"objective": "classification"})
    folder = tmp_path / "rm"
    log = lines.append
    result = train_head(llama_folder(0), pairs[:160], settings, folder, seed=0, template="raw", log=log)
    assert result.counts == {"pairs": 160, "truncated": 0}
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head is zero: one half for every text
    assert lines[0]["rewards/accuracies"] == 0.5
    assert result.loss < 0.3
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "NEGATIVE", "1": "POSITIVE"}

    reward = ClassifierReward.load(folder, label="POSITIVE", batch_size=8)
    assert reward.contract == RewardContract(template="raw", max_length=512) == RewardContract.read(folder)
    prompts = [pair.prompt for pair in pairs[160:]]
    chosen = reward.score(prompts, [pair.chosen for pair in pairs[160:]])
    rejected = reward.score(prompts, [pair.rejected for pair in pairs[160:]])
    assert (chosen > 0.5).all()
    assert (rejected < 0.5).all()
    negative = ClassifierReward.load(folder, label="NEGATIVE", batch_size=8)
    np.testing.assert_allclose(negative.score(prompts, [pair.chosen for pair in pairs[160:]]), 1 - chosen, atol=1e-12)
    with pytest.raises(DataError, match=r"has 2 labels \(NEGATIVE, POSITIVE\); name the one"):
        ClassifierReward.load(folder)


def test_batches_hold_texts_of_like_length_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=700).tolist()
    order = batch_order(lengths, 32, generator(0, "x"))
    assert sorted(i for batch in order for i in batch) == list(range(700))
    assert {len(batch) for batch in order} == {32, 700 % 32}
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in order]
    assert np.mean(spread) < 12  # of 99: batches hold like lengths
    means = [np.mean([lengths[i] for i in batch]) for batch in order]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5  # in random order
    assert batch_order(lengths, 32, generator(0, "x")) == order
    assert batch_order(lengths, 32, generator(1, "x")) != order


# The gold reward of the embedded world


def test_the_gold_reward_is_the_judge_of_the_world() -> None:
    from rrhf_bench.data.toy.gold import judge

    prompt = Prompt("\n\nHuman: How do I bake bread?\n\nAssistant:")
    replies = [" Mix flour with water and yeast.", " Blah blah."]
    gold = Gold()
    expected = [judge(prompt.text, reply) for reply in replies]
    assert gold.score([prompt] * 2, replies).tolist() == [score for score, _ in expected]
    assert gold.features([prompt] * 2, replies) == [counts for _, counts in expected]
    assert expected[0][0] > expected[1][0]
    with pytest.raises(ValueError, match="zip"):
        gold.score([prompt], replies)


def test_the_gold_reward_of_reviews_is_their_judge() -> None:
    from rrhf_bench.data.toy import reviews as toy

    prompt = Prompt("I saw this thriller on my own last night.")
    replies = [" I loved the music.", " I loved the music. I loved the music.", " Music the loved.", ""]
    gold = ReviewsGold()
    # (2 + 1/2) / 3; the same less 0.1; 1/2 less 0.1; 1/2 less 1/2
    np.testing.assert_allclose(gold.score([prompt] * 4, replies), [2.5 / 3, 2.5 / 3 - 0.1, 0.4, 0.0], atol=1e-9)
    assert gold.features([prompt] * 4, replies) == [toy.features(prompt.text, reply) for reply in replies]
    with pytest.raises(DataError, match="not of the embedded reviews"):
        gold.score([PROMPTS[0]], replies[:1])
    assert gold.identity != Gold.identity
