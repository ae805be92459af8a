"""The peak memory of this process on its device, counted from a moment that the caller chooses."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_RESIDENT_PEAK = "5"  # proc(5): sets VmHWM of the process to its present resident set


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
