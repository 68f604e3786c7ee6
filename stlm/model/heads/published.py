"""The head of the published byte model, which predicts all bytes of the next id at once: see its embedder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import ModelConfig, PublishedEmbedderConfig, PublishedHeadConfig
from stlm.errors import ConfigError
from stlm.model.context import Context
from stlm.model.embedders.patching.rules import Patches
from stlm.model.embedders.published import PAD, SlotStack, symbols_of
from stlm.model.heads.base import HEADS, Head
from stlm.model.registry import Vocabulary


@HEADS.register("paper")
class PublishedHead(Head):
    """Head that predicts the spelling of the next id: [B, T, D] → [B, T, V].

    A vector becomes S slots, a bidirectional transformer runs over them, and each slot has logits z[s, a] of its
    symbol, independent of the others given the vector: p(id) is the product over slots of softmax(z[s]) at the id's
    symbols, renormalised over the vocabulary. Every id fills every slot, pads included, so the slots' normalisers are
    the same for all ids, and the logit of an id is

        sum over s of z[s, symbol[s]]   or, up to a constant,   sum over filled s of z[s, symbol[s]] - z[s, PAD]

    The second sum has as many terms as the ids have bytes; it is computed as one bag of rows of z^T per id.
    """

    symbols_VS: Tensor
    rows_R: Tensor
    offsets_V: Tensor

    def __init__(self, config: PublishedHeadConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if not isinstance(model.embedder, PublishedEmbedderConfig):
            raise ConfigError(f"model.head.kind: got 'paper' with a {model.embedder.kind} embedder, expected 'linear'")
        width, slots = model.embedder.width, model.embedder.slots
        self.reconstruction_weight = model.embedder.reconstruction_weight
        symbols_VS = symbols_of(vocabulary, slots)
        num_symbols = int(symbols_VS.max()) + 1
        filled_VS = symbols_VS != PAD
        rows_R = (symbols_VS + num_symbols * torch.arange(slots, device="cpu"))[filled_VS]
        offsets_V = F.pad(filled_VS.sum(1).cumsum(0), (1, -1))
        for name, tensor in (("symbols_VS", symbols_VS), ("rows_R", rows_R), ("offsets_V", offsets_V)):
            self.register_buffer(name, tensor.to(torch.get_default_device()), persistent=False)
        self.project = nn.Linear(model.width, slots * width, bias=False)
        self.local = SlotStack(config.num_layers, config.num_heads, width, slots)
        self.output = nn.Linear(width, num_symbols, bias=False)

    def new_cache(self) -> None:
        return None

    def forward(
        self,
        x_BPD: Tensor,
        inputs_BT: Tensor,
        patches: Patches | None,
        context: Context,
        cache: None = None,
    ) -> Tensor:
        if self.training and self.reconstruction_weight:
            assert patches is not None
            nats = self.nats_of_spelling(patches.states_BTd, inputs_BT)
            context.add("reconstruction", self.reconstruction_weight * nats)
        x = context.pick(x_BPD)
        z_NSA = self.spell(x).float()
        z_NSA = z_NSA - z_NSA[..., PAD:][..., :1]
        bags_VN = F.embedding_bag(self.rows_R, z_NSA.flatten(1).T.contiguous(), self.offsets_V, mode="sum")
        return bags_VN.T.unflatten(0, x.shape[:-1])

    def spell(self, x_BTD: Tensor) -> Tensor:
        """Return each slot's logits of symbols: [B, T, D] or [N, D] → [N, S, A]."""
        slots_NSd = self.project(x_BTD).flatten(0, -2).unflatten(-1, (self.symbols_VS.size(1), -1))
        everything_NS = torch.ones(slots_NSd.shape[:2], dtype=torch.bool, device=x_BTD.device)
        return self.output(self.local(slots_NSd, everything_NS))

    def nats_of_spelling(self, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Return the summed cross-entropy, in nats, of the symbols of ids given vectors; pads do not count."""
        symbols_NS = self.symbols_VS[ids_BT.long()].flatten(0, 1)
        nats_NS = F.cross_entropy(self.spell(x_BTD).float().transpose(1, 2), symbols_NS, reduction="none")
        return torch.where(symbols_NS != PAD, nats_NS, 0.0).double().sum()
