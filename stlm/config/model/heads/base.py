"""The family of head configs, chosen by `model.head.kind`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stlm.config.yaml.fields import Component, setting


@dataclass(frozen=True)
class HeadConfig(Component):
    """Family of heads."""

    tied: bool = setting(True, "use the embedder's table as the last matrix: one tensor for both")


def logit_cap_setting() -> Any:
    """Return the field `logit_cap`, which heads share."""
    help = "bound on logits: cap * tanh(logit / cap) (Gemma 2, arXiv 2408.00118); null: none"
    return setting(None, help, above=0.0)
