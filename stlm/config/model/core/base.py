"""The family of core configs, chosen by `model.core.kind`."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.yaml.fields import Component


@dataclass(frozen=True)
class CoreConfig(Component):
    """Family of cores."""
