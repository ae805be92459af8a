"""Memory of this process: its peak on a device from a chosen moment on, and the error of an allocation that fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rrhf_bench.errors import StageError, is_out_of_memory

if TYPE_CHECKING:
    from rrhf_bench.pipeline.services import Services

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_RESIDENT_PEAK = "5"  # proc(5): sets VmHWM of the process to its present resident set

HOLDERS_NAMED = 4  # in a message: the largest ones

# The keys that lower the memory of a kind of stage. Those that change no result beyond rounding come first.
_SCORING = "lower runtime.score_batch"
_TRAINING = "lower runtime.pass_tokens, set runtime.checkpoint_activations = true, or set lora for the method"
_SAMPLING = "lower sampling.max_new_tokens, or policy.max_length (of a policy trained here policy.scratch.context)"
_LOWER = {
    "train": _TRAINING,
    "sample": _SAMPLING,
    "score": _SCORING,
    "score pairs": "lower runtime.pass_tokens",
    "evaluate": f"{_SCORING} and runtime.pass_tokens",
    "evaluate pairs": f"{_SCORING} and runtime.pass_tokens",
}
WITHOUT_A_FILE = "use a smaller model, --dtype bfloat16 or another --device, or for `train` --set lora.rank=8"


def what_to_lower(kind: str, device: str) -> str:
    """Return the keys of an experiment file that lower the memory of a kind of stage."""
    own = _LOWER.get(kind, "use a smaller model")
    share = "give the sampler less with runtime.gpu_memory" if device == "cuda" else "set runtime.workers = 1"
    return f"{own}, or {share}"


@contextmanager
def out_of_memory_named(services: Services, advice: str) -> Iterator[None]:
    """Raise StageError if an allocation fails in here; it names the largest holders of memory and gives the advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        held = ", ".join(f"{what} {size / 2**30:.2f} GiB" for what, size in services.held()[:HOLDERS_NAMED])
        raise StageError(
            f"out of memory on {services.device} ({reason or 'no room'}); loaded in this process: "
            f"{held or 'no model'}; {advice}"
        ) from error


def reset_peak(device: torch.device) -> bool:
    """Set the peak to the memory in use now, and return True when the system could do so.

    When it returns False, the peak may be that of anything the process did before, so it must not be reported.
    """
    if device.type == "cuda":
        if torch.cuda.is_initialized():  # else nothing was allocated, and there are no statistics to reset
            torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text(_RESET_RESIDENT_PEAK)
    except OSError:  # not Linux, or a sandbox that forbids the write
        return False
    return _resident_peak() is not None


def peak_bytes(device: torch.device) -> int:
    """Return the peak since ``reset_peak`` returned True: bytes that PyTorch held on a GPU, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _resident_peak()
    assert peak is not None, "reset_peak has read the same line"
    return peak


def _resident_peak() -> int | None:
    """Return the largest resident set in bytes (VmHWM), or None when the system does not report it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return None if found is None else int(found[1]) * 1024
