"""Check that the sampler draws from the policy as it is now, at the temperature asked for.

Old weights, a prefix cache with old states and a temperature that an engine ignores raise no error. All three show in
one comparison: the sampler's log-probs of what it drew against the trainer's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rrhf_bench.data.dialogue import ASSISTANT, HUMAN
from rrhf_bench.errors import Diverged, StageError
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.policy import Policy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.sampling.sampler import Progress, Sampler, SamplingSpec


@dataclass(frozen=True)
class Limit:
    """The largest difference between the log-probs of one token in nats, on average and at most."""

    mean: float
    max: float


# By the precision that the engine computes in. Float32: kernels that sum in two orders leave 1e-6 on average and 7e-6
# at most on models of four million parameters; deep ones leave more. Half precision: bfloat16 rounds a logit of 4 in
# steps of 1/32 and one of 16 in steps of 1/8, on both sides; small models, whose logits are small, leave 0.01 and 0.1.
# Float16 has three bits more.
LIMITS = {
    "float32": Limit(mean=1e-4, max=1e-3),
    "bfloat16": Limit(mean=0.05, max=1.0),
    "float16": Limit(mean=0.01, max=0.25),
}

# Few tokens cost little after every sync; the second of each is read from the cache of the first. A prompt is longer
# than a block of the prefix cache (32 tokens on a CPU, 16 to 64 on a GPU), because only such a prompt shows old states.
PROMPT_TOKENS = 65
ASKED = SamplingSpec(n=4, temperature=1.0, max_new_tokens=2, seed=0, purpose="contract", logprobs=True)
OPENINGS = ("How do I bake bread?", "What is a glacier?")
MORE = "The flour is old, the oven is slow and nobody knows why; say it in a few words."


@dataclass(frozen=True)
class Agreement:
    """|log-prob of the sampler - log-prob of the trainer|, over the sampled tokens of one comparison."""

    temperature: float
    tokens: int
    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, gaps: NDArray[np.float64], temperature: float) -> Agreement:
        p99 = float(np.quantile(gaps, 0.99))
        return cls(temperature, len(gaps), float(gaps.mean()), p99, float(gaps.max()))

    def within(self, limit: Limit) -> bool:
        """Return True if both differences are within the limit; NaN is not."""
        return self.mean <= limit.mean and self.max <= limit.max


def agreement(sampler: Sampler, policy: Policy, prompts: Sequence[Prompt], temperature: float) -> Agreement:
    """Return the agreement on a few tokens sampled behind each prompt."""
    rows = sampler.sample(prompts, replace(ASKED, temperature=temperature))
    replies = [(policy.tokenization.prompt_ids(row.prompt), reply) for row in rows for reply in row.responses]
    pairs = [(prompt_ids, reply.token_ids or ()) for prompt_ids, reply in replies]
    with torch.no_grad():
        logp_BT = policy.token_logprobs(ResponseBatch.of_pairs(pairs, temperature)).cpu()
    theirs = [reply.logprobs or () for _, reply in replies]
    gaps = [
        np.abs(np.array(row) - logp_T[: len(row)].double().numpy()) for row, logp_T in zip(theirs, logp_BT, strict=True)
    ]
    return Agreement.of(np.concatenate(gaps), temperature)


def canaries(tokenization: Tokenization, context: int) -> list[Prompt]:
    """Return prompts of at least PROMPT_TOKENS tokens, or of as many as leave room for a few more in the context.

    There are none if the context is too short for any.
    """
    prompts = []
    for opening in OPENINGS:
        words, text = itertools.cycle(MORE.split()), opening
        fitting: list[Prompt] = []
        length = 0
        while length < PROMPT_TOKENS:
            prompt = Prompt(f"{HUMAN} {text}{ASSISTANT}")
            length = len(tokenization.prompt_ids(prompt))
            if length > context - ASKED.max_new_tokens:
                break
            fitting = [prompt]
            text += " " + next(words)
        prompts += fitting
    return prompts


class CheckedSampler:
    """A Sampler that compares the log-probs of another with those of the policy synced, after every sync, before it
    samples at a temperature for the first time.

    The prompts of the comparison are sampled before the sync as well, so that the prefix cache holds their old states.
    ``note`` receives what each comparison found; ``progress`` is of what is sampled, not of comparisons.

    ``sync`` raises Diverged if the policy's own log-probs are NaN. ``sample`` raises StageError if the contract is
    broken.
    """

    def __init__(
        self,
        engine: Any,
        dtype: str,
        context: int,
        *,
        progress: Progress | None = None,
        note: Callable[[dict[str, Any]], None] = lambda found: None,
    ) -> None:
        self.engine = engine
        self._limit = LIMITS[dtype]
        self._context = context
        self._progress = progress
        self._note = note
        self._policy: Policy | None = None
        self._prompts: list[Prompt] = []
        self._checked: set[float] = set()  # temperatures, since the last sync

    @property
    def tokenization(self) -> Tokenization:
        return self.engine.tokenization

    @property
    def identity(self) -> str:
        return self.engine.identity

    def sync(self, policy: Policy) -> None:
        """Copy the policy's weights into the engine. Raises Diverged, with the engine untouched, if they give NaN."""
        self.engine.progress = None
        if self._policy is not policy:
            self._policy, self._prompts = policy, canaries(policy.tokenization, self._context)
        _require_numbers(policy, self._prompts)
        self.engine.sample(self._prompts, replace(ASKED, n=1, max_new_tokens=1, logprobs=False))
        self.engine.sync(policy)
        self._checked = set()

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        # Greedy decoding and a search have no temperature, but weights and a cache.
        temperature = 1.0 if spec.greedy or spec.strategy != "sample" else spec.temperature
        if temperature not in self._checked:
            # A context too short for any of ours has no block of a cache that could be of before.
            self._check(self._prompts or prompts[: len(OPENINGS)], temperature)
            self._checked.add(temperature)
        self.engine.progress = self._progress
        try:
            return self.engine.sample(prompts, spec)
        finally:
            self.engine.progress = None

    def _check(self, prompts: Sequence[Prompt], temperature: float) -> None:
        assert self._policy is not None, "sync before sampling"
        began = time.monotonic()
        found = agreement(self.engine, self._policy, prompts, temperature)
        self._note({**asdict(found), "limit": asdict(self._limit), "seconds": time.monotonic() - began})
        if not found.within(self._limit):
            raise StageError(
                f"sampler {self.identity}: its log-probs are {found.mean:.1e} from the trainer's on average and "
                f"{found.max:.1e} at most, over {found.tokens} tokens at temperature {temperature:g} (limits "
                f"{self._limit.mean:g} and {self._limit.max:g}): its weights or cached states are old, the temperature "
                "is not applied, it multiplies in TF32 (set TRITON_F32_DEFAULT=ieee), or the policy's logits are too "
                "large for two computations to agree (lower lr); run again, and if it stays, set sampling.backend = "
                '"transformers"'
            )


@torch.no_grad()
def _require_numbers(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Raise Diverged if the policy's log-prob of the end-of-text token is NaN after one of the prompts."""
    end = (policy.tokenization.eos_id,)
    starts = [policy.tokenization.prompt_ids(prompt) for prompt in prompts] or [end]
    logp_BT = policy.token_logprobs(ResponseBatch.of_pairs([(start, end) for start in starts]))
    if torch.isnan(logp_BT).any():
        finite = all(bool(torch.isfinite(weight).all()) for weight in policy.parameters())
        weights = "its weights are finite, but too large" if finite else "its weights are not finite"
        raise Diverged(f"the policy's log-probs are NaN: {weights}; lower lr, or train and load it in float32")
