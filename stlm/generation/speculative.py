"""Speculative decoding: ids are drafted cheaply, and the whole model verifies several of them in one pass.

The result is that of the whole model: the same text at temperature 0 (except where two ids are equally probable to the
last digit), and the same distribution otherwise (Leviathan et al. 2023, arXiv 2211.17192). Drafts come from the model's
first layers (LayerSkip, arXiv 2404.16710, section 3.3), or from earlier occurrences of the last ids, as in decoding
with references (Yang et al. 2023, arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stlm.generation.decoding import last_of, read_anew
from stlm.generation.drawing import Draws, distribution, pick
from stlm.generation.effort import Effort
from stlm.generation.steppable import Steppable

LONGEST, SHORTEST = 5, 2  # lengths of the n-grams that are searched for earlier in the text
LONGEST_PAUSE = 31  # passes without drafts after repeated rejections


class Drafting(Steppable, Protocol):
    """Interface of a model that drafts with its first layers."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers at the exits: the first drafts, the last is the whole core."""
        ...

    def draft(self, ids_B1: Tensor, state: Any) -> Tensor:
        """Read one more id through the first layers; return their logits [B, 1, V] of the id after it."""
        ...

    def verify(self, state: Any) -> Tensor:
        """Run all drafted ids through the remaining layers; return logits [B, N, V], equal to those of `step`."""
        ...

    def keep(self, state: Any, number: int) -> None:
        """Keep the first `number` of the ids just verified, and remove the others."""
        ...


