"""Metrics of a running server, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stlm.serving.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of requests and ids, latencies of answers, and the load of a scheduler."""

    def __init__(self, scheduler: Scheduler, name: str, routes: frozenset[str]) -> None:
        """`routes`: paths counted by name; any other path counts as "other"."""
        self.routes = routes
        disable_created_metrics()  # no second series for each metric
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("stlm_model", "Model that is served", registry=registry).info({"name": name})
        self.requests = Counter("stlm_requests", "Requests answered", ["route", "status"], registry=registry)
        self.prompt_ids = Counter("stlm_prompt_ids", "Ids of prompts read", registry=registry)
        self.completion_ids = Counter("stlm_completion_ids", "Ids drawn", registry=registry)
        self.texts = Counter("stlm_texts", "Texts ended, by the reason", ["finish"], registry=registry)
        self.first_piece = Histogram(
            "stlm_first_piece_seconds", "From a request to the first piece of its answer",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.answer = Histogram(
            "stlm_answer_seconds", "From a request to the end of its answer", buckets=_SECONDS, registry=registry
        )
        running = Gauge("stlm_texts_running", "Texts that are being written", registry=registry)
        waiting = Gauge("stlm_texts_waiting", "Texts that wait for a free row", registry=registry)
        running.set_function(lambda: scheduler.load()[0])
        waiting.set_function(lambda: scheduler.load()[1])

    def page(self) -> Response:
        """Return the current metrics."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class CountRequests:
    """Middleware that counts each answer by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        route = path if path in self.metrics.routes else "/v1/models/" if path.startswith("/v1/models/") else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            self.metrics.requests.labels(route, "500").inc()
            raise
