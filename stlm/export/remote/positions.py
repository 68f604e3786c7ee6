"""Positions of padded inputs: checks, and taking those that count."""

from __future__ import annotations

import torch
from torch import Tensor

from stlm.export.remote.cache import StlmCache


def real_positions(mask: Tensor | None, inputs: Tensor, past: int, cache: StlmCache | None) -> Tensor:
    """Return bool [B, T], False for padding, from a mask over the inputs and those that the cache has read."""
    batch, length = inputs.shape[:2]
    if mask is None:
        return torch.ones((batch, length), dtype=torch.bool, device=inputs.device)
    if mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask: got the shape {list(mask.shape)}, expected {[batch, past + length]}: zeros and ones for "
            "each position of each text, including those in the cache"
        )
    real = mask.bool().to(inputs.device)
    if cache is not None and cache.real is not None and not torch.equal(real[:, :past], cache.real):
        raise ValueError("attention_mask: differs from the mask with which the cache was filled")
    return real[:, past:]


def check_position_ids(position_ids: Tensor | None, real_BT: Tensor, cache: StlmCache | None) -> None:
    """Raise ValueError for positions other than the network's own, which count ids from 0."""
    if position_ids is None:
        return
    counted_B1: Tensor | int = 0
    if cache is not None and cache.real is not None:
        counted_B1 = cache.real.sum(1, keepdim=True)
    expected_BT = counted_B1 + real_BT.long().cumsum(1) - 1
    got_BT = position_ids.to(real_BT.device).expand(expected_BT.shape)
    if not torch.equal(got_BT[real_BT], expected_BT[real_BT]):
        raise ValueError("position_ids: this model counts positions itself, from 0 in every row; leave them out")


def kept_positions(logits_to_keep: int | Tensor, length: int, labels: Tensor | None) -> Tensor | None:
    """Return the positions whose logits are wanted; None: all."""
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return None
    if labels is not None:
        raise ValueError("logits_to_keep: the loss needs the logits of all positions; leave it out, or labels")
    if isinstance(logits_to_keep, Tensor):
        kept = logits_to_keep.long()
        return torch.where(kept < 0, kept + length, kept)
    return torch.arange(max(0, length - logits_to_keep), length)


def take_inputs(inputs: Tensor, place_BT: Tensor) -> Tensor:
    """Return ids or vectors at the given places of their rows."""
    return inputs.gather(1, place_BT if inputs.ndim == 2 else place_BT[..., None].expand_as(inputs))


def take_states(x_BND: Tensor, place_BT: Tensor) -> Tensor:
    """Return vectors at the given places of their rows, [B, T, D]; zeros where a place is below 0."""
    found_BTD = x_BND.gather(1, place_BT.clamp(min=0)[..., None].expand(-1, -1, x_BND.size(2)))
    return found_BTD * (place_BT >= 0)[..., None]
