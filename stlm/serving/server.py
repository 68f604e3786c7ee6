"""The listening socket and the HTTP server, which closes slow clients and answers all requests before it stops."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from stlm.errors import StlmError
from stlm.serving.protocol import RequestError, ServerLimits
from stlm.serving.scheduler import Scheduler

_LINGER_S = 2  # seconds for a rejected client to read its answer
_READ_AHEAD_BYTES = 1 << 16  # bytes that a client may send before it is answered
GRACE_S = 5  # time for texts to finish when the server stops
KEEP_ALIVE_S = 75  # longer than clients keep connections, so that they close first and lose no request


def listen_on(host: str, port: str) -> socket.socket:
    """Bind a socket, which refuses connections until the server starts. Raises StlmError if that fails."""
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise StlmError(f"--port: got {port!r}, expected 0 (any free one) to 65535; 8000 would work")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise StlmError(f"--host: got {host!r}, expected an address of this machine ({error}); try 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise StlmError(f"--host: {host} is not an address of this machine; try 127.0.0.1") from None
        problem = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise StlmError(f"--port: {port} on {host} {problem}; choose another one, or 0 for any free one") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Return True if only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """Return the URL for clients on this machine."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


class HTTPProtocol(H11Protocol):
    """HTTP/1.1 with a time limit on the headers of a request."""

    head_timeout_s = ServerLimits.head_timeout_s
    _timer: asyncio.TimerHandle | None = None
    _head_started = False  # whether a request's headers have arrived in part
    _rejected = False  # answered without a complete request; further bytes are ignored

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        if self._rejected:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are complete, or wrong and answered
            self._stop_waiting()
        elif self._timer is None:
            self._wait_for_head()
        self._head_started = self._timer is not None
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _READ_AHEAD_BYTES:
            self.flow.resume_reading()  # keep reading, to notice if a client that sends more disconnects

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Shut down: answer a partial request, close an idle connection, and let a running request finish."""
        if self._head_started:
            self._answer(RequestError("the server is stopping", status=503))
        else:
            super().shutdown()

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self._head_timed_out)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._head_started = None, False

    def _head_timed_out(self) -> None:
        problem = f"the headers of the request did not arrive within {self.head_timeout_s:g} s"
        self._answer(RequestError(problem, status=408))

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP."""
        problem = f"{msg} Expected HTTP/1.1 with one Host header and at most 64 KiB of headers"
        self._answer(RequestError(problem, status=400))

    def _answer(self, error: RequestError) -> None:
        """Send an error without a complete request, and close after the client had time to read it.

        Closing a connection with unread bytes of the client resets it, and the answer is lost.
        """
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # its body is not valid HTTP
            started = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if started:
                self.transport.close()
                return
        self._rejected = True
        body = json.dumps(error.body).encode()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            "",
            "",
        )
        self.transport.write("\r\n".join(head).encode() + body)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, self.transport.close)


class Server(uvicorn.Server):
    """Server that runs until a signal arrives or `should_exit` is set; texts then have `GRACE_S` to finish."""

    def __init__(self, app: FastAPI, scheduler: Scheduler, ready: Callable[[], None]) -> None:
        """`ready` is called once connections are accepted."""
        config = uvicorn.Config(
            app, http=HTTPProtocol, ws="none", log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2 * GRACE_S, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self._scheduler, self._ready = scheduler, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_S, self._scheduler.stop)  # running texts then get "closed"
        await super().shutdown(sockets)
