"""Access control: refuses pages of other sites, foreign host names (DNS rebinding), and clients without the key."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stlm.errors import StlmError
from stlm.serving.protocol import RequestError

OPEN_ROUTES = frozenset({"/health"})  # routes without a key
_AUTHORITY = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)
_MAX_DRAINED_BYTES, _DRAIN_TIMEOUT_S = 64 << 20, 5.0


@dataclass(frozen=True)
class Access:
    """Access rules of one server."""

    loopback: bool = True  # listens on loopback alone: Host must name this machine
    origins: tuple[str, ...] = ()  # origins of pages with access, as browsers write them; "*" is all
    api_key: str | None = None

    def refusal(self, path: str, headers: Headers) -> RequestError | None:
        """Return the error for a request that the rules refuse; None if it is allowed."""
        host, origin = headers.get("host"), headers.get("origin")
        if self.loopback and host is not None and not self._names_this_machine(host):
            return RequestError(
                f"Host: got {host[:100]!r}, expected localhost or a loopback address, as the server listens on "
                "loopback only; --allow-origin http://NAME allows another name",
                status=403, code="host_not_allowed",
            )  # fmt: skip
        if origin is not None and not self._allows_origin(origin, host):
            return RequestError(
                f"Origin: pages of {origin[:100]!r} may not use this server; --allow-origin {origin[:100]} allows them",
                status=403, code="origin_not_allowed",
            )  # fmt: skip
        if self.api_key is not None and path not in OPEN_ROUTES:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1", "replace")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.api_key.encode()):
                problem = "the API key is wrong" if key else "the API key is missing"
                return RequestError(f"{problem}; send Authorization: Bearer KEY", status=401, code="invalid_api_key")
        return None

    def _names_this_machine(self, host: str) -> bool:
        """Return True if a Host header names this machine, or the site of an allowed page."""
        match = _AUTHORITY.fullmatch(host)
        if match is None:
            return False
        name = match["name"].lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or "*" in self.origins:
            return True
        if any(urlsplit(origin).hostname == name for origin in self.origins):
            return True
        try:
            return ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return False

    def _allows_origin(self, origin: str, host: str | None) -> bool:
        """Return True if pages of this origin have access: the server's own origin, or an allowed one."""
        own = host is not None and origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
        return own or "*" in self.origins or origin.lower() in self.origins


def checked_origins(origins: list[str]) -> tuple[str, ...]:
    """Return origins in lower case. Raises StlmError for one that no browser would send."""
    for origin in origins:
        if origin in ("*", "null"):
            continue
        try:
            parts = urlsplit(origin)
            _ = parts.port  # ValueError where it is no number
        except ValueError:
            parts = urlsplit("")
        if not parts.scheme or not parts.netloc or origin.lower() != f"{parts.scheme}://{parts.netloc}".lower():
            works = f"{parts.scheme}://{parts.netloc}" if parts.scheme and parts.netloc else "http://localhost:3000"
            raise StlmError(f"--allow-origin: got {origin!r}, expected scheme://host:port without a path: {works}")
    return tuple(origin.lower() for origin in origins)


class CheckAccess:
    """Middleware that refuses requests by the access rules."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self.access.refusal(scope["path"], Headers(scope=scope))):
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


class DrainBodies:
    """Middleware that reads the rest of a request before it is answered.

    Closing a connection with unread bytes of the client resets it, and the answer is lost. A client that waits for
    permission to send its body (Expect: 100-continue) is answered at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        untouched, unread = True, True

        async def tracked_receive() -> Message:
            nonlocal untouched, unread
            message = await receive()
            untouched, unread = False, message.get("more_body", False)
            return message

        async def drain() -> None:
            size = 0
            while unread and size < _MAX_DRAINED_BYTES:
                size += len((await tracked_receive()).get("body", b""))

        async def draining_send(message: Message) -> None:
            expects = untouched and "expect" in Headers(scope=scope)
            if message["type"] == "http.response.start" and unread and not expects and message["status"] != 408:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(drain(), _DRAIN_TIMEOUT_S)
            await send(message)

        await self.app(scope, tracked_receive, draining_send)
