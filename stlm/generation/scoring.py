"""Exact likelihood of sequences of any length by overlapping windows, and log-probabilities of ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stlm.generation.interfaces import DecodableModel

MAX_LOGITS = 1 << 24  # logits held at a time


class ScoredId(NamedTuple):
    """An id with its log-probability under the model, and the most probable ids at its position."""

    id: int
    log_probability: float  # nats, of the raw logits, without temperature, penalties and limits
    top: tuple[tuple[int, float], ...]  # (id, log-probability), the most probable one first


def score_drawn(logits_MV: Tensor, ids: Sequence[int], num_top: int) -> list[ScoredId]:
    """Return the log-probability of one id for each row of logits, with the row's `num_top` most probable ids."""
    log_MV = logits_MV.float().log_softmax(-1)
    own_M = log_MV.gather(-1, torch.tensor(ids, device=log_MV.device)[:, None])[:, 0].tolist()
    values_MK, ids_MK = log_MV.topk(min(num_top, log_MV.size(-1)), dim=-1)
    top = [tuple(zip(*row, strict=True)) for row in zip(ids_MK.tolist(), values_MK.tolist(), strict=True)]
    return [ScoredId(*scored) for scored in zip(ids, own_M, top, strict=True)]


@torch.inference_mode()
def score_ids(model: DecodableModel, ids: Sequence[int], num_top: int) -> list[ScoredId]:
    """Return the log-probability of every id of a text that fits into the context, the first included."""
    logits_1V, state = model.begin(1)
    scored: list[ScoredId] = []
    at_once = max(1, MAX_LOGITS // logits_1V.size(-1))
    for start in range(0, len(ids), at_once):
        piece = ids[start : start + at_once]
        logits_NV = model.step(torch.tensor([piece]), state)[0]
        scored += score_drawn(torch.cat((logits_1V, logits_NV[:-1])), piece, num_top)
        logits_1V = logits_NV[-1:]
    return scored


@torch.no_grad()
def nats_per_id(
    logits_of: Callable[[Tensor], Tensor], ids: Tensor, *, context_length: int, stride: int, batch_size: int = 16
) -> Iterator[Tensor]:
    """Yield the negative log-likelihood of every id of `ids` [S], each scored exactly once, in order, in float32 nats.

    `logits_of` maps ids [B, T] to logits [B, T, V] of the same ids. Windows of `context_length` begin every `stride`
    ids; from the second on, only a window's last `stride` ids are scored, so each id but the first few sees at least
    context_length - stride ids before it. `stride` = `context_length` is the cheapest and gives the least context.
    """
    assert 1 <= stride <= context_length
    starts = list(range(0, max(1, ids.numel() - context_length + stride), stride))
    for first in range(0, len(starts), batch_size):
        group = starts[first : first + batch_size]
        lengths = [min(context_length, ids.numel() - start) for start in group]
        window_BT = ids.new_zeros(len(group), max(lengths))  # padding after the end is not read: the model is causal
        for row, (start, length) in enumerate(zip(group, lengths, strict=True)):
            window_BT[row, :length] = ids[start : start + length]
        logits_BTV = logits_of(window_BT).float()
        nats_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), window_BT, reduction="none").cpu()
        for row, (start, length) in enumerate(zip(group, lengths, strict=True)):
            yield nats_BT[row, (0 if start == 0 else context_length - stride) : length]
