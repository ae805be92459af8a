"""Seeds derived by name. Nothing here depends on a global random state that a caller could have touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive_seed(*name: str | int) -> int:
    """A seed in [0, 2**63) from a name such as ``(experiment seed, "candidates", prompt id, sample index)``.

    sha256 of the name as canonical JSON: stable over processes, machines and Python versions, unlike ``hash()``.
    """
    digest = hashlib.sha256(json.dumps(name, separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*name: str | int) -> np.random.Generator:
    """A numpy generator whose stream is fixed by ``name``."""
    return np.random.default_rng(derive_seed(*name))


@contextmanager
def torch_seed(*name: str | int) -> Iterator[None]:
    """Seed torch's global CPU and CUDA generators by ``name`` inside the block, and restore them after it.

    For library code that can only draw from the global state (weight initialisation in transformers and peft).
    """
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        torch.manual_seed(derive_seed(*name))
        yield
