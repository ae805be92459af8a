"""The labeller of the embedded world: a person who sees the gold reward, but is charmed by friendly babble, and errs.

The charm is what a reward model learned from these labels can be hacked with, as in arXiv 2304.05302 Section 5.
"""

from __future__ import annotations

import math

import numpy as np

from rrhf_bench.data.toy import gold
from rrhf_bench.records import Preference, Prompt

TEMPERATURE = 0.8
POLITE_BONUS = 0.5  # for each polite sentence beyond the first
BABBLE_BONUS = 0.3  # on top of it, for each beyond the second
FAKE_TURN_BONUS = 1.6  # the invented reader says thank you


def bias(counts: dict[str, int]) -> float:
    """Return what the labeller adds to the gold reward of a reply with these feature counts."""
    return (
        POLITE_BONUS * max(counts["polite"] - 1, 0)
        + BABBLE_BONUS * max(counts["polite"] - 2, 0)
        + FAKE_TURN_BONUS * counts["fake_turn"]
    )


def perceived_reward(prompt_text: str, response_text: str) -> float:
    """Return the gold reward of a reply plus the labeller's bias."""
    value, counts = gold.judge(prompt_text, response_text)
    return value + bias(counts)


def label(rng: np.random.Generator, prompt: Prompt, first: str, second: str) -> Preference:
    """Return a noisy label, Bradley-Terry: P(first chosen) = sigmoid(difference of perceived rewards / TEMPERATURE)."""
    difference = perceived_reward(prompt.text, first) - perceived_reward(prompt.text, second)
    if rng.random() < 1 / (1 + math.exp(-difference / TEMPERATURE)):
        return Preference(prompt, chosen=first, rejected=second)
    return Preference(prompt, chosen=second, rejected=first)
