"""Decoding state of a model as a cache for transformers."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from stlm.model import DecodingState

MAX_SNAPSHOTS = 32  # that a cache keeps


class Snapshot(NamedTuple):
    """A state to which a cache can return."""

    read: int
    state: DecodingState
    last: Tensor


class StlmCache(Cache):
    """The inputs that a network has read of a batch, and its decoding state.

    `crop` does not remove positions from the state: the state returns to a snapshot, or to the beginning, and the next
    call reads the positions from there to the end again.
    """

    is_compileable = False
    is_linear: ClassVar = [False]  # presented as one layer
    is_sliding: ClassVar = [False]
    is_dummy: ClassVar = [False]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: DecodingState | None = None  # has read the first `read` of all positions
        self.read = 0
        self.last: Tensor | None = None  # logits [B, V] after the last id that the state has read
        self.inputs: Tensor | None = None  # all positions: ids [B, T] or vectors [B, T, D], padding included
        self.real: Tensor | None = None  # bool [B, T]: which positions are not padding
        self.snapshots: list[Snapshot] = []
        self.recording = False

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return f"StlmCache(length={self.get_seq_length()})"

    @property
    def batch_size(self) -> int:
        return -1 if self.inputs is None else self.inputs.size(0)

    @property
    def is_initialized(self) -> bool:
        return self.inputs is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.inputs is None else self.inputs.size(1)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.recording = True

    def append(self, inputs: Tensor, real_BN: Tensor) -> None:
        """Append the inputs that are read next."""
        if self.inputs is None or self.real is None:
            self.inputs, self.real = inputs, real_BN
            return
        if inputs.size(0) != self.inputs.size(0):
            raise ValueError(f"cache: holds {self.inputs.size(0)} rows, but got inputs with {inputs.size(0)}")
        self.inputs, self.real = torch.cat((self.inputs, inputs), 1), torch.cat((self.real, real_BN), 1)

    def record_snapshot(self) -> None:
        """Keep a snapshot of the state to return to, if recording is on."""
        if self.recording and self.state is not None and self.last is not None:
            self.snapshots = [
                *self.snapshots[1 - MAX_SNAPSHOTS :],
                Snapshot(self.read, self.state.snapshot(), self.last),
            ]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; their number is given as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: got {tokens_to_remove}, expected a negative number: minus the number of positions to remove"
            )
        if not tokens_to_remove or self.inputs is None or self.real is None:
            return
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if not length:
            self.reset()
            return
        self.inputs, self.real = self.inputs[:, :length], self.real[:, :length]
        if self.read > length:
            self.snapshots = [one for one in self.snapshots if one.read <= length]
            if self.snapshots:
                self.read, self.last = self.snapshots[-1].read, self.snapshots[-1].last
                self.state = self.snapshots[-1].state.snapshot()
            else:
                self.read, self.state, self.last = 0, None, None

    def reset(self) -> None:
        self.state = self.last = self.inputs = self.real = None
        self.read, self.snapshots = 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.inputs is None or self.real is None:
            return
        beam_idx = beam_idx.to(self.inputs.device)
        self.inputs, self.real, self.snapshots = self.inputs[beam_idx], self.real[beam_idx], []
        if self.state is not None and self.last is not None:
            self.state, self.last = self.state.select(beam_idx.cpu()), self.last[beam_idx.to(self.last.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))

    def update(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("StlmCache: the model reads ids into it; keys and values cannot be added")


def checked_cache(cache: Any) -> StlmCache:
    if not isinstance(cache, StlmCache):
        raise TypeError(
            f"cache: got a {type(cache).__name__}, expected the StlmCache that this model returned, or None"
        )
    return cache
