"""Messages from the front, and requests that arrive while a forward pass is computed.

    main thread        take, schedule | forward pass ................. | answers, send, take
    receiving thread                  |  add, refuse   add   add       |

A pass of many rows takes tens of milliseconds, and longer with prompts. A request that cannot be
computed in time ought not to learn that after the pass, so the thread that receives it adds it to
the core and sends the refusal, if there is one. The core has one user at any time: the main thread,
except while it waits for the runner to compute. What is added meanwhile only waits, so the pass
does not depend on it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from loraplex_server.engine.messages import Submit, ToEngine

MAX_WAIT = 3600.0
"""Longest wait for a message in seconds; `queue` accepts no time of arbitrary length."""


class Inbox:
    """Keeps each message for the main thread or, while a pass is computed, adds a request at once.

    A context manager, entered by the main thread for as long as it does not use the core.
    """

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._in_use = threading.Lock()
        self._in_use.acquire()
        self._closing = False
        self._add: Callable[[Submit], None] = self._messages.put
        self._kept = self._taken = 0  # messages; each number is changed by one thread

    def open_to(self, add: Callable[[Submit], None]) -> None:
        """Sets what adds a request to the core. Called before the first pass."""
        self._add = add

    def __enter__(self) -> None:
        self._closing = False
        self._in_use.release()

    def __exit__(self, *_: object) -> None:
        self._closing = True  # a stream of requests must not keep the main thread out
        self._in_use.acquire()

    def put(self, message: ToEngine) -> None:
        """Passes on a message. Called by one thread, in the order in which messages arrive."""
        # What arrived before a request, such as an order to unload, must have its effect before it.
        is_next = self._kept == self._taken
        if not isinstance(message, Submit) or not is_next or not self._enter():
            self._kept += 1
            self._messages.put(message)
            return
        try:
            self._add(message)
        finally:
            self._in_use.release()

    def wake(self) -> None:
        """Ends a wait of `take`, which may return no message then. Called by any thread."""
        self._messages.put(None)

    def take(self, wait: float | None) -> list[ToEngine]:
        """Removes and returns all messages; waits `wait` seconds for a first one (None: ever)."""
        found: list[ToEngine | None] = []
        if wait != 0.0:
            try:
                found.append(
                    self._messages.get(timeout=None if wait is None else min(wait, MAX_WAIT))
                )
            except queue.Empty:
                return []
        for _ in range(self._messages.qsize()):
            found.append(self._messages.get_nowait())
        messages = [message for message in found if message is not None]
        self._taken += len(messages)
        return messages

    def _enter(self) -> bool:
        """Takes the core, if a pass is being computed."""
        return not self._closing and self._in_use.acquire(blocking=False)
