"""Handling of one message from the front in the engine, without harm to the others if it fails."""

from __future__ import annotations

import logging
import time
from typing import Final, TypeVar

import msgspec

from loraplex_server.engine.core import FAULT, EngineCore
from loraplex_server.engine.messages import (
    Abort,
    Control,
    ControlDone,
    LimitHost,
    Shutdown,
    Submit,
    ToEngine,
    Unload,
)
from loraplex_server.engine.statistics import BatchView, Look

FAR_SECONDS: Final = 366 * 86_400.0
"""Longest distance of a deadline in seconds. Timers and queues refuse waits of some centuries."""

MAX_FAILURES: Final = 8
"""Number of requests and orders in a row that fail with an exception before the process is to be
replaced."""

T = TypeVar("T", Submit, Unload)

log = logging.getLogger(__name__)


class Handler:
    """Passes messages to the core. An exception fails the message that caused it, and no other.

    Attributes:
        broken: the last `MAX_FAILURES` requests and orders have failed, so the core is at fault.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._failures = 0

    @property
    def broken(self) -> bool:
        """Whether the process should be replaced."""
        return self._failures >= MAX_FAILURES

    def handle(self, message: ToEngine) -> ControlDone | BatchView | None:
        """Passes a message, which is not `Shutdown`, to the core.

        Returns the answer to a question, or to an order that failed; a failed request is answered
        by the next step.
        """
        assert not isinstance(message, Shutdown), "Shutdown is for the main loop"
        try:
            match message:
                case Submit():
                    self._core.add(within_reach(message))
                case Abort():
                    self._core.abort(message.id)
                    return None
                case LimitHost():
                    self._core.limit_host(message.nbytes)
                    return None
                case Look():
                    return self._core.look(message.op)
                case Unload():
                    self._core.control(within_reach(message))
                case _:
                    self._core.control(message)
        except Exception:
            concerns = {"request_id": message.request_id} if isinstance(message, Submit) else None
            text = "a message of the kind %s failed"
            log.exception(text, type(message).__name__, extra=concerns)
            return self._failed(message)
        self._failures = 0
        return None

    def _failed(self, message: Submit | Abort | LimitHost | Look | Control) -> ControlDone | None:
        if isinstance(message, Abort | LimitHost):
            return None
        self._failures += 1
        if isinstance(message, Submit):
            self._core.reject(message.id)
            return None
        return ControlDone(message.op, FAULT)


def within_reach(message: T) -> T:
    """The message with a deadline that can be compared and waited for.

    A deadline that is not a number has passed, and one in the far future is `FAR_SECONDS` away.
    """
    deadline = message.deadline
    if deadline is None:
        return message
    now = time.monotonic()
    if deadline <= now + FAR_SECONDS:
        return message
    late = now if deadline != deadline else now + FAR_SECONDS
    return msgspec.structs.replace(message, deadline=late)
