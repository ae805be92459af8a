"""Small models trained on text: from nothing, and from such a model on."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_bench.data.toy.scratch import train_language_model
from rrhf_bench.errors import StageError
from rrhf_bench.settings.experiment import ScratchSettings

SETTINGS = ScratchSettings(vocabulary=300, hidden=32, layers=1, heads=1, ffn=64, context=64, epochs=2, batch=2)
OTHER = tuple(text.replace("?", ", please?") for text in TEXTS)


def train(folder: Path, texts=TEXTS, settings: ScratchSettings = SETTINGS, start: Path | None = None) -> list[dict]:
    log: list[dict] = []
    train_language_model(
        texts, settings, seed=3, folder=folder, device="cpu", log=log.append, progress=lambda *_: None, start=start
    )
    return log


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    train(folder)
    return folder


def test_training_goes_on_from_the_weights(raw: Path, tmp_path: Path) -> None:
    """At a learning rate that changes nothing, the model that comes out is the one that went in."""
    still = SETTINGS.model_copy(update={"lr": 1e-30, "epochs": 1})
    log = train(tmp_path / "same", OTHER, still, start=raw)
    assert all(torch.equal(value, weights(raw)[name]) for name, value in weights(tmp_path / "same").items())
    # Its first loss is that of the model on the first batch, not that of random weights: ln 300 = 5.70.
    fresh = train(tmp_path / "fresh", OTHER, still)
    assert log[0]["loss"] < fresh[0]["loss"]
    assert fresh[0]["loss"] == pytest.approx(5.70, abs=0.1)  # random weights of std 0.02 are nearly uniform


def test_training_changes_the_weights_and_leaves_the_start_alone(raw: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    train(tmp_path / "a", OTHER, start=raw)
    train(tmp_path / "b", OTHER, start=raw)
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == before
    trained, again = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert any(not torch.equal(trained[name], value) for name, value in weights(raw).items())


def test_tokenizer_is_that_of_the_start(raw: Path, tmp_path: Path) -> None:
    # Another vocabulary is asked for, and other texts would give other merges.
    train(tmp_path, ("zzzz qqqq",) * 3, SETTINGS.model_copy(update={"vocabulary": 400}), start=raw)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(raw)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (*TEXTS, "zzzz qqqq"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.pad_token_id, ours.eos_token_id) == (theirs.pad_token_id, theirs.eos_token_id)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(theirs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 64}, "its model has hidden = 32; scratch asks for hidden = 64; "),
        ({"layers": 2}, "its model has layers = 1; scratch asks for layers = 2; "),
        ({"heads": 2}, "its model has heads = 1; scratch asks for heads = 2; "),
        ({"ffn": 96}, "its model has ffn = 64; scratch asks for ffn = 96; "),
        ({"context": 128}, "its model has context = 64; scratch asks for context = 128; "),
        ({"layers": 2, "ffn": 96}, "layers = 1, ffn = 64; scratch asks for layers = 2, ffn = 96; "),
    ],
)
def test_another_architecture_is_refused(raw: Path, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(StageError, match=message) as error:
        train(tmp_path / "out", settings=SETTINGS.model_copy(update=changed), start=raw)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"found no config\.json"):
        train(tmp_path / "out", start=tmp_path / "nothing")
