"""Record what transformers 4.46 returns for beam search and diverse beam search, as tests/golden/beam.json.

No test runs this. In an environment of its own, because the project's transformers has no group beam search any more:

    python3 -m venv /tmp/beam && /tmp/beam/bin/pip install "torch==2.13.0" "transformers==4.46.3" numpy
    /tmp/beam/bin/python tests/golden/record_beam.py

The weights are no part of the file: ``random_weights`` draws them by numpy, so that every version of torch and of
transformers builds the same model. tests/test_beam.py imports it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).with_name("beam.json")
VOCABULARY = 320
MAX_NEW_TOKENS = 16
PROMPT_LENGTHS = (3, 11, 1, 7, 5, 18)
SETTINGS = (
    {"beams": 4, "groups": 1, "diversity_penalty": 0.0},
    {"beams": 4, "groups": 4, "diversity_penalty": 1.0},
    {"beams": 4, "groups": 4, "diversity_penalty": 0.5},
    {"beams": 4, "groups": 2, "diversity_penalty": 1.0},
    {"beams": 4, "groups": 2, "diversity_penalty": 0.5},
    {"beams": 6, "groups": 2, "diversity_penalty": 1.0},
    # The paper's DP: a temperature, which has no effect without do_sample.
    {"beams": 4, "groups": 4, "diversity_penalty": 1.0, "temperature": 0.8},
)
# (architecture, seed, how many tokens end a reply, whether the pad token is the end-of-text token)
MODELS = (
    ("llama", 0, 1, False),
    ("llama", 1, 1, True),
    ("gpt2", 2, 1, True),
    ("gpt2", 3, 2, False),
)


def build(architecture: str, seed: int, vocabulary: int = VOCABULARY) -> Any:
    """A small random model with distributions far from uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if architecture == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=False,
                **ends,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary, n_positions=128, n_embd=64, n_layer=2, n_head=2, **ends)
        )
    model.load_state_dict(random_weights(model.state_dict(), seed))
    return model.eval()


def random_weights(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Weights drawn in the order of their names: norms about 1, biases small, the rest wide."""
    rng = np.random.RandomState(seed)
    drawn = {}
    for name in sorted(state):
        shape = state[name].shape
        norm = "norm" in name or ".ln_" in name
        noise = rng.standard_normal(tuple(shape)).astype(np.float32)
        value = noise * 0.05 + float(norm and name.endswith("weight")) if len(shape) == 1 else noise * 0.3
        drawn[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    if "transformer.wte.weight" in drawn:
        drawn["lm_head.weight"] = drawn["transformer.wte.weight"]  # tied
    return drawn


def prompts(seed: int) -> list[list[int]]:
    rng = np.random.RandomState(1000 + seed)
    return [rng.randint(VOCABULARY, size=length).tolist() for length in PROMPT_LENGTHS]


def generate(model: Any, prompt: list[int], setting: dict[str, Any], eos: list[int] | None, pad: int | None) -> Any:
    extra: dict[str, Any] = {"temperature": setting["temperature"]} if "temperature" in setting else {}
    if setting["groups"] > 1:
        extra |= {"num_beam_groups": setting["groups"], "diversity_penalty": setting["diversity_penalty"]}
    ids = torch.tensor([prompt])
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=setting["beams"],
            num_return_sequences=setting["beams"],
            length_penalty=1.0,
            early_stopping=False,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=eos,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_scores=True,
            **extra,
        )


def replies(prompt: list[int], output: Any, eos: list[int]) -> list[list[int]]:
    """The generated ids of each sequence, the padding after its end taken off."""
    rows = []
    for row in output.sequences[:, len(prompt) :].tolist():
        ends = [place for place, token in enumerate(row) if token in eos]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def record() -> dict[str, Any]:
    import transformers

    assert transformers.__version__.startswith("4.46."), transformers.__version__
    torch.set_num_threads(1)
    models = []
    for architecture, seed, ends, pad_is_eos in MODELS:
        model = build(architecture, seed)
        # What ends a reply is what the model likes to say, so that many end, at different lengths.
        said: Counter[int] = Counter()
        for prompt in prompts(seed):
            for row in generate(model, prompt, SETTINGS[1], None, None).sequences[:, len(prompt) + 2 :].tolist():
                said.update(set(row))
        eos = [token for token, _ in said.most_common(ends)]
        pad = eos[0] if pad_is_eos else next(token for token, _ in said.most_common() if token not in eos)
        cases = []
        for setting in SETTINGS:
            for prompt in prompts(seed):
                output = generate(model, prompt, setting, eos, pad)
                cases.append(
                    {
                        "setting": setting,
                        "prompt": prompt,
                        "token_ids": replies(prompt, output, eos),
                        "scores": [round(score, 7) for score in output.sequences_scores.tolist()],
                    }
                )
        models.append({"architecture": architecture, "seed": seed, "eos_ids": eos, "pad_id": pad, "cases": cases})
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "max_new_tokens": MAX_NEW_TOKENS,
        "models": models,
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(record(), separators=(",", ":")).replace('{"setting"', '\n{"setting"') + "\n")
