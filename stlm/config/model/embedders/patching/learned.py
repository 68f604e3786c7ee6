"""Config of learned patches."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.model.embedders.patching.rules import VariablePatchingConfig
from stlm.config.yaml.fields import register, setting


@register("learned")
@dataclass(frozen=True)
class LearnedPatchingConfig(VariablePatchingConfig):
    """A patch begins where a learned router decides (H-Net's dynamic chunking)."""

    ratio_weight: float = setting(
        0.03, "weight of the loss that leads to patches of patch_length bytes on average", minimum=0.0
    )
