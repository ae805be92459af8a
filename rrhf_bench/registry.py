"""Every method by name: where its settings are (torch-free) and where its code is. Strings, resolved when used.

A new method is one row here, one settings class, one implementation, one test.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rrhf_bench.settings import MethodSettings

METHODS: dict[str, tuple[str, str]] = {
    "rrhf": ("rrhf_bench.training.rrhf_settings:RRHFSettings", "rrhf_bench.training.rrhf:RRHF"),
    "sft": ("baselines.sft_settings:SFTSettings", "baselines.sft:SFT"),
    "best_of_n": ("baselines.best_of_n_settings:BestOfNSettings", "baselines.best_of_n:BestOfN"),
    "ppo": ("baselines.ppo_settings:PPOSettings", "baselines.ppo:PPO"),
}


def settings_class(kind: str) -> type[MethodSettings]:
    """The settings class of a method; imports no torch."""
    return _resolve(METHODS[kind][0])


def build(settings: MethodSettings) -> Any:
    """The method itself: a LossMethod, Trainer or InferenceMethod according to ``settings.family``."""
    return _resolve(METHODS[settings.kind][1])(settings)


def _resolve(address: str) -> Any:
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)
