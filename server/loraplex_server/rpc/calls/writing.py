"""Writes the messages of streams, and notices clients that do not read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from loraplex_server.rpc.calls.gate import CallGate

DRAIN_STALL_SECONDS: Final = 3.0
"""Longest time for one write while the server drains."""


class StreamWriter:
    """Writes to streams. Each write may take `seconds`, and less once the gate closes."""

    def __init__(self, gate: CallGate, seconds: float) -> None:
        self._seconds = seconds
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}
        gate.when_closing(self._hurry)

    async def write(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        event: Message,
        events: AsyncGenerator[Message, None],
        on_stall: Callable[[], None],
    ) -> None:
        """Writes one message; calls `on_stall` and closes `events` if it is not read in time.

        Waits for the write in any case: gRPC cannot send a status before the write has ended, which
        happens when the client reads again or is gone.
        """
        loop = asyncio.get_running_loop()
        closing: list[asyncio.Task[None]] = []

        def give_up() -> None:
            on_stall()
            closing.append(loop.create_task(events.aclose()))

        self._timers[give_up] = loop.call_later(self._seconds, give_up)
        try:
            await context.write(event)
        except Exception as error:
            # A write fails only if the client is gone; its cancellation is about to arrive.
            raise asyncio.CancelledError from error
        finally:
            self._timers.pop(give_up).cancel()
            if closing:
                await closing[0]

    def _hurry(self) -> None:
        """Shortens the limit, also of the writes in progress."""
        loop = asyncio.get_running_loop()
        self._seconds = min(self._seconds, DRAIN_STALL_SECONDS)
        for give_up, timer in self._timers.items():
            if not timer.cancelled() and timer.when() > loop.time() + self._seconds:
                timer.cancel()
                self._timers[give_up] = loop.call_later(self._seconds, give_up)
