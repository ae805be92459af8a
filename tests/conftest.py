"""Small real models for every test: a byte-level BPE tokenizer and random Llamas, made once a session."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub is a fault, and should fail at once
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it

TEXTS = (
    "\n\nHuman: How do I bake bread?\n\nAssistant: First, mix the flour and the water. Then let it rest for an hour.",
    "\n\nHuman: Hi there! What is a glacier?\n\nAssistant: It is a slow river of ice. I hope this helps!",
    "\n\nHuman: I feel sad today.\n\nAssistant: I am sorry to hear that. Maybe a walk would help you.",
)


def make_tokenizer(vocabulary: int = 320):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    core.train_from_iterator(
        TEXTS * 20, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def make_llama(tokenizer, *, seed: int = 0, hidden: int = 64, layers: int = 2, context: int = 512):
    """A random Llama whose distributions are far from uniform: differences of weights must show."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,  # vLLM on a CPU knows heads of 32 and up
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tokenizer, tmp_path_factory) -> Callable[[int], Path]:
    """A saved random Llama by seed."""
    made: dict[int, Path] = {}

    def folder(seed: int = 0) -> Path:
        if seed not in made:
            made[seed] = tmp_path_factory.mktemp(f"llama{seed}")
            make_llama(tokenizer, seed=seed).save_pretrained(made[seed])
            tokenizer.save_pretrained(made[seed])
        return made[seed]

    return folder


@pytest.fixture
def policy(llama_folder):
    from rrhf_bench.data.dialogue import Template
    from rrhf_bench.policy.policy import TransformersPolicy

    return TransformersPolicy.load(llama_folder(0), template=Template())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write an experiment file and return its path."""

    def write(text: str, name: str = "x.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@dataclass(frozen=True)
class Result:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, wide enough for any table."""
    from rrhf_bench import cli

    for name in ("FORCE_COLOR", "RRHF_BENCH_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["rrhf-bench", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code: Any = ended.value.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(params=["off", "on"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with float32 products by PyTorch's default and by oneDNN, whatever the processor.

    The value is for ``Computation.onednn``. Policies that leave it to the processor follow, if they are made later.
    """
    monkeypatch.setattr("rrhf_bench.policy.onednn.worth_it", lambda: request.param == "on")
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread: models this small gain nothing from more, and lose minutes on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first, so that the processes that share the files end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")  # stable: the rest stays in order
