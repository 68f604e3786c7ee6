"""The order in which training visits windows: a pure function, so resuming needs one integer and no file.

Each epoch is a pseudo-random permutation of all windows. A Feistel network on Z_a × Z_b with a·b slightly above the
number of windows is a bijection for any round function. Positions that it maps beyond the last window are mapped again
until they are in range ("cycle walking"). Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
2002, sections 4 and 5; the round function is SplitMix64's mixer (Steele, Lea and Flood, "Fast Splittable Pseudorandom
Number Generators", OOPSLA 2014).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 8
_MAX_WINDOWS = 1 << 50  # keeps every intermediate value well within 64 bits

_U64 = np.uint64


def window_at(position: ArrayLike, num_windows: int, seed: int) -> NDArray[np.int64]:
    """Return the window at `position` of the endless training order.

    position: an integer ≥ 0 or an array of them; position p belongs to epoch p // num_windows. Returns windows in [0,
    num_windows), of the shape of `position`. Every window occurs exactly once per epoch. Time and memory do not depend
    on num_windows.
    """
    if not 0 < num_windows <= _MAX_WINDOWS:
        raise ValueError(f"num_windows must be in 1 … {_MAX_WINDOWS}, got {num_windows}")
    positions = np.asarray(position)
    if positions.size and positions.min() < 0:
        raise ValueError(f"positions must not be negative, got {positions.min()}")
    flat = positions.reshape(-1).astype(_U64)
    epoch, index = np.divmod(flat, _U64(num_windows))
    key = _mix(_mix(np.full_like(epoch, seed & 0xFFFFFFFFFFFFFFFF)) + epoch)

    a = math.isqrt(num_windows - 1) + 1
    b = -(-num_windows // a)
    window = _permute(index, key, _U64(a), _U64(b))
    while (outside := np.flatnonzero(window >= num_windows)).size:
        window[outside] = _permute(window[outside], key[outside], _U64(a), _U64(b))
    return window.astype(np.int64).reshape(positions.shape)


def derived_seed(seed: int, number: int) -> int:
    """Return a separate seed for each of several orders of one run; number 0 keeps the run's seed."""
    return (seed ^ number * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF


class Order(Protocol):
    """A pure function from positions to windows."""

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]: ...


class Shuffled:
    """A new permutation of all windows every epoch: `window_at`."""

    def __init__(self, num_windows: int, seed: int) -> None:
        self._num_windows = num_windows
        self._seed = seed

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return window_at(positions, self._num_windows, self._seed)


class EasyToHard:
    """A curriculum: the first epoch visits groups of windows in turn, each group shuffled; later epochs are `Shuffled`.

    ranking [num_windows]: all windows, those of the first group first. edges [groups + 1]: the start of each group in
    it, then num_windows.
    """

    def __init__(self, ranking: NDArray[np.int64], edges: NDArray[np.int64], seed: int) -> None:
        self._ranking = ranking
        self._edges = edges
        self._seed = seed
        self._later = Shuffled(len(ranking), seed)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        windows = np.empty(positions.shape, np.int64)
        later = positions >= len(self._ranking)
        windows[later] = self._later(positions[later])
        groups = np.searchsorted(self._edges, positions, side="right") - 1
        for group in np.unique(groups[~later]).tolist():
            mine = groups == group
            first, last = self._edges[group : group + 2].tolist()
            places = window_at(positions[mine] - first, last - first, derived_seed(self._seed, group + 1))
            windows[mine] = self._ranking[first + places]
        return windows


def _permute(index: NDArray[np.uint64], key: NDArray[np.uint64], a: np.uint64, b: np.uint64) -> NDArray[np.uint64]:
    """Apply a bijection of [0, a·b) for each key: each half is shifted by an amount that depends on the other."""
    left, right = np.divmod(index, b)
    for round in range(0, _ROUNDS, 2):
        left = (left + _mix(key + _U64(round << 56) + right) % a) % a
        right = (right + _mix(key + _U64(round + 1 << 56) + left) % b) % b
    return left * b + right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output function of value + golden gamma: every input bit affects every output bit."""
    value = value + _U64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _U64(27))) * _U64(0x94D049BB133111EB)
    return value ^ (value >> _U64(31))
