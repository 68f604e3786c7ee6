"""Early exits: their training, and reading ids through the first layers now and through the others later.

Later ids need the keys and values of every layer. So positions that stopped early wait before the stage they have not
passed, and pass it together when one of them must. Deeper layers run less often, and their caches are exact
(synchronised decoding in FREE: Bae et al. 2023, arXiv 2310.05424, section 3.2; verification in LayerSkip: arXiv
2404.16710, section 3.3).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stlm.model.context import Context
from stlm.model.core.base import Core
from stlm.model.decoding.cache import DecodingState, snapshot
from stlm.model.embedders.base import Embedder
from stlm.model.heads.base import Head
from stlm.model.row_random import uniform


class ExitLogits(NamedTuple):
    """Logits of the rows of a batch, each read at its own exit."""

    logits: Tensor  # [B, T, V]
    chosen: Tensor  # [B]: the exit of each row, counted from 0
    weights: dict[int, float]  # number of layers before each exit → weight of its loss


def choose(row_keys_B: Tensor, num_exits: int) -> Tensor:
    """Choose an exit for each row [B], uniformly."""
    return (uniform(row_keys_B, 0) * num_exits).long()


def states_of(states_BPD: list[Tensor], chosen_B: Tensor) -> Tensor:
    """Select each row's states [B, P, D] at its chosen exit, from the states at all exits."""
    rows_B = torch.arange(chosen_B.size(0), device=chosen_B.device)
    return torch.stack(states_BPD)[chosen_B, rows_B]


class Model(Protocol):
    """Interface of the models that this module runs."""

    embedder: Embedder
    core: Core
    head: Head


class Waiting:
    """Ids that a decoding state has read through the first stages of the core only."""

    def __init__(self, state: DecodingState, num_stages: int) -> None:
        self.embedder, self.head = snapshot(state.embedder), snapshot(state.head)  # before these ids
        self.ids: list[Tensor] = []  # [B, 1] each
        self.positions: list[int] = []  # core positions that each id added: with patches, mostly none
        # Waiting before each stage: states [B, P, D], and values of the first layer where later ones mix them in.
        self.states: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in range(num_stages)]
        self.finished: Tensor | None = None  # [B, P, D], when all have passed


def draft(model: Model, ids_B1: Tensor, state: DecodingState) -> Tensor:
    """Read one more id through the first stage; return logits [B, 1, V] of the first exit."""
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
    """Run all waiting ids through `stage` of the core; return the newest id's logits [B, 1, V] there.

    After `draft`, call it for stages 1, 2, … in order. The head must have no cache.
    """
    x_BPD = _advance(model.core, state, stage)
    ids_B1 = state.waiting.ids[-1]
    if stage == len(model.core.depths) - 1:
        state.waiting = None
    return model.head(model.core.finish(x_BPD[:, -1:]), ids_B1, None, Context())


def verify(model: Model, state: DecodingState) -> Tensor:
    """Run all drafted ids through the remaining stages; return logits [B, N, V] of the id after each, as `step` would.

    Keys and values of the first stage are reused. Embedder and head, which are small compared with the core, read the
    ids a second time, in one pass. Call `keep` next.
    """
    waiting = state.waiting
    for stage in range(1, len(model.core.depths)):
        waiting.finished = _advance(model.core, state, stage)
    return _read_again(model, state, len(waiting.ids))


def keep(model: Model, state: DecodingState, number: int) -> None:
    """Keep the first `number` of the verified ids, and remove the others from the state."""
    waiting = state.waiting
    if number < len(waiting.ids):
        model.core.forget(state.core, sum(waiting.positions[number:]))
        _read_again(model, state, number)
    state.waiting = None


def _advance(core: Core, state: DecodingState, stage: int) -> Tensor:
    """Run all positions that wait before a stage through it; they then wait before the next."""
    here, context = state.waiting.states[stage:], Context()
    values = [values_BMPK for _, values_BMPK in here[0] if values_BMPK is not None]
    context.values = torch.cat(values, dim=2) if values else None
    x_BPD = core.advance(torch.cat([x_BPD for x_BPD, _ in here[0]], dim=1), context, state.core, stage)
    here[0].clear()
    if len(here) > 1:
        here[1].append((x_BPD, context.values))
    return x_BPD


def _read_again(model: Model, state: DecodingState, number: int) -> Tensor:
    """Run embedder and head on the first ids again, from their earlier caches, with the core's finished states."""
    waiting, context = state.waiting, Context()
    ids_BN = torch.cat(waiting.ids[:number], dim=1)
    state.embedder, state.head = snapshot(waiting.embedder), snapshot(waiting.head)
    x_BPD, patches = model.embedder(ids_BN, context, state.embedder)
    y_BPD = model.core.finish(waiting.finished[:, : x_BPD.size(1)])
    return model.head(y_BPD, ids_BN, patches, context, state.head)
