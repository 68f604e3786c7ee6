"""Early exits: how they are trained, and how ids are read through the first layers now and through the rest later.

Later, because what comes after needs the keys and values of every layer: positions wait in front of the stage they
have not passed, and pass it together when one of them must. So deeper layers are run less often, and what they
remember is exact (synchronised decoding, in FREE: Bae et al. 2023, arXiv 2310.05424, section 3.2; and the verification
of LayerSkip: arXiv 2404.16710, section 3.3).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stlm.model.context import Context
from stlm.model.core.transformer import Core
from stlm.model.decoding.cache import DecodingState, snapshot
from stlm.model.embedders.token import Embedder
from stlm.model.heads.linear import Head
from stlm.model.row_random import uniform


class ExitLogits(NamedTuple):
    """What the rows of a batch would say if each of them had stopped at an exit of its own."""

    logits: Tensor  # [B, T, V]
    chosen: Tensor  # [B]: the exit of each row, counted from 0
    weights: dict[int, float]  # layers in front of each exit there is → what its loss is multiplied by


def choose(row_keys_B: Tensor, num_exits: int) -> Tensor:
    """An exit for each row [B], all as likely."""
    return (uniform(row_keys_B, 0) * num_exits).long()


def states_of(states_BPD: list[Tensor], chosen_B: Tensor) -> Tensor:
    """What each row's chosen exit gives out, of what all of them do: [B, P, D]."""
    rows_B = torch.arange(chosen_B.size(0), device=chosen_B.device)
    return torch.stack(states_BPD)[chosen_B, rows_B]


class Model(Protocol):
    """What reads: a model's model."""

    embedder: Embedder
    core: Core
    head: Head


class Waiting:
    """What a decoding state has read through the first stages of the core only."""

    def __init__(self, state: DecodingState, num_stages: int) -> None:
        self.embedder, self.head = snapshot(state.embedder), snapshot(state.head)  # as they were before
        self.ids: list[Tensor] = []  # [B, 1] each
        self.positions: list[int] = []  # that each of the ids brought to the core: in patches, mostly none
        # In front of each stage: states [B, P, D], and values of the first layer where later ones mix them in.
        self.states: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in range(num_stages)]
        self.finished: Tensor | None = None  # [B, P, D], when all have passed


def draft(model: Model, ids_B1: Tensor, state: DecodingState) -> Tensor:
    """Read one more id through the first stage: logits [B, 1, V] of the first exit."""
    if state.waiting is None:
        state.waiting = Waiting(state, len(model.core.depths))
    waiting, context = state.waiting, Context()
    x_BPD, patches = model.embedder(ids_B1, context, state.embedder)
    waiting.ids.append(ids_B1)
    waiting.positions.append(x_BPD.size(1))
    waiting.states[0].append((x_BPD, None))
    x_BPD = _advance(model.core, state, 0)
    return model.head(model.core.finish(x_BPD), ids_B1, patches, context, state.head)


def deepen(model: Model, state: DecodingState, stage: int) -> Tensor:
    """Bring the newest id, and all that wait there, through the next stage: logits [B, 1, V] of that id at its end.

    Stages follow each other: 1 after `draft`, then 2, …. For heads that remember nothing.
    """
    x_BPD = _advance(model.core, state, stage)
    ids_B1 = state.waiting.ids[-1]
    if stage == len(model.core.depths) - 1:
        state.waiting = None
    return model.head(model.core.finish(x_BPD[:, -1:]), ids_B1, None, Context())


def verify(model: Model, state: DecodingState) -> Tensor:
    """Bring all drafted ids through the rest: logits [B, N, V] of the id that follows each, as if nothing had waited.

    Their keys and values of the first stage are used again. Embedder and head, which are small beside the core, read
    the ids a second time, in one pass. `keep` comes next.
    """
    waiting = state.waiting
    for stage in range(1, len(model.core.depths)):
        waiting.finished = _advance(model.core, state, stage)
    return _read_again(model, state, len(waiting.ids))


def keep(model: Model, state: DecodingState, number: int) -> None:
    """Keep the first `number` of the ids that were verified; the state forgets the others."""
    waiting = state.waiting
    if number < len(waiting.ids):
        model.core.forget(state.core, sum(waiting.positions[number:]))
        _read_again(model, state, number)
    state.waiting = None


def _advance(core: Core, state: DecodingState, stage: int) -> Tensor:
    """All that wait in front of a stage pass it, and wait in front of the next."""
    here, context = state.waiting.states[stage:], Context()
    values = [values_BMPK for _, values_BMPK in here[0] if values_BMPK is not None]
    context.values = torch.cat(values, dim=2) if values else None
    x_BPD = core.advance(torch.cat([x_BPD for x_BPD, _ in here[0]], dim=1), context, state.core, stage)
    here[0].clear()
    if len(here) > 1:
        here[1].append((x_BPD, context.values))
    return x_BPD


def _read_again(model: Model, state: DecodingState, number: int) -> Tensor:
    """Embedder and head read the first ids again, from where they were, with what the core has made of them."""
    waiting, context = state.waiting, Context()
    ids_BN = torch.cat(waiting.ids[:number], dim=1)
    state.embedder, state.head = snapshot(waiting.embedder), snapshot(waiting.head)
    x_BPD, patches = model.embedder(ids_BN, context, state.embedder)
    y_BPD = model.core.finish(waiting.finished[:, : x_BPD.size(1)])
    return model.head(y_BPD, ids_BN, patches, context, state.head)
