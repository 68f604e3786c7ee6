"""Patching rules, which decide where byte patches begin, and the assignment of patches to slots.

A rule decides at which positions a patch is wanted. It reads only earlier ids, so it is causal. Slots are assigned the
same way for every rule, so shapes depend on the config alone: of a window of C positions and P slots, the first t
positions have ceil(t P / C) slots. A patch without a free slot does not begin, and the current one continues; leftover
slots serve later patches.

Shape letters: B batch, T positions, P slots, d width of the byte states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import FixedPatchingConfig, ModelConfig, PatchingConfig, SpacePatchingConfig
from stlm.model.context import Context
from stlm.model.registry import Registry, Vocabulary

NOBODY = torch.iinfo(torch.int64).min  # the document of a slot without a patch


class Routing(NamedTuple):
    """Probabilities of a learned rule (p: probability that a patch begins)."""

    sureness_BT: Tensor  # p where a patch begins, 1 - p where none does
    probability_BP: Tensor  # p where each patch begins


class Patches(NamedTuple):
    """Inputs of a head that decodes patches into bytes (d: width of the byte states)."""

    states_BTd: Tensor  # the local encoder's output at each byte position
    index_BT: Tensor  # the patch of each position: 1 … P for those that began in this call, 0 for the one before
    documents_BP: Tensor | None = None  # the document of each patch, where documents are kept apart
    used_BP: Tensor | None = None  # which slots have a patch; None: all
    counts: list[int] | None = None  # patches that began in each row, where rows may differ: with a cache
    routing: Routing | None = None  # only of learned patches


class Taken(NamedTuple):
    """Slots and positions used so far by each row of a batch, in its own window."""

    slots_B1: Tensor  # slots with a patch
    positions_B1: Tensor  # positions read


class Placed(NamedTuple):
    """Assignment of patches to slots (P: slots of this call)."""

    start_BP: Tensor  # the position in this call where the patch of each slot begins; -1 in slots without one
    index_BT: Tensor  # as in Patches
    begun_BT: Tensor  # whether a patch begins
    counts_B: Tensor  # patches that began in this call
    taken: Taken  # at the end of this call, earlier calls included


class Patching(nn.Module):
    """Interface of every rule."""

    ragged = True  # whether the rows of a batch may begin patches at different positions
    learned = False  # whether `forward` returns probabilities rather than booleans

    def __init__(self, config: PatchingConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.num_slots = config.num_slots(model.context_length)
        self.context_length = model.context_length

    def new_cache(self) -> Any:
        """Return an empty decoding state for `forward(…, cache)`; None if the rule keeps none."""
        return None

    def forward(self, inputs_BT: Tensor, states_BTd: Tensor, context: Context, cache: Any = None) -> Tensor:
        """Return where a patch is wanted, bool [B, T]: at t from inputs[:, :t + 1] alone, which are the ids before t.

        A learned rule returns probabilities; a patch is wanted from 0.5 on.
        """
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def room(self, position: Any) -> Any:
        """Return the number of slots of the first `position` positions of a window: an int, or a tensor of integers."""
        return -(-position * self.num_slots // self.context_length)

    def place(self, wanted_BT: Tensor, documents_BT: Tensor | None = None, before: Taken | None = None) -> Placed:
        """Give each wanted patch the next free slot, in order.

        `before` is the cached `taken` of the previous call. Without it there are as many slots as T positions have,
        used or not; with it, as many as the row with the most new patches needs.

        A document wants a patch at its first position. It uses none of the slots that earlier documents left over, so
        its patches get the same slots whatever those contain.

        The slots taken are taken[t] = min(taken[t - 1] + wanted[t], room[t + 1]), computed as a running minimum.
        """
        length = wanted_BT.size(1)
        first_B1 = before.positions_B1 if before else wanted_BT.new_zeros(1, 1, dtype=torch.long)
        room_BS = self.room(first_B1 + torch.arange(length + 1, device=wanted_BT.device))  # [B, T + 1]
        begins_BT = torch.zeros_like(wanted_BT)  # where documents begin; also the first position of a call
        begins_BT[:, 0] = True
        if documents_BT is not None:
            begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        if before is None:
            wanted_BT = wanted_BT | begins_BT
            entry_BT = room_BS[:, :-1].expand_as(wanted_BT)  # slots taken or given up before a document
        else:
            entry_BT = before.slots_B1.expand_as(wanted_BT)

        asked_BT = wanted_BT.long().cumsum(1)
        room_BT = room_BS[:, 1:]
        limit_BT = torch.where(begins_BT, torch.minimum(entry_BT + wanted_BT, room_BT), room_BT) - asked_BT
        apart_BT = begins_BT.long().cumsum(1) * (2 * length + 1)  # keeps each minimum within its document
        taken_BT = asked_BT + (limit_BT - apart_BT).cummin(1).values + apart_BT

        earlier_BT = torch.where(begins_BT, entry_BT, F.pad(taken_BT[:, :-1], (1, 0)))
        entry_BT = torch.where(begins_BT, entry_BT, 0).cummax(1).values  # of the position's own document
        index_BT = torch.where(taken_BT > entry_BT, taken_BT - entry_BT[:, :1], 0)
        begun_BT = taken_BT > earlier_BT
        counts_B = begun_BT.sum(1)
        slots = self.room(length) if before is None else int(counts_B.max())
        slot_BT = torch.where(begun_BT, index_BT - 1, slots)  # no patch begins: an extra slot, cut off below
        place_BT = torch.arange(length, device=wanted_BT.device).expand_as(slot_BT)
        start_BP = torch.full_like(slot_BT[:, :1], -1).repeat(1, slots + 1).scatter(1, slot_BT, place_BT)[:, :-1]
        taken = Taken(taken_BT[:, -1:], (first_B1 + length).expand_as(taken_BT[:, -1:]))
        return Placed(start_BP, index_BT, begun_BT, counts_B, taken)


PATCHINGS: Registry[Patching] = Registry("embedder.patching")


@PATCHINGS.register("fixed")
class FixedPatching(Patching):
    """Fixed patches, at every `patch_size`-th position (MegaByte: Yu et al. 2023, arXiv 2305.07185)."""

    ragged = False

    def __init__(self, config: FixedPatchingConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, model, vocabulary)

    def forward(self, inputs_BT: Tensor, states_BTd: Tensor, context: Context, cache: None = None) -> Tensor:
        return torch.ones_like(inputs_BT, dtype=torch.bool)


class SpaceCache:
    """Decoding state of `SpacePatching`: the last id."""

    def __init__(self) -> None:
        self.last_B1: Tensor | None = None


@PATCHINGS.register("space")
class SpacePatching(Patching):
    """Patches after every space-like byte that follows none (SpaceByte: Slagle 2024, arXiv 2404.14824, section 3).

    All bytes but ASCII letters, digits, and UTF-8 continuation bytes are space-like. So a patch is a word and the first
    space or punctuation after it; in scripts of several bytes per character it is about a character. A patch also
    begins after every id that no text contains, such as the end of a document.
    """

    def __init__(self, config: SpacePatchingConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, model, vocabulary)

    def new_cache(self) -> SpaceCache:
        return SpaceCache()

    def forward(
        self, inputs_BT: Tensor, states_BTd: Tensor, context: Context, cache: SpaceCache | None = None
    ) -> Tensor:
        last_B1 = inputs_BT[:, :1] if cache is None or cache.last_B1 is None else cache.last_B1
        before_BT = torch.cat((last_B1, inputs_BT[:, :-1]), dim=1)
        if cache is not None:
            cache.last_B1 = inputs_BT[:, -1:]
        return special(inputs_BT) | spacelike(inputs_BT) & ~spacelike(before_BT)


def spacelike(bytes_BT: Tensor) -> Tensor:
    """Return True for bytes that are no ASCII letter, no digit, and no UTF-8 continuation byte (0x80 to 0xBF)."""
    lower_BT = bytes_BT | 0x20  # lower case, of letters
    letter_BT = (lower_BT >= ord("a")) & (lower_BT <= ord("z"))
    digit_BT = (bytes_BT >= ord("0")) & (bytes_BT <= ord("9"))
    continuing_BT = (bytes_BT >= 0x80) & (bytes_BT < 0xC0)
    return ~(letter_BT | digit_BT | continuing_BT)


def special(bytes_BT: Tensor) -> Tensor:
    """Return True for bytes that UTF-8 never uses (RFC 3629, section 1): special ids."""
    return (bytes_BT == 0xC0) | (bytes_BT == 0xC1) | (bytes_BT >= 0xF5)
