"""Continuous batching: one thread steps one batch, which texts of all requests join and leave at any step.

As in Orca (Yu et al. 2022, OSDI, section 3.2), a request waits for a free row, not for the whole batch to finish.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from stlm.generation import DecodingBatch, DecodingRow, Sampling, ScoredId, TextStream, score_ids
from stlm.serving.tokens import Token, Tokens
from stlm.stlm import STLM


class Busy(Exception):
    """Raised when too many texts are waiting already."""


class Closed(Exception):
    """Raised after the scheduler has stopped."""


class Piece(NamedTuple):
    """A piece of a job's text, and in the last piece the reason of its end: "stop", "length", "error" or "closed"."""

    text: str
    finish: str | None
    tokens: Sequence[Token] = ()  # ids whose text begins in this piece, if log-probabilities are requested


class Prompt:
    """A prompt of a request, shared by all its choices."""

    def __init__(self, ids: Sequence[int], num_top: int | None = None) -> None:
        """`num_top`: also score the prompt and this many of the most probable ids; None: no scores."""
        self.ids = ids  # end_of_text first
        self.num_top = num_top
        self.scores: list[ScoredId] | None = None  # of each id, set before the first piece of a job

    def score(self, model: STLM) -> None:
        """Score the ids, once."""
        if self.num_top is not None and self.scores is None:
            self.scores = score_ids(model, self.ids, self.num_top)


class Job:
    """One text to be generated; the scheduler's thread calls `send` with its pieces."""

    def __init__(
        self, prompt: Prompt, row: DecodingRow, stream: TextStream, tokens: Tokens, send: Callable[[Piece], None]
    ) -> None:
        self.prompt = prompt
        self.row = row
        self.stream = stream
        self.tokens = tokens
        self.send = send
        self.cancelled = False


class Scheduler:
    """Owner of a model and of the thread in which it runs.

    `max_rows` texts are decoded together; `max_waiting` more may wait. A job's text equals that of `STLM.generate`,
    whatever else is in the batch. `precision` as in `STLM.optimize_for_decoding`.
    """

    def __init__(self, model: STLM, *, max_rows: int, max_waiting: int, precision: str = "fp32") -> None:
        self.model = model.optimize_for_decoding(precision)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[DecodingRow, Job] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def job(
        self,
        prompt: Prompt,
        sampling: Sampling,
        max_new_ids: int,
        stop: Sequence[str],
        send: Callable[[Piece], None],
        num_top: int | None = None,
    ) -> Job:
        """Create a job without starting it. `num_top` as in `DecodingRow`."""
        row = self.model.row(prompt.ids, sampling, max_new_ids, num_top)
        return Job(prompt, row, TextStream(self.model.tokenizer, stop), Tokens(self.model.tokenizer), send)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. Raises Busy or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._waiting) + len(jobs) > self.max_waiting and self._waiting:
                raise Busy
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs; their rows become free at the next step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def load(self) -> tuple[int, int]:
        """Return the number of texts being generated, and of those that wait."""
        with self._changed:
            return len(self._running), sum(not job.cancelled for job in self._waiting)

    def stop(self) -> None:
        """Stop the thread after its current step; unfinished jobs receive the piece "closed"."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self) -> None:
        """Call `stop` and wait for the thread to end."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        batch = DecodingBatch(self.model, self.model.config.context_length)
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    unfinished = [*self._running.values(), *self._waiting]
                    self._running, self._waiting = {}, deque()
                    break
                joining = self._admit(batch)
            for job in joining:
                self._start(batch, job)
            for row in batch.step():
                job = self._running[row]
                try:
                    if row.error is not None:
                        raise row.error
                    self._emit(batch, job)
                except Exception:  # a bug, or out of memory: the client must not wait forever
                    logging.getLogger("uvicorn.error").exception("failed to continue a text")
                    self._fail(batch, job)
        for job in unfinished:
            job.send(Piece("", "closed"))

    def _admit(self, batch: DecodingBatch) -> list[Job]:
        """Free the rows of cancelled jobs; return the waiting jobs that take free rows."""
        for job in [job for job in self._running.values() if job.cancelled]:
            batch.remove(job.row)
            del self._running[job.row]
        joining = []
        while self._waiting and len(self._running) < self.max_rows:
            job = self._waiting.popleft()
            if not job.cancelled:
                self._running[job.row] = job
                joining.append(job)
        return joining

    def _start(self, batch: DecodingBatch, job: Job) -> None:
        """Score a job's prompt if requested, and add the job to the batch if it has ids to draw."""
        try:
            job.prompt.score(self.model)
        except Exception:
            logging.getLogger("uvicorn.error").exception("failed to score a prompt")
            self._fail(batch, job)
            return
        if job.row.sampler.remaining:
            batch.add([job.row])
        else:
            self._finish(job, Piece("", "length"))

    def _fail(self, batch: DecodingBatch, job: Job) -> None:
        """End one job with an error; others continue."""
        batch.remove(job.row)
        with self._changed:
            self._running.pop(job.row, None)
        with suppress(Exception):  # `send` itself may have failed
            job.send(Piece("", "error"))

    def _emit(self, batch: DecodingBatch, job: Job) -> None:
        """Pass a job the text drawn for it."""
        id, stream = job.row.last_id, job.stream
        assert id is not None
        ended = id == self.model.tokenizer.end_of_text_id
        if job.row.score is not None:
            job.tokens.add(job.row.score)
        text = "" if ended else stream.push(id)
        finish = "stop" if ended or stream.stopped else "length" if job.row.sampler.remaining == 0 else None
        if finish is not None:
            text += stream.close()
            if stream.stopped:  # the held-back text may complete the stop string
                finish = "stop"
            batch.remove(job.row)
        piece = Piece(text, finish, job.tokens.release(text, finish is not None))
        if finish is not None:
            self._finish(job, piece)
        elif text:
            job.send(piece)

    def _finish(self, job: Job, piece: Piece) -> None:
        """Send a job's last piece and free its row."""
        with self._changed:
            del self._running[job.row]
        job.send(piece)
