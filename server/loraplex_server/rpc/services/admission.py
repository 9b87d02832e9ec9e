"""Admission of requests: bounds on the requests in the server and on waiting prompt tokens."""

from __future__ import annotations

import time
from typing import Final

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.metrics import Metrics

MAX_DEADLINE_SECONDS: Final = 86_400.0
"""Longest time that a request with a deadline may take; later deadlines count as this one."""


def admitted_deadline(remaining: float | None) -> float | None:
    """The deadline (`time.monotonic()`) of a request with `remaining` seconds; None without one.

    A client may send any number, such as a hundred million hours; waits of that length overflow.
    """
    if remaining is None:
        return None
    if not remaining <= MAX_DEADLINE_SECONDS:  # NaN is not, either
        remaining = MAX_DEADLINE_SECONDS
    return time.monotonic() + max(0.0, remaining)


class Admission:
    """Bounds the queue in requests and in tokens, and refuses what exceeds it.

    A request waits until its prompt is computed; then it runs. The gauges of the queue are set
    here, so they are right even while the engine is restarting.
    """

    def __init__(self, max_requests: int, max_waiting_tokens: int, metrics: Metrics) -> None:
        self._max_requests = max_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._metrics = metrics
        self._requests = 0
        self._running = 0
        self._waiting_tokens = 0

    @property
    def running(self) -> int:
        """Number of requests that are producing tokens."""
        return self._running

    def enter(self) -> Ticket:
        """Takes a place in the queue, a context manager. Raises Refusal(OVERLOADED)."""
        if self._requests >= self._max_requests:
            raise Refusal(
                Reason.OVERLOADED, f"{self._requests} requests are in the server; try again later"
            )
        return Ticket(self)

    def _change(self, requests: int = 0, running: int = 0, tokens: int = 0) -> None:
        self._requests += requests
        self._running += running
        self._waiting_tokens += tokens
        self._metrics.series.queue_depth.set(self._requests - self._running)
        self._metrics.series.queued_tokens.set(self._waiting_tokens)
        self._metrics.series.running_requests.set(self._running)

    def _room_for(self, tokens: int) -> bool:
        # A prompt of any size may wait alone; otherwise a long one could never be answered.
        return not self._waiting_tokens or self._waiting_tokens + tokens <= self._max_waiting_tokens


class Ticket:
    """Place of one request in the queue; leaving the context frees it."""

    __slots__ = ("_admission", "_running", "_tokens")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._tokens = 0
        self._running = False

    def __enter__(self) -> Ticket:
        self._admission._change(requests=1)
        return self

    def wait(self, tokens: int) -> None:
        """Counts the prompt's tokens as waiting. Raises Refusal(OVERLOADED)."""
        if not self._admission._room_for(tokens):
            raise Refusal(Reason.OVERLOADED, "too many prompt tokens are waiting; try again later")
        self._tokens = tokens
        self._admission._change(tokens=tokens)

    def run(self) -> None:
        """Counts the request as running, because its prompt is computed."""
        self._admission._change(running=1, tokens=-self._tokens)
        self._running = True
        self._tokens = 0

    def __exit__(self, *_: object) -> None:
        self._admission._change(requests=-1, running=-int(self._running), tokens=-self._tokens)
