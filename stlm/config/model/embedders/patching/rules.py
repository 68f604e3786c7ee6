"""Configs of patching rules, which decide where patches begin, chosen by `kind`, as are their modules in stlm.model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Component, Conflict, register, setting

HEADROOM = 1.25  # slots per patch of the stated mean length


@dataclass(frozen=True)
class PatchingConfig(Component):
    """Family of patching rules. The number of patch slots in a window does not depend on its text: shapes are fixed."""

    @property
    def span(self) -> int:
        """Number of byte states, up to the position where a patch begins, that its vector is computed from."""
        raise TypeError(f"{type(self).__name__} defines no span")

    def num_slots(self, context_length: int) -> int:
        """Return the largest number of patches in a window of `context_length` bytes."""
        raise TypeError(f"{type(self).__name__} defines no num_slots()")


@register("fixed")
@dataclass(frozen=True)
class FixedPatchingConfig(PatchingConfig):
    """A patch begins at every `patch_size`-th byte (MegaByte)."""

    patch_size: int = setting(4, "bytes per patch", unit="bytes", minimum=1)

    @property
    def span(self) -> int:
        return self.patch_size

    def num_slots(self, context_length: int) -> int:
        return -(-context_length // self.patch_size)

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        if 2 * self.patch_size > model.context_length:
            yield one_patch("patch_size", self.patch_size, model.context_length)
        elif model.context_length % self.patch_size:
            rounded = -(-model.context_length // self.patch_size) * self.patch_size
            yield Conflict(
                "context_length",
                f"got {model.context_length}, expected a multiple of model.embedder.patching.patch_size = "
                f"{self.patch_size}; {rounded} would work",
                ("embedder.patching.patch_size",),
            )


@dataclass(frozen=True)
class VariablePatchingConfig(PatchingConfig):
    """Settings shared by rules whose patches vary in length."""

    patch_length: float = setting(
        6.0, "mean bytes per patch that slots are provided for, with a quarter to spare", unit="bytes", above=1.0
    )
    span: int = setting(
        8, "byte states, up to where a patch begins, that its vector is computed from", unit="bytes", minimum=1
    )

    def num_slots(self, context_length: int) -> int:
        return min(context_length, math.ceil(context_length * HEADROOM / self.patch_length))

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        if 2 * self.patch_length > model.context_length:
            yield one_patch("patch_length", self.patch_length, model.context_length)


def one_patch(key: str, length: float, context_length: int) -> Conflict:
    """Return the conflict of patches so long that a window holds only one."""
    works = f"{min(4, context_length // 2)}" if context_length >= 4 else f"model.context_length={math.ceil(2 * length)}"
    return Conflict(
        f"embedder.patching.{key}",
        f"got {length:g}, expected at most half of model.context_length = {context_length}, or a window is one patch; "
        f"{works} would work",
        ("context_length",),
    )


@register("space")
@dataclass(frozen=True)
class SpacePatchingConfig(VariablePatchingConfig):
    """A patch begins after each run of spaces and punctuation, so that it is roughly a word (SpaceByte)."""
