"""The network: embedder → core → head, ids in and logits out.

It knows its config, what its ids spell, and which of them begins a sequence. `STLM` is a network with its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stlm.config import ModelConfig
from stlm.model.accounting import count_parameters
from stlm.model.context import Context
from stlm.model.core.lora import correct
from stlm.model.core.transformer import CORES
from stlm.model.decoding.cache import DecodingState, joined
from stlm.model.embedders.token import EMBEDDERS
from stlm.model.exits import ExitLogits, choose, deepen, draft, keep, states_of, verify
from stlm.model.heads.linear import HEADS, tie
from stlm.model.pooling import mean_over_text, starts_of
from stlm.model.vocabulary import Vocabulary
from stlm.model.width_transfer import learning_rate_scales, transfer


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor  # [B, T, V]: logits[:, t] are those of ids[:, t], given ids[:, :t]
    auxiliary: dict[str, Tensor]  # what parts add to the loss, by name: see Context
    measures: dict[str, Tensor]  # what they measure, by name: see Context
    exits: ExitLogits | None = None  # in the training of a model with exits


class Network(nn.Module):
    """A language model over ids.

    `forward(ids_BT)` gives, at every position t, the logits of ids[:, t] given the ids before it. The one shift that
    makes this so stands in `forward`: the parts read the start symbol and then ids[:, :-1].
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, start_id: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.start_id = start_id
        self.embedder = EMBEDDERS[config.embedder.kind](config.embedder, config, vocabulary)
        self.core = CORES[config.core.kind](config.core, config)
        self.head = HEADS[config.head.kind](config.head, config, vocabulary)
        if config.head.tied:
            tie(self.head, self.embedder)
        if config.base_width is not None:
            transfer(self, self._at_base_width())
        if config.lora.rank is not None:
            correct(self, self.core, config.lora)

    def learning_rate_scales(self) -> dict[Tensor, float]:
        """What the learning rate of a parameter is multiplied by where the model has a base width; 1 if left out."""
        return {} if self.config.base_width is None else learning_rate_scales(self, self._at_base_width())

    def _at_base_width(self) -> Network:
        """The same model at its base width: shapes alone."""
        with torch.device("meta"):
            return Network(self.config.at_base_width(), self.vocabulary, self.start_id)

    def forward(
        self,
        ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        row_keys_B: Tensor | None = None,
        wanted_BT: Tensor | None = None,
    ) -> Output:
        """ids [B, T] → logits [B, T, V]: position t is predicted from positions before t.

        With `document_ids_BT`, ids of other documents have no influence: at the first id of a document only the id
        before it is read, which says where it begins (end_of_text). Positions are relative, or count from where a
        document begins, so it does not matter where in the window it stands; with patches, up to its distance from
        where a patch begins. With `row_keys_B`, as in training, rows skip layers and try exits as the config says, and
        each row as its key says. With `wanted_BT`, only the logits where it is True are made: [number of them, V].
        """
        states: list[Tensor] | None = [] if row_keys_B is not None and len(self.depths) > 1 else None
        documents_BT = None if document_ids_BT is None else document_ids_BT.long()  # data may number them in less
        return self.read(self._shifted(ids_BT), Context(documents_BT, None, row_keys_B, states, wanted=wanted_BT))

    def exit_logits(self, ids_BT: Tensor) -> list[Tensor]:
        """What `forward` would give behind each of the layers `depths`: [B, T, V] for each, the last layer included."""
        inputs_BT, context = self._shifted(ids_BT), Context(exits=[])
        x_BPD, patches = self.embedder(inputs_BT, context)
        y_BPD = self.core(x_BPD, context)
        finished = [*(self.core.finish(exit_BPD) for exit_BPD in context.exits or ()), y_BPD]
        return [self.head(y_BPD, inputs_BT, patches, Context()) for y_BPD in finished]

    def _shifted(self, ids_BT: Tensor) -> Tensor:
        start_B1 = ids_BT.new_full((ids_BT.size(0), 1), self.start_id)
        return torch.cat((start_B1, ids_BT[:, :-1]), dim=1)

    def begin(self, batch_size: int, ids_BN: Tensor | None = None) -> tuple[Tensor, DecodingState]:
        """A new state for `step`, which has read `ids_BN` where they are given, and the logits [B, V] of what follows.

        All is read in one pass, and only the last position's logits are made.
        """
        state = self.new_state(batch_size)
        inputs_BT = torch.full((batch_size, 1), self.start_id, device=self.device)
        if ids_BN is not None:
            inputs_BT = torch.cat((inputs_BT, ids_BN.to(self.device)), dim=1)
            state.read(ids_BN.size(1))
        wanted_BT = torch.zeros_like(inputs_BT, dtype=torch.bool)
        wanted_BT[:, -1] = True
        return self.read(inputs_BT, Context(wanted=wanted_BT), state).logits, state

    def new_state(self, batch_size: int) -> DecodingState:
        """A state that has read nothing, not even the start symbol, for `read`."""
        patches, ragged = self.embedder.patches, self.embedder.ragged
        apart = ragged and batch_size > 1
        core_cache: Any = [self.core.new_cache() for _ in range(batch_size)] if apart else self.core.new_cache()
        caches = self.embedder.new_cache(), core_cache, self.head.new_cache()
        return DecodingState(*caches, [0] * batch_size, patches=patches, ragged=ragged, apart=apart)

    def step(self, ids_BN: Tensor, state: DecodingState, wanted_BN: Tensor | None = None) -> Tensor:
        """Read N more ids; logits [B, N, V] of the id that follows each. Equals `forward` within rounding (1e-5).

        With `wanted_BN`, only the logits where it is True are made: [number of them, V].
        """
        state.read(ids_BN.size(1))
        return self.read(ids_BN.to(self.device), Context(wanted=wanted_BN), state).logits

    def join(self, parts: Sequence[tuple[DecodingState, Tensor]]) -> DecodingState:
        """The given rows of each of several states as one batch. They need not have read as many ids: what `step` gives
        for a row depends on no other."""
        return joined(parts)

    # What follows reads ids through the first layers now and the others later: see `stlm.model.exits`.

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers behind which the head may read: the exits, and last of all the whole core."""
        return self.core.depths

    def draft(self, ids_B1: Tensor, state: DecodingState) -> Tensor:
        """Read one more id through the first exit's layers only: its logits [B, 1, V] of the id that follows."""
        state.read(1)
        return draft(self, ids_B1.to(self.device), state)

    def deepen(self, state: DecodingState, stage: int) -> Tensor:
        """Bring the id just drafted on to exit `stage` (1, 2, … in turn): that exit's logits [B, 1, V]."""
        return deepen(self, state, stage)

    def verify(self, state: DecodingState) -> Tensor:
        """Bring all drafted ids through the rest of the layers: logits [B, N, V], equal to those of `step`."""
        return verify(self, state)

    def keep(self, state: DecodingState, number: int) -> None:
        """Keep the first `number` of the ids just verified, and forget the others."""
        state.read(number - len(state.waiting.ids))
        keep(self, state, number)

    def read(self, inputs_BT: Tensor, context: Context, state: DecodingState | None = None) -> Output:
        """embedder → core → head: from the first position on, or after what the state remembers."""
        context.length = inputs_BT.size(1)
        caches: tuple[Any, Any, Any] = state.caches() if state else (None, None, None)
        embedder_cache, core_cache, head_cache = caches
        x_BPD, patches = self.embedder(inputs_BT, context, embedder_cache)
        core_context = context if patches is None else context.at(patches.documents_BP, patches.used_BP)
        if patches is None or state is None or not state.apart:
            y_BPD = self.core(x_BPD, core_context, core_cache)
        else:  # rows begin patches at different positions: each goes on by itself, with a cache of its own
            assert patches.counts is not None
            rows = zip(x_BPD.split(1), patches.counts, core_cache, strict=True)
            y_BPD = pad_sequence([self.core(x_1PD[:, :n], core_context, cache)[0] for x_1PD, n, cache in rows], True)
        logits_BTV = self.head(y_BPD, inputs_BT, patches, context, head_cache)
        output = Output(logits_BTV, context.auxiliary, context.measures)
        if context.exits is None or context.row_keys is None:
            return output
        chosen_B = choose(context.row_keys, len(context.exits))
        y_BPD = self.core.finish(states_of(context.exits, chosen_B))
        exit_BTV = self.head(y_BPD, inputs_BT, patches, Context(context.documents))
        return output._replace(exits=ExitLogits(exit_BTV, chosen_B, self.core.exit_weights))

    # What follows reads a text for what it is about, not for what follows it.

    @property
    def longest_text(self) -> int:
        """Ids of a text that `embed_ids` can read: the context, less the start symbol and what ends the last patch."""
        return self.config.context_length - 1 - self._reach

    @property
    def _reach(self) -> int:
        """Positions behind a text by which a patch of a fixed rule, or of words, has begun that reads its end."""
        context, embedder = self.config.context_length, self.config.embedder
        return -(-context // embedder.positions_of(context)) if embedder.patched else 0

    def embed_ids(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """A vector for each text: ids [B, T], of which the first `lengths` of each row are text → fp32 [B, D].

        It is the mean of what the core gives out, behind its last norm, at the positions that read the text; of a patch
        model, at the patches that do. What stands in the other places of a row, and in other rows, has no influence:
        behind each text the next document begins.
        """
        assert ids_BT.size(1) <= self.longest_text
        behind_BT = torch.arange(ids_BT.size(1), device=ids_BT.device) >= lengths_B[:, None]
        inputs_BT = F.pad(ids_BT.masked_fill(behind_BT, self.start_id), (1, self._reach), value=self.start_id)
        context = Context()
        context.length = inputs_BT.size(1)
        x_BPD, patches = self.embedder(inputs_BT, context)
        core_context = context if patches is None else context.at(patches.documents_BP, patches.used_BP)
        y_BPD = self.core(x_BPD, core_context)
        return mean_over_text(y_BPD, starts_of(patches, y_BPD.size(1), inputs_BT), lengths_B, self._reach)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedder.table.weight.device

    def num_parameters(self) -> int:
        """Unique parameters, embedding included; tied ones are counted once."""
        return count_parameters(self)
