"""Each family of policies and reward models through every step, against plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.ppo_settings import PPOSettings
from baselines.sft_settings import SFTSettings
from families.plain import Plain, PlainReward, read
from families.replicas import CAP, CONTEXT, FAMILIES, REWARDS, Family, RewardFamily, build, build_reward
from families.tokens import DIALOGUES, PROMPTS, REPLIES
from rrhf_bench.jsonl import write_jsonl
from rrhf_bench.pipeline.file_commands import PlainSteps
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.training.rrhf_settings import RRHFSettings

RUNTIME = RuntimeSettings(device="cpu", kv_cache_mib=16)
GREEDY = SamplingSpec(n=1, temperature=0.0, max_new_tokens=CAP, seed=0, purpose="families")
POOR = " No. I do not know."
KNOWN = tuple(zip(PROMPTS, REPLIES, strict=True))
LONG = " It rains, and rains." * CONTEXT

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Case:
    """A family's folder and what the steps make of it."""

    family: Family
    folder: Path
    reward: RewardCase
    services: Services = field(default_factory=lambda: Services(RUNTIME))

    @cached_property
    def plain(self) -> Plain:
        return Plain.load(self.folder, self.family)

    @cached_property
    def expected(self) -> list[tuple[str, str, list[int]]]:
        """(text, finish, ids) of each prompt's greedy reply."""
        return [self.plain.greedy(messages, CAP) for messages in DIALOGUES]

    def ref(self, folder: Path | None = None) -> ModelRef:
        return ModelRef(str(folder or self.folder), template=self.family.template)

    @cached_property
    def policy(self) -> TransformersPolicy:
        """The folder's policy, which no test may change."""
        return self.services.policy(self.ref())

    @property
    def steps(self) -> PlainSteps:
        return PlainSteps(RUNTIME, "transformers", lambda done, total: None)

    def changed(self, factor: float) -> TransformersPolicy:
        """Return a policy with the folder's weights times a factor."""
        policy = self.services.policy(self.ref())
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(factor)
        return policy

    def train(self, settings: Any, data: Path, out: Path) -> list[dict[str, Any]]:
        """Train as the command line does, check that the folder is whole, and return the log."""
        reward = self.reward.ref if settings.kind == "ppo" else None
        self.steps.train(settings, self.ref(), data, out, seed=0, reward=reward, max_new_tokens=CAP, stop=())
        saved = Plain.load(out, self.family)
        assert type(saved.tokenizer) is type(self.plain.tokenizer)
        for messages, reply in zip(DIALOGUES, REPLIES, strict=True):
            assert saved.reply_ids(messages, reply) == self.plain.reply_ids(messages, reply)
        ids = torch.tensor([saved.prompt_ids(DIALOGUES[0])])
        policy = self.services.policy(self.ref(out))
        with torch.no_grad():
            assert torch.equal(policy.model(input_ids=ids).logits, saved.model(input_ids=ids).logits)
            assert not torch.equal(saved.logits(ids[0].tolist()), self.plain.logits(ids[0].tolist()))
        assert saved.model.config.tie_word_embeddings == self.plain.model.config.tie_word_embeddings
        return read(out / "metrics.jsonl")

    def nll(self, messages: Any, reply: str) -> tuple[float, int]:
        """(summed negative log-likelihood of a reply and its end, tokens)."""
        ids = self.plain.reply_ids(messages, reply)
        return -self.plain.logprobs(self.plain.prompt_ids(messages), ids).sum().item(), len(ids)


@dataclass
class RewardCase:
    """A reward model's folder."""

    family: RewardFamily
    folder: Path

    @cached_property
    def plain(self) -> PlainReward:
        return PlainReward(self.folder, self.family)

    @property
    def ref(self) -> ModelRef:
        family = self.family
        return ModelRef(str(self.folder), template=family.template, layout=family.layout, pad_token=family.pad_token)


