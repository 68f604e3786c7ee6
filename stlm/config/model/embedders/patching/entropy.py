"""Config of patches that begin where the next byte is hard to predict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stlm.config.model.core.base import CoreConfig
from stlm.config.model.core.transformer import TransformerCoreConfig
from stlm.config.model.embedders.patching.rules import VariablePatchingConfig
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, register, setting

Shape = TypeVar("Shape", bound=ModelShape)


@register("entropy")
@dataclass(frozen=True)
class EntropyPatchingConfig(VariablePatchingConfig):
    """A patch begins where a small byte model's entropy of the next byte is high (BLT).

    The threshold is set when the run begins, so that patches of its text have the mean length `patch_length`.
    """

    entropy_model: str | None = setting(
        None, "run or model directory of the byte model; read when the run starts, and saved with the model"
    )
    width: int = setting(64, "width of the byte model", unit="dimensions", minimum=2)
    core: CoreConfig = field(default=TransformerCoreConfig(), metadata={"help": "core of the byte model"})

    def byte_model(self, model: Shape) -> Shape:
        """Return the whole config of the byte model, with ModelConfig's default embedder and head."""
        kind: Any = type(model)  # a protocol has no arguments of its own
        return kind(context_length=model.context_length, width=self.width, core=self.core)

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        yield from super().check(model)
        for conflict in self.byte_model(model).check():
            message = re.sub(r"\bmodel\.(width|core)\b", r"model.embedder.patching.\1", conflict.message)
            yield conflict._replace(message=message).under("embedder.patching")
