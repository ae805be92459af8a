"""Matrix products of float32 models through oneDNN, for processors on which PyTorch's default BLAS is slower.

The default BLAS (MKL) leaves AVX-512 unused on processors of other makers. oneDNN uses what the processor has. On some
processors both are equally fast.

Letters: M rows (positions), K inputs, N outputs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return a @ b in float32 on a CPU, computed by oneDNN through a private operator of the pinned torch.

    The operator raises on empty operands. A product without rows, inner dimension or columns is therefore made here,
    as zeros.
    """
    if not (a_MK.numel() and b_KN.numel()):
        return a_MK.new_zeros(a_MK.shape[0], b_KN.shape[1])
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], ""))


class Linear(torch.nn.Linear):
    """A linear layer whose float32 products on a CPU are oneDNN's; other inputs go to PyTorch's own layer."""

    def forward(self, input: Tensor) -> Tensor:
        if product_of(self, input) is not product:
            return super().forward(input)
        out_MN = _Linear.apply(input.reshape(-1, input.shape[-1]), self.weight, self.bias)
        return cast(Tensor, out_MN).view(*input.shape[:-1], self.out_features)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        out_MN = product(x_MK, weight_NK.t())
        return out_MN if bias_N is None else out_MN.add_(bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad
        grad_MN = grads[0].contiguous()
        return (
            product(grad_MN, weight_NK) if want_x else None,
            product(grad_MN.t(), x_MK) if want_weight else None,
            grad_MN.sum(0) if want_bias else None,
        )


def product_of(layer: torch.nn.Module, input: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that multiplies in a linear layer for an input of this dtype on this device."""
    steered = isinstance(layer, Linear) and input.dtype == torch.float32 and input.device.type == "cpu"
    return product if steered and not torch.is_autocast_enabled("cpu") else torch.mm


def apply(model: torch.nn.Module) -> int:
    """Make every linear layer of a model one of these, in place, and return their number.

    oneDNN and PyTorch each keep the kernels of the last 1024 shapes. Training multiplies another number of rows at
    nearly every step, so that a small model held 0.5 GB of kernels after two hundred. 64 are enough for one pass.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")  # read at the first product
    layers = [module for module in model.modules() if type(module) in (torch.nn.Linear, Linear)]
    for layer in layers:
        layer.__class__ = Linear
    return len(layers)


def worth_it(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if ``onednn = "auto"`` uses oneDNN: on AMD processors with full-width AVX-512 (Zen 5 and later).

    The processor decides, not a measurement. On a busy machine two processes of one run would measure differently, and
    their results would differ in the last place. ``gain`` measures the speed. PyTorch may be kept to AVX2 by
    ``ATEN_CPU_CAPABILITY=avx2``; the default BLAS then multiplies, as on a processor without AVX-512.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        return False
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    family = said.get("cpu family", "")
    full_width = said.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26
    return full_width and torch.backends.mkldnn.is_available()


def gain() -> float:
    """Return how many times as fast as PyTorch's default oneDNN multiplies here: the median of seven rounds, 40 ms."""
    a_MK, b_KN = torch.ones(512, 512), torch.ones(512, 512)
    ratios = []
    for _ in range(8):
        seconds = []
        for multiply in (torch.mm, product):
            started = time.perf_counter()
            multiply(a_MK, b_KN)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round only warms up
