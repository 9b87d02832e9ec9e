"""Turns the bytes of requests into checked messages, without holding the event loop for long.

Decoding is a single call into C that nothing can interrupt: 4 MiB of empty submessages take tens
of milliseconds. It is as long in a thread, since it keeps the interpreter's lock. Therefore the
bytes of all requests together are limited before any of them is decoded, and large requests are
decoded one at a time, each followed by a pause as long as its decoding, in which all other calls go
on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from google.protobuf.message import Message
from loraplex_model.base.refusal import Reason, Refusal

MAX_HELD_BYTES: Final = 256 << 20
"""Most bytes of the requests that are handled at the same time."""

SMALL_BYTES: Final = 64 << 10
"""Largest request that is decoded at once, which takes a millisecond at most."""

Reader: TypeAlias = Callable[[bytes], Any]
"""A deserialiser of generated stubs."""


class Intake:
    """Accounts for the bytes of the requests in the server, and decodes them."""

    def __init__(self, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0
        self._turn = asyncio.Lock()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Counts `size` bytes of a request within the context. Raises Refusal(OVERLOADED)."""
        if self._held_bytes and self._held_bytes + size > self._max_held_bytes:
            text = f"the requests in the server have {self._held_bytes} bytes; try again later"
            raise Refusal(Reason.OVERLOADED, text)
        self._held_bytes += size
        try:
            yield
        finally:
            self._held_bytes -= size

    async def decode(self, read: Reader, data: bytes) -> Message:
        """The message in `data`. Raises Refusal(REQUEST_MALFORMED)."""
        if len(data) <= SMALL_BYTES:
            return _decoded(read, data)
        await self._turn.acquire()
        began = time.perf_counter()
        try:
            return _decoded(read, data)
        finally:
            pause = time.perf_counter() - began
            asyncio.get_running_loop().call_later(pause, self._turn.release)


def _decoded(read: Reader, data: bytes) -> Message:
    try:
        message: Message = read(data)
    except Exception:
        raise Refusal(Reason.REQUEST_MALFORMED, "malformed request") from None
    return message
