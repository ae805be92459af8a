"""The conformance suite: what every method of the bench must do, on a model small enough for seconds.

``check_method(settings)`` runs all checks that apply to a method; ``checks(settings)`` lists them for pytest::

    @pytest.mark.parametrize("check", checks(MySettings()))
    def test_it_conforms(check): check(MySettings())

A failed check raises AssertionError with what was found. The model is a random Llama of one layer over a few letters;
the reward is the share of the letter d in a reply, which every method can raise. Letters: R responses, T tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rrhf_bench import registry
from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import BenchError
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.transformers import TransformersSampler
from rrhf_bench.seeding import generator, torch_seed
from rrhf_bench.settings.methods import MethodSettings, OfflineSettings, candidates_of
from rrhf_bench.settings.online import OnPolicySettings
from rrhf_bench.training.method import Example, MethodBatch, Progress, TrainContext, TrainInputs
from rrhf_bench.training.offline import OfflineTrainer
from rrhf_bench.training.reference import ResponseLogprobs, response_logprobs

PROMPTS = [
    Prompt(f"\n\nHuman: {a} {b}\n\nAssistant:") for a in ("ab", "cd", "abcd") for b in ("dead", "bad", "add", "b")
]
CONTEXT = 128  # tokens
NEW_TOKENS = 8
Check = Callable[[MethodSettings], None]


@cache
def tiny_tokenization() -> Tokenization:
    """Return a tokenization of 32 tokens: replies end by themselves, and stop strings occur."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32, special_tokens=["<eos>", "<pad>"], initial_alphabet=[])
    bpe.train_from_iterator([prompt.text for prompt in PROMPTS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    return Tokenization(tokenizer, Template(), "tiny")


def tiny_policy(**changes: Any) -> TransformersPolicy:
    """Return a random Llama of one layer, the same at every call. ``changes`` are keys of its configuration."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenization().tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **changes,
    )
    with torch_seed("tiny"):
        return TransformersPolicy(LlamaForCausalLM(config), tiny_tokenization())


def share_of_d(text: str) -> float:
    """Return the share of the letter d in a text."""
    return text.count("d") / max(len(text), 1)


def gold(text: str) -> float:
    """Return the gold reward of this world, whose spread over a prompt's replies is about 1, as a reward model's is."""
    return 15.0 * share_of_d(text)


class FunctionReward:
    """A reward model that is a function of the reply's text."""

    identity = "function"

    def __init__(self, function: Callable[[str], float]) -> None:
        self.function = function

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        return np.array([self.function(response) for response in responses], np.float64)


class Run:
    """A tiny policy with all that a trainer is given, and what the trainer logged."""

    def __init__(
        self, reward: Callable[[str], float] = share_of_d, *, seed: int = 0, stop: tuple[str, ...] = ()
    ) -> None:
        self.policy = tiny_policy()
        self.log: list[Mapping[str, float]] = []
        self.watched: list[Progress] = []
        self.context = TrainContext(
            seed=seed,
            sampler=TransformersSampler(self.policy, max_model_len=CONTEXT),
            reward=FunctionReward(reward),
            reference=self.policy.frozen_copy(),
            max_new_tokens=NEW_TOKENS,
            stop=stop,
            watch=lambda progress, policy: self.watched.append(progress),
            log=self.log.append,
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.policy.state()}

    def replies(self, n: int, purpose: str, cue: str = "") -> list[Candidates]:
        """Return n scored replies of the present policy to each prompt, with the method's cue behind it."""
        sampler, reward = self.context.sampler, self.context.reward
        assert sampler is not None
        assert reward is not None
        sampler.sync(self.policy.with_cue(cue))
        spec = SamplingSpec(n=n, temperature=1.0, max_new_tokens=NEW_TOKENS, seed=0, purpose=purpose)
        return [_scored(row, reward.score([row.prompt] * n, [r.text for r in row.responses])) for row in
                sampler.sample(PROMPTS, spec)]  # fmt: skip


def _scored(row: Candidates, score_G: NDArray[np.float64]) -> Candidates:
    responses = zip(row.responses, score_G.tolist(), strict=True)
    return replace(row, responses=tuple(replace(response, score=score) for response, score in responses))


@cache
def _inputs() -> TrainInputs:
    """Return candidates of the tiny policy, each text once, and as pairs the best and the worst of each prompt."""
    groups = []
    for row in Run(gold).replies(12, "conformance"):
        distinct = {response.text: response for response in row.responses if response.text}
        by_score = {response.score: response for response in distinct.values()}  # no two of equal score
        groups.append(replace(row, responses=tuple(by_score.values())))
    groups = [group for group in groups if len(group.responses) > 1]
    assert len(groups) > 6, "the tiny policy says too little"
    assert len({len(group.responses) for group in groups}) > 1, "groups of unequal size are the point"
    pairs = []
    for group in groups:
        ordered = sorted(group.responses, key=lambda response: response.score or 0.0)
        pairs.append(Preference(group.prompt, ordered[-1].text, ordered[0].text))
    return TrainInputs(pairs, groups)


@cache
def _reference() -> ResponseLogprobs:
    """Return the log-probs of all candidates and pairs under the tiny policy."""
    made = _inputs()
    pairs = [
        Candidates(p.prompt, (Response(p.chosen, "chosen"), Response(p.rejected or "", "rejected")))
        for p in made.preferences
    ]
    policy = tiny_policy()
    table = response_logprobs(policy, made.candidates, max_length=CONTEXT)
    table |= response_logprobs(policy, pairs, max_length=CONTEXT)
    return table


def inputs_of(settings: MethodSettings) -> TrainInputs:
    """Return what a method is given here: pairs, or candidates if it trains on these, and the reference log-probs."""
    made = _inputs()
    reference = _reference() if "reference" in settings.requires else None
    return TrainInputs(made.preferences, made.candidates if candidates_of(settings) else (), reference)


# --- Offline losses ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluated:
    total: float  # loss x weight
    gradient: dict[tuple[str, str], Tensor]  # of loss x weight, by (prompt id, response text), summed over examples


def _examples(settings: MethodSettings, inputs: TrainInputs) -> Sequence[Example]:
    return registry.build(settings).examples(inputs)


def _evaluate(settings: MethodSettings, examples: Sequence[Example], *, at_start: bool = False) -> _Evaluated:
    """Return the loss of some examples in one batch, at log-probs that depend on prompt and text alone.

    ``at_start``: the policy's log-probs are the reference's, as before the first step.
    """
    tokenization = tiny_tokenization()

    def logp(name: str, example: Example, response: Response) -> NDArray[np.float32]:
        tokens = len(tokenization.response_ids(response.text, ended=response.ended))
        rng = generator(0, name, example.prompt.id, response.text)
        return (-rng.uniform(0.1, 4.0, tokens)).astype(np.float32)

    if "reference" in settings.requires:
        examples = [
            replace(e, reference=tuple(logp("reference", e, response) for response in e.responses)) for e in examples
        ]
    batch = MethodBatch.of(examples, tokenization, None)
    name = "reference" if at_start else "policy"
    rows = [torch.as_tensor(logp(name, e, response)) for e in examples for response in e.responses]
    logp_RT = pad_sequence(rows, batch_first=True).requires_grad_()
    output = registry.build(settings).loss(logp_RT, batch)
    assert torch.isfinite(output.loss), f"the loss is {output.loss.item()}"
    (grad_RT,) = torch.autograd.grad(output.loss * output.weight, logp_RT)
    assert torch.isfinite(grad_RT).all(), "the gradient is not finite"
    mask_RT = batch.responses.mask_BT
    gradient: dict[tuple[str, str], Tensor] = {}
    keys = [(e.prompt.id, response.text) for e in examples for response in e.responses]
    for key, grad_T, mask_T in zip(keys, grad_RT, mask_RT, strict=True):
        gradient[key] = gradient.get(key, torch.zeros(int(mask_T.sum()))) + grad_T[mask_T]
    return _Evaluated(output.loss.item() * output.weight, gradient)


def _assert_same(a: _Evaluated, b: _Evaluated, what: str) -> None:
    assert math.isclose(a.total, b.total, rel_tol=1e-4, abs_tol=1e-5), (
        f"{what}: the loss goes from {a.total} to {b.total}"
    )
    for key in a.gradient.keys() & b.gradient.keys():
        same = torch.allclose(a.gradient[key], b.gradient[key], rtol=1e-3, atol=1e-5)
        assert same, f"{what}: the gradient of {key[1]!r} goes from {a.gradient[key]} to {b.gradient[key]}"


def prefers_the_better_reply(settings: MethodSettings) -> None:
    """At the start, a step raises each prompt's best reply against its worst.

    A method with a cue learns what follows which words, and raises both.
    """
    if settings.cue:
        return
    found = _evaluate(settings, _examples(settings, inputs_of(settings)), at_start=True)
    gaps = []
    for pair in _inputs().preferences:
        best, worst = (found.gradient.get((pair.prompt.id, text or "")) for text in (pair.chosen, pair.rejected))
        best_sum = 0.0 if best is None else best.sum().item()
        gaps.append((0.0 if worst is None else worst.sum().item()) - best_sum)
    assert min(gaps) >= -1e-6, f"for some prompt the worst reply is raised against the best: {min(gaps)}"
    assert max(gaps) > 0.0, "no prompt has a gradient that tells its replies apart"


def ignores_padding(settings: MethodSettings) -> None:
    """A long example in the batch changes no gradient of loss x weight, a sum over units, of the others."""
    if "whole step" in settings.requires:
        return
    examples = list(_examples(settings, inputs_of(settings)))
    long = replace(examples[0], responses=tuple(replace(r, text=r.text + " add" * 9, token_ids=None)
                                                for r in examples[0].responses))  # fmt: skip
    alone, beside = _evaluate(settings, examples[1:]), _evaluate(settings, [*examples[1:], long])
    for key, grad_T in alone.gradient.items():
        assert torch.allclose(grad_T, beside.gradient[key], rtol=1e-3, atol=1e-6), f"gradient of {key[1]!r}"


def ignores_order(settings: MethodSettings) -> None:
    """The order of prompts, and of the candidates of a prompt, changes nothing."""
    inputs = inputs_of(settings)
    examples = list(_examples(settings, inputs))
    found = _evaluate(settings, examples)
    _assert_same(found, _evaluate(settings, examples[::-1]), "prompts in reverse")
    if inputs.candidates:
        turned = [replace(row, responses=row.responses[::-1]) for row in inputs.candidates]
        again = _evaluate(settings, _examples(settings, replace(inputs, candidates=turned)))
        _assert_same(found, again, "candidates in reverse")


def survives_ties_and_single_replies(settings: MethodSettings) -> None:
    """Equal rewards, and a prompt with one reply, give a finite loss or one clear error."""
    inputs = inputs_of(settings)
    first, *others = inputs.candidates or _inputs().candidates
    equal = replace(first, responses=tuple(replace(response, score=1.0) for response in first.responses))
    alone = replace(first, responses=first.responses[:1])
    for row in (equal, alone):
        for rows in ([row, *others], [row]):
            changed = replace(inputs, candidates=rows) if inputs.candidates else inputs
            if not inputs.candidates:
                pairs = inputs.preferences
                changed = replace(inputs, preferences=[replace(pairs[0], rejected=pairs[0].chosen), *pairs[1:]])
            if (examples := _examples_or_one_line(settings, changed)) is not None:
                _evaluate(settings, examples)


def _examples_or_one_line(settings: MethodSettings, inputs: TrainInputs) -> Sequence[Example] | None:
    """Return the examples, or None if the method refuses the inputs in one line."""
    try:
        return _examples(settings, inputs)
    except BenchError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1, f"the error has {len(lines)} lines"
    return None


def is_cut_into_passes(settings: MethodSettings) -> None:
    """A step in several passes has the gradient of the step in one.

    The reference is another model. The mean log-ratio of the replies is then positive, about 1 nat, so a loss that
    bounds the mean at 0, as KTO bounds its reference point, still depends on it.
    """
    assert isinstance(settings, OfflineSettings)
    examples = list(_examples(settings, inputs_of(settings)))
    if "reference" in settings.requires:
        reference = tiny_policy()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(2.0)
        rows = [Candidates(e.prompt, e.responses) for e in examples]
        table = response_logprobs(reference, rows, max_length=CONTEXT)
        examples = [replace(e, reference=tuple(table.of(e.prompt, r) for r in e.responses)) for e in examples]
    gradients = []
    for tokens in (100_000, 1, 90):
        policy = tiny_policy()
        policy.pass_tokens = tokens
        trainer = OfflineTrainer(registry.build(settings), settings.model_copy(update={"max_length": CONTEXT}))
        _, weight = trainer.accumulate(policy, examples)
        gradients.append([p.grad / weight for p in policy.parameters() if p.grad is not None])
    for cut in gradients[1:]:
        for one, other in zip(gradients[0], cut, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-5), f"differs by {(one - other).abs().max().item()}"


# --- All methods that train ----------------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


class _Memory:
    """Checkpoints in memory; the run is stopped when the given one is offered."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.kept: Mapping[str, Any] | None = None
        self.offered = 0

    def last(self) -> Mapping[str, Any] | None:
        return copy.deepcopy(self.kept)

    def offer(self, state: Mapping[str, Any]) -> None:
        self.offered += 1
        self.kept = copy.deepcopy(state)
        if self.offered == self.stop_at:
            raise _Killed


SHORT: Mapping[str, Any] = {"lr": 3e-3, "warmup": 0.0}


def _fit(settings: MethodSettings, checkpoints: _Memory) -> Run:
    run = Run(gold)
    inputs = inputs_of(settings)
    if "sampler" in settings.needs:
        inputs = replace(inputs, reference=None)
    context = replace(run.context, checkpoints=checkpoints)
    stage_helpers.trainer(settings, CONTEXT).fit(run.policy, inputs, context)
    return run


def resumes(settings: MethodSettings) -> None:
    """A run that is stopped between two steps and started again ends with the same weights, bit for bit."""
    sizes = {"epochs": 2, "batch_prompts": 4} if isinstance(settings, OfflineSettings) else _few(settings)
    short = settings.changed({**SHORT, **sizes})
    whole = _fit(short, _Memory()).weights()
    memory = _Memory(stop_at=2)
    try:
        _fit(short, memory)
    except _Killed:
        memory.stop_at = None
    else:
        raise AssertionError("the run offered fewer than 2 checkpoints")
    for name, weight in _fit(short, memory).weights().items():
        assert torch.equal(weight, whole[name]), f"{name} differs after the run was resumed"


def _few(settings: MethodSettings) -> dict[str, Any]:
    replies = getattr(settings, "replies", 1)
    return {"iterations": 3, "rollouts": 16 * replies, "minibatch": 8 * replies}


LEAST_GAIN = 0.6  # of the mean reward, which is about 0.4 at the start and 15 at the most


def learns(settings: MethodSettings) -> None:
    """After training, fresh replies have a clearly higher reward than before."""
    if isinstance(settings, OfflineSettings):
        sizes: dict[str, Any] = {"epochs": 20, "batch_prompts": 4, "lr": 5e-3}
    else:
        sizes = {"iterations": 10, "rollouts": 48, "minibatch": 12, "lr": 5e-3, "missing_eos": "none"}
        sizes |= {"kl_coefficient": 0.01} if "kl_coefficient" in type(settings).model_fields else {}
    run = _fit(settings.changed({**SHORT, **sizes}), _Memory())
    before, after = Run(gold).replies(16, "held out"), run.replies(16, "held out", settings.cue)
    means = [float(np.mean([row.scores for row in rows])) for rows in (before, after)]
    assert means[1] - means[0] >= LEAST_GAIN, f"the mean reward goes from {means[0]:.3f} to {means[1]:.3f}"


def checks(settings: MethodSettings) -> list[Check]:
    """Return the checks that apply to a method: those of an offline loss, and those of everything that trains."""
    if settings.family == "inference":
        return []
    trained: list[Check] = [resumes, learns]
    if isinstance(settings, OnPolicySettings):
        return trained
    return [
        prefers_the_better_reply, ignores_padding, ignores_order, survives_ties_and_single_replies, is_cut_into_passes,
        *trained,
    ]  # fmt: skip


def check_method(settings: MethodSettings) -> None:
    """Run every check that applies to a method. Raises AssertionError with the check's name and what it found."""
    for check in checks(settings):
        try:
            check(settings)
        except AssertionError as error:
            raise AssertionError(f"{settings.kind} fails {check.__name__}: {error}") from error
