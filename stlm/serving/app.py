"""The application: routes, streams, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from stlm.serving.chat import ChatTemplate
from stlm.serving.protocol import Asked, Limits, Refused, parse_body, read_request
from stlm.serving.scheduler import Busy, Job, Piece, Scheduler

LOOK_EVERY_S = 0.25  # whether a client that waits is still there


def build_app(scheduler: Scheduler, name: str, limits: Limits, template: ChatTemplate) -> FastAPI:
    """The server of one model, which clients call `name`."""
    app = FastAPI(title="stlm", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path}: {error.detail}; see GET /v1/models and POST /v1/completions"
        return JSONResponse(Refused(told, status=error.status_code).body, error.status_code)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = scheduler.load()
        return {"status": "ok", "model": name, "running": running, "waiting": waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        described = {
            "id": name, "object": "model", "created": started, "owned_by": "stlm",
            "context_length": scheduler.model.config.context_length,
        }  # fmt: skip
        return {"object": "list", "data": [described]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    async def answer(request: Request, chat: bool) -> Response:
        asked = read_request(parse_body(await read_body(request, limits)), chat, limits, template)
        if asked.model not in (None, name):
            raise Refused(f"model: got {asked.model!r}, expected {name!r}", "model", 404, "model_not_found")
        exchange = Exchange(scheduler, asked, name)
        if asked.stream:
            return StreamingResponse(exchange.events(), media_type="text/event-stream")
        return JSONResponse(await exchange.whole(request))

    return app


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request, or Refused where it is too large or too slow."""

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise Refused(f"the body: expected at most {limits.max_body_bytes:,} bytes", status=413)
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_timeout_s)
    except asyncio.TimeoutError:
        raise Refused(f"the body did not arrive within {limits.body_timeout_s:g} s", status=408) from None


class Exchange:
    """One request on its way through the scheduler."""

    def __init__(self, scheduler: Scheduler, asked: Asked, name: str) -> None:
        self.scheduler, self.asked, self.name = scheduler, asked, name
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.jobs = [self._job(place) for place in range(len(asked.prompts) * asked.choices)]
        longest = max(len(job.row.read) for job in self.jobs)
        if longest >= scheduler.model.config.context_length:
            raise Refused(
                f"the prompt has {longest - 1} ids, expected at most {scheduler.model.config.context_length - 2}, for "
                f"the context is {scheduler.model.config.context_length}; shorten it",
                "messages" if asked.chat else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        self.prompt_ids = sum(len(job.row.read) - 1 for job in self.jobs[:: asked.choices])
        try:
            scheduler.submit(self.jobs)
        except Busy:
            raise Refused("too many requests are waiting; try again in a moment", status=429) from None

    def _job(self, place: int) -> Job:
        """Choice c of a prompt draws as a text alone does with seed + c."""
        asked, loop = self.asked, asyncio.get_running_loop()
        prompt, choice = divmod(place, asked.choices)

        def tell(piece: Piece) -> None:
            try:
                loop.call_soon_threadsafe(self.pieces.put_nowait, (place, piece))
            except RuntimeError:  # the server has ended
                job.cancelled = True

        sampling = replace(asked.sampling, seed=asked.sampling.seed + choice)
        job = self.scheduler.job(asked.prompts[prompt], sampling, asked.max_tokens, asked.stop, tell)
        return job

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [""] * len(self.jobs)
        finishes: dict[int, str] = {}
        try:
            while len(finishes) < len(self.jobs):
                try:
                    place, piece = await asyncio.wait_for(self.pieces.get(), LOOK_EVERY_S)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        raise Refused("the client has left", status=499) from None
                    continue
                texts[place] += piece.text
                if piece.finish is not None:
                    finishes[place] = piece.finish
        finally:
            self.scheduler.cancel(self.jobs)
        if "error" in finishes.values():
            raise Refused("the model failed", status=500)
        choices = []
        for place, text in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
            choices.append({"index": place, **said, "logprobs": None, "finish_reason": finishes[place]})
        return {**self._head("chat.completion" if self.asked.chat else "text_completion"), "choices": choices,
                "usage": self._usage()}  # fmt: skip

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self._head("chat.completion.chunk" if self.asked.chat else "text_completion")
        unfinished = len(self.jobs)
        try:
            if self.asked.chat:
                for place in range(len(self.jobs)):
                    yield event(head, [choice_of(place, {"delta": {"role": "assistant", "content": ""}}, None)])
            while unfinished:
                place, piece = await self.pieces.get()
                unfinished -= piece.finish is not None
                if piece.finish == "error":
                    yield f"data: {json.dumps(Refused('the model failed', status=500).body)}\n\n"
                    return
                delta = {"content": piece.text} if piece.text else {}
                said = {"delta": delta} if self.asked.chat else {"text": piece.text}
                yield event(head, [choice_of(place, said, piece.finish)])
            if self.asked.usage:
                yield event({**head, "usage": self._usage()}, [])
            yield "data: [DONE]\n\n"
        finally:  # also where the client has left
            self.scheduler.cancel(self.jobs)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _usage(self) -> dict[str, int]:
        drawn = sum(self.asked.max_tokens - job.row.draws.left for job in self.jobs)
        return {
            "prompt_tokens": self.prompt_ids,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_ids + drawn,
        }


def event(head: dict[str, Any], choices: list[dict[str, Any]]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps({**head, 'choices': choices})}\n\n"


def choice_of(place: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    """One choice of an event."""
    return {"index": place, **said, "logprobs": None, "finish_reason": finish}
