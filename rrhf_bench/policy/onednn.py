"""Matrix products of float32 models through oneDNN, for processors on which PyTorch's default BLAS is slower.

The default BLAS (MKL) leaves AVX-512 unused on processors of other makers. oneDNN uses what the processor has. On some
processors both are equally fast.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return a @ b in float32 on a CPU, computed by oneDNN through a private operator of the pinned torch.

    The operator raises on empty operands. A product without rows, inner dimension or columns is therefore made here,
    as zeros. Such products occur: a LoRA layer's first backward pass has no row whose gradient is not zero.
    """
    if not (a_MK.numel() and b_KN.numel()):
        return a_MK.new_zeros(a_MK.shape[0], b_KN.shape[1])
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], ""))


def worth_it(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if ``onednn = "auto"`` uses oneDNN: on AMD processors with full-width AVX-512 (Zen 5 and later).

    The processor decides, not a measurement. On a busy machine two processes of one run would measure differently, and
    their results would differ in the last place. ``gain`` measures the speed.
    """
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        return False
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    family = said.get("cpu family", "")
    full_width = said.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26
    return full_width and "avx512f" in said.get("flags", "").split() and torch.backends.mkldnn.is_available()


def gain() -> float:
    """Return how many times as fast as PyTorch's default oneDNN multiplies here.

    Both sides multiply in turn, and the result is the median of the ratios. The measurement takes about 40 ms.
    """
    a_MK, b_KN = torch.ones(512, 512), torch.ones(512, 512)
    ratios = []
    for turn in range(8):
        seconds = []
        for multiply in (torch.mm, product):
            started = time.perf_counter()
            multiply(a_MK, b_KN)
            seconds.append(time.perf_counter() - started)
        if turn:  # the first turn only warms up
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
