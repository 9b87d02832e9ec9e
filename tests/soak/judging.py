"""What the calls of a soak met, and what of it nobody can explain."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

AFTERMATH: Final[dict[str, tuple[float, frozenset[str]]]] = {
    "engine killed": (40.0, frozenset({"ENGINE_RESTARTED", "ADAPTER_UNLOADED", "CONNECTION"})),
    "front killed": (40.0, frozenset({"CONNECTION", "ENGINE_RESTARTED", "DRAINING"})),
    "index away": (15.0, frozenset({"STORE_UNAVAILABLE"})),
    "engine fault": (5.0, frozenset({"ENGINE_FAULT", "NON_FINITE_LOGITS"})),
}
"""Seconds after a disturbance during which calls may fail for its reasons. A call that began before
may fail at any time after it."""

ALWAYS: Final = frozenset({"OVERLOADED", "DEADLINE_EXCEEDED", "DEADLINE_UNMEETABLE"})
"""Reasons for which any call may be refused while many clients compete."""


@dataclass
class Verdict:
    """Counts of a soak.

    Attributes:
        tokens: tokens that arrived and were right.
        wrong: answers with a token or a digest that cannot be.
        outcomes: ends of calls, by kind of client and reason ("OK" without one).
        unexpected: what nothing explains, with its time; the first hundred.
        disturbances: times at which each kind of disturbance began.
    """

    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    disturbances: dict[str, float] = field(default_factory=dict)

    def disturb(self, kind: str) -> None:
        """Notes that a disturbance begins, or still lasts."""
        assert kind in AFTERMATH
        self.disturbances[kind] = time.monotonic()

    def ended(
        self,
        client: str,
        began: float,
        error: grpc.aio.AioRpcError | None = None,
        allowed: frozenset[str] = frozenset(),
    ) -> None:
        """Counts the end of a call that began at `began`; `allowed` are reasons of its own."""
        reason = "OK" if error is None else reason_of(error)
        self.outcomes[client, reason] += 1
        if reason != "OK" and reason not in allowed | ALWAYS | self._explained(began):
            self._note(f"{client}: {reason}: {error.details() if error else ''}")

    def wrong_answer(self, client: str, text: str) -> None:
        """Notes an answer that cannot be right."""
        self.wrong.append(f"{client}: {text}")

    def _explained(self, began: float) -> frozenset[str]:
        now, reasons = time.monotonic(), frozenset[str]()
        for kind, at in self.disturbances.items():
            seconds, explained = AFTERMATH[kind]
            if began - 1.0 <= at or now - at <= seconds:
                reasons |= explained
        return reasons

    def _note(self, text: str) -> None:
        if len(self.unexpected) < 100:
            self.unexpected.append(f"{time.strftime('%H:%M:%S')} {text}")


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason of a failed call; CONNECTION if it did not come from the server's handlers."""
    with suppress(ValueError):  # gRPC may replace the message when a deadline ends a stream
        status = rpc_status.from_call(error)
        for packed in status.details if status is not None else ():
            if packed.Is(ErrorInfo.DESCRIPTOR):
                return str(ErrorInfo.FromString(packed.value).reason)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return "CONNECTION"
    return error.code().name
