"""Clients that cost little beside the service they measure: one thread, one loop, requests that are bytes already."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.service import HOST

END = b"\r\n\r\n"


class Timed(NamedTuple):
    """One answer, as it came."""

    status: int
    content: bytes
    seconds: float  # from the first byte sent to the last one received


def encode(path: str, body: Any) -> bytes:
    """A POST of JSON, ready to be sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    return head.encode() + END + content


def load(port: int, requests: Sequence[bytes], *, clients: int) -> list[Timed]:
    """Sends all over `clients` connections, each the next one as soon as it is answered; the answers in order.

    Raises ConnectionError where the service closes a connection.
    """
    return asyncio.run(_load(port, requests, clients))


async def _load(port: int, requests: Sequence[bytes], clients: int) -> list[Timed]:
    loop, out = asyncio.get_running_loop(), [Timed(0, b"", 0.0)] * len(requests)
    left, ends = iter(enumerate(requests)), [loop.create_future() for _ in range(clients)]

    def heard(number: int, answer: Timed) -> None:
        out[number] = answer

    for end in ends:
        await loop.create_connection(lambda end=end: _Connection(left, heard, end), HOST, port)  # type: ignore[misc]
    await asyncio.gather(*ends)
    return out


class _Connection(asyncio.Protocol):
    def __init__(
        self, left: Iterator[tuple[int, bytes]], heard: Callable[[int, Timed], None], end: asyncio.Future[None]
    ):
        self._left, self._heard, self._end = left, heard, end
        self._number, self._began, self._data = 0, 0.0, b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        following = next(self._left, None)
        if following is None:
            self._end.set_result(None)
            self._transport.close()
            return
        self._number, request = following
        self._began = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, content = self._data.partition(END)
        if not found:
            return
        _, _, length = head.lower().partition(b"content-length:")
        if len(content) < int(length.partition(b"\r\n")[0]):
            return
        self._heard(self._number, Timed(int(head.split(b" ", 2)[1]), content, time.perf_counter() - self._began))
        self._data = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._end.done():
            self._end.set_exception(error or ConnectionError("the service closed the connection"))
