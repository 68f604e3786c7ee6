#!/usr/bin/env python
"""Two plain products against torch's fused attention kernel, forward and backward, on this machine's CPU.

    python benchmarks/attention.py

The rows are the shapes that a 512-byte context gives: windows of local byte layers, a core over patches, a core over
bytes. `stlm.model.core.attention.attend` takes the plain products up to SHORT keys.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from stlm.model.core import attention
from stlm.model.decoding.cache import visible

ROUNDS = 7
SHAPES = {  # name: (batch, heads, queries, keys, head width)
    "windows of 32 bytes": (256, 2, 32, 64, 64),
    "128 patches": (16, 4, 128, 128, 64),
    "256 patches": (16, 4, 256, 256, 64),
    "512 bytes": (16, 4, 512, 512, 64),
}


def seconds(limit: int, tensors: list[Tensor], mask: Tensor) -> float:
    """Return the time of one forward and backward pass with plain products up to `limit` keys."""
    attention.SHORT = limit
    begin = time.perf_counter()
    attention.attend(*tensors, mask).sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    print(f"{'shape':22}{'dtype':12}{'fused ms':>10}{'plain ms':>10}{'fused / plain':>15}")
    for name, (batch, heads, queries, keys, width) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            tensors = [
                torch.randn(batch, heads, length, width, dtype=dtype, requires_grad=True)
                for length in (queries, keys, keys)
            ]
            mask = visible(queries, keys - queries, keys, 0, None, tensors[0].device)
            times = [(seconds(0, tensors, mask), seconds(keys, tensors, mask)) for _ in range(ROUNDS + 1)][1:]
            fused, plain = (1e3 * median(column) for column in zip(*times, strict=True))
            print(f"{name:22}{str(dtype)[6:]:12}{fused:10.1f}{plain:10.1f}{fused / plain:15.2f}")


if __name__ == "__main__":
    main()
