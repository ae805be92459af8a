"""The initial policy at a lower temperature: a control that shows what sharper samples alone give.

A trained policy has a lower entropy than the initial one. Where that policy garbles at temperature 1, part of what
training seems to gain is the loss of entropy, and this row shows how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.tempered_settings import TemperedSettings
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.rewards.reward import RewardModel
from rrhf_bench.sampling.sampler import Sampler, SamplingSpec
from rrhf_bench.sampling.wrapped import WrappedSampler


class Tempered:
    """An InferenceMethod that replaces the temperature of the samples and reads no reward."""

    def __init__(self, settings: TemperedSettings) -> None:
        self.settings = settings

    def wrap(self, sampler: Sampler, reward: RewardModel) -> Sampler:
        temperature = self.settings.temperature

        def draw(prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
            return sampler.sample(prompts, replace(spec, temperature=temperature))

        same = "tempered: greedy decoding is the same at every temperature"
        return WrappedSampler(sampler, f"temperature {temperature:g}", draw, greedy=same)
