"""Restriction of generation to valid UTF-8: the text is well-formed and its last character complete.

The automaton over bytes has eight states (RFC 3629, section 4): between characters, three that await one to three
continuation bytes, and four after the leading bytes whose next byte is limited: 0xE0, 0xED, 0xF0 and 0xF4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETWEEN, ONE, TWO, THREE, E0, ED, F0, F4, BROKEN = range(9)
MISSING = (0, 1, 2, 3, 2, 2, 3, 3)  # bytes until the character is complete, by state


def transitions() -> Tensor:
    """Return the next state for each state and byte: [9, 256]."""
    table = torch.full((9, 256), BROKEN)
    table[BETWEEN, :0x80] = BETWEEN
    table[BETWEEN, 0xC2:0xE0] = ONE
    table[BETWEEN, 0xE0:0xF0] = TWO
    table[BETWEEN, 0xF0:0xF5] = THREE
    for byte, state in ((0xE0, E0), (0xED, ED), (0xF0, F0), (0xF4, F4)):
        table[BETWEEN, byte] = state
    for state, first, end, following in (
        (ONE, 0x80, 0xC0, BETWEEN),
        (TWO, 0x80, 0xC0, ONE),
        (THREE, 0x80, 0xC0, TWO),
        (E0, 0xA0, 0xC0, ONE),  # below: an overlong form
        (ED, 0x80, 0xA0, ONE),  # above: surrogates
        (F0, 0x90, 0xC0, TWO),  # below: an overlong form
        (F4, 0x80, 0x90, TWO),  # above: beyond U+10FFFF
    ):
        table[state, first:end] = following
    return table


class UTF8Automaton:
    """The automaton over the ids of a vocabulary: `next_states` [9, V] is the state after each id."""

    def __init__(self, spellings: Sequence[bytes]) -> None:
        """`spellings`: the bytes of each id; ids without text have none, and do not change the state."""
        table = transitions()
        lengths_V = torch.tensor([len(spelling) for spelling in spellings])
        next_states = torch.arange(9)[:, None].repeat(1, len(spellings))
        padded = b"".join(spelling.ljust(int(lengths_V.max()), b"\0") for spelling in spellings)
        bytes_VL = torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(spellings), -1).long()
        for place in range(bytes_VL.size(1)):
            moved = table[next_states, bytes_VL[:, place]]
            next_states = torch.where(place < lengths_V, moved, next_states)
        self.next_states = next_states
        self._missing = torch.tensor([*MISSING, 1 << 30])[next_states]  # bytes still missing after each id

    def banned(self, state: int, remaining: int) -> Tensor:
        """Mask [V] of ids not allowed after `state` with `remaining` ids left, as each missing byte may need an id."""
        return self._missing[state] > remaining - 1

    def next_state(self, state: int, id: int) -> int:
        """Return the state after an id."""
        return int(self.next_states[state, id])
