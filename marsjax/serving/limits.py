"""How large and how frequent requests may be: an ASGI layer around the service."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

CLIENTS = 10_000  # whose rates are remembered, the latest ones
# A sender reads its answer only once it has sent its body: closing the connection on it makes a broken pipe of a 413.
# So what is left of a body that is refused is read and thrown away, up to this many times the limit and this long.
DISCARD_TIMES, DISCARD_SECONDS = 8, 5.0

Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class TooLarge(Exception):
    """The body of a request is longer than it may be."""


class Limits:
    """Refuses bodies of more than `most_bytes` (413) and more than `rate` requests a second of one client (429), with a
    burst of one second's worth. `heard` is told path and status of every answer."""

    def __init__(self, app: Any, *, most_bytes: int, rate: float, heard: Callable[[str, int], None]):
        self._app, self._most_bytes, self._rate, self._heard = app, most_bytes, rate, heard
        self._left: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, read, began = scope["path"], 0, False

        async def sending(message: Any) -> None:
            nonlocal began
            if read > self._most_bytes and not began:
                return  # what is said of a body that could not be read; the answer is given below
            if message["type"] == "http.response.start":
                began = True
                self._heard(path, message["status"])
            await send(message)

        if not self._admits(scope):
            await _refuse(sending, 429, "too many requests; wait a second", [(b"retry-after", b"1")])
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most_bytes:
            await self._refuse_body(receive, sending, read)
            return

        async def receiving() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise TooLarge
            return message

        with contextlib.suppress(TooLarge):
            await self._app(scope, receiving, sending)
        if read > self._most_bytes and not began:
            already, read = read, 0
            await self._refuse_body(receive, sending, already)

    def _admits(self, scope: Scope) -> bool:
        if scope["path"] in ("/healthz", "/readyz"):
            return True
        client, now = (scope.get("client") or ("", 0))[0], time.monotonic()
        left, at = self._left.pop(client, (self._rate, now))
        left = min(self._rate, left + (now - at) * self._rate)
        # A refusal costs nothing, or who sends a little more than the rate would be refused for ever.
        self._left[client] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return left >= 1

    async def _refuse_body(self, receive: Receive, send: Send, read: int) -> None:
        """Refuses a body that is too large, of which `read` bytes have come."""
        await _discard(receive, DISCARD_TIMES * self._most_bytes - read)
        text = f"expected a body of at most {self._most_bytes} bytes, found more"
        await _refuse(send, 413, text, [(b"connection", b"close")])


async def _discard(receive: Receive, most_bytes: int) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while most_bytes > 0:
                message = await receive()
                most_bytes -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def _refuse(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps({"error": text}).encode()
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": kind + headers})
    await send({"type": "http.response.body", "body": body})
