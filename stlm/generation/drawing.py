"""Drawing the next id of every row of a batch, by the row's own sampling rules and random numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stlm.generation.sampling import Sampling, penalised, probabilities
from stlm.generation.utf8 import BETWEEN, ValidText


class Draws:
    """Sampling state of one row: its random numbers, and the counts and UTF-8 state of its ids so far."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], banned_V: Tensor, max_new_ids: int, stop_id: int,
        valid_text: ValidText | None = None,
    ) -> None:  # fmt: skip
        """`banned_V`: True for ids that are never drawn. `stop_id` ends the text; `valid_text` is for `valid_utf8`."""
        assert valid_text is not None or not sampling.valid_utf8
        self.sampling = sampling
        self.rules = replace(sampling, seed=0)  # rows with the same rules are drawn together
        self.left = max_new_ids
        self._random = random.Random(sampling.seed)
        self._banned_V, self._stop_id = banned_V, stop_id
        self._valid_text = valid_text if sampling.valid_utf8 else None
        self._state = BETWEEN
        self.seen_V: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen_V = torch.zeros_like(banned_V)
            self.seen_V[torch.tensor(prompt, dtype=torch.long)] = True
        self.counts_V = torch.zeros(banned_V.numel()) if sampling.counts else None

    def fork(self) -> Draws:
        """Return a copy for drafted ids, with the same source of random numbers."""
        new = copy.copy(self)
        new.seen_V = None if self.seen_V is None else self.seen_V.clone()
        new.counts_V = None if self.counts_V is None else self.counts_V.clone()
        return new

    def refused(self) -> Tensor:
        """Mask [V], True for ids that must not be drawn next."""
        if self._valid_text is None:
            return self._banned_V
        refused_V = self._valid_text.refused(self._state, self.left) | self._banned_V
        refused_V[self._stop_id] = self._state != BETWEEN
        return refused_V

    def uniform(self) -> float:
        """Draw the row's next random number, in [0, 1)."""
        return self._random.random()

    def take(self, id: int) -> None:
        """Record that an id was drawn."""
        self.left -= 1
        if self.seen_V is not None:
            self.seen_V[id] = True
        if self.counts_V is not None:
            self.counts_V[id] += 1
        if self._valid_text is not None:
            self._state = self._valid_text.after(self._state, id)


def distribution(logits_BV: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Return the probability of each id to be drawn, [B, V]; all rows have the same rules."""
    return probabilities(_allowed(logits_BV, rows), rows[0].rules)


def _allowed(logits_BV: Tensor, rows: Sequence[Draws]) -> Tensor:
    rules = rows[0].rules
    logits_BV = penalised(
        logits_BV, rules, _stacked([row.seen_V for row in rows]), _stacked([r.counts_V for r in rows])
    )
    if rules.valid_utf8:
        return logits_BV.masked_fill(torch.stack([row.refused() for row in rows]), -torch.inf)
    return logits_BV.masked_fill(rows[0].refused(), -torch.inf)


def _stacked(each: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [tensor for tensor in each if tensor is not None]
    return torch.stack(tensors) if tensors else None


def draw(logits_BV: Tensor, rows: Sequence[Draws]) -> list[int]:
    """Draw one id for each row; the caller passes it to `Draws.take`. A row's id depends on its logits, its rules and
    its random numbers alone. No random number is used before everything that may fail is computed."""
    logits_BV = logits_BV.float().cpu()
    groups: dict[Sampling, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.rules, []).append(place)
    weights = {
        rules: _weights(logits_BV if len(groups) == 1 else logits_BV[places], [rows[place] for place in places])
        for rules, places in groups.items()
    }
    ids = [0] * len(rows)
    for rules, places in groups.items():
        if rules.temperature == 0:
            drawn = weights[rules].argmax(-1).tolist()
        else:
            drawn = pick(weights[rules], [rows[place].uniform() for place in places])
        for place, id in zip(places, drawn, strict=True):
            ids[place] = id
    return ids


def _weights(logits_BV: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Return the weights by which ids of rows with the same rules are chosen: logits at temperature 0, else
    probabilities."""
    rules = rows[0].rules
    return _allowed(logits_BV, rows) if rules.temperature == 0 else distribution(logits_BV, rows)


def pick(weights_BV: Tensor, uniforms: Sequence[float]) -> list[int]:
    """Draw an id for each row by inverting the cumulative distribution of its weights at its number in [0, 1)."""
    ends_BV = weights_BV.double().cumsum(-1)
    total_B1 = ends_BV[:, -1:].contiguous()
    marks_B1 = torch.tensor(uniforms, dtype=torch.float64)[:, None] * total_B1
    ids_B1 = torch.searchsorted(ends_BV, marks_B1, right=True)
    last_B1 = torch.searchsorted(ends_BV, total_B1)  # last id with any weight: rounding may lead beyond it
    return torch.minimum(ids_B1, last_B1)[:, 0].tolist()
