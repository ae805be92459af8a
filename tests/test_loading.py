"""Folders that people have: adapters, missing heads, generation configurations that transformers cannot write."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from conftest import make_llama, make_tokenizer

from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.loading import architecture_of
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.rewards.hub import ClassifierReward
from rrhf_bench.settings.experiment import RuntimeSettings
from tests.architectures import tokenization

BATCH = ResponseBatch.of_pairs([((3, 4, 5), (6, 7)), ((3, 4), (8,))])
pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder):
    return TransformersPolicy.load(folder, template=Template())


def logprobs(policy):
    with torch.no_grad():
        return policy.token_logprobs(BATCH)


@pytest.mark.parametrize("rename", [lambda name: f"module.{name}", lambda name: name.replace("layers.1.", "layers.9.")])
def test_a_folder_with_renamed_or_missing_weights_is_no_policy(llama_folder, tmp_path, rename):
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama_folder(0), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(DataError, match="would be random"):
        load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_without_a_language_model_head_is_no_policy(tokenizer, tmp_path, kind):
    import transformers

    config = make_llama(tokenizer).config
    config.num_labels, config.tie_word_embeddings = 1, False
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        load(tmp_path)


def test_a_model_whose_layers_cannot_be_found_is_not_said_to_lack_a_head():
    """transformers says that Llama 4's layers are in ``language_model``, which its text model does not have."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    model = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**sizes, **heads, intermediate_size_mlp=48))
    with pytest.raises(DataError, match=r"^Llama4ForCausalLM: has no module 'language_model'"):
        TransformersPolicy(model, tokenization())
    model.lm_head = None
    with pytest.raises(DataError, match=r"^Llama4ForCausalLM: has no language-model head"):
        TransformersPolicy(model, tokenization())


@pytest.mark.parametrize("pad", [None, "<beyond>"])
def test_no_pad_token_is_fed_to_a_policy(tmp_path, pad):
    """A tokenizer may have no pad token, or one beyond the model's vocabulary, such as one that was added later."""
    tokenizer = make_tokenizer()
    model = make_llama(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = load(tmp_path)
    tokenizer.pad_token = None
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
        assert tokenizer.pad_token_id == model.config.vocab_size
    tokenizer.save_pretrained(tmp_path)
    policy = load(tmp_path)
    expected.layout = policy.layout = "padded"
    assert torch.equal(logprobs(policy), logprobs(expected))


def test_a_generation_configuration_that_transformers_cannot_write_is_saved_as_it_was(llama_folder, tmp_path):
    """Vicuna and Llama 2 have a temperature without do_sample: transformers reads that and refuses to write it."""
    shutil.copytree(llama_folder(0), tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    own = {**json.loads(path.read_text()), "temperature": 0.9, "top_p": 0.6}
    path.write_text(json.dumps(own))
    policy = Services(RuntimeSettings(device="cpu")).policy_to_train(ModelRef(str(tmp_path / "model")))
    policy.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {key: saved[key] for key in ("temperature", "top_p", "eos_token_id")} == {
        key: own[key] for key in ("temperature", "top_p", "eos_token_id")
    }
    torch.testing.assert_close(logprobs(load(tmp_path / "saved")), logprobs(policy), rtol=0, atol=0)


def test_a_model_that_could_not_be_saved_is_refused_before_it_is_trained(llama_folder, monkeypatch):
    policy = load(llama_folder(0))
    monkeypatch.setattr(TransformersPolicy, "load", lambda *_, **__: policy)
    policy.model.config.odd = {1, 2}  # a set cannot be written as JSON
    with pytest.raises(DataError, match="could not be saved"):
        Services(RuntimeSettings(device="cpu")).policy_to_train(ModelRef(str(llama_folder(0))))


def adapter(base, task, targets, folder, tokenizer=None, **settings):
    import peft

    config = peft.LoraConfig(r=4, target_modules=targets, task_type=task, init_lora_weights=False, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_folder_is_its_base_with_the_adapter_added(llama_folder, tokenizer, tmp_path, with_tokenizer):
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder(0))
    own = tokenizer if with_tokenizer else None
    expected = adapter(base, "CAUSAL_LM", ["q_proj", "v_proj"], tmp_path / "adapter", own, use_rslora=True)
    policy = load(tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logprobs(policy), logprobs(load(llama_folder(0))))
    assert all(parameter.requires_grad for parameter in policy.parameters())
    policy.save(tmp_path / "saved")
    torch.testing.assert_close(logprobs(load(tmp_path / "saved")), logprobs(policy), rtol=0, atol=0)
    assert architecture_of(str(tmp_path / "adapter"), None)[0] == str(llama_folder(0))


def test_an_adapter_of_a_reward_model_brings_its_head(llama_folder, tokenizer, tmp_path):
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(llama_folder(0), num_labels=1)
    expected = adapter(base, "SEQ_CLS", ["q_proj"], tmp_path / "adapter", tokenizer)
    reward = ClassifierReward.load(tmp_path / "adapter")
    row = [3, 4, 5, 6]
    with torch.no_grad():
        score = expected(input_ids=torch.tensor([row])).logits.item()
    assert reward.score_batch([row])[0] == pytest.approx(score, rel=1e-5)


def test_an_adapter_without_its_weights_is_refused(llama_folder, tokenizer, tmp_path):
    import transformers
    from safetensors.torch import load_file, save_file

    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder(0))
    adapter(base, "CAUSAL_LM", ["q_proj"], tmp_path, tokenizer)
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"x.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(DataError, match="would be random"):
        load(tmp_path)
