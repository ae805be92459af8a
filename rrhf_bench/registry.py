"""Every method by name: its settings (torch-free), its implementation, and the traits that a report reads.

A new method is one row here, one settings class, one implementation and one test. A method of another package needs no
row: its ``kind`` in the experiment file is the address of its ``Method``, such as ``"their_package.module:METHOD"``.
The addresses are strings that are resolved when they are used, so that ``plan`` imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

# offline: a loss over fixed examples; online: trains on replies that it samples; inference: trains nothing.
Family = Literal["offline", "online", "inference"]


@dataclass(frozen=True)
class Method:
    """The traits of one method. Addresses are ``"module:object"``."""

    settings: str  # a subclass of MethodSettings
    implementation: str  # a LossMethod, Trainer or InferenceMethod, built from the settings
    label: str  # in tables and figures
    colour: str  # "#rrggbb", the same in every report
    family: Family
    marker: str = "o"  # of matplotlib


# The colours are Okabe and Ito's, which people with any of the common colour-blindnesses can tell apart.
METHODS: Mapping[str, Method] = {
    "rrhf": Method(
        "rrhf_bench.training.rrhf_settings:RRHFSettings",
        "rrhf_bench.training.rrhf:RRHF",
        "RRHF", "#0072B2", "offline",
    ),
    "sft": Method("baselines.sft_settings:SFTSettings", "baselines.sft:SFT", "SFT", "#009E73", "offline"),
    "best_of_n": Method(
        "baselines.best_of_n_settings:BestOfNSettings",
        "baselines.best_of_n:BestOfN",
        "best-of-n", "#CC79A7", "inference", "D",
    ),
    "tempered": Method(
        "baselines.tempered_settings:TemperedSettings",
        "baselines.tempered:Tempered",
        "base at a lower temperature", "#808080", "inference", "P",
    ),
    "dpo": Method("baselines.dpo_settings:DPOSettings", "baselines.dpo:DPO", "DPO", "#E69F00", "offline"),
    "rloo": Method("baselines.rloo_settings:RLOOSettings", "baselines.rloo:RLOO", "RLOO", "#56B4E9", "online"),
    "grpo": Method("baselines.grpo_settings:GRPOSettings", "baselines.grpo:GRPO", "GRPO", "#E8003D", "online", "P"),
    "reinforce": Method(
        "baselines.reinforce_settings:ReinforceSettings",
        "baselines.reinforce:Reinforce",
        "REINFORCE", "#8855FF", "online", "X",
    ),
    "remax": Method(
        "baselines.remax_settings:ReMaxSettings",
        "baselines.remax:ReMax",
        "ReMax", "#00B400", "online", "v",
    ),
    "reinforce_pp": Method(
        "baselines.reinforce_pp_settings:ReinforcePPSettings",
        "baselines.reinforce_pp:ReinforcePP",
        "REINFORCE++-baseline", "#444400", "online", "p",
    ),
    "online_dpo": Method(
        "baselines.online_dpo_settings:OnlineDPOSettings",
        "baselines.online_dpo:OnlineDPO",
        "online DPO", "#2B2BFF", "online", "h",
    ),
    "ppo": Method("baselines.ppo_settings:PPOSettings", "baselines.ppo:PPO", "PPO", "#D55E00", "online"),
    "nlpo": Method("baselines.nlpo_settings:NLPOSettings", "baselines.nlpo:NLPO", "NLPO", "#E815E8", "online", "*"),
    "vcb": Method("baselines.vcb_settings:VCBSettings", "baselines.vcb:VCB", "VCB", "#332288", "offline", "s"),
    "kto": Method("baselines.kto_settings:KTOSettings", "baselines.kto:KTO", "KTO", "#DDCC77", "offline", "^"),
    "simpo": Method(
        "baselines.simpo_settings:SimPOSettings",
        "baselines.simpo:SimPO",
        "SimPO", "#CC6677", "offline", "v",
    ),
    "orpo": Method("baselines.orpo_settings:ORPOSettings", "baselines.orpo:ORPO", "ORPO", "#882255", "offline", "<"),
    "slic_hf": Method(
        "baselines.slic_hf_settings:SLiCHFSettings",
        "baselines.slic_hf:SLiCHF",
        "SLiC-HF", "#117733", "offline", ">",
    ),
    "pro": Method("baselines.pro_settings:PROSettings", "baselines.pro:PRO", "PRO", "#999933", "offline", "p"),
    "raft": Method("baselines.raft_settings:RAFTSettings", "baselines.raft:RAFT", "RAFT", "#44AA99", "offline", "h"),
    "ulma": Method("baselines.ulma_settings:ULMASettings", "baselines.ulma:ULMA", "ULMA", "#AA4499", "offline", "d"),
    "rebel": Method(
        "baselines.rebel_settings:REBELSettings",
        "baselines.rebel:REBEL",
        "REBEL", "#6699CC", "offline", "P",
    ),
    "bonbon": Method(
        "baselines.bonbon_settings:BoNBoNSettings",
        "baselines.bonbon:BoNBoN",
        "BoNBoN", "#661100", "offline", "X",
    ),
    "coh": Method("baselines.coh_settings:CoHSettings", "baselines.coh:CoH", "CoH", "#000000", "offline", "*"),
}  # fmt: skip


def find(kind: str) -> Method:
    """Return the method of a ``kind``: a row of METHODS, or a ``Method`` at an address.

    Raises LookupError with the reason if there is none.
    """
    if kind in METHODS:
        return METHODS[kind]
    if ":" not in kind:
        raise LookupError("no kind of method")
    try:
        found = resolve(kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"cannot be imported ({error}); install its package or set PYTHONPATH") from error
    if not isinstance(found, Method):
        raise LookupError(f"is a {type(found).__name__}; expected an rrhf_bench.registry.Method")
    return found


def settings_class(kind: str) -> Any:
    """Return the settings class of a method. The import loads no torch."""
    return resolve(find(kind).settings)


def build(settings: Any) -> Any:
    """Return the method itself, made from its settings."""
    return resolve(find(settings.kind).implementation)(settings)


def resolve(address: str) -> Any:
    """Return the object at ``"module:object"``. Raises ImportError or AttributeError if it is not there."""
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)
