"""Beam search equals transformers 4.46 and an enumeration, also through the sampler and the command line."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import ConfigError, DataError
from rrhf_bench.policy import onednn as onednn_products
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.beam import beam_search
from rrhf_bench.sampling.cached import CachedRows
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.transformers import TransformersSampler
from tests.architectures import GROUPED, made
from tests.conftest import make_llama, make_tokenizer
from tests.golden.record_beam import GOLDEN, build

RECORDED = json.loads(GOLDEN.read_text())
PROMPTS = [Prompt(text) for text in ("The flour is old", "How", "\n\nHuman: What is a glacier?\n\nAssistant:")]
VOID = 100_000  # no token of the vocabulary: nothing ends
SPEC = SamplingSpec(n=4, temperature=1.0, max_new_tokens=12, seed=0, purpose="test")
BEAM = replace(SPEC, strategy="beam")
DIVERSE = replace(SPEC, strategy="diverse-beam", groups=4)


def name_of(recorded: Any) -> str:
    return f"{recorded['architecture']}{recorded['seed']}"


@pytest.fixture(params=RECORDED["models"], ids=name_of)
def recorded(request, onednn):
    """(the recorded cases by their settings, a search with the model and the tokens that they were recorded with)."""
    model = build(request.param["architecture"], request.param["seed"])
    if onednn == "on":  # as a policy on such a processor has its layers
        assert onednn_products.apply(model)
    tokens = {"eos_ids": request.param["eos_ids"], "pad_id": request.param["pad_id"]}

    def search(cases: list[Any], setting: dict[str, Any]) -> Any:
        # A recorded temperature had no effect, and there is none to pass on.
        search = {key: value for key, value in setting.items() if key != "temperature"}
        prompts = [case["prompt"] for case in cases]
        return beam_search(model, prompts, max_new_tokens=RECORDED["max_new_tokens"], **tokens, **search)

    by_setting = itertools.groupby(request.param["cases"], key=lambda case: case["setting"])
    return [(setting, list(cases)) for setting, cases in by_setting], search


def agree(found: Any, cases: list[Any]) -> None:
    for hypotheses, case in zip(found, cases, strict=True):
        assert [list(hypothesis.token_ids) for hypothesis in hypotheses] == case["token_ids"], case["setting"]
        # float32 sums over 16 steps, in another version's order of operations: 1.5e-6 was the largest difference seen.
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(case["scores"], abs=1e-5)


def test_beams_are_those_of_transformers_4_46(recorded):
    """Prompts of 1 to 18 tokens in one left-padded batch; recorded one by one."""
    settings, search = recorded
    assert len(settings) == 7
    for setting, cases in settings:
        agree(search(cases, setting), cases)


@pytest.mark.parametrize(
    "broken",
    [{"diversity_penalty": 0.9}, {"groups": 2}, {"pad_id": 0}, {"eos_ids": [1]}],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_finds_other_beams_than_the_recorded_ones(broken):
    """This model's pad token ends replies, so what groups that are done choose shows as well."""
    model = RECORDED["models"][2]
    cases = [case for case in model["cases"] if case["setting"] == {"beams": 4, "groups": 4, "diversity_penalty": 1.0}]
    options = {**cases[0]["setting"], "eos_ids": model["eos_ids"], "pad_id": model["pad_id"], **broken}
    network = build(model["architecture"], model["seed"])
    found = beam_search(network, [case["prompt"] for case in cases], max_new_tokens=16, **options)
    with pytest.raises(AssertionError):
        agree(found, cases)


def continuations(vocabulary: int, length: int, eos: int) -> list[tuple[int, ...]]:
    """Every reply of at most ``length`` tokens: ended, or cut by the cap."""
    others = [token for token in range(vocabulary) if token != eos]
    whole = list(itertools.product(others, repeat=length))
    return whole + [(*begin, eos) for size in range(length) for begin in itertools.product(others, repeat=size)]


