"""Steps that stages and plain-file commands share: score, train, evaluate. They take objects and return records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rrhf_bench import registry
from rrhf_bench.pipeline.candidates import pair_candidates
from rrhf_bench.pipeline.services import DistinctTexts, Progress
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.policy.policy import Policy, TransformersPolicy
from rrhf_bench.records import Candidates, Decoding, Evaluated, PairScored, Preference, Prompt, Response
from rrhf_bench.rewards.gold import Gold
from rrhf_bench.rewards.reward import RewardModel, require_finite
from rrhf_bench.sampling.sampler import Sampler, SamplingSpec
from rrhf_bench.seeding import derive_seed
from rrhf_bench.settings.methods import MethodSettings, OfflineSettings, OptimiserSettings, candidates_of
from rrhf_bench.settings.online import OnPolicySettings
from rrhf_bench.training.method import Trainer
from rrhf_bench.training.offline import FixedExamples, OfflineTrainer
from rrhf_bench.training.on_policy import OnPolicyTrainer
from rrhf_bench.training.online import OnlineExamples

Row = tuple[Prompt, Response]


def score_shared_candidates(
    reward: DistinctTexts, candidates: Sequence[Candidates], where: str, progress: Progress | None = None
) -> list[Candidates]:
    """Return the scored candidates that several rows may train on.

    Raises DataError if a score is not finite; ``where`` names the reward model in the message.
    """
    prompts = [group.prompt for group in candidates for _ in group.responses]
    texts = [response.text for group in candidates for response in group.responses]
    score = iter(require_finite(reward.score(prompts, texts, progress), prompts, where).tolist())
    return [
        replace(group, responses=tuple(replace(response, score=next(score)) for response in group.responses))
        for group in candidates
    ]


def trainer(settings: MethodSettings, context: int) -> Trainer:
    """Return the loop that trains a method: the offline loop, in which no text goes beyond ``context`` tokens, or the
    on-policy loop. A method that is neither brings a ``fit`` of its own."""
    method = registry.build(settings)
    if isinstance(settings, OnPolicySettings):
        return OnPolicyTrainer(method, settings)
    if not isinstance(settings, OfflineSettings):
        return cast(Trainer, method)
    max_length = min(settings.max_length or context, context)
    candidates = candidates_of(settings)
    supply = FixedExamples if candidates is None or not candidates.refresh else OnlineExamples
    return OfflineTrainer(method, settings.model_copy(update={"max_length": max_length}), supply)


def adapt(policy: TransformersPolicy, settings: MethodSettings, seed: int) -> Policy | None:
    """Add the adapters of a method to the policy, and return the policy without them as a reference, or None."""
    lora = settings.lora if isinstance(settings, OptimiserSettings) else None
    if lora is None:
        return None
    policy.adapt(lora, derive_seed(seed, "lora"))
    return policy.before_adapting()


@dataclass(frozen=True)
class Judges:
    """The models that judge a reply: the reward model, the gold reward of the world if any, the perplexity model."""

    reward: RewardModel
    gold: Gold | None = None
    perplexity: TransformersPolicy | None = None
    batch: int = 64

    def verdicts(self, rows: Sequence[Row], place: str) -> list[dict[str, Any]]:
        """Return the judged fields of an Evaluated for each reply.

        Raises Diverged, with ``place`` in its message, if a reward is not finite.
        """
        prompts, texts = [prompt for prompt, _ in rows], [response.text for _, response in rows]
        rewards = require_finite(self.reward.score(prompts, texts), prompts, place, texts)
        verdicts: list[dict[str, Any]] = [{"reward": x} for x in rewards.tolist()]
        if self.gold is not None:
            golds, features = self.gold.score(prompts, texts).tolist(), self.gold.features(prompts, texts)
            for verdict, gold, counts in zip(verdicts, golds, features, strict=True):
                verdict.update(gold=gold, features=counts)
        if self.perplexity is not None:
            for verdict, (nll, tokens) in zip(verdicts, reply_nll(self.perplexity, rows, self.batch), strict=True):
                verdict.update(nll=nll, nll_tokens=tokens)
        return verdicts


def decodings(evaluation: Mapping[str, Any], seed: int, purpose: str) -> dict[Decoding, SamplingSpec]:
    """Return the arena's ways to decode: one reply a prompt."""
    return {
        decoding: SamplingSpec(
            n=1,
            temperature=0.0 if decoding == "greedy" else evaluation["temperature"],
            top_k=0 if decoding == "greedy" else evaluation["top_k"],
            max_new_tokens=evaluation["max_new_tokens"],
            seed=seed,
            purpose=f"{purpose}/{decoding}",
            stop=tuple(evaluation["stop"]),
        )
        for decoding in evaluation["decoding"]
    }


