"""A running request: its jobs in the scheduler, and its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from stlm.serving.metrics import Metrics
from stlm.serving.prompts import EncodedPrompt
from stlm.serving.protocol import RequestError, RequestParams
from stlm.serving.scheduler import Busy, Closed, Job, Piece, Scheduler
from stlm.serving.tokens import Tokens, chat_logprobs, completion_logprobs


class ActiveRequest:
    """One request and its jobs in the scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        params: RequestParams,
        prompts: list[EncodedPrompt],
        name: str,
        metrics: Metrics,
        started: float,
    ) -> None:
        self.scheduler, self.params, self.prompts, self.name = scheduler, params, prompts, name
        self.metrics, self.started = metrics, started
        self.id = f"{'chatcmpl' if params.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.pieces: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()  # None: the client disconnected
        self.jobs = [self._job(place) for place in range(len(prompts) * params.choices)]
        self.prompt_ids = sum(len(one.prefix) + len(one.prompt.ids) - 1 for one in prompts)
        self._not_started = set(range(len(self.jobs)))  # indices of jobs without a piece so far
        self._closed = False
        try:
            scheduler.submit(self.jobs)
        except Busy:
            raise RequestError("too many requests are waiting; try again in a moment", status=429) from None
        except Closed:
            raise RequestError("the server is stopping", status=503) from None

    def _job(self, place: int) -> Job:
        """Create a job. Choice c of a prompt draws as a single text does with seed + c."""
        params, loop = self.params, asyncio.get_running_loop()
        number, choice = divmod(place, params.choices)

        def send(piece: Piece) -> None:
            try:
                loop.call_soon_threadsafe(self.pieces.put_nowait, (place, piece))
            except RuntimeError:  # the event loop is closed
                job.cancelled = True

        sampling = replace(params.sampling, seed=params.sampling.seed + choice)
        prompt = self.prompts[number].prompt
        job = self.scheduler.job(prompt, sampling, params.max_tokens, params.stop, send, params.logprobs)
        return job

    async def watch_disconnect(self, request: Request) -> None:
        """Wait until the client disconnects, and free its rows."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.scheduler.cancel(self.jobs)
        self.pieces.put_nowait(None)

    def close(self) -> None:
        """End the request: cancel its jobs and count it in the metrics."""
        if not self._closed:
            self._closed = True
            self.scheduler.cancel(self.jobs)
            self.metrics.answer.observe(time.perf_counter() - self.started)
            self.metrics.prompt_ids.inc(self.prompt_ids)
            self.metrics.completion_ids.inc(self._num_drawn)

    async def _next(self) -> tuple[int, Piece]:
        """Wait for the next piece, and return it with the index of its job. Raises RequestError if none will come."""
        next_piece = await self.pieces.get()
        if next_piece is None:
            raise RequestError("the client disconnected", status=499)
        place, piece = next_piece
        if piece.finish is not None:
            self.metrics.texts.labels(piece.finish).inc()
        if piece.finish == "error":
            raise RequestError("the model failed; see the server's log", status=500)
        if piece.finish == "closed":
            raise RequestError("the server is stopping", status=503)
        if len(self._not_started) == len(self.jobs):
            self.metrics.first_piece.observe(time.perf_counter() - self.started)
        return place, piece

    def _render(self, place: int, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """Return a piece's text and log-probabilities; with `echo`, the first piece begins with the prompt."""
        tokenizer, params = self.scheduler.model.tokenizer, self.params
        first = place in self._not_started
        self._not_started.discard(place)
        encoded = self.prompts[place // params.choices]
        text = encoded.text + piece.text if params.echo and first else piece.text
        if params.logprobs is None:
            return text, None
        if params.chat:
            return text, chat_logprobs(tokenizer, piece.tokens)
        logprobs = completion_logprobs(tokenizer, piece.tokens, len(encoded.text) if params.echo else 0)
        if params.echo and first:
            assert encoded.prompt.scores is not None
            tokens = Tokens(tokenizer)
            for id in encoded.prefix:
                tokens.add(encoded.prompt.scores[0]._replace(id=id), known=False)
            for scored in encoded.prompt.scores[1:]:
                tokens.add(scored)
            prompt_logprobs = completion_logprobs(tokenizer, tokens.all())
            logprobs = {name: prompt_logprobs[name] + logprobs[name] for name in logprobs}
        return text, logprobs

    async def _render_in_thread(self, place: int, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """Run `_render`, outside the event loop if it may be slow, as for log-probabilities of long prompts."""
        if self.params.logprobs is None:
            return self._render(place, piece)
        return await run_in_threadpool(self._render, place, piece)

    async def complete(self) -> dict[str, Any]:
        """Return the complete answer."""
        texts = [""] * len(self.jobs)
        finishes: dict[int, str] = {}
        logprobs: list[dict[str, Any] | None] = [None] * len(self.jobs)
        while len(finishes) < len(self.jobs):
            place, piece = await self._next()
            text, more = await self._render_in_thread(place, piece)
            texts[place] += text
            logprobs[place] = merge_logprobs(logprobs[place], more)
            if piece.finish is not None:
                finishes[place] = piece.finish
        choices = []
        for place, text in enumerate(texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.params.chat else {"text": text}
            choices.append(build_choice(place, content, logprobs[place], finishes[place]))
        return {**self._head("chat.completion" if self.params.chat else "text_completion"), "choices": choices,
                "usage": self._usage()}  # fmt: skip

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        head = self._head("chat.completion.chunk" if self.params.chat else "text_completion")
        if self.params.usage:
            head["usage"] = None
        unfinished = len(self.jobs)
        try:
            if self.params.chat:
                for place in range(len(self.jobs)):
                    delta = {"role": "assistant", "content": ""}
                    yield event(head, [build_choice(place, {"delta": delta}, None, None)])
            while unfinished:
                place, piece = await self._next()
                unfinished -= piece.finish is not None
                text, logprobs = await self._render_in_thread(place, piece)
                content = {"delta": {"content": text} if text else {}} if self.params.chat else {"text": text}
                yield event(head, [build_choice(place, content, logprobs, piece.finish)])
        except RequestError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.params.usage:
            yield event({**head, "usage": self._usage()}, [])
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    @property
    def _num_drawn(self) -> int:
        return sum(self.params.max_tokens - job.row.sampler.remaining for job in self.jobs)

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_ids,
            "completion_tokens": self._num_drawn,
            "total_tokens": self.prompt_ids + self._num_drawn,
        }


class EventStream(StreamingResponse):
    """Response as server-sent events, which frees its rows however it ends."""

    def __init__(self, active: ActiveRequest, watch: asyncio.Task[None]) -> None:
        super().__init__(active.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.active, self.watch = active, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.watch.cancel()
            self.active.close()


def event(head: dict[str, Any], choices: list[dict[str, Any]]) -> str:
    """Format one server-sent event."""
    return f"data: {json.dumps({**head, 'choices': choices})}\n\n"


def build_choice(
    place: int, content: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    """Build one choice of an answer or event."""
    return {"index": place, **content, "logprobs": logprobs, "finish_reason": finish}


def merge_logprobs(before: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    """Concatenate the log-probabilities of two pieces."""
    if before is None or more is None:
        return before or more
    return {name: before[name] + more[name] if isinstance(before[name], list) else before[name] for name in before}
