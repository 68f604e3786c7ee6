"""Config of a model for transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from stlm.config import ModelConfig, from_dict
from stlm.model import Network, Vocabulary

BYTES = range(0x100)
UNUSED = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not use, which serve as symbols


class StlmConfig(PreTrainedConfig):
    """The settings of a network, under `network` as in its config.json, and its vocabulary.

    `spellings`: the bytes of each id, in hex, where the network reads them. None: ids are only numbers, or bytes where
    there are 256.
    """

    model_type = "stlm"
    keys_to_ignore_at_inference: ClassVar = ["cache"]

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        vocab_size: int = 256,
        start_id: int = 0xFC,
        spellings: list[str] | None = None,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        self.network = network or {}
        self.vocab_size = vocab_size
        self.start_id = start_id
        self.spellings = spellings
        self.use_cache = use_cache
        settings = self.settings()
        self.hidden_size = settings.width
        self.num_hidden_layers = getattr(settings.core, "num_layers", 1)
        self.max_position_embeddings = settings.context_length
        others.setdefault("tie_word_embeddings", True)  # transformers requires it for any tying
        super().__init__(**others)

    def settings(self) -> ModelConfig:
        """Return the settings as dataclasses."""
        return from_dict(ModelConfig, self.network, source="config.json, network")

    def build(self) -> Network:
        """Build a network with these settings and initial values."""
        if self.spellings is not None:
            spellings = [bytes.fromhex(spelling) for spelling in self.spellings]
        elif self.vocab_size == len(BYTES):
            spellings = [b"" if byte in UNUSED else bytes([byte]) for byte in BYTES]
        else:
            spellings = [b""] * self.vocab_size
        return Network(self.settings(), Vocabulary(tuple(spellings)), self.start_id)