def log_prob(model: Any, prompt: list[int], reply: tuple[int, ...]) -> float:
    """The sum over the reply, of one plain forward pass."""
    with torch.no_grad():
        logp_LV = model(torch.tensor([[*prompt, *reply]])).logits[0].double().log_softmax(-1)
    return sum(logp_LV[len(prompt) - 1 + i, token].item() for i, token in enumerate(reply))


@pytest.mark.parametrize("seed", [0, 1])
def test_enough_beams_find_the_best_of_all_replies(seed):
    """With as many beams as there are prefixes nothing is pruned: the best mean log-probs of all 5 ** 3-odd replies."""
    vocabulary, length, eos = 5, 3, 2
    model = build("llama", seed, vocabulary)
    prompt = [0, 3]
    replies = continuations(vocabulary, length, eos)
    ranked = sorted(replies, key=lambda reply: log_prob(model, prompt, reply) / len(reply), reverse=True)
    (found,) = beam_search(model, [prompt], beams=len(replies), max_new_tokens=length, eos_ids=[eos], pad_id=eos)
    best = [hypothesis for hypothesis in found if hypothesis.score > -1e6][:20]
    assert [hypothesis.token_ids for hypothesis in best] == ranked[:20]
    for hypothesis in best:
        mean = log_prob(model, prompt, hypothesis.token_ids) / len(hypothesis.token_ids)
        # float32: cached one token at a time against one pass over all; other replies differ by far more.
        assert hypothesis.score == pytest.approx(mean, abs=1e-5)
        assert hypothesis.ended == (hypothesis.token_ids[-1] == eos)


def greedy(model: Any, prompt: list[int], eos: int, length: int) -> tuple[int, ...]:
    reply: list[int] = []
    while len(reply) < length and reply[-1:] != [eos]:
        with torch.no_grad():
            reply.append(model(torch.tensor([[*prompt, *reply]])).logits[0, -1].argmax().item())
    return tuple(reply)


def test_groups_of_one_beam_without_a_penalty_are_greedy():
    model = build("llama", 0)
    prompts = [[5, 9, 200], [17], [300, 2, 2, 8]]
    likely = greedy(model, prompts[0], -1, 6)[3]  # one of the prompts reaches it
    found = beam_search(
        model, prompts, beams=3, groups=3, diversity_penalty=0.0, max_new_tokens=10, eos_ids=[likely], pad_id=likely
    )
    for prompt, hypotheses in zip(prompts, found, strict=True):
        assert {hypothesis.token_ids for hypothesis in hypotheses} == {greedy(model, prompt, likely, 10)}
    assert found[0][0].ended
    assert found[0][0].token_ids[-1] == likely


def test_a_large_penalty_separates_the_groups():
    """In every step no two of a prompt's groups take the same token while the vocabulary has others to offer."""
    (found,) = beam_search(
        build("llama", 0),
        [[5, 9, 200]],
        beams=4,
        groups=4,
        diversity_penalty=100.0,
        max_new_tokens=8,
        eos_ids=[VOID],
        pad_id=VOID,
    )
    for step in zip(*(hypothesis.token_ids for hypothesis in found), strict=True):
        assert len(set(step)) == 4


