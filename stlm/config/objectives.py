"""Configs of training objectives, chosen by `kind`. Each has a module of that name in stlm.objectives."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.yaml.fields import Component, register


@dataclass(frozen=True)
class ObjectiveConfig(Component):
    """Family of objectives. A name alone selects one with its defaults: `training.objective: next_token`.

    `check` gets the whole RunConfig; the keys of its conflicts are relative to that.
    """

    by_name = True


@register("next_token")
@dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
    """Prediction of each id from the ids before it."""
