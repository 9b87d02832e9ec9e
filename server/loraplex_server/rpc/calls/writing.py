"""Writes the messages of streams, and notices clients that do not read them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from loraplex_server.rpc.calls.gate import CallGate

DRAIN_STALL_SECONDS: Final = 3.0
"""Longest time for one write while the server drains."""


class StreamWriter:
    """Writes to streams. Each write may take `seconds`, and less once the gate closes.

    Nearly every write ends soon, so one timer serves all of them: that of the oldest.
    """

    def __init__(self, gate: CallGate, seconds: float) -> None:
        self._seconds = seconds
        self._ends: dict[Callable[[], None], float] = {}  # the earliest first
        self._timer: asyncio.TimerHandle | None = None
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
        # `give_up` is called in the context of any call, the one that has set the timer.
        own = contextvars.copy_context()

        def give_up() -> None:
            own.run(on_stall)
            closing.append(loop.create_task(events.aclose(), context=own))

        self._ends[give_up] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._look)
        try:
            await context.write(event)
        except Exception as error:
            # A write fails only if the client is gone; its cancellation is about to arrive.
            raise asyncio.CancelledError from error
        finally:
            self._ends.pop(give_up, None)
            if closing:
                await closing[0]

    def _look(self) -> None:
        """Gives up the writes that have taken too long; looks again when the next one will have."""
        loop = asyncio.get_running_loop()
        self._timer = None
        for give_up, end in list(self._ends.items()):
            if end > loop.time():
                self._timer = loop.call_at(end, self._look)
                return
            del self._ends[give_up]
            give_up()

    def _hurry(self) -> None:
        """Shortens the limit, also of the writes in progress."""
        loop = asyncio.get_running_loop()
        self._seconds = min(self._seconds, DRAIN_STALL_SECONDS)
        latest = loop.time() + self._seconds
        self._ends = {give_up: min(end, latest) for give_up, end in self._ends.items()}
        if self._timer is not None:
            self._timer.cancel()
            self._look()
