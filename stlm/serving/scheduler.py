"""Continuous batching: one thread steps one batch, in which texts of all requests join and leave at every step.

As in Orca (Yu et al. 2022, OSDI, section 3.2): a request waits for a free row, never for the end of another's text.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from stlm.generation import Batch, Row, Sampling, TextStream
from stlm.stlm import STLM


class Busy(Exception):
    """Too many texts are waiting already."""


class Piece(NamedTuple):
    """Some text of a job, and how it ended if it did: "stop", "length", or "error"."""

    text: str
    finish: str | None


class Job:
    """One text to be written; `tell` is called with its pieces, from the scheduler's thread."""

    def __init__(self, row: Row, stream: TextStream, tell: Callable[[Piece], None]) -> None:
        self.row = row
        self.stream = stream
        self.tell = tell
        self.cancelled = False


class Scheduler:
    """Owns a model, and the thread in which it is run.

    `max_rows` texts are decoded together; `max_waiting` more may wait. What is written for a job is what
    `STLM.generate` says, whatever else is in the batch; `precision` as in `STLM.settle`.
    """

    def __init__(self, model: STLM, *, max_rows: int, max_waiting: int, precision: str = "fp32") -> None:
        self.model = model.settle(precision)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Row, Job] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def job(
        self, prompt: str, sampling: Sampling, max_new_ids: int, stop: Sequence[str], tell: Callable[[Piece], None]
    ) -> Job:
        """A text to be written, not begun yet."""
        return Job(self.model.row(prompt, sampling, max_new_ids), TextStream(self.model.tokenizer, stop), tell)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs take part, all or none. Raises Busy."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self.max_waiting and self._waiting:
                raise Busy
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their rows become free at the next step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def load(self) -> tuple[int, int]:
        """Texts that are being written, and those that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def close(self) -> None:
        """End the thread; texts that are not finished stay so."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        batch = Batch(self.model, self.model.config.context_length)
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                self._exchange(batch)
            for row in batch.step():
                job = self._running[row]
                try:
                    if row.error is not None:
                        raise row.error
                    self._say(batch, job)
                except Exception:  # of the program, or memory that is short: the client must not wait for ever
                    logging.getLogger("uvicorn.error").exception("a text cannot be continued")
                    self._fail(batch, job)

    def _exchange(self, batch: Batch) -> None:
        """Rows whose clients have left become free, and those who wait take the free ones."""
        for job in [job for job in self._running.values() if job.cancelled]:
            batch.remove(job.row)
            del self._running[job.row]
        while self._waiting and len(self._running) < self.max_rows:
            job = self._waiting.popleft()
            if not job.cancelled:
                self._running[job.row] = job
                batch.add([job.row])

    def _fail(self, batch: Batch, job: Job) -> None:
        """End one job, and no other, with an error."""
        batch.remove(job.row)
        with self._changed:
            self._running.pop(job.row, None)
        with suppress(Exception):  # telling may be what failed
            job.tell(Piece("", "error"))

    def _say(self, batch: Batch, job: Job) -> None:
        """Tell a job what was drawn for it."""
        newest, stream = job.row.newest, job.stream
        assert newest is not None
        ended = newest == self.model.tokenizer.end_of_text_id
        text = "" if ended else stream.push(newest)
        finish = "stop" if ended or stream.stopped else "length" if job.row.draws.left == 0 else None
        if finish is not None:
            text += stream.close()
            if stream.stopped:  # the stop string may have been completed by what was held back
                finish = "stop"
            batch.remove(job.row)
            with self._changed:
                del self._running[job.row]
        if text or finish:
            job.tell(Piece(text, finish))
