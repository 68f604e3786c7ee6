"""A super tiny language model for transformers: its config, its decoding state as a cache, and the model itself.

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from stlm.config import ModelConfig, from_dict
from stlm.model import Context, DecodingState, Network, Vocabulary, initialize

BYTES = range(0x100)
UNUSED = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not use: symbols


class StlmConfig(PreTrainedConfig):
    """The settings of a network as its config.json has them, under `network`, and what it knows of its ids.

    `spellings` holds the bytes of each id, in hex, where a network reads them; None: ids are only numbers, or, where
    there are 256, bytes.
    """

    model_type = "stlm"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        vocab_size: int = 256,
        start_id: int = 0xFC,
        spellings: list[str] | None = None,
        **others: Any,
    ) -> None:
        self.network = network or {}
        self.vocab_size = vocab_size
        self.start_id = start_id
        self.spellings = spellings
        settings = self.settings()
        self.hidden_size = settings.width
        self.num_hidden_layers = getattr(settings.core, "num_layers", 1)
        self.max_position_embeddings = settings.context_length
        others.setdefault("tie_word_embeddings", True)  # asked by transformers before it ties anything at all
        super().__init__(**others)

    def settings(self) -> ModelConfig:
        """The settings as dataclasses."""
        return from_dict(ModelConfig, self.network, source="config.json, network")

    def build(self) -> Network:
        """A network of these settings, with initial values."""
        if self.spellings is not None:
            spelt = [bytes.fromhex(spelling) for spelling in self.spellings]
        elif self.vocab_size == len(BYTES):
            spelt = [b"" if byte in UNUSED else bytes([byte]) for byte in BYTES]
        else:
            spelt = [b""] * self.vocab_size
        return Network(self.settings(), Vocabulary(tuple(spelt)), self.start_id)


class StlmCache(Cache):
    """What a network remembers of a batch."""

    is_compileable = False

    def __init__(self, state: DecodingState, length: int) -> None:
        """length: of what was read, padding included."""
        super().__init__(layers=[])
        self.state = state
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.select(beam_idx.cpu())


class StlmForCausalLM(PreTrainedModel, GenerationMixin):
    """The network, as `AutoModelForCausalLM` is used: ids that begin with the start symbol in, logits of the next out.

    Rows of a batch that are shorter than others are padded in front; each is then read by itself, so that it gives
    what it would give alone.
    """

    config_class = StlmConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"

    def __init__(self, config: StlmConfig) -> None:
        super().__init__(config)
        self.network = config.build()
        self._tied_weights_keys = tied(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What the files do not hold: tables made from the config, and, in a new model, initial values."""
        place = next((name for name, other in self.named_modules() if other is module), "")
        with torch.device("cpu"):
            fresh = self.config.build()
        initialize(fresh, seed=0)
        if not place.startswith("network"):
            return
        source = fresh.get_submodule(place.removeprefix("network").removeprefix("."))
        for name, tensor in [*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)]:
            init.copy_(getattr(module, name), tensor)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embedder.table

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head.output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: StlmCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; with `labels`, in which -100 is not counted, the mean nats of the ids that follow.

        In training the network's own terms, such as the balance of experts, are added to them.
        """
        padding = _padding(attention_mask)
        auxiliary: dict[str, Tensor] = {}
        if cache is not None:
            if not isinstance(cache, StlmCache):
                raise TypeError(f"cache: got a {type(cache).__name__}, expected what this model returned, or None")
            logits_BTV = self.network.step(input_ids, cache.state)
            cache.length += input_ids.size(1)
        elif use_cache and labels is None:
            logits_BTV, cache = self._begin(input_ids, padding)
        elif padding:
            logits_BTV = _apart(lambda row, ids_1T: self.network.read(ids_1T, Context()).logits, input_ids, padding)
        else:
            output = self.network.read(input_ids, Context())
            logits_BTV, auxiliary = output.logits, output.auxiliary
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **others)
            if self.training:
                loss = loss + sum(auxiliary.values()) / input_ids.numel()
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, cache=cache)

    def _begin(self, ids_BT: Tensor, padding: list[int]) -> tuple[Tensor, StlmCache]:
        """Logits of a prompt, and the cache that has read it."""
        network = self.network
        if not padding:
            state = network.new_state(ids_BT.size(0))
            logits_BTV = network.step(ids_BT, state)
        else:
            states = [network.new_state(1) for _ in padding]
            logits_BTV = _apart(lambda row, ids_1T: network.step(ids_1T, states[row]), ids_BT, padding)
            state = network.join([(each, torch.zeros(1, dtype=torch.long)) for each in states])
        return logits_BTV, StlmCache(state, ids_BT.size(1))


def tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one under its first name: {other: first}."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            names[name] = first[id(parameter)]
    return names


def _padding(attention_mask: Tensor | None) -> list[int]:
    """Ids in front of each row that stand for nothing; [] where there are none."""
    if attention_mask is None or bool(attention_mask[:, 0].all()):
        return []
    return attention_mask.long().argmax(1).tolist()


def _apart(read: Callable[[int, Tensor], Tensor], ids_BT: Tensor, padding: list[int]) -> Tensor:
    """Logits [B, T, V] of rows that are read one by one, without their padding; there they are zeros."""
    rows = [read(row, ids_BT[row : row + 1, skipped:]) for row, skipped in enumerate(padding)]
    padded = [nn.functional.pad(logits, (0, 0, skipped, 0)) for logits, skipped in zip(rows, padding, strict=True)]
    return torch.cat(padded)