def speculate(
    model: Drafting,
    prompt: Sequence[int],
    draws: Draws,
    *,
    context_length: int,
    stop_id: int,
    num_drafts: int,
    effort: Effort,
) -> Iterator[int]:
    """Yield ids as `generate_ids` does, with the same windows; the first layers draft up to `num_drafts` at a time."""
    effort.depth = model.depths[-1]
    read = last_of(list(prompt), context_length - 1)
    logits_1V, state = read_anew(model, read)
    while draws.left > 0:
        drawn = [_draw(logits_1V, draws)]  # the id after a window that was just read
        while drawn:
            for id in drawn:
                if id == stop_id:
                    return
                yield id
            read += drawn  # the model has read all but the last of them
            room = min(num_drafts, context_length - len(read), draws.left)
            drawn = _round(model, state, read[-1], room, stop_id, draws, effort) if room > 0 else []
        if draws.left > 0:
            read = last_of(read, context_length // 2)
            logits_1V, state = read_anew(model, read)


@torch.inference_mode()
def _round(
    model: Drafting, state: Any, last: int, num_drafts: int, stop_id: int, draws: Draws, effort: Effort
) -> list[int]:
    """Draft ids after `last`, which the model has not read yet, and verify them. Returns at least one id; the model has
    read all but the last of them."""
    ids, ahead = [last], draws.fork()
    drafted_from: list[Tensor] = []
    while len(drafted_from) < num_drafts and (ids[-1] != stop_id or not drafted_from):
        q_1V = distribution(model.draft(torch.tensor([ids[-1:]]), state)[:, -1].cpu(), [ahead])
        drafted_from.append(q_1V[0])
        ids += pick(q_1V, [draws.uniform()])
        ahead.take(ids[-1])
    logits_NV = model.verify(state)[0].cpu()
    drawn, accepted = _accepted(ids[1:], drafted_from, logits_NV, draws)
    model.keep(state, len(drawn))
    effort.ids += len(drawn)
    effort.drafted += len(drafted_from)
    effort.accepted += accepted
    effort.layers += model.depths[0] * len(drafted_from) + model.depths[-1] - model.depths[0]
    return drawn


class Rewindable(Steppable, Protocol):
    """Interface of a model that verifies copied drafts: its states have a `snapshot`."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers at the exits; the last is the whole core."""
        ...


def look_up(
    model: Rewindable,
    prompt: Sequence[int],
    draws: Draws,
    *,
    context_length: int,
    stop_id: int,
    num_drafts: int,
    effort: Effort,
) -> Iterator[int]:
    """Yield ids as `generate_ids` does, with the same windows; drafts of up to `num_drafts` ids are n-gram copies.

    After a pass whose drafts were all rejected, drafting pauses for one pass; each further rejection in a row doubles
    the pause and adds one, so text that never repeats itself costs little.
    """
    effort.depth = model.depths[-1]
    pause = waiting = 0
    read = last_of(list(prompt), context_length - 1)
    logits_1V, state = read_anew(model, read)
    while draws.left > 0:
        drawn = unread = [_draw(logits_1V, draws)]
        while drawn:
            for id in drawn:
                if id == stop_id:
                    return
                yield id
            read += drawn
            drawn = []
            if draws.left > 0 and len(read) < context_length:
                room = min(num_drafts, context_length - 1 - len(read), draws.left - 1)
                # After a rejection, the ids before it are read again; when many have piled up, nothing is drafted.
                drafts = follow_up(read, room) if not waiting and len(unread) <= num_drafts else []
                accepted = effort.accepted
                drawn, state, unread = _verified(model, state, unread, drafts, draws, effort)
                if drafts:
                    pause = 0 if effort.accepted > accepted else min(2 * pause + 1, LONGEST_PAUSE)
                    waiting = pause
                else:
                    waiting = max(0, waiting - 1)
        if draws.left > 0:
            read = last_of(read, context_length // 2)
            logits_1V, state = read_anew(model, read)


@torch.inference_mode()
def _verified(
    model: Rewindable, state: Any, unread: list[int], drafts: list[int], draws: Draws, effort: Effort
) -> tuple[list[int], Any, list[int]]:
    """Read unread ids and then drafts; return the ids drawn, the state, and the ids that it has not read."""
    before = state.snapshot() if drafts else state
    logits_NV = model.step(torch.tensor([unread + drafts]), state)[0, len(unread) - 1 :].cpu()
    surely = torch.nn.functional.one_hot(torch.tensor(drafts, dtype=torch.long), logits_NV.size(-1)).double()
    drawn, accepted = _accepted(drafts, list(surely), logits_NV[:-1], draws)
    effort.drafted += len(drafts)
    effort.accepted += accepted
    effort.layers += model.depths[-1]
    if accepted == len(drafts):
        drawn.append(_draw(logits_NV[-1:], draws))
        state, unread = state, drawn[-1:]
    else:
        state, unread = before, unread + drawn
    effort.ids += len(drawn)
    return drawn, state, unread


def follow_up(read: Sequence[int], number: int) -> list[int]:
    """Return up to `number` ids that followed the last earlier occurrence of the text's end; longer ends go first."""
    for length in range(min(LONGEST, len(read) - 1), SHORTEST - 1, -1) if number > 0 else ():
        end = list(read[-length:])
        for place in range(len(read) - length - 1, -1, -1):
            if read[place] == end[0] and list(read[place : place + length]) == end:
                return list(read[place + length : place + length + number])
    return []


def _accepted(
    drafts: Sequence[int], drafted_from: Sequence[Tensor], logits_NV: Tensor, draws: Draws
) -> tuple[list[int], int]:
    """Return the accepted drafts, followed by a replacement if one is rejected, and the number of accepted drafts.

    A draft is accepted with probability p / q, where q is its probability under the draft distribution and p under the
    whole model. The first rejected draft is replaced by a draw from max(p - q, 0), and ends the round.
    """
    drawn: list[int] = []
    for id, q_V, logits_V in zip(drafts, drafted_from, logits_NV, strict=True):
        p_V = distribution(logits_V[None], [draws])[0]
        rejected = draws.uniform() * q_V[id] >= p_V[id]
        if rejected:
            rest_V = (p_V - q_V).clamp(min=0)
            (id,) = pick((rest_V if rest_V.any() else p_V)[None], [draws.uniform()])  # no mass: p = q within rounding
        draws.take(id)
        drawn.append(id)
        if rejected:
            return drawn, len(drawn) - 1
    return drawn, len(drawn)


def _draw(logits_1V: Tensor, draws: Draws) -> int:
    (id,) = pick(distribution(logits_1V.cpu(), [draws]), [draws.uniform()])
    draws.take(id)
    return id
