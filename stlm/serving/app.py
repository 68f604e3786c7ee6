"""The application: routes, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from stlm.chat.template import ChatTemplate
from stlm.serving.access import Access, CheckAccess, DrainBodies
from stlm.serving.active_request import ActiveRequest, EventStream
from stlm.serving.metrics import CountRequests, Metrics
from stlm.serving.prompts import EncodedPrompt, encode_prompt
from stlm.serving.protocol import RequestError, RequestParams, ServerLimits, parse_body, parse_request
from stlm.serving.scheduler import Scheduler

READ_METHODS = ["GET", "HEAD"]


def build_app(
    scheduler: Scheduler, name: str, limits: ServerLimits, template: ChatTemplate, access: Access | None = None
) -> FastAPI:
    """Build the application that serves one model under the name `name`."""
    app = FastAPI(title="stlm", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    access = access or Access()
    description = {
        "id": name, "object": "model", "created": int(time.time()), "owned_by": "stlm",
        "context_length": scheduler.model.config.context_length,
    }  # fmt: skip
    routes = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"}
    metrics = Metrics(scheduler, name, frozenset(routes))

    # The middleware added last sees a request first.
    app.add_middleware(CheckAccess, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["Retry-After"],
        )  # fmt: skip
    app.add_middleware(CountRequests, metrics=metrics)
    app.add_middleware(DrainBodies)

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; see GET /v1/models and POST /v1/completions"
        body = RequestError(message, status=error.status_code).body
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return RequestError("internal error; see the server's log", status=500).response()

    @app.api_route("/health", methods=READ_METHODS)
    async def health() -> dict[str, Any]:
        running, waiting = scheduler.load()
        return {"status": "ok", "model": name, "running": running, "waiting": waiting}

    @app.api_route("/metrics", methods=READ_METHODS)
    async def metrics_page() -> Response:
        return metrics.page()

    @app.api_route("/v1/models", methods=READ_METHODS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    @app.api_route("/v1/models/{model:path}", methods=READ_METHODS)
    async def model(model: str) -> dict[str, Any]:
        check_name(model)
        return description

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    def check_name(model: str | None) -> None:
        if model not in (None, name):
            raise RequestError(f"model: got {model!r}, expected {name!r}", "model", 404, "model_not_found")

    async def answer(request: Request, chat: bool) -> Response:
        started, body = time.perf_counter(), await read_body(request, limits)

        def parse() -> tuple[RequestParams, list[EncodedPrompt]]:
            params = parse_request(parse_body(body), chat, limits, template)
            check_name(params.model)
            return params, [encode_prompt(scheduler.model, params, prompt) for prompt in params.prompts]

        params, prompts = await run_in_threadpool(parse)  # encoding a long text is slow
        active = ActiveRequest(scheduler, params, prompts, name, metrics, started)
        watch = asyncio.create_task(active.watch_disconnect(request))
        if params.stream:
            return EventStream(active, watch)
        try:
            return await run_in_threadpool(JSONResponse, await active.complete())
        finally:
            watch.cancel()
            active.close()

    return app


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """Read the body of a request. Raises RequestError if it is too large or too slow."""
    too_large = RequestError(f"the body: expected at most {limits.max_body_bytes:,} bytes", status=413)
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
        raise RequestError(f"the body did not arrive within {limits.body_timeout_s:g} s", status=408) from None