STATES = {
    "lfm2": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"])),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(**GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_no_keys_and_values_follow_their_rows(name):
    """Convolution and Mamba: what a row continues with is what the model says of the whole row."""
    model = made(STATES[name])
    texts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    rows = CachedRows(model, texts)
    rows.next_logits()
    rows.repeat(2)
    texts = [texts[0], texts[0], texts[1], texts[1]]
    for kept, tokens in ([0, 1, 2, 3], [20, 21, 22, 23]), ([3, 0, 0], [30, 31, 32]), ([2, 1, 0], [40, 41, 42]):
        rows.extend(kept, tokens)
        texts = [[*texts[row], token] for row, token in zip(kept, tokens, strict=True)]
        found = rows.next_logits()
        with torch.no_grad():
            expected = torch.cat([model(input_ids=torch.tensor([text])).logits[:, -1] for text in texts])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# Through the sampler


@pytest.fixture
def sampler(policy):
    return TransformersSampler(policy, max_model_len=256)


@pytest.mark.parametrize("spec", [BEAM, DIVERSE, replace(DIVERSE, groups=2)], ids=["beam", "diverse", "two groups"])
def test_beams_are_candidates_best_first(sampler, policy, spec):
    ids = [policy.tokenization.prompt_ids(prompt) for prompt in PROMPTS]
    eos, pad = policy.tokenization.eos_id, policy.tokenization.tokenizer.pad_token_id
    options = {"groups": spec.groups, "diversity_penalty": spec.diversity_penalty, "max_new_tokens": 12}
    expected = beam_search(policy.model, ids, beams=4, eos_ids=[eos], pad_id=pad, **options)
    rows = sampler.sample(PROMPTS, spec)
    for row, prompt, hypotheses in zip(rows, PROMPTS, expected, strict=True):
        assert row.prompt == prompt
        assert [reply.token_ids for reply in row.responses] == [hypothesis.token_ids for hypothesis in hypotheses]
        assert [reply.finish for reply in row.responses] == [
            "eos" if hypothesis.ended else "length" for hypothesis in hypotheses
        ]


def test_beams_depend_on_no_batch_order_seed_or_temperature(policy):
    small, large = (TransformersSampler(policy, max_model_len=256, batch=batch) for batch in (1, 128))
    one_by_one = small.sample(PROMPTS, DIVERSE)
    assert one_by_one == large.sample(PROMPTS, DIVERSE)
    assert one_by_one == large.sample(PROMPTS[::-1], DIVERSE)[::-1]
    assert one_by_one == large.sample(PROMPTS, replace(DIVERSE, temperature=0.8, top_p=0.5, top_k=3, seed=9))


def test_beams_follow_a_sync(sampler, llama_folder):
    before = sampler.sample(PROMPTS, BEAM)
    other = TransformersPolicy.load(llama_folder(1), template=Template())
    sampler.sync(other)
    after = sampler.sample(PROMPTS, BEAM)
    assert after != before
    assert after == TransformersSampler(other, max_model_len=256).sample(PROMPTS, BEAM)


def test_a_stop_string_cuts_the_text_of_a_beam_but_not_its_tokens(sampler, policy):
    whole = sampler.sample(PROMPTS[:1], BEAM)[0].responses[0]
    stop = policy.tokenization.decode(whole.token_ids[2:4])
    cut = sampler.sample(PROMPTS[:1], replace(BEAM, stop=(stop,)))[0].responses[0]
    assert (cut.token_ids, cut.finish) == (whole.token_ids, "stop")
    text = policy.tokenization.decode(whole.token_ids)
    assert cut.text == text[: text.index(stop)].rstrip()


def test_the_end_tokens_of_the_model_end_a_reply(policy):
    """The model's own settings name the tokens that end it, as in ``generate``; the first of them is written."""
    spec, eos = replace(BEAM, max_new_tokens=1), policy.tokenization.eos_id
    likely = TransformersSampler(policy, max_model_len=256).sample(PROMPTS[:1], spec)[0].responses[0].token_ids[0]
    policy.tokenization = Tokenization(policy.tokenization.tokenizer, Template(), "here", [eos, likely])
    best = TransformersSampler(policy, max_model_len=256).sample(PROMPTS[:1], spec)[0].responses[0]
    assert (best.token_ids, best.text, best.finish) == ((eos,), "", "eos")


def test_beams_use_transformers_under_every_backend():
    assert choose_backend("vllm", "diverse-beam") == choose_backend("transformers")


# Through the command line


@pytest.fixture
def command(tmp_path) -> Any:
    """``rrhf-bench sample`` on a folder and prompts; the rows that it wrote."""
    from rrhf_bench.cli import app

    def run(folder: Path, texts: list[str], *words: str) -> list[dict[str, Any]]:
        prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        files = ["--model", str(folder), "--prompts", str(prompts), "--out", str(out), "--device", "cpu"]
        app(["sample", *files, *words], standalone_mode=False)
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


TEXTS = ["The cat sat", "\n\nHuman: Hi\n\nAssistant:", " Human: Hi\n\nAssistant: Well,", "What is ice?\n"]


@pytest.mark.parametrize("pad", [True, False], ids=["a pad token", "no pad token"])
@pytest.mark.parametrize(("strategy", "groups"), [("beam", 1), ("diverse-beam", 4)])
def test_the_command_feeds_prompts_as_they_are(command, tmp_path, strategy, groups, pad):
    """Also of a tokenizer without a pad token: what is not dialogue is not read as one, and padding is masked."""
    tokenizer = make_tokenizer()
    if not pad:
        tokenizer.pad_token = None
    model = make_llama(tokenizer, seed=3)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    words = ["--strategy", strategy, "--beams", "4", "--groups", "4", "--diversity-penalty", "1.0"]
    rows = command(tmp_path / "model", TEXTS, *words, "--max-new-tokens", "16")
    eos = tokenizer.eos_token_id
    expected = beam_search(
        model.eval(),
        [tokenizer(text)["input_ids"] for text in TEXTS],
        beams=4,
        groups=groups,
        diversity_penalty=1.0,
        max_new_tokens=16,
        eos_ids=[eos],
        pad_id=tokenizer.pad_token_id if pad else eos,
    )
    for row, text, hypotheses in zip(rows, TEXTS, expected, strict=True):
        assert row["query"] == text
        assert row["token_ids"] == [list(hypothesis.token_ids) for hypothesis in hypotheses]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row["token_ids"]]
        # A reply that the cap cut may end within a character.
        ended = [hypothesis.ended for hypothesis in hypotheses]
        assert row["responses"] == [
            text if end else text.removesuffix("\ufffd") for text, end in zip(texts, ended, strict=True)
        ]


