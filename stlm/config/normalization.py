"""Norms of a transformer, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.fields import Component, register, setting


@dataclass(frozen=True)
class NormConfig(Component):
    """Family of norms."""


@register("rms_norm")
@dataclass(frozen=True)
class RMSNormConfig(NormConfig):
    """Divides by the root of the mean square."""

    eps: float = setting(1e-6, "added to the mean square", minimum=0.0)
