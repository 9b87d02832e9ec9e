"""Bounds what the messages of clients may hold while they arrive.

gRPC keeps the bytes of a message until it is complete, for as long as its sender likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final, NamedTuple, TypeVar

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.rpc.calls.gate import CallGate

ARRIVAL_SECONDS: Final = 30.0
"""Seconds that a request has to arrive completely."""

MAX_HALF_SENT: Final = 64
"""Most calls whose request has not arrived completely; beyond it the oldest is refused."""

YOUNG_SECONDS: Final = 1.0
"""Age in seconds up to which a call is not refused for newer ones: a burst takes time to read."""

SILENCE_SECONDS: Final = 60.0
"""Seconds without a message after which a stream of requests is ended."""

M = TypeVar("M")


class _Arrival(NamedTuple):
    refuse: Callable[[Refusal], None]
    began: float
    drains: bool


class Arrivals:
    """The calls whose only request has not arrived completely, oldest first.

    Most requests arrive at once, so there is one timer, for the oldest call, instead of one for
    each.
    """

    def __init__(self, gate: CallGate) -> None:
        self._waiting: dict[int, _Arrival] = {}
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        gate.when_closing(self._end_all)

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, refuse: Callable[[Refusal], None], drains: bool) -> int:
        """Begins to wait for a request; returns a key for `end`.

        `refuse` is called if the request takes too long or there are too many; with `drains` also
        when the gate closes.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if len(self._waiting) >= MAX_HALF_SENT:
            self._make_room(now)
        if self._timer is None:
            self._timer = loop.call_later(ARRIVAL_SECONDS, self._sweep)
        self._count += 1
        self._waiting[self._count] = _Arrival(refuse, now, drains)
        return self._count

    def end(self, key: int) -> None:
        """Ends the wait, whether the request has arrived or the call has ended. Idempotent."""
        self._waiting.pop(key, None)

    def _make_room(self, now: float) -> None:
        key, oldest = next(iter(self._waiting.items()))
        if now - oldest.began >= YOUNG_SECONDS:
            self._refuse(key, Refusal(Reason.OVERLOADED, "too many requests arrive too slowly"))

    def _sweep(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        text = f"the request was not complete after {ARRIVAL_SECONDS:g} s"
        for key, arrival in list(self._waiting.items()):
            if arrival.began + ARRIVAL_SECONDS > loop.time():
                self._timer = loop.call_at(arrival.began + ARRIVAL_SECONDS, self._sweep)
                return
            self._refuse(key, Refusal(Reason.DEADLINE_EXCEEDED, text))

    def _end_all(self) -> None:
        for key in [key for key, arrival in self._waiting.items() if arrival.drains]:
            self._refuse(key, Refusal(Reason.DRAINING, "the server is shutting down"))

    def _refuse(self, key: int, refusal: Refusal) -> None:
        self._waiting.pop(key).refuse(refusal)


async def messages(
    requests: AsyncIterator[M], gate: CallGate, draining: str, silence: str
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
