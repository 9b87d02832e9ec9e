"""Admission of requests: bounds on the requests in the server and on waiting prompt tokens.

An account that fills the server must not keep others out. So some places beyond the bound, and the
same part of the waiting tokens, are for accounts that have few requests in the server.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

from loraplex_model.base.refusal import Problem, Reason, Refusal

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

    def __init__(
        self, max_requests: int, max_waiting_tokens: int, metrics: Metrics, reserved: int = 0
    ) -> None:
        """`reserved` places are for accounts with fewer requests than that."""
        self._max_requests = max_requests
        self._reserved = reserved
        self._accounts: Counter[str] = Counter()
        self._account_tokens: Counter[str] = Counter()
        self._max_waiting_tokens = max_waiting_tokens
        self._metrics = metrics
        self._requests = 0
        self._running = 0
        self._waiting_tokens = 0
        self._waiting_since: dict[Ticket, float] = {}
        metrics.series.oldest_waiting_request_seconds.set_function(self.oldest_seconds)

    @property
    def running(self) -> int:
        """Number of requests that are producing tokens."""
        return self._running

    def oldest_seconds(self) -> float:
        """How long the oldest waiting request has waited; 0 if none waits. For any thread."""
        since = min(list(self._waiting_since.values()), default=None)
        return 0.0 if since is None else time.monotonic() - since

    def unfit(self, requests: int, field: str, tokens: int = 0) -> list[Problem]:
        """Problems of a call of several requests, `field`, that is never accepted.

        `tokens` are those of the prompt of each request.
        """
        most = self._max_waiting_tokens
        if requests > self._max_requests:
            text = f"is {requests}, and the server takes at most {self._max_requests} requests"
        elif requests > 1 and requests * tokens > most:
            text = f"is {requests}: that many prompts of {tokens} tokens have more than {most}"
        else:
            return []
        return [Problem(field, text)]

    def enter(self, account: str = "", requests: int = 1) -> Ticket:
        """Takes places in the queue, a context manager. Raises Refusal(OVERLOADED)."""
        most = self._max_requests
        if self._accounts[account] + requests <= self._reserved:
            most += self._reserved
        if self._requests + requests > most:
            raise Refusal(
                Reason.OVERLOADED, f"{self._requests} requests are in the server; try again later"
            )
        return Ticket(self, account, requests)

    def _count(self, account: str, requests: int) -> None:
        self._accounts[account] += requests
        if not self._accounts[account]:
            del self._accounts[account]
        self._change(requests=requests)

    def _wait(self, account: str, tokens: int) -> None:
        self._account_tokens[account] += tokens
        if not self._account_tokens[account]:
            del self._account_tokens[account]
        self._change(tokens=tokens)

    def _change(self, requests: int = 0, running: int = 0, tokens: int = 0) -> None:
        self._requests += requests
        self._running += running
        self._waiting_tokens += tokens
        self._metrics.series.queue_depth.set(self._requests - self._running)
        self._metrics.series.queued_tokens.set(self._waiting_tokens)
        self._metrics.series.running_requests.set(self._running)

    def _room_for(self, tokens: int, account: str) -> bool:
        # A prompt of any size may wait alone; otherwise a long one could never be answered.
        if not self._waiting_tokens:
            return True
        most = self._max_waiting_tokens
        reserved = most * self._reserved // self._max_requests
        if self._account_tokens[account] + tokens <= reserved:
            most += reserved
        return self._waiting_tokens + tokens <= most


class Ticket:
    """Places of a call's requests in the queue; leaving the context frees them."""

    __slots__ = ("_account", "_admission", "_places", "_prompt", "_running", "_waiting")

    def __init__(self, admission: Admission, account: str, requests: int) -> None:
        self._admission = admission
        self._account = account
        self._places = self._waiting = requests
        self._prompt = 0
        self._running = 0

    def __enter__(self) -> Ticket:
        self._admission._count(self._account, self._places)
        self._admission._waiting_since[self] = time.monotonic()
        return self

    def wait(self, tokens: int) -> None:
        """Counts the tokens of each request's prompt as waiting. Raises Refusal(OVERLOADED)."""
        if not self._admission._room_for(self._waiting * tokens, self._account):
            raise Refusal(Reason.OVERLOADED, "too many prompt tokens are waiting; try again later")
        self._prompt = tokens
        self._admission._wait(self._account, self._waiting * tokens)

    def run(self) -> None:
        """Counts a request as running, because its prompt is computed."""
        self._waiting -= 1
        self._running += 1
        if not self._waiting:
            self._admission._waiting_since.pop(self, None)
        self._admission._change(running=1)
        self._admission._wait(self._account, -self._prompt)

    def end(self) -> None:
        """Frees the place of a request that has run, unless it is the last one.

        The last one is kept until the client has read the end of the call.
        """
        if self._places > 1:
            self._places -= 1
            self._running -= 1
            self._admission._change(running=-1)
            self._admission._count(self._account, -1)

    def __exit__(self, *_: object) -> None:
        self._admission._waiting_since.pop(self, None)
        self._admission._change(running=-self._running)
        self._admission._wait(self._account, -self._waiting * self._prompt)
        self._admission._count(self._account, -self._places)
