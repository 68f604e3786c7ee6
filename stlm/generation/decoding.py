"""The decoding loop: works on anything that has `begin`, `step` and a context length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stlm.generation.sampling import sample


class Steppable(Protocol):
    """What the loop needs of a model."""

    def begin(self, batch_size: int) -> tuple[Tensor, Any]:
        """Logits of the first id [B, V], and a new decoding state."""
        ...

    def step(self, ids_BN: Tensor, state: Any) -> Tensor:
        """Read N more ids; logits [B, N, V] of the id that follows each of them."""
        ...


@torch.no_grad()
def generate_ids(
    model: Steppable,
    prompt: Sequence[int],
    *,
    max_new_ids: int,
    context_length: int,
    stop_id: int,
    banned_ids: Tensor,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_ids` ids that continue `prompt`, and end before `stop_id`.

    `banned_ids` [V] is True for ids that are never drawn. When the context is full, the model starts anew on the last
    half of it: what it reads is never longer than what it was trained on.
    """
    generator = torch.Generator().manual_seed(seed % 2**64)
    read = last_of(list(prompt), context_length - 1)
    logits_BV, state = read_anew(model, read)
    for _ in range(max_new_ids):
        allowed_BV = logits_BV.float().cpu().masked_fill(banned_ids, -torch.inf)
        drawn = int(sample(allowed_BV, generator, temperature, top_k, top_p))
        if drawn == stop_id:
            return
        yield drawn
        read.append(drawn)
        if len(read) < context_length:
            logits_BV = model.step(torch.tensor([[drawn]]), state)[:, -1]
        else:
            read = last_of(read, context_length // 2)
            logits_BV, state = read_anew(model, read)


def last_of(ids: list[int], number: int) -> list[int]:
    """The last `number` ids, or all where there are fewer."""
    return ids[max(0, len(ids) - number) :]  # ids[-number:] would be all of them where number is 0


def read_anew(model: Steppable, ids: list[int]) -> tuple[Tensor, Any]:
    """A new decoding state that has read `ids`, and the logits [1, V] of the id that follows them."""
    logits_BV, state = model.begin(1)
    return (model.step(torch.tensor([ids]), state)[:, -1] if ids else logits_BV), state
