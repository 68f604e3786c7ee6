"""Batched decoding: rows join and leave a batch at any step. A single text is a batch of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stlm.generation.interfaces import DecodableModel
from stlm.generation.sampler import Sampler, sample_ids
from stlm.generation.scoring import ScoredId, score_drawn


class DecodingRow:
    """A text being continued: its sampling state, and the window of ids that the model reads for it."""

    def __init__(self, prompt: Sequence[int], sampler: Sampler, num_top: int | None = None) -> None:
        """`num_top`: also score each id drawn and this many of the most probable ids; None: no scores."""
        self.sampler = sampler
        self.window = list(prompt)
        self.last_id: int | None = None  # the id drawn last
        self.num_top = num_top
        self.score: ScoredId | None = None  # of the id drawn last
        self.error: Exception | None = None  # why no more ids can be drawn for it

    def append(self, id: int) -> None:
        """Append an id to the text."""
        self.sampler.accept(id)
        self.last_id = id
        self.window.append(id)


class DecodingBatch:
    """Rows that are decoded together. Neither the ids drawn for a row nor its failure depend on other rows.

    When the context of a row is full, the model restarts on the last half of it, so it never reads more than the
    context length it was trained with. If a prompt is longer than the context, its end is read.
    """

    def __init__(self, model: DecodableModel, context_length: int) -> None:
        self.model = model
        self.context_length = context_length
        self.rows: list[DecodingRow] = []
        self._waiting: list[DecodingRow] = []  # rows without a state
        self._state: Any = None  # of the rows and, until the next step, of removed ones
        self._size = 0  # number of rows in the state
        self._places: list[int] = []  # index of each row in the state

    def add(self, rows: Sequence[DecodingRow]) -> None:
        """Add rows; they take part from the next step on."""
        for row in rows:
            if len(row.window) >= self.context_length:
                started = row.last_id is not None
                row.window = last_ids(row.window, self.context_length // 2 if started else self.context_length - 1)
            self._waiting.append(row)

    def remove(self, row: DecodingRow) -> None:
        """Remove a row, if it is in the batch."""
        if row in self._waiting:
            self._waiting.remove(row)
        elif row in self.rows:
            place = self.rows.index(row)
            del self.rows[place], self._places[place]

    def __len__(self) -> int:
        return len(self.rows) + len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[DecodingRow]:
        """Draw one more id for every row; return the rows, each with its `last_id`.

        A row that fails is removed from the batch and returned with its `error`.
        """
        try:
            rows = self._step_together()
        except Exception as error:
            rows = self._step_each(error)
        for row in rows:
            if row.error is not None:
                self.remove(row)
        return rows

    def _step_together(self) -> list[DecodingRow]:
        logits = []
        self._restart_full_ones()
        if self.rows:
            logits.append(self._advance())
        if self._waiting:
            logits.append(self._read_prompts())
        if not self.rows:
            return []
        logits_BV = torch.cat(logits)
        ids = sample_ids(logits_BV, [row.sampler for row in self.rows])
        for place, (row, id) in enumerate(zip(self.rows, ids, strict=True)):
            try:
                row.append(id)
                if row.num_top is not None:
                    (row.score,) = score_drawn(logits_BV[place : place + 1], [id], row.num_top)
            except Exception as error:
                row.error = error
        return list(self.rows)

    def _step_each(self, error: Exception) -> list[DecodingRow]:
        """Step every row alone, after a joint step failed before anything was drawn. Rows that succeed rejoin at the
        next step, which reads their ids again."""
        rows = [*self.rows, *self._waiting]
        self.rows, self._waiting, self._places, self._state, self._size = [], [], [], None, 0
        if len(rows) == 1:
            rows[0].error = error
            return rows
        for row in rows:
            alone = DecodingBatch(self.model, self.context_length)
            alone.add([row])
            alone.step()
        self.add([row for row in rows if row.error is None])
        return rows

    def _restart_full_ones(self) -> None:
        for row in [row for row in self.rows if len(row.window) >= self.context_length]:
            self.remove(row)
            row.window = last_ids(row.window, self.context_length // 2)
            self._waiting.append(row)

    def _advance(self) -> Tensor:
        """Read the last ids of the rows that have a state; return logits [B, V]."""
        if len(self._places) < self._size:
            self._state = self.model.join([(self._state, torch.tensor(self._places))])
            self._size, self._places = len(self._places), list(range(len(self._places)))
        return self.model.step(torch.tensor([row.window[-1:] for row in self.rows]), self._state)[:, -1]

    def _read_prompts(self) -> Tensor:
        """Read the prompts of waiting rows, those of one length in one pass, and join them; return logits [B, V].

        A prompt that several rows share is read once.
        """
        self._waiting.sort(key=lambda row: len(row.window))  # stable: rows of one length stay in their order
        parts = [(self._state, torch.tensor(self._places))] if self.rows else []
        logits = []
        while self._waiting:
            length = len(self._waiting[0].window)
            group = [row for row in self._waiting if len(row.window) == length][:PROMPTS_PER_PASS]
            places: dict[tuple[int, ...], int] = {}  # index of each distinct prompt
            place_of_R = torch.tensor([places.setdefault(tuple(row.window), len(places)) for row in group])
            ids_BN = torch.tensor(list(places), dtype=torch.long).view(len(places), length)
            logits_BV, state = self.model.begin(len(places), ids_BN)
            self._waiting = self._waiting[len(group) :]
            logits.append(logits_BV[place_of_R.to(logits_BV.device)])
            parts.append((state, place_of_R))
            self.rows += group
        if len(parts) == 1 and len(parts[0][1]) == parts[0][1].unique().numel():
            self._state = parts[0][0]
        else:
            self._state = self.model.join(parts)
        self._size, self._places = len(self.rows), list(range(len(self.rows)))
        return torch.cat(logits)


PROMPTS_PER_PASS = 16


def generate_ids(
    model: DecodableModel,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    context_length: int,
    stop_id: int,
) -> Iterator[int]:
    """Yield ids that continue `prompt`, up to `sampler.remaining` ids; stop before `stop_id`."""
    batch, row = DecodingBatch(model, context_length), DecodingRow(prompt, sampler)
    batch.add([row])
    while sampler.remaining > 0:
        batch.step()
        if row.error is not None:
            raise row.error
        assert row.last_id is not None
        if row.last_id == stop_id:
            return
        yield row.last_id


def last_ids(ids: list[int], number: int) -> list[int]:
    """Return the last `number` ids, or all if there are fewer."""
    return ids[max(0, len(ids) - number) :]  # ids[-number:] would be all ids if number is 0


@torch.inference_mode()
def start_decoding(model: DecodableModel, ids: list[int]) -> tuple[Tensor, Any]:
    """Return the logits [1, V] of the id after `ids`, and a new decoding state that has read them."""
    return model.begin(1, torch.tensor([ids], dtype=torch.long).view(1, len(ids)))
