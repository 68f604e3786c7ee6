#!/usr/bin/env python
"""Kernels of causal attention on this machine's CPU: seconds of one forward and backward pass.

    python benchmarks/attention.py [--threads N] [--rounds N]

Rows are shapes and kinds of attention in models of this project. Columns are kernels: "fused" is torch's
scaled_dot_product_attention; "products" computes the whole square of scores; "folded" cuts the window into blocks of
its own width; "blocks 64" (or 128) computes blocks of queries, each with the keys up to its end. "chosen" is the kernel
that `stlm.model.core.attention.causal_attention` takes; the last column is the speed-up over fused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from stlm.model.core import attention, blockwise
from stlm.model.core.attention import attend, causal_attention, windowed_attention
from stlm.model.core.blockwise import Visibility, blockwise_attention
from stlm.model.decoding.cache import visible

SHAPES: dict[str, tuple[int, int, int, int, int, int | None]] = {
    "128 patches": (16, 4, 4, 128, 64, None),
    "256 patches": (16, 4, 4, 256, 64, None),
    "512 ids": (8, 6, 6, 512, 64, None),
    "512 ids, wide heads": (8, 3, 3, 512, 128, None),
    "1024 bytes, grouped": (8, 4, 2, 1024, 64, None),
    "2048 bytes": (2, 4, 4, 2048, 64, None),
    "4096 bytes": (1, 4, 4, 4096, 64, None),
    "512 bytes, window 32": (8, 2, 2, 512, 48, 32),
    "512 bytes, window 64": (8, 2, 2, 512, 48, 64),
    "1024 bytes, window 256": (8, 4, 4, 1024, 64, 256),
}
KERNELS = ("fused", "products", "folded", "blocks 64", "blocks 128", "chosen")


def kernel(name: str, length: int, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return the function of a column, or None where it does not apply."""
    seen = Visibility(window)
    mask = visible(length, 0, length, 0, window, torch.device("cpu"))
    if name in ("fused", "products"):
        attention.SHORT = 0 if name == "fused" else length
        return lambda q, k, v: attend(q, k, v, mask if name == "products" or window else None)
    if name == "folded":
        return None if window is None else lambda q, k, v: windowed_attention(q, k, v, window)
    if name == "chosen":
        return lambda q, k, v: causal_attention(q, k, v, seen)
    blockwise.BLOCK = int(name.split()[1])
    return lambda q, k, v: blockwise_attention(q, k, v, seen)


def seconds(name: str, length: int, window: int | None, tensors: list[Tensor]) -> float:
    """Return the time of one forward and backward pass; nan where the kernel does not apply."""
    block, short = blockwise.BLOCK, attention.SHORT
    try:
        function = kernel(name, length, window)
        if function is None or (name == "products" and length > 2048):
            return float("nan")
        started = time.perf_counter()
        function(*tensors).sum().backward()
        return time.perf_counter() - started
    finally:
        blockwise.BLOCK, attention.SHORT = block, short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each kernel, alternating (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"milliseconds, {arguments.threads} threads, median of {arguments.rounds} rounds")
    print(f"{'shape':24}{'dtype':10}" + "".join(f"{name:>12}" for name in KERNELS) + f"{'speed-up':>10}")
    for shape, (batch, heads, kv_heads, length, width, window) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            tensors = [
                torch.randn(batch, length, count, width, dtype=dtype).transpose(1, 2).requires_grad_()
                for count in (heads, kv_heads, kv_heads)
            ]
            rounds = [[seconds(name, length, window, tensors) for name in KERNELS] for _ in range(arguments.rounds + 1)]
            times = [1e3 * median(column) for column in zip(*rounds[1:], strict=True)]
            cells = "".join(f"{'':>12}" if value != value else f"{value:12.1f}" for value in times)
            print(f"{shape:24}{str(dtype)[6:]:10}{cells}{times[0] / times[-1]:10.2f}", flush=True)


if __name__ == "__main__":
    main()
