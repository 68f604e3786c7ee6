"""Beam search for the most probable continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stlm.generation.decoding import last_ids
from stlm.generation.interfaces import DecodableModel


class Hypothesis(NamedTuple):
    """A text and the natural logarithm of its probability, which includes its end if it has one."""

    ids: list[int]
    log_probability: float


@torch.inference_mode()
def beam_search(
    model: DecodableModel,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_ids: int,
    context_length: int,
    stop_id: int,
    banned_V: Tensor,
) -> list[Hypothesis]:
    """Return up to `num_beams` continuations of `prompt`, the most probable first, without `stop_id`.

    In each step all extensions of all beams compete, and the `num_beams` most probable remain (Graves 2012, arXiv
    1211.3711, section 3). Finished texts are set aside, and the search ends when no beam can overtake the worst of
    them. Texts are compared by probability alone, without a length penalty, so short ones often win. With as many beams
    as there are texts, the result is exact. Windows are those of `DecodingBatch`.
    """
    read = last_ids(list(prompt), context_length - 1)
    beams, ended = [Hypothesis([], 0.0)], []
    logits_BV, state = model.begin(1, torch.tensor([read], dtype=torch.long).view(1, len(read)))
    windows = [read]
    for place in range(max_new_ids):
        log_BV = logits_BV.double().cpu().masked_fill(banned_V, -torch.inf).log_softmax(-1)
        scores_BV = log_BV + torch.tensor([beam.log_probability for beam in beams], dtype=torch.float64)[:, None]
        best = scores_BV.flatten().topk(min(2 * num_beams, scores_BV.numel()))
        kept: list[tuple[int, Hypothesis]] = []
        for score, flat in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row, id = divmod(flat, scores_BV.size(1))
            if score == -torch.inf or len(kept) == num_beams:
                break
            if id == stop_id:
                ended.append(Hypothesis(beams[row].ids, score))
            else:
                kept.append((row, Hypothesis([*beams[row].ids, id], score)))
        ended = sorted(ended, key=lambda text: -text.log_probability)[:num_beams]
        windows = [[*windows[row], beam.ids[-1]] for row, beam in kept]
        beams = [beam for _, beam in kept]
        worst = ended[-1].log_probability if len(ended) == num_beams else -torch.inf
        if not beams or beams[0].log_probability <= worst or place == max_new_ids - 1:
            break
        if len(windows[0]) < context_length:
            state = model.join([(state, torch.tensor([row for row, _ in kept]))])
            logits_BV = model.step(torch.tensor([window[-1:] for window in windows]), state)[:, -1]
        else:
            windows = [last_ids(window, context_length // 2) for window in windows]
            ids_BN = torch.tensor(windows, dtype=torch.long).view(len(windows), len(windows[0]))
            logits_BV, state = model.begin(len(windows), ids_BN)
    return sorted([*ended, *beams], key=lambda text: -text.log_probability)[:num_beams]
