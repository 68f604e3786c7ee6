"""The family of head configs, chosen by `model.head.kind`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stlm.config.yaml.fields import Component, setting


@dataclass(frozen=True)
class HeadConfig(Component):
    """Family of heads."""

    tied: bool = setting(True, "use the embedder's vectors as the weights of the last matrix: one storage for both")


def logit_cap_setting() -> Any:
    """Return the field `logit_cap`, which heads share."""
    help = "logits stay within ± this, by cap * tanh(logit / cap) (Gemma 2, arXiv 2408.00118); null: no bounds"
    return setting(None, help, above=0.0)
