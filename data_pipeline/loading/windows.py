"""Contents of windows: rows of `context_length` ids, read by number.

`StreamWindows` cuts the stream consecutively, `PlannedWindows` holds whole documents, `JoinedWindows` numbers the
windows of several folders consecutively.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.id_stream import IdStream
from data_pipeline.tokenizers import Tokenizer

NO_DOCUMENT = -1  # the document id of padding


class Windows(NamedTuple):
    """Some windows: n rows of T ids."""

    ids: NDArray[np.int64]  # [n, T]
    loss_mask: NDArray[np.bool_]  # [n, T]: false on padding and on ids that are read but not predicted
    document_ids: NDArray[np.int32] | None = None  # [n, T]: attention stays within equal ids; None: no limits


class WindowSet(Protocol):
    """Windows, read by number."""

    num_windows: int

    def read(self, windows: NDArray[np.int64]) -> Windows:
        """Return the windows of these numbers, in this order."""
        ...


class StreamWindows:
    """The stream in pieces of `context_length` ids; the last one is padded.

    With an `end_of_text_id`, the documents of a window are numbered: a document ends with that id.
    """

    def __init__(self, stream: IdStream, context_length: int, pad_id: int, end_of_text_id: int | None = None) -> None:
        """Raise DataError if the stream is empty."""
        if not len(stream):
            raise DataError("the split holds no ids: there is nothing to read")
        self._stream = stream
        self._given = stream.given
        self._context_length = context_length
        self._pad_id = pad_id
        self._end_of_text_id = end_of_text_id
        self.num_windows = -(-len(stream) // context_length)

    def read(self, windows: NDArray[np.int64]) -> Windows:
        starts = windows * self._context_length
        ids = self._stream.rows(starts, self._context_length, self._pad_id)
        loss_mask = np.ones(ids.shape, dtype=np.bool_)
        for row in np.flatnonzero(windows == self.num_windows - 1).tolist():
            loss_mask[row, len(self._stream) - starts[row] :] = False
        document_ids = None
        if self._end_of_text_id is not None:
            document_ids = np.zeros(ids.shape, dtype=np.int32)
            np.cumsum(ids[:, :-1] == self._end_of_text_id, axis=1, out=document_ids[:, 1:])
            document_ids[~loss_mask] = NO_DOCUMENT
        if self._given is not None:
            loss_mask &= self._given.rows(starts, self._context_length, 1) == 0
        return Windows(ids, loss_mask, document_ids)


class JoinedWindows:
    """Several sets of windows of the same length as one: those of the first, then those of the second, …"""

    def __init__(self, sets: Sequence[WindowSet]) -> None:
        self._sets = sets
        self._stops = np.array(list(accumulate(windows.num_windows for windows in sets)))
        self.num_windows = int(self._stops[-1])

    def read(self, windows: NDArray[np.int64]) -> Windows:
        numbers = np.searchsorted(self._stops, windows, side="right")
        places, pieces = [], []
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            own = self._sets[number]
            pieces.append(own.read(windows[mine] - (self._stops[number] - own.num_windows)))
            places.append(mine)
        if len(pieces) == 1:
            return pieces[0]
        back = np.argsort(np.concatenate(places))
        ids, loss_mask = (np.concatenate([piece[field] for piece in pieces])[back] for field in (0, 1))
        documents = [piece.document_ids for piece in pieces if piece.document_ids is not None]
        return Windows(ids, loss_mask, np.concatenate(documents)[back] if documents else None)


class PlannedWindows:
    """Windows that a plan lists: each holds whole documents, or parts of those longer than a window.

    A document follows an end_of_text, as in generation, and a continuation follows the start symbol. If another id
    precedes it, an extra symbol is inserted, which is read but not predicted. See `window_plans`.
    """

    def __init__(
        self,
        stream: IdStream,
        pieces: NDArray[Any],
        firsts: NDArray[np.int64],
        context_length: int,
        several: bool,
        tokenizer: Tokenizer,
    ) -> None:
        """pieces, firsts: arrays of a plan. several: a window may hold several documents, which are then numbered."""
        self._stream = stream
        self._given = stream.given
        self._pieces = pieces
        self._firsts = firsts
        self._context_length = context_length
        self._several = several
        self._tokenizer = tokenizer
        self.num_windows = len(firsts) - 1

    def read(self, windows: NDArray[np.int64]) -> Windows:
        shape = (len(windows), self._context_length)
        ids = np.full(shape, self._tokenizer.pad_id, dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.bool_)
        document_ids = np.full(shape, NO_DOCUMENT, dtype=np.int32)
        bounds = zip(self._firsts[windows].tolist(), self._firsts[windows + 1].tolist(), strict=True)
        for row, (first, last) in enumerate(bounds):
            place = 0
            for document, piece in enumerate(self._pieces[first:last].tolist()):
                start, length, continues = piece
                if place == 0 and not continues:
                    ids[row, 0], document_ids[row, 0] = self._tokenizer.end_of_text_id, document
                    place = 1
                elif place and continues:
                    ids[row, place] = self._tokenizer.start_id
                    place += 1
                stop = place + length
                ids[row, place:stop] = self._stream.read(start, start + length)
                loss_mask[row, place:stop] = self._given is None or self._given.read(start, start + length) == 0
                document_ids[row, place:stop] = document
                place = stop
        return Windows(ids, loss_mask, document_ids if self._several else None)
