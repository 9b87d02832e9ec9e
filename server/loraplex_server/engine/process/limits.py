"""What the front tolerates of an engine process, and when it gives up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.messages import Failure

MAX_ORDERS: Final = 1024
"""Orders about adapters that may wait for their answers at once; more are refused."""

TOO_MANY_ORDERS: Final = Failure(
    Reason.OVERLOADED, f"{MAX_ORDERS} orders about adapters are waiting for the engine already"
)


@dataclass(frozen=True, slots=True)
class SupervisionLimits:
    """Limits of the supervision. Times are seconds.

    Attributes:
        first_pause: pause before a lost process is replaced for the first time.
        longest_pause: pause that is reached by doubling, if replacements are lost too.
        healthy: time after which an engine that has not been lost counts as healthy.
        most_ends: number of processes in a row that may end, or fail to start, without one of them
            becoming healthy.
        give_up: time without a healthy engine before which the front does not give up.
        start: time that a process may take to become ready.
        restart: time that a replacement may take to become ready; longer if the first start took
            long, and twice as long after each replacement that ran out of time, up to `start`.
        silent: longest time between two messages of a process.
        stuck: time that the main loop may take for one turn.
        adapter_deaths: number of ends during work on an adapter after which it is quarantined.
        request_deaths: number of ends in a row after which the only request that ran at each of
            them is refused. A call of our client with its retries makes four attempts, each of
            which is told that the engine was lost; only who sends the request once more is refused.
    """

    first_pause: float = 0.1
    longest_pause: float = 10.0
    healthy: float = 60.0
    most_ends: int = 10
    give_up: float = 120.0
    start: float = 1800.0
    restart: float = 120.0
    silent: float = 30.0
    stuck: float = 300.0
    adapter_deaths: int = 2
    request_deaths: int = 4


class RestartPolicy:
    """Pauses before restarts, which double with each end until an engine has become healthy."""

    def __init__(
        self, limits: SupervisionLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._ends = 0
        self._healthy_until = clock()
        self._ready_since: float | None = None

    def on_ready(self) -> None:
        """A process has become ready."""
        self._ready_since = self._clock()

    def on_end(self) -> None:
        """A process has ended, or has failed to start."""
        now = self._clock()
        since, self._ready_since = self._ready_since, None
        if since is not None and now - since >= self._limits.healthy:
            self._ends = 0
            self._healthy_until = now
        self._ends += 1

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start."""
        doublings = min(max(self._ends - 1, 0), 32)
        return min(self._limits.first_pause * 2.0**doublings, self._limits.longest_pause)

    @property
    def gives_up(self) -> bool:
        """Whether no further start should be attempted."""
        troubled = self._clock() - self._healthy_until
        return self._ends > self._limits.most_ends and troubled >= self._limits.give_up

    def __str__(self) -> str:
        troubled = self._clock() - self._healthy_until
        return f"{self._ends} engine processes ended within {troubled:.0f} s"
