"""Self-speculative decoding: the first layers draft ids one by one, the others verify them all in one pass.

What comes out is what the whole model would have said: the same text at temperature 0 (but where two ids are likely
alike to the last digit), and the same distribution otherwise (Leviathan et al. 2023, arXiv 2211.17192; with the
model's own layers as the drafter: LayerSkip, arXiv 2404.16710, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stlm.generation.decoding import Steppable, last_of, read_anew
from stlm.generation.effort import Effort
from stlm.generation.sampling import probabilities


class Drafting(Steppable, Protocol):
    """What speculation needs of a model."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers: the first is what drafts, the last is all."""
        ...

    def draft(self, ids_B1: Tensor, state: Any) -> Tensor:
        """Read one more id through the first layers; their logits [B, 1, V] of the id that follows."""
        ...

    def verify(self, state: Any) -> Tensor:
        """Bring all drafted ids through the rest; logits [B, N, V], equal to those of `step`."""
        ...

    def keep(self, state: Any, number: int) -> None:
        """Keep the first `number` of the ids just verified and forget the others."""
        ...


@torch.no_grad()
def speculate(
    model: Drafting,
    prompt: Sequence[int],
    *,
    max_new_ids: int,
    context_length: int,
    stop_id: int,
    banned_ids: Tensor,
    seed: int,
    num_drafts: int,
    effort: Effort,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[int]:
    """Yield ids as `generate_ids` does, with the same windows, drafting up to `num_drafts` ids at a time."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    effort.depth = model.depths[-1]

    def chances(logits_1V: Tensor) -> Tensor:
        allowed_1V = logits_1V.float().cpu().masked_fill(banned_ids, -torch.inf)
        return probabilities(allowed_1V, temperature, top_k, top_p)[0]

    read = last_of(list(prompt), context_length - 1)
    logits_1V, state = read_anew(model, read)
    left = max_new_ids
    while left:
        drawn = [_draw(chances(logits_1V), generator)]  # what comes after a window that was read anew
        while drawn:
            for id in drawn[:left]:
                if id == stop_id:
                    return
                yield id
            left -= len(drawn[:left])
            read += drawn  # but for the last of them, the model has read them
            room = min(num_drafts, context_length - len(read), left)
            drawn = _round(model, state, read[-1], room, stop_id, chances, generator, effort) if room > 0 else []
        if left:
            read = last_of(read, context_length // 2)
            logits_1V, state = read_anew(model, read)


def _round(
    model: Drafting,
    state: Any,
    last: int,
    num_drafts: int,
    stop_id: int,
    chances: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    effort: Effort,
) -> list[int]:
    """Draft ids that follow `last`, which has not been read yet, and verify them. Returns at least one id; all but the
    last of them have been read.

    A draft is accepted with the probability p / q, where q is how likely it was to be drafted, and p how likely the
    whole model would have drawn it; the first that is not is replaced by a draw from max(p - q, 0), and ends the round.
    """
    ids = [last]
    drafted_from: list[Tensor] = []  # q
    while len(drafted_from) < num_drafts and (ids[-1] != stop_id or not drafted_from):
        drafted_from.append(chances(model.draft(torch.tensor([ids[-1:]]), state)[:, -1]))
        ids.append(_draw(drafted_from[-1], generator))
    logits_NV = model.verify(state)[0]
    drafts, accepted = ids[1:], 0
    for id, q_V, logits_V in zip(drafts, drafted_from, logits_NV, strict=True):
        p_V = chances(logits_V[None])
        if float(torch.rand((), generator=generator)) * q_V[id] >= p_V[id]:
            rest_V = (p_V - q_V).clamp(min=0)
            drafts[accepted:] = [_draw(rest_V if rest_V.any() else p_V, generator)]  # none: p = q, but for rounding
            break
        accepted += 1
    model.keep(state, len(drafts))
    effort.ids += len(drafts)
    effort.drafted += len(drafted_from)
    effort.accepted += accepted
    effort.layers += model.depths[0] * len(drafted_from) + model.depths[-1] - model.depths[0]
    return drafts


def _draw(weights_V: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights_V, 1, generator=generator))
