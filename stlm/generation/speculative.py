"""Speculative decoding: ids are drafted cheaply, and the whole model verifies several of them in one pass.

The result is that of the whole model: the same text at temperature 0 (except where two ids are equally probable to the
last digit), and the same distribution otherwise (Leviathan et al. 2023, arXiv 2211.17192). Drafts come from the model's
first layers (LayerSkip, arXiv 2404.16710, section 3.3), or from earlier occurrences of the last ids, as in decoding
with references (Yang et al. 2023, arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stlm.generation.decoding import last_ids, start_decoding
from stlm.generation.interfaces import DraftingModel, LayeredModel
from stlm.generation.sampler import Sampler, distribution, sample_by_cdf
from stlm.generation.stats import DecodingStats

LONGEST_NGRAM, SHORTEST_NGRAM = 5, 2  # lengths of the n-grams that are searched for earlier in the text
LONGEST_PAUSE = 31  # passes without drafts after repeated rejections


def speculate_with_layers(
    model: DraftingModel,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    context_length: int,
    stop_id: int,
    num_drafts: int,
    stats: DecodingStats,
) -> Iterator[int]:
    """Yield ids as `generate_ids` does, with the same windows; the first layers draft up to `num_drafts` at a time."""
    stats.depth = model.depths[-1]
    read = last_ids(list(prompt), context_length - 1)
    logits_1V, state = start_decoding(model, read)
    while sampler.remaining > 0:
        drawn = [_sample(logits_1V, sampler)]  # the id after a window that was just read
        while drawn:
            for id in drawn:
                if id == stop_id:
                    return
                yield id
            read += drawn  # the model has read all but the last of them
            room = min(num_drafts, context_length - len(read), sampler.remaining)
            drawn = _draft_and_verify(model, state, read[-1], room, stop_id, sampler, stats) if room > 0 else []
        if sampler.remaining > 0:
            read = last_ids(read, context_length // 2)
            logits_1V, state = start_decoding(model, read)


@torch.inference_mode()
def _draft_and_verify(
    model: DraftingModel, state: Any, last: int, num_drafts: int, stop_id: int, sampler: Sampler, stats: DecodingStats
) -> list[int]:
    """Draft ids after `last`, which the model has not read yet, and verify them. Returns at least one id; the model has
    read all but the last of them."""
    ids, draft_sampler = [last], sampler.copy()
    draft_distributions: list[Tensor] = []
    while len(draft_distributions) < num_drafts and (ids[-1] != stop_id or not draft_distributions):
        q_1V = distribution(model.draft(torch.tensor([ids[-1:]]), state)[:, -1].cpu(), [draft_sampler])
        draft_distributions.append(q_1V[0])
        ids += sample_by_cdf(q_1V, [sampler.uniform()])
        draft_sampler.accept(ids[-1])
    logits_NV = model.verify(state)[0].cpu()
    drawn, accepted = _accept_drafts(ids[1:], draft_distributions, logits_NV, sampler)
    model.keep(state, len(drawn))
    stats.ids += len(drawn)
    stats.drafted += len(draft_distributions)
    stats.accepted += accepted
    stats.layers += model.depths[0] * len(draft_distributions) + model.depths[-1] - model.depths[0]
    return drawn


def speculate_with_ngrams(
    model: LayeredModel,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    context_length: int,
    stop_id: int,
    num_drafts: int,
    stats: DecodingStats,
) -> Iterator[int]:
    """Yield ids as `generate_ids` does, with the same windows; drafts of up to `num_drafts` ids are n-gram copies.

    After a pass whose drafts were all rejected, drafting pauses for one pass; each further rejection in a row doubles
    the pause and adds one, so text that never repeats itself costs little.
    """
    stats.depth = model.depths[-1]
    pause = waiting = 0
    read = last_ids(list(prompt), context_length - 1)
    logits_1V, state = start_decoding(model, read)
    while sampler.remaining > 0:
        drawn = unread = [_sample(logits_1V, sampler)]
        while drawn:
            for id in drawn:
                if id == stop_id:
                    return
                yield id
            read += drawn
            drawn = []
            if sampler.remaining > 0 and len(read) < context_length:
                room = min(num_drafts, context_length - 1 - len(read), sampler.remaining - 1)
                # After a rejection, the ids before it are read again; when many have piled up, nothing is drafted.
                drafts = ngram_draft(read, room) if not waiting and len(unread) <= num_drafts else []
                accepted = stats.accepted
                drawn, state, unread = _verify_drafts(model, state, unread, drafts, sampler, stats)
                if drafts:
                    pause = 0 if stats.accepted > accepted else min(2 * pause + 1, LONGEST_PAUSE)
                    waiting = pause
                else:
                    waiting = max(0, waiting - 1)
        if sampler.remaining > 0:
            read = last_ids(read, context_length // 2)
            logits_1V, state = start_decoding(model, read)


@torch.inference_mode()
def _verify_drafts(
    model: LayeredModel, state: Any, unread: list[int], drafts: list[int], sampler: Sampler, stats: DecodingStats
) -> tuple[list[int], Any, list[int]]:
    """Read unread ids and then drafts; return the ids drawn, the state, and the ids that it has not read."""
    before = state.snapshot() if drafts else state
    logits_NV = model.step(torch.tensor([unread + drafts]), state)[0, len(unread) - 1 :].cpu()
    certain_NV = torch.nn.functional.one_hot(torch.tensor(drafts, dtype=torch.long), logits_NV.size(-1)).double()
    drawn, accepted = _accept_drafts(drafts, list(certain_NV), logits_NV[:-1], sampler)
    stats.drafted += len(drafts)
    stats.accepted += accepted
    stats.layers += model.depths[-1]
    if accepted == len(drafts):
        drawn.append(_sample(logits_NV[-1:], sampler))
        state, unread = state, drawn[-1:]
    else:
        state, unread = before, unread + drawn
    stats.ids += len(drawn)
    return drawn, state, unread


def ngram_draft(read: Sequence[int], number: int) -> list[int]:
    """Return up to `number` ids that followed the last earlier occurrence of the text's end; longer ends go first."""
    for length in range(min(LONGEST_NGRAM, len(read) - 1), SHORTEST_NGRAM - 1, -1) if number > 0 else ():
        end = list(read[-length:])
        for place in range(len(read) - length - 1, -1, -1):
            if read[place] == end[0] and list(read[place : place + length]) == end:
                return list(read[place + length : place + length + number])
    return []


