"""How a transformer knows where a vector stands, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.fields import Component, register, setting


@dataclass(frozen=True)
class PositionsConfig(Component):
    """Family of positions."""


@register("rope")
@dataclass(frozen=True)
class RoPEConfig(PositionsConfig):
    """Rotary: queries and keys are turned by angles that grow with the position."""

    theta: float = setting(10000.0, "base of the wavelengths, in positions", minimum=1.0)
