"""The part of a model's config that checks of components read, and arithmetic that these checks share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

from stlm.config.yaml.fields import Conflict


class ModelShape(Protocol):
    """View of a ModelConfig for its components."""

    @property
    def context_length(self) -> int:
        """Ids of a training window."""
        ...

    @property
    def width(self) -> int:
        """Width of the core."""
        ...

    @property
    def embedder(self) -> Any:
        """Config of the embedder."""
        ...

    @property
    def core(self) -> Any:
        """Config of the core."""
        ...

    @property
    def head(self) -> Any:
        """Config of the head."""
        ...

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between the parts."""
        ...


def heads_fit(heads_key: str, num_heads: int, width_key: str, width: int, even: bool = True) -> Iterator[Conflict]:
    """Yield a conflict unless heads divide the width. `even`: each head's width must be even (rotary positions)."""
    unit = 2 if even else 1
    if width % num_heads == 0 and width // num_heads % unit == 0:
        return
    if width % unit:
        yield Conflict(
            width_key, f"got {width}, expected an even number (rotary positions rotate pairs); {width + 1} would work"
        )
        return
    fitting = nearest(num_heads, divisors(width // unit))
    leaving = " that leaves each head an even width" if even else ""
    yield Conflict(
        heads_key,
        f"got {num_heads}, expected a divisor of model.{width_key} = {width}{leaving}; {fitting} would work",
        (width_key,),
    )


def divisors(number: int) -> list[int]:
    """Return all divisors of `number`, unordered and possibly repeated."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return [*small, *(number // candidate for candidate in small)]


def nearest(target: int, candidates: list[int]) -> int:
    """Return the candidate nearest to `target`, the smaller one of two equally near."""
    return min(candidates, key=lambda candidate: (abs(candidate - target), candidate))
