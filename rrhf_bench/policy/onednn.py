"""Matrix products of float32 models through oneDNN, for processors on which PyTorch's default BLAS is slower.

That BLAS leaves AVX-512 unused on processors that are not its maker's; oneDNN goes by what the processor can do. On
some of them it makes no difference.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b in float32 on a CPU, by oneDNN: a private operator of the pinned torch."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], ""))


def worth_it(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether oneDNN is taken where nobody says: on AMD's processors whose AVX-512 is full width (Zen 5 and later).

    The processor decides, not a measurement: two processes of one run would measure differently on a busy machine, and
    their results would differ in the last place. ``gain`` measures.
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
    """How many times as fast oneDNN multiplies here: both sides in turn, the median of the ratios. Some 40 ms."""
    a_MK, b_KN = torch.ones(512, 512), torch.ones(512, 512)
    ratios = []
    for turn in range(8):
        seconds = []
        for multiply in (torch.mm, product):
            started = time.perf_counter()
            multiply(a_MK, b_KN)
            seconds.append(time.perf_counter() - started)
        if turn:  # the first warms up
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
