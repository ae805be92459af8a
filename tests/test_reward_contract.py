"""Each fault in the input of a reward model is found in a real model, with the setting that mends it.

A model whose input differs from its training still returns numbers, so only these checks can find the fault.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, make_llama, make_tokenizer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
)

from rrhf_bench.errors import DataError
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards.checks import PROBES, ROUNDING, Check, check_pairs, record_of
from rrhf_bench.rewards.hub import ClassifierReward
from rrhf_bench.rewards.input_contract import CONTRACT_FILE, KNOWN_LAYOUTS, RewardContract
from rrhf_bench.rewards.train_head import train_head
from rrhf_bench.rewards.value_head import ValueHeadReward
from rrhf_bench.settings.reward import RewardTrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
NAMES = [
    "EOS",
    "BOS",
    "padding and EOS",
    "truncation side",
    "padding side",
    "dtype",
    "labels",
    "head",
    "batch and order",
    "recorded texts",
]


def pairs(n: int, seed: int = 1, *, last: bool = False) -> list[Preference]:
    """Return pairs that one word decides. The word is anywhere in a reply, or its last word."""
    rng = np.random.default_rng(seed)
    filler = [" the flour", " and the water", " a slow river of ice", " hour", " walk", " bread", " Then let it rest"]

    def reply(word: str) -> str:
        words = [filler[i] for i in rng.integers(0, len(filler), size=int(rng.integers(2, 7)))]
        words.insert(len(words) if last else int(rng.integers(0, len(words))), word)
        return "".join(words)

    prompts = [Prompt(f"\n\nHuman: Question {i % 10}?\n\nAssistant:") for i in range(n)]
    return [Preference(prompt, reply(" help"), reply(" sad")) for prompt in prompts]


def with_bos(times: int = 1) -> Any:
    """A tokenizer that writes its BOS so many times before a text."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=times * "<s> " + "$A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of our own, trained from a model whose tokenizer writes a BOS."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = with_bos()
    make_llama(tokenizer).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    settings = RewardTrainingSettings(lr=3e-3, batch_pairs=16)
    train_head(folder / "policy", pairs(640), settings, folder / "reward", seed=0)
    return folder / "reward"


@pytest.fixture
def spoilt(trained: Path, tmp_path: Path) -> Path:
    """A copy to plant a fault in."""
    return shutil.copytree(trained, tmp_path / "reward")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONTRACT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forget(folder: Path) -> None:
    """Remove the record and the contract, as in a model that another program has trained."""
    (folder / CONTRACT_FILE).unlink()


