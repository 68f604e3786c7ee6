"""Model FLOPs utilization (MFU): the FLOPs of a step compared with the measured peak of the device.

MFU is the fraction of a device's peak that the model uses (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). The
matrix products of a forward pass count three times, as the backward pass costs two more; recomputation to save memory
does not count. The peak is not taken from a data sheet, which a shared, throttled or virtual machine does not reach: it
is measured when the run begins, on all ranks at once, as in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from stlm.model.accounting import CPU_ATTENTION

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = 3  # forward, and backward for vectors and for weights
ENOUGH_S = 0.005  # a product that takes longer is large enough to show the peak
SIZES = (1024, 2048, 4096, 8192)
MEASURED_S = 0.25


class Peak(NamedTuple):
    """Speed of the fastest of several products of square matrices."""

    flops: float  # per second
    size: int  # rows and columns


def measure_peak(device: torch.device, precision: str) -> Peak:
    """Measure the peak of one rank's device in "fp32", "bf16" or "fp16", with the threads of this process.

    Takes about a third of a second. Does not change the state of torch's random numbers.
    """
    generator = torch.Generator(device).manual_seed(1)
    for size in SIZES:
        matrix = torch.randn(size, size, generator=generator, device=device).to(DTYPES[precision])
        matrix @ matrix  # warm-up
        seconds = _seconds(device, lambda matrix=matrix: matrix @ matrix)  # type: ignore[misc]
        if seconds > ENOUGH_S:
            break
    until = time.perf_counter() + MEASURED_S
    while time.perf_counter() < until:
        seconds = min(seconds, _seconds(device, lambda: matrix @ matrix))
    if device.type == "cuda":  # keep this out of the run's memory figures
        del matrix
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Peak(2 * size**3 / seconds, size)


def _seconds(device: torch.device, function: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def count_flops() -> FlopCounterMode:
    """Return a context that counts the FLOPs inside, read by `get_total_flops`; results do not change."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def readable_flops(flops: float) -> str:
    """Format FLOPs per second: "61.3 GFLOP/s"."""
    unit, size = next(((unit, size) for unit, size in (("P", 1e15), ("T", 1e12)) if flops >= size), ("G", 1e9))
    return f"{flops / size:.3g} {unit}FLOP/s"