def _accept_drafts(
    drafts: Sequence[int], draft_distributions: Sequence[Tensor], logits_NV: Tensor, sampler: Sampler
) -> tuple[list[int], int]:
    """Return the accepted drafts, followed by a replacement if one is rejected, and the number of accepted drafts.

    A draft is accepted with probability p / q, where q is its probability under the draft distribution and p under the
    whole model. The first rejected draft is replaced by a draw from max(p - q, 0), and ends the round.
    """
    drawn: list[int] = []
    for id, q_V, logits_V in zip(drafts, draft_distributions, logits_NV, strict=True):
        p_V = distribution(logits_V[None], [sampler])[0]
        rejected = sampler.uniform() * q_V[id] >= p_V[id]
        if rejected:
            residual_V = (p_V - q_V).clamp(min=0)
            weights_V = residual_V if residual_V.any() else p_V  # no mass: p = q within rounding
            (id,) = sample_by_cdf(weights_V[None], [sampler.uniform()])
        sampler.accept(id)
        drawn.append(id)
        if rejected:
            return drawn, len(drawn) - 1
    return drawn, len(drawn)


def _sample(logits_1V: Tensor, sampler: Sampler) -> int:
    (id,) = sample_by_cdf(distribution(logits_1V.cpu(), [sampler]), [sampler.uniform()])
    sampler.accept(id)
    return id
