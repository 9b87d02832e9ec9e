"""The audit log: who changed what, and who was refused.

A line is written for every call that manages adapters or training jobs, whatever its outcome, and
for every call that is refused because of its credential or its caller's permissions. Lines hold
names, digests and outcomes; no credentials, prompts, chat templates or paths.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from loraplex_model.base.refusal import Reason

from loraplex_server.logs import AUDIT
from loraplex_server.metrics import Metrics

UNAUTHENTICATED: Final = frozenset(
    {Reason.CREDENTIALS_MISSING.name, Reason.CREDENTIALS_INVALID.name}
)
"""Reasons with which a call is refused because its caller is not known."""

REFUSALS: Final = UNAUTHENTICATED | {Reason.PERMISSION_DENIED.name}
"""Reasons with which a call is refused because of its caller."""

REFUSALS_PER_SECOND: Final = 10
"""Most lines in a second about refusals with one reason. Anybody can cause these, at any rate."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What the audit log says of one call.

    Attributes:
        method: full name of the method, "/package.Service/Method".
        principal: name of the caller; "" if it is not known.
        peer: address that the call came from.
        request_id: id of the call, as in the log and in the client's trailer.
        code: gRPC code of the outcome.
        reason: reason of the error table; "" if the call has succeeded.
        why: for a refusal, its cause in words, which the caller may not be told; "" else.
        seconds: duration of the call.
        about: what the call was about: ids, names, digest and version.
    """

    method: str
    principal: str
    peer: str
    request_id: str
    code: str
    reason: str
    why: str
    seconds: float
    about: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """The fields of the line; those that are empty are left out."""
        fields = {
            "principal": self.principal,
            "peer": self.peer,
            "method": self.method.rpartition("/")[2],
            "request_id": self.request_id,
            **self.about,
            "code": self.code,
            "reason": self.reason,
            "why": self.why,
            "seconds": round(self.seconds, 4),
        }
        return {name: value for name, value in fields.items() if value != ""}


class AuditSink(Protocol):
    """Where the lines of the audit log go."""

    def write(self, fields: Mapping[str, Any]) -> None:
        """Takes one line. Neither blocks nor raises."""

    def close(self) -> None:
        """Writes what was taken, as far as that is possible within a few seconds."""


class LoggedAudit:
    """Writes the lines to the server's log, by the logger `AUDIT`."""

    def __init__(self, metrics: Metrics) -> None:
        self._log = logging.getLogger(AUDIT)
        self._metrics = metrics

    def write(self, fields: Mapping[str, Any]) -> None:
        self._log.info("audit", extra=dict(fields))
        self._metrics.audit_lines("written", 1)

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Second:
    """The refusals of one second, with one reason."""

    shown: int = 0
    left_out: int = 0


@dataclass
class AuditLog:
    """Writes lines about calls, and bounds those about refusals.

    Must be used on the event loop.
    """

    sink: AuditSink
    metrics: Metrics
    _seconds: dict[str, _Second] = field(default_factory=dict)

    def record(self, entry: AuditEntry) -> None:
        """Records the end of a call; a refusal only if there is room for it in this second."""
        if entry.reason not in REFUSALS or self._has_room(entry.reason):
            self.sink.write(entry.fields())

    def finish(self) -> None:
        """Says how many refusals were left out so far. No call is recorded afterwards."""
        for reason in list(self._seconds):
            self._end_second(reason)

    def _has_room(self, reason: str) -> bool:
        second = self._seconds.get(reason)
        if second is None:
            second = self._seconds[reason] = _Second()
            asyncio.get_running_loop().call_later(1.0, self._end_second, reason)
        if second.shown < REFUSALS_PER_SECOND:
            second.shown += 1
            return True
        second.left_out += 1
        return False

    def _end_second(self, reason: str) -> None:
        second = self._seconds.pop(reason, None)
        if second is not None and second.left_out:
            self.sink.write({"reason": reason, "refusals_left_out": second.left_out})
            self.metrics.audit_lines("left_out", second.left_out)
