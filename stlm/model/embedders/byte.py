"""The byte embedder: a table of the 256 bytes."""

from __future__ import annotations

from stlm.config import ByteEmbedderConfig, ModelConfig
from stlm.errors import ConfigError
from stlm.model.embedders.base import EMBEDDERS
from stlm.model.embedders.token import TokenEmbedder
from stlm.model.registry import Vocabulary


@EMBEDDERS.register("byte")
class ByteEmbedder(TokenEmbedder):
    """Token embedder over the 256 bytes, for plain byte transformers: one position a byte."""

    def __init__(self, config: ByteEmbedderConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        require_bytes("byte", vocabulary)
        super().__init__(config, model, vocabulary)


def require_bytes(kind: str, vocabulary: Vocabulary) -> None:
    """Raise ConfigError unless the vocabulary is the 256 bytes, the only one that byte embedders read."""
    if vocabulary.size != 256:
        raise ConfigError(
            f"model.embedder.kind: got {kind!r} with a vocabulary of {vocabulary.size} ids, expected the 256 bytes; "
            "set data.tokenizer=byte, or model.embedder.kind=token"
        )
