"""The listening socket and the HTTP server: slow clients are closed, and everybody is answered before the end."""

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
from stlm.serving.protocol import Refused, ServerLimits
from stlm.serving.scheduler import Scheduler

_LINGER_S = 2  # that a refused client gets to read its answer in
_AHEAD = 1 << 16  # bytes that a client may send before it is answered
GRACE_S = 5  # that texts get to end in when the server is asked to stop
KEEP_ALIVE_S = 75  # longer than clients keep connections for: they close first, and lose no request


def listen_on(host: str, port: str) -> socket.socket:
    """A socket that is bound, but refuses connections until the server has started. StlmError where it cannot be."""
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
            raise StlmError(f"--host: {host} is no address of this machine; try 127.0.0.1") from None
        told = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise StlmError(f"--port: {port} on {host} {told}; choose another one, or 0 for any free one") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """The address for clients on this machine."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


class Protocol(H11Protocol):
    """HTTP/1.1 where the headers of a request must arrive in time."""

    head_timeout_s = ServerLimits.head_timeout_s
    _timer: asyncio.TimerHandle | None = None
    _begun = False  # whether bytes of a request have come whose headers are not complete
    _refused = False  # answered without a request; what still comes is not looked at

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are complete, or wrong and answered
            self._stop_waiting()
        elif self._timer is None:
            self._wait_for_head()
        self._begun = self._timer is not None
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _AHEAD:
            self.flow.resume_reading()  # of a client that sends more, it must be noticed too that it leaves

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends: half a request is answered, an idle connection is closed, a running one goes on."""
        if self._begun:
            self._answer(Refused("the server is stopping", status=503))
        else:
            super().shutdown()

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._begun = None, False

    def _too_slow(self) -> None:
        told = f"the headers of the request did not arrive within {self.head_timeout_s:g} s"
        self._answer(Refused(told, status=408))

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._answer(Refused(f"{msg} Expected HTTP/1.1 with one Host header and at most 64 KiB of headers", status=400))

    def _answer(self, refused: Refused) -> None:
        """Send an error that no request was complete enough for, and close when the client has read it.

        A connection that is closed while bytes of the client wait to be read is reset, and the answer lost.
        """
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # its body is no HTTP
            begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if begun:
                self.transport.close()
                return
        self._refused = True
        body = json.dumps(refused.body).encode()
        head = (
            f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}",
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
    """Serves until a signal comes, or `should_exit` is set; then texts get `GRACE_S` to end in."""

    def __init__(self, app: FastAPI, scheduler: Scheduler, ready: Callable[[], None]) -> None:
        """`ready` is called when connections are accepted."""
        config = uvicorn.Config(
            app, http=Protocol, ws="none", log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2 * GRACE_S, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self._scheduler, self._ready = scheduler, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_S, self._scheduler.stop)  # what still runs then is told so
        await super().shutdown(sockets)