@pytest.fixture(scope="module")
def reward_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RewardCase]:
    made: dict[str, RewardCase] = {}
    by_name = {family.name: family for family in REWARDS}

    def of(name: str) -> RewardCase:
        if name not in made:
            made[name] = RewardCase(by_name[name], build_reward(by_name[name], tmp_path_factory.mktemp(name)))
        return made[name]

    return of


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def case(request: pytest.FixtureRequest, reward_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = request.param
    folder = tmp_path_factory.mktemp(family.name)
    return Case(family, build(family, folder), reward_of(family.reward))


@pytest.fixture(scope="module", params=REWARDS, ids=str)
def reward(request: pytest.FixtureRequest, reward_of: Any) -> RewardCase:
    return reward_of(request.param.name)


@pytest.fixture(autouse=True)
def cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Name the cell of the table that a test fills."""
    params = request.node.callspec.params
    record_property("family", str(params.get("case") or params["reward"]))
    record_property("step", request.node.originalname.removeprefix("test_"))


def rows(path: Path, *values: Any) -> Path:
    write_jsonl(path, values)
    return path


def test_special(case: Case) -> None:
    """The name of any special token within a reply is encoded as text."""
    tokenization = case.policy.tokenization
    special = {i: token.content for i, token in case.plain.tokenizer.added_tokens_decoder.items() if token.special}
    for name in special.values():
        text = f" Mix {name} it."
        ids = tokenization.response_ids(text, ended=False)
        assert special.keys().isdisjoint(ids)
        assert tokenization.names_special_token(text)


def test_ids(case: Case) -> None:
    """Prompt and reply have the ids that they have in the whole conversation, and the ids the text."""
    tokenization = case.policy.tokenization
    for messages, prompt, reply in zip(DIALOGUES, PROMPTS, REPLIES, strict=True):
        ids = case.plain.reply_ids(messages, reply)
        assert list(tokenization.prompt_ids(Prompt(prompt))) == case.plain.prompt_ids(messages)
        assert list(tokenization.response_ids(reply, ended=False)) == ids[:-1]
        assert tokenization.template.read_response(tokenization.decode(ids[:-1])) == reply


def test_ends(case: Case) -> None:
    """A reply ends by the tokens that end one in ``generate``, and training appends the template's own end."""
    tokenization = case.policy.tokenization
    assert set(tokenization.end_ids) == set(case.plain.end_ids)
    assert tokenization.end_ids[0] == tokenization.eos_id == case.plain.end_ids[0]
    assert tokenization.response_ids(REPLIES[0], ended=True)[-1] == case.plain.end_ids[0]


def test_logprobs(case: Case) -> None:
    """Packed or padded, in float32; of replies that are certain and of one that is not."""
    policy = case.policy
    pairs = []
    for messages in DIALOGUES:
        prompt_ids = case.plain.prompt_ids(messages)
        pairs += [(prompt_ids, case.plain.reply_ids(messages, reply)) for reply in (*REPLIES, POOR)]
    with torch.no_grad():
        logp_BT = policy.token_logprobs(ResponseBatch.of_pairs([(tuple(p), tuple(r)) for p, r in pairs]))
    for (prompt_ids, ids), logp_T in zip(pairs, logp_BT, strict=True):
        torch.testing.assert_close(logp_T[: len(ids)], case.plain.logprobs(prompt_ids, ids), rtol=1e-4, atol=1e-4)


def check_greedy(case: Case, sampler: Any, expected: list[tuple[str, str, list[int]]]) -> None:
    replies = [row.responses[0] for row in sampler.sample([Prompt(prompt) for prompt in PROMPTS], GREEDY)]
    assert [(reply.text, reply.finish, list(reply.token_ids)) for reply in replies] == expected


def test_transformers(case: Case) -> None:
    """Texts, ends and ids are those of ``generate``; the replica says what it has learnt."""
    assert [finish for _, finish, _ in case.expected] == ["eos", "eos", "length"]
    assert [text for text, *_ in case.expected[:2]] == list(REPLIES[:2])
    check_greedy(case, case.services.sampler(case.policy, case.ref(), "transformers"), case.expected)


@pytest.mark.skipif(choose_backend("vllm").name != "vllm", reason="vLLM is not installed here")
def test_vllm(case: Case, tmp_path: Path) -> None:
    """As ``generate`` with the folder's weights, and with others once they are synced."""
    check_greedy(case, case.services.sampler(case.policy, case.ref(), "vllm"), case.expected)
    policy = case.changed(0.9)
    other = Plain(case.plain.tokenizer, policy.model, case.plain.end_ids, case.plain.chat, case.plain.aside)
    sampler = case.services.sampler(policy, case.ref(), "vllm")
    check_greedy(case, sampler, [other.greedy(messages, CAP) for messages in DIALOGUES])


def test_sft(case: Case, tmp_path: Path) -> None:
    """The first loss is the mean over the tokens of the replies, their ends included."""
    pairs = [{"prompt": prompt, "chosen": POOR, "rejected": reply} for prompt, reply in KNOWN]
    settings = SFTSettings(epochs=1, batch_prompts=8, lr=1e-3, warmup=0.0)
    log = case.train(settings, rows(tmp_path / "pairs.jsonl", *pairs), tmp_path / "out")
    nll = [case.nll(messages, POOR) for messages in DIALOGUES]
    assert log[0]["loss"] == pytest.approx(sum(x for x, _ in nll) / sum(n for _, n in nll), rel=1e-3)


def test_rrhf(case: Case, tmp_path: Path) -> None:
    """The first terms by hand: two replies, of which the poor one has the higher reward."""
    scored = [{"query": prompt, "responses": [POOR, reply], "scores": [1.0, 0.0]} for prompt, reply in KNOWN]
    settings = RRHFSettings(epochs=1, batch_prompts=8, lr=1e-3, warmup=0.0)
    log = case.train(settings, rows(tmp_path / "scored.jsonl", *scored), tmp_path / "out")
    poor = [case.nll(messages, POOR) for messages in DIALOGUES]
    known = [case.nll(messages, reply) for messages, reply in zip(DIALOGUES, REPLIES, strict=True)]
    rank = sum(max(0.0, a / m - b / n) for (a, m), (b, n) in zip(poor, known, strict=True)) / len(poor)
    assert log[0]["loss/sft"] == pytest.approx(sum(x for x, _ in poor) / len(poor), rel=1e-3)
    assert log[0]["loss/rank"] == pytest.approx(rank, rel=1e-3)


def test_ppo(case: Case, tmp_path: Path) -> None:
    """So cold that rollouts are the greedy replies: as many count as cut, and they have the mean score."""
    settings = PPOSettings(iterations=1, rollouts=3, minibatch=3, update_epochs=2, temperature=0.02, lr=1e-3)
    prompts = rows(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    log = case.train(settings, prompts, tmp_path / "out")
    scores = [
        case.reward.plain.score(messages, text) for messages, (text, *_) in zip(DIALOGUES, case.expected, strict=True)
    ]
    assert log[0]["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert log[0]["completions/mean_length"] == pytest.approx(sum(len(ids) for *_, ids in case.expected) / 3)
    assert log[0]["reward/mean"] == pytest.approx(sum(scores) / 3, rel=1e-3, abs=1e-4)
    assert log[0]["val/ratio"] == pytest.approx(1.0, abs=1e-3)


def test_save(case: Case, tmp_path: Path) -> None:
    """Weights that were changed come back, and the settings of generation with them."""
    policy = case.changed(1.1)
    policy.save(tmp_path / "saved")
    saved = Plain.load(tmp_path / "saved", case.family)
    ids = case.plain.prompt_ids(DIALOGUES[2])
    with torch.no_grad():
        assert torch.equal(policy.model(input_ids=torch.tensor([ids])).logits[0], saved.logits(ids))
    said = [json.loads((folder / "generation_config.json").read_text()) for folder in (case.folder, tmp_path / "saved")]
    assert said[0]["eos_token_id"] == said[1]["eos_token_id"]


def test_evaluate(case: Case, tmp_path: Path) -> None:
    """Replies, lengths, rewards and likelihoods are the plain ones; the policy is 0 nats from itself."""
    prompts = rows(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    cold = SamplingSpec(n=1, temperature=0.02, max_new_tokens=CAP, seed=0, purpose="families")
    records, _ = case.steps.evaluate(
        case.ref(), case.reward.ref, prompts, tmp_path / "out.jsonl", name="row", seed=0, gold=False,
        decodings={"greedy": GREEDY, "sample": cold}, initial=case.ref(), perplexity=case.ref(),
    )  # fmt: skip
    assert len(records) == 6
    for record, messages, (text, finish, ids) in zip(records, DIALOGUES * 2, case.expected * 2, strict=True):
        assert (record.response, record.finish, record.tokens) == (text, finish, len(ids))
        assert record.reward == pytest.approx(case.reward.plain.score(messages, text), rel=1e-3, abs=1e-4)
        assert record.kl == (None if record.decoding == "greedy" else 0.0)
        # The perplexity model reads the text and the template's end of turn.
        said = case.plain.reply_ids(messages, text)
        said = said if finish == "eos" else said[:-1]
        nll = -case.plain.logprobs(case.plain.prompt_ids(messages), said).sum().item()
        assert (record.nll, record.nll_tokens) == (pytest.approx(nll, rel=1e-3, abs=1e-4), len(said))


def test_score(reward: RewardCase, tmp_path: Path) -> None:
    """Scores are those of the model's own class, one row at a time."""
    given = rows(tmp_path / "c.jsonl", *({"query": p, "responses": [r, POOR]} for p, r in KNOWN))
    PlainSteps(RUNTIME, "transformers", lambda done, total: None).score(reward.ref, given, tmp_path / "out.jsonl")
    for row, messages in zip(read(tmp_path / "out.jsonl"), DIALOGUES, strict=True):
        expected = [reward.plain.score(messages, reply) for reply in row["responses"]]
        assert row["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert abs(expected[0] - expected[1]) > 1e-3


def test_long(reward: RewardCase, tmp_path: Path) -> None:
    """A reply beyond the context is scored as its end, behind the token that opens every text."""
    given = rows(tmp_path / "c.jsonl", {"query": PROMPTS[0], "responses": [LONG, POOR]})
    PlainSteps(RUNTIME, "transformers", lambda done, total: None).score(reward.ref, given, tmp_path / "out.jsonl")
    ids = reward.plain.ids(DIALOGUES[0], LONG)
    opens = ids[:1] if ids[0] in (reward.plain.tokenizer.bos_token_id, reward.plain.tokenizer.cls_token_id) else []
    expected = reward.plain.score_ids([*opens, *ids[len(ids) - reward.family.places + len(opens) :]])
    assert read(tmp_path / "out.jsonl")[0]["scores"][0] == pytest.approx(expected, rel=1e-4, abs=1e-5)
