"""The application: routes, streams, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from data_pipeline.tokenizers import Tokenizer
from stlm.serving.access import Access, CheckAccess, DrainBodies
from stlm.serving.chat import ChatTemplate
from stlm.serving.metrics import CountRequests, Metrics
from stlm.serving.protocol import Asked, Refused, ServerLimits, parse_body, read_request
from stlm.serving.scheduler import Busy, Closed, Job, Piece, Prompt, Scheduler
from stlm.serving.tokens import Tokens, chat_logprobs, completion_logprobs
from stlm.stlm import STLM

READ = ["GET", "HEAD"]


def build_app(
    scheduler: Scheduler, name: str, limits: ServerLimits, template: ChatTemplate, access: Access | None = None
) -> FastAPI:
    """Build the application that serves one model under the name `name`."""
    app = FastAPI(title="stlm", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    access = access or Access()
    started = int(time.time())
    described = {
        "id": name, "object": "model", "created": started, "owned_by": "stlm",
        "context_length": scheduler.model.config.context_length,
    }  # fmt: skip
    answers = "/v1/completions", "/v1/chat/completions"
    metrics = Metrics(scheduler, name, frozenset({*answers, "/v1/models", "/health", "/metrics"}))

    # The middleware added last sees a request first.
    app.add_middleware(CheckAccess, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["Retry-After"],
        )  # fmt: skip
    app.add_middleware(CountRequests, metrics=metrics)
    app.add_middleware(DrainBodies)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else {"Connection": "close"}
        return JSONResponse(error.body, error.status, headers=headers if error.status in (408, 413, 429, 503) else None)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path}: {error.detail}; see GET /v1/models and POST /v1/completions"
        return JSONResponse(Refused(told, status=error.status_code).body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(Refused("the server failed; its log says more", status=500).body, 500)

    @app.api_route("/health", methods=READ)
    async def health() -> dict[str, Any]:
        running, waiting = scheduler.load()
        return {"status": "ok", "model": name, "running": running, "waiting": waiting}

    @app.api_route("/metrics", methods=READ)
    async def numbers() -> Response:
        return metrics.page()

    @app.api_route("/v1/models", methods=READ)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described]}

    @app.api_route("/v1/models/{model:path}", methods=READ)
    async def model(model: str) -> dict[str, Any]:
        check_name(model)
        return described

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    def check_name(asked: str | None) -> None:
        if asked not in (None, name):
            raise Refused(f"model: got {asked!r}, expected {name!r}", "model", 404, "model_not_found")

    async def answer(request: Request, chat: bool) -> Response:
        begun, body = time.perf_counter(), await read_body(request, limits)

        def understand() -> tuple[Asked, list[Given]]:
            asked = read_request(parse_body(body), chat, limits, template)
            check_name(asked.model)
            return asked, [given_of(scheduler.model, asked, prompt) for prompt in asked.prompts]

        asked, given = await run_in_threadpool(understand)  # encoding a long text is slow
        exchange = Exchange(scheduler, asked, given, name, metrics, begun)
        watch = asyncio.create_task(exchange.watch(request))
        if asked.stream:
            return EventStream(exchange, watch)
        try:
            found = await exchange.whole()
            return await run_in_threadpool(JSONResponse, found)
        finally:
            watch.cancel()
            exchange.close()

    return app


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """Read the body of a request. Raises Refused if it is too large or too slow."""
    too_large = Refused(f"the body: expected at most {limits.max_body_bytes:,} bytes", status=413)
    if int(request.headers.get("content-length", 0)) > limits.max_body_bytes:  # unread, so no 100 Continue is sent
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_timeout_s)
    except asyncio.TimeoutError:
        raise Refused(f"the body did not arrive within {limits.body_timeout_s:g} s", status=408) from None


@dataclass
class Given:
    """A prompt as given, and as the model reads it."""

    prompt: Prompt
    text: str
    front: list[int]  # symbols of a document's beginning that the given ids contain


def given_of(model: STLM, asked: Asked, prompt: str | list[int]) -> Given:
    """Encode a prompt, or check its ids. Raises Refused if an id is unknown or the prompt exceeds the context."""
    tokenizer, context_length = model.tokenizer, model.config.context_length
    param = "messages" if asked.chat else "prompt"
    scores_only = asked.echo and asked.max_tokens <= 1  # an id drawn at the last position is not scored
    longest = context_length - (1 if scores_only else 2)
    if not isinstance(prompt, str):
        for place, id in enumerate(prompt):
            if not 0 <= id < tokenizer.vocab_size:
                last = tokenizer.vocab_size - 1
                raise Refused(f"prompt: got id {str(id)[:40]} at place {place}, expected 0 to {last}", "prompt")
    for id, _ in asked.sampling.logit_bias:
        if id >= tokenizer.vocab_size:
            raise Refused(f"logit_bias: got id {id}, expected 0 to {tokenizer.vocab_size - 1}", "logit_bias")

    def refuse(told: str) -> None:
        raise Refused(
            f"the prompt has {told} ids, expected at most {longest}, for the context is {context_length}; shorten it",
            param, code="context_length_exceeded",
        )  # fmt: skip

    if isinstance(prompt, str):
        least = -(-len(prompt.encode()) // int(tokenizer.bytes_per_id.max()))
        if least > longest and len(prompt) > 1 << 16:
            refuse(f"at least {least}")  # without encoding what may be a megabyte
        ids, text, front = model.prompt_ids(prompt), prompt, []
    else:
        front = front_of(tokenizer, prompt)
        text = tokenizer.decode(prompt[len(front) :])
        ids = [tokenizer.end_of_text_id, *prompt[len(front) :]]
    if len(ids) - 1 > longest:
        refuse(str(len(ids) - 1))
    return Given(Prompt(ids, asked.logprobs if asked.echo else None), text, front)


def front_of(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return the first ids of a prompt that mark the beginning of a document: start, end_of_text, or both."""
    number = 0
    for symbol in (tokenizer.start_id, tokenizer.end_of_text_id):
        number += ids[number : number + 1] == [symbol]
    return ids[:number]


