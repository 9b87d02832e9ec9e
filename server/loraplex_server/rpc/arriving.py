"""Bounds what the messages of clients may hold while they arrive.

gRPC keeps the bytes of a message until it is complete, for as long as its sender likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.rpc.gate import Gate

ARRIVAL_SECONDS: Final = 30.0
"""Seconds that a request has to arrive completely."""

MAX_HALF_SENT: Final = 64
"""Most calls whose request has not arrived completely; beyond it the oldest is refused."""

YOUNG_SECONDS: Final = 1.0
"""Age up to which a call is never refused for others. In a burst many have not been read yet."""

SILENCE_SECONDS: Final = 60.0
"""Seconds without a message after which a stream of requests is ended."""

M = TypeVar("M")


@dataclass(frozen=True, slots=True, eq=False)
class _Arrival:
    refuse: Callable[[Refusal], None]
    began: float
    timer: asyncio.TimerHandle


class Arrivals:
    """The calls whose only request has not arrived completely, oldest first."""

    def __init__(self, gate: Gate) -> None:
        self._waiting: dict[int, _Arrival] = {}
        self._count = 0
        gate.when_closing(self._end_all)

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def waiting(self, refuse: Callable[[Refusal], None]) -> Iterator[None]:
        """While a request is read. Calls `refuse` if that takes too long or there are too many."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if len(self._waiting) >= MAX_HALF_SENT:
            self._make_room(now)
        self._count += 1
        key = self._count
        timer = loop.call_later(ARRIVAL_SECONDS, self._expire, key)
        self._waiting[key] = _Arrival(refuse, now, timer)
        try:
            yield
        finally:
            timer.cancel()
            self._waiting.pop(key, None)

    def _make_room(self, now: float) -> None:
        key, oldest = next(iter(self._waiting.items()))
        if now - oldest.began >= YOUNG_SECONDS:
            self._end(key, Refusal(Reason.OVERLOADED, "too many requests arrive too slowly"))

    def _expire(self, key: int) -> None:
        text = f"the request was not complete after {ARRIVAL_SECONDS:g} s"
        self._end(key, Refusal(Reason.DEADLINE_EXCEEDED, text))

    def _end_all(self) -> None:
        for key in list(self._waiting):
            self._end(key, Refusal(Reason.DRAINING, "the server is shutting down"))

    def _end(self, key: int, refusal: Refusal) -> None:
        arrival = self._waiting.pop(key)
        arrival.timer.cancel()
        arrival.refuse(refusal)


async def messages(
    requests: AsyncIterator[M], gate: Gate, draining: str, silence: str
) -> AsyncGenerator[M, None]:
    """Yields the messages of a stream of requests, each within SILENCE_SECONDS.

    Raises Refusal: DRAINING with the text `draining`, DEADLINE_EXCEEDED with the text `silence`.
    """
    try:
        while True:
            coming = anext(requests, None)
            request = await gate.before_draining(coming, draining, SILENCE_SECONDS)
            if request is None:
                return
            yield request
    except TimeoutError:
        raise Refusal(Reason.DEADLINE_EXCEEDED, silence) from None
