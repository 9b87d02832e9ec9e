"""The output stream of one request, from the engine's messages to the rpc that reads it."""

from __future__ import annotations

import asyncio
import math
import time

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.messages import Failure, Output

RESTARTED = Failure(Reason.ENGINE_RESTARTED, "the engine was restarted; try again")
STOPPED = Failure(Reason.DRAINING, "the server is shutting down")
REFUSED = Failure(
    Reason.REQUEST_QUARANTINED, "the engine ended each time that this request was computed"
)
"""What a stream ends with if its request was not computed to its end."""


class OutputStream:
    """The outputs of one request, in order, for one reader. The last has a finish or an error.

    Attributes:
        has_begun: there has been an output.
    """

    __slots__ = ("_complete", "_ended", "_not_before", "_outputs", "_waiter", "has_begun")

    def __init__(self) -> None:
        self._outputs: list[Output] = []
        self._waiter: asyncio.Future[None] | None = None
        self._complete = False
        self._ended = False
        self._not_before = 0.0
        self.has_begun = False

    def put(self, output: Output) -> None:
        """Adds an output, and wakes the reader unless it asked to sleep longer."""
        self._outputs.append(output)
        self.has_begun = True
        self._complete = ends(output)
        if self._complete or time.monotonic() >= self._not_before:
            self._wake()

    async def take(self, not_before: float = 0.0) -> list[Output]:
        """All outputs received so far, at least one; empty once the last has been taken.

        Returns at once when the last output arrives, and otherwise not before `not_before`
        (`time.monotonic()`), so that a patient reader is woken once for several steps.
        """
        if self._ended:
            return []
        self._not_before = not_before
        while not self._outputs or not (self._complete or time.monotonic() >= not_before):
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            early = time.monotonic() < not_before < math.inf
            timer = loop.call_at(not_before, self._wake) if early else None
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        taken, self._outputs = self._outputs, []
        self._not_before = 0.0
        self._ended = self._complete
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def ends(output: Output) -> bool:
    """Whether an output is the last of its request."""
    return output.finish is not None or output.error is not None