class Exchange:
    """One request and its jobs in the scheduler."""

    def __init__(
        self, scheduler: Scheduler, asked: Asked, given: list[Given], name: str, metrics: Metrics, begun: float
    ) -> None:
        self.scheduler, self.asked, self.given, self.name = scheduler, asked, given, name
        self.metrics, self.begun = metrics, begun
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.pieces: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()  # None: the client disconnected
        self.jobs = [self._job(place) for place in range(len(given) * asked.choices)]
        self.prompt_ids = sum(len(one.front) + len(one.prompt.ids) - 1 for one in given)
        self._silent = set(range(len(self.jobs)))  # indices of jobs without a piece so far
        self._closed = False
        try:
            scheduler.submit(self.jobs)
        except Busy:
            raise Refused("too many requests are waiting; try again in a moment", status=429) from None
        except Closed:
            raise Refused("the server is stopping", status=503) from None

    def _job(self, place: int) -> Job:
        """Create a job. Choice c of a prompt draws as a single text does with seed + c."""
        asked, loop = self.asked, asyncio.get_running_loop()
        number, choice = divmod(place, asked.choices)

        def tell(piece: Piece) -> None:
            try:
                loop.call_soon_threadsafe(self.pieces.put_nowait, (place, piece))
            except RuntimeError:  # the event loop is closed
                job.cancelled = True

        sampling = replace(asked.sampling, seed=asked.sampling.seed + choice)
        prompt = self.given[number].prompt
        job = self.scheduler.job(prompt, sampling, asked.max_tokens, asked.stop, tell, asked.logprobs)
        return job

    async def watch(self, request: Request) -> None:
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
            self.metrics.answer.observe(time.perf_counter() - self.begun)
            self.metrics.prompt_ids.inc(self.prompt_ids)
            self.metrics.completion_ids.inc(self._drawn)

    async def _next(self) -> tuple[int, Piece]:
        """Wait for the next piece, and return it with the index of its job. Raises Refused if there will be none."""
        found = await self.pieces.get()
        if found is None:
            raise Refused("the client has left", status=499)
        place, piece = found
        if piece.finish is not None:
            self.metrics.texts.labels(piece.finish).inc()
        if piece.finish == "error":
            raise Refused("the model failed", status=500)
        if piece.finish == "closed":
            raise Refused("the server is stopping", status=503)
        if len(self._silent) == len(self.jobs):
            self.metrics.first_piece.observe(time.perf_counter() - self.begun)
        return place, piece

    def _choice(self, place: int, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """Return a piece's text and log-probabilities; with `echo`, the first piece begins with the prompt."""
        tokenizer, asked = self.scheduler.model.tokenizer, self.asked
        first = place in self._silent
        self._silent.discard(place)
        given = self.given[place // asked.choices]
        text = given.text + piece.text if asked.echo and first else piece.text
        if asked.logprobs is None:
            return text, None
        if asked.chat:
            return text, chat_logprobs(tokenizer, piece.tokens)
        found = completion_logprobs(tokenizer, piece.tokens, len(given.text) if asked.echo else 0)
        if asked.echo and first:
            assert given.prompt.scores is not None
            tokens = Tokens(tokenizer)
            for id in given.front:
                tokens.add(given.prompt.scores[0]._replace(id=id), known=False)
            for scored in given.prompt.scores[1:]:
                tokens.add(scored)
            of_prompt = completion_logprobs(tokenizer, tokens.all())
            found = {name: of_prompt[name] + found[name] for name in found}
        return text, found

    async def _said(self, place: int, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """Run `_choice`, outside the event loop if it may be slow, as for log-probabilities of long prompts."""
        if self.asked.logprobs is None:
            return self._choice(place, piece)
        return await run_in_threadpool(self._choice, place, piece)

    async def whole(self) -> dict[str, Any]:
        """Return the complete answer."""
        texts = [""] * len(self.jobs)
        finishes: dict[int, str] = {}
        logprobs: list[dict[str, Any] | None] = [None] * len(self.jobs)
        while len(finishes) < len(self.jobs):
            place, piece = await self._next()
            text, found = await self._said(place, piece)
            texts[place] += text
            logprobs[place] = merged(logprobs[place], found)
            if piece.finish is not None:
                finishes[place] = piece.finish
        choices = []
        for place, text in enumerate(texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self.asked.chat else {"text": text}
            choices.append(choice_of(place, said, logprobs[place], finishes[place]))
        return {**self._head("chat.completion" if self.asked.chat else "text_completion"), "choices": choices,
                "usage": self._usage()}  # fmt: skip

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        head = self._head("chat.completion.chunk" if self.asked.chat else "text_completion")
        if self.asked.usage:
            head["usage"] = None
        unfinished = len(self.jobs)
        try:
            if self.asked.chat:
                for place in range(len(self.jobs)):
                    yield event(head, [choice_of(place, {"delta": {"role": "assistant", "content": ""}}, None, None)])
            while unfinished:
                place, piece = await self._next()
                unfinished -= piece.finish is not None
                text, logprobs = await self._said(place, piece)
                said = {"delta": {"content": text} if text else {}} if self.asked.chat else {"text": text}
                yield event(head, [choice_of(place, said, logprobs, piece.finish)])
        except Refused as refused:
            yield f"data: {json.dumps(refused.body)}\n\n"
            return
        if self.asked.usage:
            yield event({**head, "usage": self._usage()}, [])
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    @property
    def _drawn(self) -> int:
        return sum(self.asked.max_tokens - job.row.sampler.remaining for job in self.jobs)

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_ids,
            "completion_tokens": self._drawn,
            "total_tokens": self.prompt_ids + self._drawn,
        }


class EventStream(StreamingResponse):
    """Response as server-sent events, which frees its rows however it ends."""

    def __init__(self, exchange: Exchange, watch: asyncio.Task[None]) -> None:
        super().__init__(exchange.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.exchange, self.watch = exchange, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.watch.cancel()
            self.exchange.close()


def event(head: dict[str, Any], choices: list[dict[str, Any]]) -> str:
    """Format one server-sent event."""
    return f"data: {json.dumps({**head, 'choices': choices})}\n\n"


def choice_of(place: int, said: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    """Build one choice of an answer or event."""
    return {"index": place, **said, "logprobs": logprobs, "finish_reason": finish}


def merged(before: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    """Concatenate the log-probabilities of two pieces."""
    if before is None or more is None:
        return before or more
    return {name: before[name] + more[name] if isinstance(before[name], list) else before[name] for name in before}