def refused(load: Callable[[], object], *words: str) -> str:
    """Assert that loading fails with one line that holds these words, and return the line."""
    with pytest.raises(DataError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
    return message


def found(checks: tuple[Check, ...], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


# What is recorded, and that it is replayed


def test_eight_texts_are_recorded_and_replayed(trained: Path) -> None:
    reward = ClassifierReward.load(trained)
    record = reward.contract.record
    assert record is not None
    assert (len(record.texts), record.dtype, record.label) == (8, "float32", None)
    assert [check.name for check in reward.checks] == NAMES
    assert not [check for check in reward.checks if check.ok is False]
    assert found(reward.checks, "recorded texts").found.startswith("8 replayed: ids equal")
    # By hand: one unpadded text at a time, BOS before it and EOS behind, through the class's own forward pass.
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    model.config.pad_token_id = None
    for text, probe in zip(record.texts, PROBES, strict=True):
        ids = [*reward.tokenizer(text.prompt.text + text.response)["input_ids"], reward.tokenizer.eos_token_id]
        cut = ids if text.max_length is None else [ids[0], *ids[len(ids) - text.max_length + 1 :]]
        assert list(text.ids) == cut
        assert replace(text, ids=(), score=0.0) == probe
        with torch.no_grad():
            assert text.score == pytest.approx(model(torch.tensor([cut])).logits.item(), abs=1e-5)
    assert [len(text.ids) for text in record.texts].count(16) == 1  # one is cut


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_against_eight_is_far_within_the_bound(trained: Path, tmp_path: Path, kind: str) -> None:
    reward = ClassifierReward.load(trained) if kind == "llama" else fresh_gpt2()
    rows = [reward.encode(probe.prompt, probe.response, probe.max_length) for probe in PROBES]
    together = reward.score_batch(rows)
    alone = np.concatenate([reward.score_batch([row]) for row in rows])
    scale = max(1.0, np.abs(together).max())
    assert np.abs(together - alone).max() / scale < ROUNDING["float32"] / 10
    for size in (1, 8):
        reward.batch_size = size
        prompts, replies = [probe.prompt for probe in PROBES[:7]], [probe.response for probe in PROBES[:7]]
        np.testing.assert_allclose(reward.score(prompts, replies), alone[:7], atol=scale * ROUNDING["float32"] / 10)


def fresh_gpt2(tokenizer: Any = None, cls: Any = GPT2ForSequenceClassification, **contract: Any) -> ClassifierReward:
    tokenizer = tokenizer or make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256, num_labels=1, initializer_range=0.3,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = cls(config)
    return ClassifierReward(model, tokenizer, RewardContract(**contract), identity="")


def test_a_contract_without_a_record_loads(spoilt: Path) -> None:
    before = ClassifierReward.load(spoilt)
    RewardContract(max_length=512).write(spoilt)
    assert "record" not in json.loads((spoilt / CONTRACT_FILE).read_text())
    after = ClassifierReward.load(spoilt)
    assert after.contract.record is None
    assert found(after.checks, "recorded texts").found == "none"
    assert after.identity == before.identity  # what was recorded decides no score
    test = pairs(8, seed=2)
    prompts, replies = [pair.prompt for pair in test], [pair.chosen for pair in test]
    assert after.score(prompts, replies).tolist() == before.score(prompts, replies).tolist()


def test_the_record_is_replayed_under_a_given_contract(trained: Path) -> None:
    contract = RewardContract(append_eos=False, max_length=512)
    refused(lambda: ClassifierReward.load(trained, contract=contract), "found the end, expected ['<eos>']")


def test_a_damaged_record_is_named(spoilt: Path) -> None:
    record = json.loads((spoilt / CONTRACT_FILE).read_text())["record"]
    del record["texts"][3]["ids"]
    edit(spoilt, record=record)
    refused(lambda: ClassifierReward.load(spoilt), f"{CONTRACT_FILE}:1: record: texts[3]", "'ids' is missing")
    (spoilt / CONTRACT_FILE).write_text("")
    refused(lambda: ClassifierReward.load(spoilt), CONTRACT_FILE, "found 0 lines; expected the contract")


def test_changed_weights_are_refused(spoilt: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(spoilt)
    with torch.no_grad():
        model.score.weight *= 1.01
    model.save_pretrained(spoilt)
    refused(lambda: ClassifierReward.load(spoilt), "scores text", CONTRACT_FILE)


def test_a_classifier_records_its_label(tmp_path: Path, llama_folder: Callable[[int], Path]) -> None:
    settings = RewardTrainingSettings(objective="classification", lr=3e-3, batch_pairs=8)
    train_head(llama_folder(0), pairs(32), settings, tmp_path, seed=0, template="raw")
    positive = ClassifierReward.load(tmp_path, label="POSITIVE")
    assert positive.contract.record is not None
    assert positive.contract.record.label == "POSITIVE"
    assert found(positive.checks, "recorded texts").found.startswith("8 replayed: ids equal, scores")
    other = ClassifierReward.load(tmp_path, label="NEGATIVE")
    assert "'POSITIVE', not compared" in found(other.checks, "recorded texts").found
    assert found(other.checks, "labels").found == "'NEGATIVE' of several, its probability"


# The nine faults


def test_fault_1_an_eos_that_differs_from_the_record(spoilt: Path) -> None:
    edit(spoilt, append_eos=False)
    refused(
        lambda: ClassifierReward.load(spoilt), "recorded text 1", "found the end, expected ['<eos>']", CONTRACT_FILE
    )
    edit(spoilt, append_eos=True, strip_response=True)
    refused(lambda: ClassifierReward.load(spoilt), "recorded text 1", "expected ['Ġ")


def test_fault_1_an_eos_without_a_record_is_found_on_held_out_pairs(spoilt: Path) -> None:
    forget(spoilt)
    held_out = pairs(100, seed=2)
    right = found(check_pairs(ClassifierReward.load(spoilt), held_out), "EOS on held-out pairs")
    assert right.ok is True
    RewardContract(append_eos=False).write(spoilt)
    wrong = found(check_pairs(ClassifierReward.load(spoilt), held_out), "EOS on held-out pairs")
    assert wrong.ok is False
    assert wrong.found.startswith(right.found)  # the same two shares
    assert wrong.found.endswith(f"append_eos = true in {CONTRACT_FILE}")


def test_fault_1_an_eos_that_the_template_writes_too(spoilt: Path) -> None:
    forget(spoilt)
    tokenizer = with_bos()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
    tokenizer.save_pretrained(spoilt)
    RewardContract(template="chat", append_eos=True).write(spoilt)
    refused(lambda: ClassifierReward.load(spoilt), "EOS <eos>", f"append_eos = false in {CONTRACT_FILE}")
    RewardContract(template="chat", append_eos=False).write(spoilt)
    assert found(ClassifierReward.load(spoilt).checks, "EOS").found.startswith("one <eos>")


def test_fault_2_bos_twice(spoilt: Path) -> None:
    with_bos(2).save_pretrained(spoilt)
    refused(lambda: ClassifierReward.load(spoilt), "recorded text 1", "at token 1 found ['<s>'")
    forget(spoilt)  # nor does it pass if nothing was recorded
    refused(lambda: ClassifierReward.load(spoilt), "BOS <s> twice", "add_bos_token = false")
    tokenizer = with_bos()
    tokenizer.chat_template = "<s><s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(spoilt)
    refused(lambda: ClassifierReward.load(spoilt, template="chat"), "BOS <s> twice", "chat template")
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("<s>")
    tokenizer.save_pretrained(spoilt)
    assert found(ClassifierReward.load(spoilt, template="chat").checks, "BOS").found == "one <s>"


def test_fault_2_bos_missing(spoilt: Path) -> None:
    with_bos(0).save_pretrained(spoilt)
    refused(lambda: ClassifierReward.load(spoilt), "recorded text 1", "at token 0", "expected ['<s>'")


class PoolsLastNonPad(LlamaForSequenceClassification):
    """Reads the last token that is not padding, by itself: under another name than the classes of transformers."""

    side = "right"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.reward_head = self.score
        del self.score

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        places = torch.arange(input_ids.shape[1]) * (input_ids != self.config.pad_token_id)
        index = places.argmax(dim=1) if self.side == "right" else -1
        return Output(self.reward_head(hidden[torch.arange(len(hidden)), index]))


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class PoolsLastPlace(PoolsLastNonPad):
    side = "left"


def own_pooling(trained: Path, cls: Any, pad_token: str = "<pad>", **contract: Any) -> ClassifierReward:
    source = AutoModelForSequenceClassification.from_pretrained(trained)
    model = cls(source.config)
    state = source.state_dict()
    model.load_state_dict(state | {"reward_head.weight": state.pop("score.weight")})
    tokenizer = with_bos()
    tokenizer.pad_token = pad_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return ClassifierReward(model, tokenizer, RewardContract(**contract), identity="")


def test_fault_3_pad_taken_for_eos(trained: Path) -> None:
    words = ("EOS as padding: both are <eos>", "reward_model.pad_token")
    refused(lambda: own_pooling(trained, PoolsLastNonPad, "<eos>"), *words)
    reward = own_pooling(trained, PoolsLastNonPad)
    assert found(reward.checks, "padding and EOS").ok
    held_out = pairs(8, seed=2)
    prompts, replies = [pair.prompt for pair in held_out], [pair.chosen for pair in held_out]
    expected = ClassifierReward.load(trained).score(prompts, replies)
    np.testing.assert_allclose(reward.score(prompts, replies), expected, atol=1e-4)


def test_fault_3_pad_taken_for_eos_in_its_training(tmp_path: Path) -> None:
    """A class of transformers in a usual training script: it reads the token before the EOS, which is also the pad."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make_llama(tokenizer).save_pretrained(tmp_path)
        model = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train = pairs(160, last=True)
    for start in range(0, len(train), 16):
        batch = train[start : start + 16]
        texts = [pair.prompt.text + reply + "<eos>" for pair in batch for reply in (pair.chosen, pair.rejected or "")]
        score = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        loss = -nn.functional.logsigmoid(score[::2] - score[1::2]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = ClassifierReward.load(tmp_path)
    padding = found(reward.checks, "padding and EOS")
    assert padding.ok is False
    assert f"append_eos = false in {CONTRACT_FILE}" in padding.found
    check = found(check_pairs(reward, pairs(100, seed=2, last=True)), "EOS on held-out pairs")
    assert check.ok is False
    assert check.found.endswith(f"append_eos = false in {CONTRACT_FILE}")


def test_fault_4_truncation_side(spoilt: Path) -> None:
    edit(spoilt, truncation_side="right")
    refused(lambda: ClassifierReward.load(spoilt), "recorded text 8", CONTRACT_FILE)
    RewardContract(truncation_side="right", max_length=12).write(spoilt)  # nothing recorded
    reward = ClassifierReward.load(spoilt)
    assert found(reward.checks, "truncation side").found == "right, at 12 tokens"
    check = found(check_pairs(reward, pairs(30, seed=2)), "truncation of held-out pairs")
    assert check.ok is False
    assert "30 of 30 pairs" in check.found
    assert f'truncation_side = "left" in {CONTRACT_FILE}' in check.found


def test_fault_5_padding_side(trained: Path, spoilt: Path) -> None:
    refused(lambda: own_pooling(trained, PoolsLastPlace), f'"padding_side": "left" in {CONTRACT_FILE}')
    reward = own_pooling(trained, PoolsLastPlace, padding_side="left")
    assert found(reward.checks, "padding side").found == "left; it changes no score"
    held_out = pairs(8, seed=2)
    prompts, replies = [pair.prompt for pair in held_out], [pair.chosen for pair in held_out]
    expected = ClassifierReward.load(trained).score(prompts, replies)
    np.testing.assert_allclose(reward.score(prompts, replies), expected, atol=1e-4)
    # The other way round, and for a model that is read at its own length, padding before it is a fault.
    mend = f'"padding_side": "right" in {CONTRACT_FILE}'
    refused(lambda: own_pooling(trained, PoolsAtLength, padding_side="left"), mend)
    edit(spoilt, padding_side="left")
    refused(lambda: ClassifierReward.load(spoilt), 'padding_side = "left"', CONTRACT_FILE)


class PoolsAtLength(PoolsLastNonPad):
    """Counts a row's tokens and reads the one at that place: padding before it moves it."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return Output(self.reward_head(hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]))


def test_fault_6_dtype(trained: Path, spoilt: Path) -> None:
    # Asked for in half precision: within a wider bound, so it loads, with a warning that says what it costs.
    half = ClassifierReward.load(trained, dtype="bfloat16")
    check = found(half.checks, "dtype")
    assert check.ok is False
    assert check.found.startswith("bfloat16")
    assert 'reward_model.dtype = "float32" (--reward-dtype float32)' in check.found
    assert found(ClassifierReward.load(trained, dtype="float16").checks, "dtype").ok is False
    # Not asked for: weights in another dtype than the contract says.
    whole = ClassifierReward.load(trained)
    words = ("in float16, its contract says dtype float32", 'reward_model.dtype = "float16"')
    refused(lambda: ClassifierReward(whole.model.half(), whole.tokenizer, whole.contract, identity=""), *words)
    # Rounded on disk, and loaded in float32 again.
    model = AutoModelForSequenceClassification.from_pretrained(spoilt, dtype=torch.bfloat16)
    model.save_pretrained(spoilt)
    refused(lambda: ClassifierReward.load(spoilt), "scores text", CONTRACT_FILE)


def test_fault_6_a_dtype_that_is_too_coarse(spoilt: Path) -> None:
    """Half precision that changes scores beyond rounding: the record is of float32, and far away."""
    record = json.loads((spoilt / CONTRACT_FILE).read_text())["record"]
    record["texts"][0]["score"] += 2 * ROUNDING["bfloat16"] * max(abs(text["score"]) + 1 for text in record["texts"])
    edit(spoilt, record=record)
    refused(lambda: ClassifierReward.load(spoilt, dtype="bfloat16"), "scores text 1", 'reward_model.dtype = "float32"')


def test_fault_7_several_labels(spoilt: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(spoilt, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(spoilt)
    refused(lambda: ClassifierReward.load(spoilt), "2 labels (LABEL_0, LABEL_1)", "reward_model.label")


def test_fault_8_a_head_that_nobody_trained(trained: Path, spoilt: Path) -> None:
    policy = trained.parent / "policy"
    refused(lambda: ClassifierReward.load(policy), "no trained score.weight")
    forget(spoilt)
    model = AutoModelForSequenceClassification.from_pretrained(spoilt)
    nn.init.zeros_(model.score.weight)
    model.save_pretrained(spoilt)
    refused(lambda: ClassifierReward.load(spoilt), "gives every text the score 0")
    # Random, and saved as if it were trained: the folder is complete, and only labelled pairs can tell.
    held_out = pairs(300, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForSequenceClassification(model.config).save_pretrained(spoilt)
    check = found(check_pairs(ClassifierReward.load(spoilt), held_out), "held-out pairs")
    assert check.ok is False
    assert "no better than chance" in check.found
    assert found(check_pairs(ClassifierReward.load(trained), held_out), "held-out pairs").ok is None


class Centred(nn.Module):
    """Takes the mean of the batch off every score."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        score = self.head(hidden)
        return score - score.mean(dim=0, keepdim=True)


class ByPlace(Centred):
    """Gives the rows of a batch weights by their place in it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden) * (1 + 0.01 * torch.arange(len(hidden)).view(-1, *[1] * (hidden.dim() - 1)))


@pytest.mark.parametrize("fault", [Centred, ByPlace])
def test_fault_9_batch_and_order(trained: Path, fault: Any) -> None:
    reward = ClassifierReward.load(trained)
    reward.model.score = fault(reward.model.score)
    refused(
        lambda: ClassifierReward(reward.model, reward.tokenizer, RewardContract(), identity=""), "batch size or order"
    )


def test_a_length_that_leaves_one_text_is_refused(spoilt: Path) -> None:
    RewardContract(max_length=2).write(spoilt)  # BOS and EOS
    refused(lambda: ClassifierReward.load(spoilt), "eight different texts become one", "raise max_length (2)")
    (spoilt / CONTRACT_FILE).write_text('{"max_length": 0}')
    refused(lambda: ClassifierReward.load(spoilt), "max_length: found 0; expected at least 2 tokens")


# Models of the hub


def test_the_known_layout_of_a_hub_model_is_used_and_not_measured(trained: Path) -> None:
    name = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"
    reward = ClassifierReward.load(trained)
    tokenizer = with_bos()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    contract = replace(KNOWN_LAYOUTS[name].contract, dtype="float32")
    known = ClassifierReward(reward.model, tokenizer, contract, identity="", where=name)
    assert found(known.checks, "EOS") == Check("EOS", True, "none at the end, as known of this model")
    assert "EOS on held-out pairs" not in [check.name for check in check_pairs(known, pairs(20))]
    other = ClassifierReward(reward.model, tokenizer, contract, identity="", where="somebody/else")
    assert found(other.checks, "EOS").ok is None
    assert "EOS on held-out pairs" in [check.name for check in check_pairs(other, pairs(20))]
    assert check_pairs(other, []) == ()


def test_a_known_model_of_the_other_layout_is_refused() -> None:
    refused(lambda: ClassifierReward.load("Dahoas/gptj-rm-static"), 'set reward_model.layout = "value-head" (--layout)')


# A value head keeps the same contract


@pytest.fixture
def value_head(trained: Path, tmp_path: Path) -> Path:
    """The same body with a bare ``v_head`` and what it has recorded."""
    from safetensors.torch import save_file

    source = AutoModelForSequenceClassification.from_pretrained(trained)
    folder = tmp_path / "value"
    folder.mkdir()
    source.config.save_pretrained(folder)
    with_bos().save_pretrained(folder)
    state = {f"transformer.{name}": tensor for name, tensor in source.model.state_dict().items()}
    save_file(state | {"v_head.weight": source.score.weight.detach()}, folder / "model.safetensors")
    contract = RewardContract(position="first-eos")
    replace(contract, record=record_of(ValueHeadReward.load(folder, contract=contract))).write(folder)
    return folder


def test_a_value_head_replays_its_record(trained: Path, value_head: Path) -> None:
    reward = ValueHeadReward.load(value_head)
    assert [check.name for check in reward.checks] == NAMES
    mine, theirs = reward.contract.record, ClassifierReward.load(trained).contract.record
    assert mine is not None
    assert theirs is not None
    assert [text.ids for text in mine.texts] == [text.ids for text in theirs.texts]
    assert [text.score for text in mine.texts] == pytest.approx([text.score for text in theirs.texts], abs=1e-4)
    padding = found(reward.checks, "padding and EOS")
    assert padding.ok is None  # its record says that it was trained so
    assert "length of its row, so the EOS counts" in padding.found
    edit(value_head, append_eos=False, position="last")
    refused(lambda: ValueHeadReward.load(value_head), "recorded text 1", "expected ['<eos>']")
    edit(value_head, append_eos=True, padding_side="left")
    refused(lambda: ValueHeadReward.load(value_head), 'padding_side = "left"', CONTRACT_FILE)
    edit(value_head, padding_side="right", join=" ")
    refused(lambda: ValueHeadReward.load(value_head), "recorded text")


# No code from a file, unless the experiment says so


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("layout", ["classifier", "value-head"])
def test_a_pickle_with_code_is_refused_and_not_run(trained: Path, tmp_path: Path, layout: str, cli: Cli) -> None:
    folder, mark = tmp_path / "hostile", tmp_path / "mark"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = AutoModelForSequenceClassification.from_pretrained(trained).state_dict()
    torch.save(state | {"score.weight": Hostile(mark)}, folder / "pytorch_model.bin")
    load = ClassifierReward.load if layout == "classifier" else ValueHeadReward.load
    refused(lambda: load(folder), "hostile: ", "expected safetensors")
    candidates, out = tmp_path / "candidates.jsonl", tmp_path / "out.jsonl"
    candidates.write_text(json.dumps({"query": "Hi?", "responses": ["Ho.", "Hm."]}) + "\n")
    words = ["--reward-model", folder, "--layout", layout, "--candidates", candidates, "--out", out, "--device", "cpu"]
    printed = cli("score", *words)
    assert printed.code == 2
    assert [line.startswith("error: ") for line in printed.err.strip().splitlines()] == [True], repr(printed.err)
    assert not mark.exists()
    assert not out.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # and it would have acted
    assert mark.is_dir()


THEIR_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class Theirs(LlamaPreTrainedModel):
    config_class = TheirConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(hidden[:, -1]))
"""


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(
    trained: Path, value_head: Path, tmp_path: Path
) -> None:
    folder, mark = tmp_path / "remote", tmp_path / "mark"
    shutil.copytree(trained, folder)
    (folder / "their_code.py").write_text(f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n" + THEIR_CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "their_code.TheirConfig", "AutoModelForSequenceClassification": "their_code.Theirs"}
    config |= {"model_type": "theirs", "architectures": ["Theirs"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    words = ("trust_remote_code = true",)
    refused(lambda: ClassifierReward.load(folder), *words)
    refused(lambda: ValueHeadReward.load(value_head, body=str(folder)), *words)
    refused(lambda: train_head(folder, pairs(4), RewardTrainingSettings(), tmp_path / "out", seed=0), *words)
    assert not mark.exists()
    reward = ClassifierReward.load(folder, trust_remote_code=True)
    assert mark.is_dir()
    assert type(reward.model).__name__ == "Theirs"
    assert found(reward.checks, "recorded texts").found.startswith("8 replayed")


FORBIDDEN = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def test_nothing_here_reads_a_file_that_could_run_code() -> None:
    """Files of torch are read as tensors and plain values, which each call states."""
    faults = []
    for path in sorted([*(ROOT / "rrhf_bench").rglob("*.py"), *(ROOT / "baselines").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            faults += [f"{path.name}: imports {name}" for name in names if name.split(".")[0] in FORBIDDEN]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                if "allow_pickle" in keywords:
                    faults.append(f"{path.name}:{node.lineno}: {call} with allow_pickle")
                if call == "torch.load" and keywords.get("weights_only") != "True":
                    faults.append(f"{path.name}:{node.lineno}: torch.load without weights_only=True")
                if call.endswith(".from_pretrained") and keywords.get("trust_remote_code") == "True":
                    faults.append(f"{path.name}:{node.lineno}: trusts code that comes with a model")
    assert not faults


def test_trust_is_off_unless_the_file_says_so(trained: Path) -> None:
    """Off, it stands in no key and no resolved file: what was made before there was such a key is found again."""
    from rrhf_bench.pipeline.stage_graph import make_plan
    from rrhf_bench.settings.reading import load_experiment

    def given(*overrides: str) -> tuple[Any, dict[str, Any]]:
        words = [f"{table}.source={trained}" for table in ("policy", "reward_model", "perplexity_model")]
        experiment = load_experiment(ROOT / "experiments" / "smoke.toml", [*words, *overrides])
        stages = make_plan(experiment).stages
        return experiment, {stage.name: stage for stage in stages if stage.kind in ("model", "reward model")}

    experiment, plain = given()
    assert not experiment.policy.trust_remote_code
    assert "trust_remote_code" not in experiment.to_toml()
    assert "trust_remote_code" not in json.dumps([dict(stage.settings) for stage in plain.values()])
    off, same = given("policy.trust_remote_code=false", "reward_model.trust_remote_code=false")
    assert (off, {name: stage.key for name, stage in same.items()}) == (
        experiment,
        {name: stage.key for name, stage in plain.items()},
    )
    on, trusted = given("policy.trust_remote_code=true", "reward_model.trust_remote_code=true")
    assert on.to_toml().count("trust_remote_code = true") == 2
    for name, expected in {"policy": True, "reward model": True, "perplexity model": False}.items():
        assert trusted[name].settings.get("trust_remote_code", False) is expected
        assert (trusted[name].key != plain["policy" if name == "perplexity model" else name].key) is expected


# Where people see it


def test_held_out_pairs_warn_of_a_setting_that_ranks_them_worse(spoilt: Path, tmp_path: Path) -> None:
    from rrhf_bench.jsonl import write_jsonl
    from rrhf_bench.pipeline.results import WARNINGS
    from rrhf_bench.pipeline.services import ModelRef, Services
    from rrhf_bench.pipeline.stage_context import Job
    from rrhf_bench.pipeline.stages import score_pairs
    from rrhf_bench.settings.experiment import RuntimeSettings

    def warnings() -> list[str]:
        for name in ("prompts", "reward", "out"):
            (tmp_path / name).mkdir(exist_ok=True)
        write_jsonl(tmp_path / "prompts" / "test.jsonl", pairs(100, seed=2))
        (tmp_path / "prompts" / "about.json").write_text('{"gold": null}')
        ModelRef(str(spoilt)).write(tmp_path / "reward")
        inputs = {"prompts": tmp_path / "prompts", "reward model": tmp_path / "reward"}
        services = Services(RuntimeSettings(device="cpu"))
        score_pairs(
            Job("score pairs", {"split": "test"}, inputs, tmp_path / "out", services, "transformers", lambda *_: None)
        )
        return json.loads((tmp_path / "out" / WARNINGS).read_text())

    assert warnings() == []
    RewardContract(append_eos=False).write(spoilt)
    (warning,) = warnings()
    assert warning.startswith("reward model, EOS on held-out pairs: ")
    assert f"append_eos = true in {CONTRACT_FILE}" in warning


def test_doctor_shows_every_check(trained: Path, spoilt: Path) -> None:
    from rrhf_bench.pipeline.doctor import _guarded, _reward
    from rrhf_bench.pipeline.services import ModelRef, Services
    from rrhf_bench.settings.experiment import RuntimeSettings

    services = Services(RuntimeSettings(device="cpu"))
    findings = _reward(services, ModelRef(str(trained)))
    assert [finding.check for finding in findings[:-1]] == ["reward model", *(f"its {name}" for name in NAMES)]
    assert findings[-1].check == "its held-out pairs"
    assert findings[-1].ok is None  # it knows nothing of this world
    assert not [finding for finding in findings if finding.ok is False]
    edit(spoilt, truncation_side="right")
    (finding,) = _guarded(services, "reward model", lambda: _reward(services, ModelRef(str(spoilt))))
    assert finding.ok is False
    assert "recorded text 8" in finding.found
    half = {f.check: f for f in _reward(services, ModelRef(str(trained), dtype="bfloat16"))}
    assert half["its dtype"].found.startswith("warning: bfloat16")
