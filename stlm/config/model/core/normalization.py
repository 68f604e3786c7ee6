"""Configs of norms in a transformer, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.yaml.fields import Component, register, setting


@dataclass(frozen=True)
class NormConfig(Component):
    """Family of norms."""


@register("rms_norm")
@dataclass(frozen=True)
class RMSNormConfig(NormConfig):
    """Division by the root mean square."""

    eps: float = setting(1e-6, "added to the mean square", minimum=0.0)


@register("layer_norm")
@dataclass(frozen=True)
class LayerNormConfig(NormConfig):
    """Subtraction of the mean and division by the standard deviation."""

    eps: float = setting(1e-5, "added to the variance", minimum=0.0)
    bias: bool = setting(True, "add a learned vector")
