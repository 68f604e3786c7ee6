"""ModelConfig: the architecture of a model, by its three parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from stlm.config.model.core.base import CoreConfig
from stlm.config.model.core.lora import LoRAConfig
from stlm.config.model.core.transformer import TransformerCoreConfig
from stlm.config.model.embedders.base import EmbedderConfig
from stlm.config.model.embedders.byte import ByteEmbedderConfig
from stlm.config.model.heads.base import HeadConfig
from stlm.config.model.heads.linear import LinearHeadConfig
from stlm.config.yaml.fields import Conflict, setting


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model. The vocabulary is determined by the tokenizer, not by this config."""

    context_length: int = setting(512, "ids per training window; attention reaches no further", unit="ids", minimum=1)
    width: int = setting(256, "width of the core", unit="dimensions", minimum=2)
    base_width: int | None = setting(
        None,
        "width at which training.learning_rate was tuned; learning rates, logits and attention scores are "
        "scaled so that it also suits `width` (muP); null: no scaling",
        unit="dimensions",
        minimum=2,
    )
    embedder: EmbedderConfig = field(default=ByteEmbedderConfig(), metadata={"help": "ids to vectors"})
    core: CoreConfig = field(default=TransformerCoreConfig(), metadata={"help": "vectors to vectors"})
    head: HeadConfig = field(default=LinearHeadConfig(), metadata={"help": "vectors to logits"})
    lora: LoRAConfig = field(
        default=LoRAConfig(), metadata={"help": "low-rank corrections, trained instead of the weights"}
    )

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between the parts, with keys relative to this section."""
        for part in (self.embedder, self.core, self.head):
            yield from part.check(self)
        yield from self.lora.check(self)
        if self.base_width is None:
            return
        for conflict in self.at_base_width().check():
            yield Conflict("base_width", f"got {self.base_width}, at which model.{conflict.key}: {conflict.message}")
        if getattr(self.embedder, "rank", None) is not None or not getattr(self.embedder, "scaled", True):
            yield Conflict(
                "base_width",
                f"got {self.base_width}, which needs a table that is not factorised and is multiplied by sqrt(width); "
                "expected null, or model.embedder={kind: token}",
                ("embedder.rank", "embedder.scaled"),
            )

    def at_base_width(self) -> ModelConfig:
        """Return the config at its base width, or an equal config where no base width is set."""
        return replace(self, width=self.base_width or self.width, base_width=None)
