"""The network: embedder → core → head, from ids to logits.

It holds its config, the bytes of each id, and the id that begins a sequence. `STLM` is a network with a tokenizer.
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
from stlm.model.core.base import CORES
from stlm.model.core.lora import correct
from stlm.model.decoding.cache import DecodingState, joined
from stlm.model.embedders.base import EMBEDDERS
from stlm.model.embedders.patching.rules import Patches
from stlm.model.exits import ExitLogits, choose, deepen, draft, keep, states_of, verify
from stlm.model.heads.base import HEADS
from stlm.model.registry import Vocabulary
from stlm.model.width_transfer import learning_rate_scales, transfer


class Output(NamedTuple):
    """Result of a forward pass."""

    logits: Tensor  # [B, T, V]: logits[:, t] are those of ids[:, t], given ids[:, :t]
    auxiliary: dict[str, Tensor]  # terms of the loss by name: see Context
    measures: dict[str, Tensor]  # measured ratios by name: see Context
    exits: ExitLogits | None = None  # only when a model with exits is trained


class Network(nn.Module):
    """A language model over ids.

    `forward(ids_BT)` returns, at every position t, the logits of ids[:, t] given the ids before it. `forward` shifts
    the ids, once: the parts read the start symbol and then ids[:, :-1].
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
            self.head.tie(self.embedder)
        if config.base_width is not None:
            transfer(self, self._at_base_width())
        if config.lora.rank is not None:
            correct(self, self.core, config.lora)

    def learning_rate_scales(self) -> dict[Tensor, float]:
        """Return the learning rate factors of parameters; 1 if absent. Empty for a model without a base width."""
        return {} if self.config.base_width is None else learning_rate_scales(self, self._at_base_width())

    def _at_base_width(self) -> Network:
        """Build this model at its base width on the meta device, which gives shapes alone."""
        with torch.device("meta"):
            return Network(self.config.at_base_width(), self.vocabulary, self.start_id)

    def forward(
        self,
        ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        row_keys_B: Tensor | None = None,
        wanted_BT: Tensor | None = None,
    ) -> Output:
        """Map ids [B, T] to logits [B, T, V]: position t is predicted from positions before t.

        With `document_ids_BT`, ids of other documents have no influence: at the first id of a document only the id
        before it is read, which marks the beginning (end_of_text). Positions are relative, or count from the beginning
        of the document, so its place in the window does not matter; with patches, only its distance from the beginning
        of a patch does. With `row_keys_B`, as in training, rows skip layers and try exits as configured, at random by
        their keys. With `wanted_BT`, only the logits where it is True are computed: [number of them, V].
        """
        states: list[Tensor] | None = [] if row_keys_B is not None and len(self.depths) > 1 else None
        documents_BT = None if document_ids_BT is None else document_ids_BT.long()  # data may use smaller types
        return self.read(self._shifted(ids_BT), Context(documents_BT, None, row_keys_B, states, wanted=wanted_BT))

    def exit_logits(self, ids_BT: Tensor) -> list[Tensor]:
        """Return the logits after each of the layers `depths`, the last included: [B, T, V] each."""
        inputs_BT, context = self._shifted(ids_BT), Context(exits=[])
        x_BPD, patches = self.embedder(inputs_BT, context)
        y_BPD = self.core(x_BPD, context)
        finished = [*(self.core.finish(exit_BPD) for exit_BPD in context.exits or ()), y_BPD]
        return [self.head(y_BPD, inputs_BT, patches, Context()) for y_BPD in finished]

    def _shifted(self, ids_BT: Tensor) -> Tensor:
        start_B1 = ids_BT.new_full((ids_BT.size(0), 1), self.start_id)
        return torch.cat((start_B1, ids_BT[:, :-1]), dim=1)

    def begin(self, batch_size: int, ids_BN: Tensor | None = None) -> tuple[Tensor, DecodingState]:
        """Return the logits [B, V] of the next id, and a new state for `step` that has read `ids_BN`, if given.

        All ids are read in one pass, and only the last position's logits are computed.
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
        """Return a state for `read` that has read nothing, not even the start symbol."""
        patches, ragged = self.embedder.patches, self.embedder.ragged
        apart = ragged and batch_size > 1
        core_cache: Any = [self.core.new_cache() for _ in range(batch_size)] if apart else self.core.new_cache()
        caches = self.embedder.new_cache(), core_cache, self.head.new_cache()
        return DecodingState(*caches, [0] * batch_size, patches=patches, ragged=ragged, apart=apart)

    def step(self, ids_BN: Tensor, state: DecodingState, wanted_BN: Tensor | None = None) -> Tensor:
        """Read N more ids; return logits [B, N, V] of the id after each. Equals `forward` within rounding (1e-5).

        With `wanted_BN`, only the logits where it is True are computed: [number of them, V].
        """
        state.read(ids_BN.size(1))
        return self.read(ids_BN.to(self.device), Context(wanted=wanted_BN), state).logits

    def join(self, parts: Sequence[tuple[DecodingState, Tensor]]) -> DecodingState:
        """Join the given rows of several states into one batch. Rows may have read different numbers of ids: the result
        of `step` for a row depends on no other."""
        return joined(parts)

    # Reading ids through the first layers now and the others later: see `stlm.model.exits`.

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers after which the head may read: the exits, and last the whole core."""
        return self.core.depths

    def draft(self, ids_B1: Tensor, state: DecodingState) -> Tensor:
        """Read one more id through the first exit's layers only; return logits [B, 1, V] of the id after it."""
        state.read(1)
        return draft(self, ids_B1.to(self.device), state)

    def deepen(self, state: DecodingState, stage: int) -> Tensor:
        """Run the id just drafted to exit `stage` (1, 2, … in order); return that exit's logits [B, 1, V]."""
        return deepen(self, state, stage)

    def verify(self, state: DecodingState) -> Tensor:
        """Run all drafted ids through the remaining layers; return logits [B, N, V], equal to those of `step`."""
        return verify(self, state)

    def keep(self, state: DecodingState, number: int) -> None:
        """Keep the first `number` of the ids just verified, and forget the others."""
        state.read(number - len(state.waiting.ids))
        keep(self, state, number)

    def read(self, inputs_BT: Tensor, context: Context, state: DecodingState | None = None) -> Output:
        """Run embedder → core → head from the first position, or after the positions that the state has read."""
        context.length = inputs_BT.size(1)
        caches: tuple[Any, Any, Any] = state.caches() if state else (None, None, None)
        embedder_cache, core_cache, head_cache = caches
        x_BPD, patches = self.embedder(inputs_BT, context, embedder_cache)
        core_context = context if patches is None else context.at(patches.documents_BP, patches.used_BP)
        if patches is None or state is None or not state.apart:
            y_BPD = self.core(x_BPD, core_context, core_cache)
        else:  # rows begin patches at different positions: each is run alone, with its own cache
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

    # Reading a text to embed it, not to continue it.

    @property
    def longest_text(self) -> int:
        """Most ids that `embed_ids` reads: the context, less the start symbol and positions to end the last patch."""
        return self.config.context_length - 1 - self._reach

    @property
    def _reach(self) -> int:
        """Positions after a text within which a patch has begun that reads the text's end: fixed patches and words."""
        context, embedder = self.config.context_length, self.config.embedder
        return -(-context // embedder.positions_of(context)) if embedder.patched else 0

    def embed_ids(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Embed texts: ids [B, T], of which the first `lengths` of each row are text → fp32 [B, D].

        A text's vector is the mean of the core's outputs, after the last norm, at the positions that read it; in a
        patch model, at such patches. Other ids of the row, and other rows, have no influence: a new document begins
        after each text.
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
        """The device of the parameters."""
        return self.embedder.table.weight.device

    def num_parameters(self) -> int:
        """Return the number of unique parameters, embedding included; tied ones count once."""
        return count_parameters(self)


def starts_of(patches: Patches | None, num_patches: int, inputs_BT: Tensor) -> Tensor:
    """Return the position at which each patch begins, [B, P]: its own for token models, T for slots without a patch."""
    numbers_BP = torch.arange(num_patches, device=inputs_BT.device).repeat(inputs_BT.size(0), 1)
    return numbers_BP if patches is None else torch.searchsorted(patches.index_BT.contiguous(), numbers_BP + 1)


def mean_over_text(y_BPD: Tensor, start_BP: Tensor, lengths_B: Tensor, reach: int) -> Tensor:
    """Return the mean over the patches that read a part of the text: [B, P, D] → fp32 [B, D].

    Position 0 reads the start symbol and positions 1 to `lengths` the text, so a patch has read some of it if the patch
    before begins before position `lengths`. The last one may begin up to `reach` positions after the text. If no patch
    has read any text, as for a text without ids, the result is the state after the start symbol.
    """
    lengths_B1 = lengths_B[:, None]
    counted_BP = F.pad((start_BP[:, :-1] < lengths_B1) & (start_BP[:, 1:] <= lengths_B1 + reach), (1, 0), value=False)
    counted_BP[:, 0] = ~counted_BP.any(1)
    y_BPD = y_BPD.float().masked_fill(~counted_BP[..., None], 0.0)
    return y_BPD.sum(1) / counted_BP.sum(1, keepdim=True)