def test_the_command_reads_dialogues_with_their_template(command, llama_folder):
    rows = command(llama_folder(0), ["What is ice?"], "--strategy", "beam", "--template", "hh", "--beams", "2")
    assert rows[0]["query"] == "\n\nHuman: What is ice?\n\nAssistant:"
    assert len(rows[0]["responses"]) == 2


def test_raw_prompts_keep_the_closing_token_of_the_tokenizer(policy):
    """A raw prompt is ``tokenizer(text)``; a dialogue's prompt that a tokenizer ended would not be continued."""
    tokenizer = policy.tokenization.tokenizer

    class Closing:
        eos_token_id, all_special_tokens, added_tokens_decoder = tokenizer.eos_token_id, (), {}

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], self.eos_token_id]}

    closing = Tokenization(Closing(), Template("raw"), "here")
    assert closing.prompt_ids(Prompt("Hi"))[-1] == tokenizer.eos_token_id


def test_beams_that_do_not_divide_into_groups_are_refused(command, llama_folder):
    with pytest.raises(ConfigError, match="--groups 3: 4 beams do not divide into groups of equal size"):
        command(llama_folder(0), ["Hi"], "--strategy", "diverse-beam", "--groups", "3")


def test_the_command_notes_that_temperatures_have_no_effect_on_beams(command, llama_folder, capsys):
    command(llama_folder(0), ["Hi"], "--strategy", "beam", "--temperature", "0.8", "--max-new-tokens", "4")
    said = " ".join(capsys.readouterr().err.split())
    assert "--temperature, --top-p and --top-k have no effect" in said


def test_an_empty_prompt_is_named(command, llama_folder):
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: prompt: is empty; expected text"):
        command(llama_folder(0), ["Hi", ""], "--strategy", "beam")
