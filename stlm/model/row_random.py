"""Random numbers keyed by the row of a step, so equal for any number of ranks and micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def row_keys(seed: int, step: int, rows: Iterable[int]) -> Tensor:
    """Return a key for each of these rows of a step: int64 [B], from (seed, step, row) alone."""
    digests = (hashlib.sha256(f"{seed}/{step}/{row}".encode()).digest() for row in rows)
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])


def uniform(row_keys_B: Tensor, number: int) -> Tensor:
    """Return draw `number` of each row: float64 [B], uniform in [0, 1).

    The key and the number of the draw are hashed by SplitMix64 (Steele, Lea & Flood 2014, figure 15) modulo 2^64. A
    draw does not depend on how many were made before.
    """
    z = row_keys_B + _signed((number + 1) * WEYL)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right logically: zeros enter from the left."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
