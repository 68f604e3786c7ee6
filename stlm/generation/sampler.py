"""Samplers: each row of a batch draws ids by its own sampling rules and random numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stlm.generation.sampling import Sampling, apply_penalties, probabilities
from stlm.generation.utf8 import BETWEEN, UTF8Automaton


class Sampler:
    """Sampling rules of one row with its random numbers, and the counts and UTF-8 state of its ids so far."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], banned_V: Tensor, max_new_ids: int, stop_id: int,
        automaton: UTF8Automaton | None = None,
    ) -> None:  # fmt: skip
        """`banned_V`: True for ids that are never drawn. `stop_id` ends the text; `automaton` is for `valid_utf8`."""
        assert automaton is not None or not sampling.valid_utf8
        self.sampling = sampling
        self.rules = replace(sampling, seed=0)  # rows with the same rules are drawn together
        self.remaining = max_new_ids
        self._random = random.Random(sampling.seed)
        self._banned_V, self._stop_id = banned_V, stop_id
        self._automaton = automaton if sampling.valid_utf8 else None
        self._state = BETWEEN
        self.seen_V: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen_V = torch.zeros_like(banned_V)
            self.seen_V[torch.tensor(prompt, dtype=torch.long)] = True
        self.counts_V = torch.zeros(banned_V.numel()) if sampling.counts else None

    def copy(self) -> Sampler:
        """Return a copy for drafted ids, with the same source of random numbers."""
        new = copy.copy(self)
        new.seen_V = None if self.seen_V is None else self.seen_V.clone()
        new.counts_V = None if self.counts_V is None else self.counts_V.clone()
        return new

    def banned(self) -> Tensor:
        """Mask [V], True for ids that must not be drawn next."""
        if self._automaton is None:
            return self._banned_V
        banned_V = self._automaton.banned(self._state, self.remaining) | self._banned_V
        banned_V[self._stop_id] = self._state != BETWEEN
        return banned_V

    def uniform(self) -> float:
        """Draw the row's next random number, in [0, 1)."""
        return self._random.random()

    def accept(self, id: int) -> None:
        """Record that an id was drawn."""
        self.remaining -= 1
        if self.seen_V is not None:
            self.seen_V[id] = True
        if self.counts_V is not None:
            self.counts_V[id] += 1
        if self._automaton is not None:
            self._state = self._automaton.next_state(self._state, id)


def distribution(logits_BV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return the probability of each id to be drawn, [B, V]; all rows have the same rules."""
    return probabilities(_adjusted_logits(logits_BV, samplers), samplers[0].rules)


def _adjusted_logits(logits_BV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return logits with penalties and biases applied, and -inf for banned ids."""
    rules = samplers[0].rules
    seen_BV, counts_BV = _stacked([one.seen_V for one in samplers]), _stacked([one.counts_V for one in samplers])
    logits_BV = apply_penalties(logits_BV, rules, seen_BV, counts_BV)
    if rules.valid_utf8:
        return logits_BV.masked_fill(torch.stack([one.banned() for one in samplers]), -torch.inf)
    return logits_BV.masked_fill(samplers[0].banned(), -torch.inf)


def _stacked(each: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [tensor for tensor in each if tensor is not None]
    return torch.stack(tensors) if tensors else None


def sample_ids(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw one id for each row; the caller passes it to `Sampler.accept`.

    A row's id depends on its logits, its rules and its random numbers alone. Everything that may fail is computed
    before any random number is used.
    """
    logits_BV = logits_BV.float().cpu()
    groups: dict[Sampling, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.rules, []).append(row)
    weights = {
        rules: _weights(logits_BV if len(groups) == 1 else logits_BV[rows], [samplers[row] for row in rows])
        for rules, rows in groups.items()
    }
    ids = [0] * len(samplers)
    for rules, rows in groups.items():
        if rules.temperature == 0:
            drawn = weights[rules].argmax(-1).tolist()
        else:
            drawn = sample_by_cdf(weights[rules], [samplers[row].uniform() for row in rows])
        for row, id in zip(rows, drawn, strict=True):
            ids[row] = id
    return ids


def _weights(logits_BV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return what ids are chosen by in rows with the same rules: logits at temperature 0, else probabilities."""
    greedy = samplers[0].rules.temperature == 0
    return _adjusted_logits(logits_BV, samplers) if greedy else distribution(logits_BV, samplers)


def sample_by_cdf(weights_BV: Tensor, uniforms: Sequence[float]) -> list[int]:
    """Draw an id for each row by inverting the cumulative distribution of its weights at its number in [0, 1)."""
    cdf_BV = weights_BV.double().cumsum(-1)
    total_B1 = cdf_BV[:, -1:].contiguous()
    targets_B1 = torch.tensor(uniforms, dtype=torch.float64)[:, None] * total_B1
    ids_B1 = torch.searchsorted(cdf_BV, targets_B1, right=True)
    last_B1 = torch.searchsorted(cdf_BV, total_B1)  # last id with any weight: rounding may lead beyond it
    return torch.minimum(ids_B1, last_B1)[:, 0].tolist()