def evaluate(
    row: str,
    seed: int,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    judges: Judges,
    decodings: Mapping[Decoding, SamplingSpec],
    policy: TransformersPolicy | None,
    initial: TransformersPolicy | None,
) -> list[Evaluated]:
    """Return one record for each prompt and decoding. The sampler must hold the policy's weights.

    KL to ``initial`` and entropy are estimated only from draws of the policy's own distribution at the spec's
    temperature. Greedy replies and draws truncated by top-k or top-p have neither (None). A policy whose vocabulary
    differs from that of ``initial`` has no KL, because the two then give probabilities to different events.

    Without a ``policy`` the sampler draws from ``initial`` in a way of its own. The log-probs that it returns then
    stand for the policy's; if it returns none, there is no KL and no entropy.

    Raises Diverged if the reward of a reply is not finite.
    """
    own = policy or initial
    comparable = initial is not None and own is not None and own.tokenization.has_vocabulary_of(initial.tokenization)
    records = []
    for decoding, asked in decodings.items():
        spec = replace(asked, logprobs=not (asked.greedy or asked.truncated))
        replies = [(c.prompt, c.responses[0]) for c in sampler.sample(prompts, spec)]
        entropies = [None if reply.logprobs is None else -math.fsum(reply.logprobs) for _, reply in replies]
        kls: Sequence[float | None] = [None] * len(replies)
        if comparable and spec.logprobs:
            assert initial is not None
            if policy is not None:
                kls = log_ratios(policy, initial, replies, spec.temperature, judges.batch)
            elif None not in entropies:
                logps = sampled_logprobs(initial, sampled_ids(initial, replies), spec.temperature, judges.batch)
                kls = [-(entropy or 0.0) - logp for entropy, logp in zip(entropies, logps, strict=True)]
        verdicts = judges.verdicts(replies, f"{row}, {decoding} replies")
        for (prompt, reply), verdict, kl, entropy in zip(replies, verdicts, kls, entropies, strict=True):
            assert reply.token_ids is not None
            verdict |= {"kl": kl, "entropy": entropy}
            tokens = len(reply.token_ids)
            records.append(Evaluated(row, seed, decoding, prompt, reply.text, reply.finish, tokens, **verdict))
    return records


def score_pairs_by_likelihood(
    row: str, seed: int, policy: TransformersPolicy, pairs: Sequence[Preference], batch: int
) -> list[PairScored]:
    """Return the policy's p_i (mean log-prob, 2304.05302 Eq. 1) of both replies of each held-out pair."""
    rows = [(c.prompt, response) for c in pair_candidates(pairs) for response in c.responses]

    def mean_logprob(batch: ResponseBatch) -> Tensor:
        return sequence_score(policy.token_logprobs(batch), batch.mask_BT.to(policy.device))

    p = compute_by_length(mean_logprob, _ids_within_context(policy, rows), batch)
    return [PairScored(row, seed, pair.prompt, p[2 * i], p[2 * i + 1]) for i, pair in enumerate(pairs)]


def reply_nll(policy: TransformersPolicy, rows: Sequence[Row], batch: int) -> list[tuple[float, int]]:
    """Return (summed negative log-likelihood in nats, tokens) of each reply given its prompt, EOS included if it ended.

    A reply that was cut before its first token has (0.0, 0).
    """
    pairs = _ids_within_context(policy, rows)

    def nll(batch: ResponseBatch) -> Tensor:
        return -policy.token_logprobs(batch).sum(-1)

    values = iter(compute_by_length(nll, [(prompt, reply) for prompt, reply in pairs if reply], batch))
    return [(next(values), len(reply)) if reply else (0.0, 0) for _, reply in pairs]


def log_ratios(policy: Policy, initial: Policy, rows: Sequence[Row], temperature: float, batch: int) -> list[float]:
    """Return log pi(y | x) - log pi_0(y | x) of each reply in nats, on the ids that it was sampled as.

    Both log-probs are at the temperature of the draw. If the replies are draws from pi at that temperature, not
    truncated, each value is the k1 estimate of KL(pi || pi_0). Each policy is given the prompt with its own cue.
    """
    pairs, initial_pairs = (sampled_ids(model, rows) for model in (policy, initial))
    if pairs != initial_pairs:
        logps = sampled_logprobs(policy, pairs, temperature, batch)
        initial_logps = sampled_logprobs(initial, initial_pairs, temperature, batch)
        return [logp - initial_logp for logp, initial_logp in zip(logps, initial_logps, strict=True)]

    def log_ratio(batch: ResponseBatch) -> Tensor:
        return (policy.token_logprobs(batch) - initial.token_logprobs(batch)).sum(-1)

    return compute_by_length(log_ratio, pairs, batch, temperature)


Ids = tuple[int, ...]


def sampled_ids(model: Policy, rows: Sequence[Row]) -> list[tuple[Ids, Ids]]:
    """Return (prompt ids, ids as they were sampled) of each reply; the prompt has the model's own cue."""
    return [(model.tokenization.prompt_ids(prompt), cast(Ids, reply.token_ids)) for prompt, reply in rows]


def sampled_logprobs(model: Policy, pairs: Sequence[tuple[Ids, Ids]], temperature: float, batch: int) -> list[float]:
    """Return the summed log-prob of each reply at a temperature."""
    return compute_by_length(lambda rows: model.token_logprobs(rows).sum(-1), pairs, batch, temperature)


def _ids_within_context(policy: TransformersPolicy, rows: Sequence[Row]) -> list[tuple[Ids, Ids]]:
    """Return (prompt ids, response ids) of each row.

    A prompt that leaves no room for its reply in the model's context is cut on the left; the reply stays whole.
    """
    tokenization = policy.tokenization
    pairs = [
        (tokenization.prompt_ids(prompt), tokenization.response_ids(reply.text, ended=reply.ended))
        for prompt, reply in rows
    ]
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return pairs
    return [(prompt[-max(1, limit - len(reply)) :], reply[: limit - 1]) for prompt, reply in pairs]


@torch.no_grad()
def compute_by_length(
    value: Callable[[ResponseBatch], Tensor], pairs: Sequence[tuple[Ids, Ids]], batch: int, temperature: float = 1.0
) -> list[float]:
    """Return a number for each (prompt ids, response ids), in order, computed in batches of like length."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), i))
    values = np.empty(len(pairs))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        values[rows] = value(ResponseBatch.of_pairs([pairs[i] for i in rows], temperature)).cpu().numpy()
    return values.tolist()
