"""The nouns: what every stage reads and writes. Frozen, free of torch, one JSON object a line on disk.

Text conventions, everywhere in the project:

* ``Prompt.text`` is an HH transcript that ends with ``Assistant:`` (no trailing space), whatever model reads it later;
  ``data/dialogue.py`` turns it into another model's chat template. (Or any text, where nobody speaks of dialogues:
  the ``raw`` template.)
* ``Response.text`` is what comes after it, its leading space included, without an end-of-text token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# How a response ended. "eos": the policy ended it; "stop": cut at a stop string (a fake turn); "length": the token cap
# (it did NOT end: no end-of-text token is trained or scored after it); "given": a reply from a data set, which ended.
Finish = Literal["eos", "stop", "length", "given"]

# "given" is for replies from the data set, which nobody decoded.
Decoding = Literal["greedy", "sample", "given"]

# A reply that begins a further turn of a transcript is cut there. Without the blank lines: undertrained models write
# "toAssistant:" as well.
STOP_STRINGS = ("Human:", "Assistant:")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue up to and including the last ``Assistant:``."""

    text: str

    @property
    def id(self) -> str:
        """First 16 hex digits of the sha256 of the text: the name that seeds and joins use."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Response:
    """One reply. ``token_ids`` and ``logprobs`` are as sampled, the end-of-text token included where there was one;
    ``logprobs`` are those of the distribution that was sampled from, temperature applied."""

    text: str
    source: str  # "model", "chosen", "rejected", or a name from a file
    finish: Finish = "given"
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    score: float | None = None

    @property
    def ended(self) -> bool:
        """False where the token cap cut the reply: it has no end to learn."""
        return self.finish != "length"


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt with k responses, scored or not yet."""

    prompt: Prompt
    responses: tuple[Response, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """The k scores; asserts that scoring has happened."""
        scores = tuple(response.score for response in self.responses if response.score is not None)
        assert len(scores) == len(self.responses), "candidates used before they were scored"
        return scores


@dataclass(frozen=True, slots=True)
class Preference:
    """A labelled pair of replies to one prompt, or the single reply of a data set to it (``rejected`` is then None).

    ``cluster`` names what several prompts have in common, such as their topic. Prompts of one cluster are not
    independent, and the intervals take that into account. None: the prompt is a cluster of its own. ``margin`` says how
    strong the preference is and ``tie`` that there is none; only the training of a reward model reads them.
    """

    prompt: Prompt
    chosen: str
    rejected: str | None = None
    ended: bool = True  # False if the single reply was cut, so that it has no end to learn
    cluster: str | None = None
    margin: float | None = None
    tie: bool | None = None  # None: the data do not say


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One reply to one evaluation prompt, judged. The unit of every table: prompt x method x seed x decoding.

    ``nll`` is the summed negative log-likelihood in nats of the reply under the perplexity model over ``nll_tokens`` of
    *its* tokens; ``kl`` the summed log-ratio of the policy to the initial policy on the reply's own tokens (k1, nats);
    ``entropy`` minus the reply's summed log-prob under the distribution that it was drawn from, in nats.
    """

    method: str
    seed: int
    decoding: Decoding
    prompt: Prompt
    response: str
    finish: Finish
    tokens: int  # length in the policy's tokens, end-of-text included
    reward: float
    gold: float | None = None
    features: Mapping[str, int] | None = None
    nll: float | None = None
    nll_tokens: int | None = None
    kl: float | None = None
    entropy: float | None = None


@dataclass(frozen=True, slots=True)
class PairScored:
    """The policy's length-normalised log-probs of a held-out pair (2304.05302 Table 5: p_i as a reward model)."""

    method: str
    seed: int
    prompt: Prompt
    chosen: float
    rejected: float


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The current policy on the dev prompts at one fraction of a training budget. Seconds are kept apart."""

    method: str
    seed: int
    decoding: Decoding
    fraction: float
    step: int  # optimiser steps so far
    sampled_tokens: int  # tokens sampled for training so far, the candidates before step 0 included
    rewards: tuple[float, ...]  # one per dev prompt, in dev order
    golds: tuple[float, ...] | None = None
    kls: tuple[float, ...] | None = None  # log-ratio to the initial policy of each sampled reply, nats (curve_kl)


@dataclass(frozen=True, slots=True)
class PoolScored:
    """n samples of one policy on one prompt, scored: what the best-of-n curve is estimated from."""

    prompt: Prompt
    rewards: tuple[float, ...]
    golds: tuple[float, ...] | None = None
    responses: tuple[str, ...] = field(default=())
