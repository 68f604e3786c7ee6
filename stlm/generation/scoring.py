"""Exact likelihood of a sequence of any length by overlapping windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@torch.no_grad()
def nats_per_id(
    logits_of: Callable[[Tensor], Tensor], ids: Tensor, *, context_length: int, stride: int, batch_size: int = 16
) -> Iterator[Tensor]:
    """Negative log-likelihood of every id of `ids` [S], each scored exactly once; yields pieces in order, float32 nats.

    `logits_of` maps ids [B, T] to logits [B, T, V] of the same ids. Windows of `context_length` begin every `stride`
    ids; from the second on, only a window's last `stride` ids are scored, so each id but the first few sees at least
    context_length - stride ids before it. `stride` = `context_length` is the cheapest and gives the least context.
    """
    assert 1 <= stride <= context_length
    starts = list(range(0, max(1, ids.numel() - context_length + stride), stride))
    for first in range(0, len(starts), batch_size):
        group = starts[first : first + batch_size]
        lengths = [min(context_length, ids.numel() - start) for start in group]
        window_BT = ids.new_zeros(len(group), max(lengths))  # what stands behind the end is never looked at: causal
        for row, (start, length) in enumerate(zip(group, lengths, strict=True)):
            window_BT[row, :length] = ids[start : start + length]
        logits_BTV = logits_of(window_BT).float()
        nats_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), window_BT, reduction="none").cpu()
        for row, (start, length) in enumerate(zip(group, lengths, strict=True)):
            yield nats_BT[row, (0 if start == 0 else context_length - stride) : length]
