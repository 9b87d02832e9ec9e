"""One call: its id and caller, the status of its failure, and what is recorded of its end.

No exception's text leaves the server. A handler raises `Refusal`; anything else becomes an
internal error. The client gets the request id, under which the log has the details.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message
from loraplex_model.base.refusal import PRINCIPAL_PREFIX, Reason, Refusal

from loraplex_server.access.audit_log.lines import REFUSALS, UNAUTHENTICATED, AuditEntry, AuditLog
from loraplex_server.access.identity.refused import BadCredential
from loraplex_server.access.principals import Principal, reset_caller, set_caller
from loraplex_server.access.roles import is_managing
from loraplex_server.logs import NOTES, PRINCIPAL, REQUEST_ID
from loraplex_server.metrics import Metrics
from loraplex_server.rpc.calls.audited import about_reply, about_request
from loraplex_server.rpc.calls.bounds import beyond_bounds
from loraplex_server.rpc.calls.errors import TABLE, require, status_of, trailers_of
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.ids import is_request_id
from loraplex_server.rpc.calls.peers import peer_host
from loraplex_server.rpc.calls.remains import forget_after_call
from loraplex_server.telemetry.trace import TRACE, CallTrace

OURS: Final = "/loraplex.v1."
"""What the names of our own methods begin with. Others are neither counted nor drained."""

_CLOCK_SLACK: Final = 0.02
"""Seconds before its deadline at which a client's cancellation still counts as the deadline."""

_Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallRecords:
    """Where the calls of all addresses are recorded."""

    gate: CallGate
    metrics: Metrics
    audit: AuditLog


class ServedCall:
    """A call of one method; a context manager around its handler.

    Within the context, `caller` is the call's principal, and log lines have its id and caller.
    """

    def __init__(
        self, records: CallRecords, method: str, context: _Context, principal: Principal
    ) -> None:
        self.id = uuid.uuid4().hex
        self._records = records
        self._context = context
        self._peer = str(context.peer())  # cannot be asked once the call has ended
        self._principal = principal
        self._ours = method.startswith(OURS)
        self._method = method
        self._managing = is_managing(method)
        self._code = grpc.StatusCode.OK
        self._reason = ""
        self._began = time.monotonic()
        self._counted = False
        self._admitted = False
        self._trace: CallTrace | None = None
        self._about: dict[str, Any] = {}
        self._why = ""
        self._notes: dict[str, Any] = {}
        self._undo: list[Callable[[], None]] = []
        self.stalled = False
        """Whether the request was ended because its client does not read."""

    async def __aenter__(self) -> Self:
        token = set_caller(self._principal)
        self._undo = [
            lambda: reset_caller(token),
            _set(REQUEST_ID, self.id),
            _set(PRINCIPAL, self._principal.name),
            _set(NOTES, self._notes),
        ]
        if self._ours:
            self._begin_trace()
            self._records.gate.enter()
            self._counted = True
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._context.set_trailing_metadata((("x-request-id", self.id),))
            else:
                forget_after_call(error)
                await self._fail(error)
        finally:
            self._leave()
            self._report(time.monotonic() - self._began)
            self._end_trace()
            for undo in self._undo:
                undo()

    def stall(self) -> None:
        """Ends the work for a client that does not read. A drain does not wait for its call."""
        log.warning("the client stopped reading", extra={"request_id": self.id})
        self.stalled = True
        self._leave()

    def check(self, request: Message) -> Message:
        """Takes the request's id and returns the request.

        Raises Refusal if a field is beyond its bounds or the server is draining.
        """
        if given := _given_id(request):
            self.id = given
            REQUEST_ID.set(given)
        if self._managing:
            self._about |= about_request(request)
        if self._ours:
            self.require_open()
            require(beyond_bounds(request))
        return request

    def answered(self, reply: M) -> M:
        """Takes note of the reply of a unary call, and returns it."""
        if self._managing:
            self._about |= about_reply(reply)
        return reply

    def require_open(self) -> None:
        """Raises Refusal if the server is draining, or too short of memory for the call."""
        if self._ours and self._records.gate.draining:
            raise Refusal(Reason.DRAINING, "the server is shutting down")
        if self._ours and not self._admitted:  # once: a stream that has begun is not cut
            self._records.gate.require_memory(self._method.rpartition("/")[2])
            self._admitted = True

    def _begin_trace(self) -> None:
        metadata: Any = self._context.invocation_metadata()
        self._trace = self._records.metrics.tracing.begin(self._method, metadata or ())
        self._undo.append(_set(TRACE, self._trace))

    def _end_trace(self) -> None:
        if self._trace is not None:
            named = {"loraplex.request_id": self.id}
            if self._principal.name:
                named["loraplex.principal"] = self._principal.name
            self._trace.end(self._code.name, self._reason, named)

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._records.gate.leave()

    def _report(self, seconds: float) -> None:
        """Counts the call, and writes its lines in the log and in the audit log."""
        if not (self._ours or self._reason in REFUSALS):
            return
        method, code = self._method.rpartition("/")[2], self._code.name
        self._records.metrics.rpc_ended(method, code, seconds, self._reason)
        extra: dict[str, Any] = {"method": method, "code": code, "seconds": round(seconds, 4)}
        extra |= self._notes
        if self._reason:
            extra["reason"] = self._reason
        # The audit log has lines about unknown callers, of whom there may be any number.
        known = self._reason not in UNAUTHENTICATED
        log.log(logging.INFO if known else logging.DEBUG, "call ended", extra=extra)
        if self._managing or self._reason in REFUSALS:
            self._records.audit.record(self._entry(seconds))

    def _entry(self, seconds: float) -> AuditEntry:
        return AuditEntry(
            method=self._method,
            principal=self._principal.name,
            peer=peer_host(self._peer),
            request_id=self.id,
            code=self._code.name,
            reason=self._reason,
            why=self._why,
            seconds=seconds,
            about=self._about,
        )

    async def _fail(self, error: BaseException) -> None:
        """Ends the call with the error's status. Returns only if there is no status to send."""
        gone = isinstance(error, grpc.aio.InternalError)  # what operations on its call then raise
        if gone or isinstance(error, asyncio.CancelledError):
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= _CLOCK_SLACK
            self._code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            if self.stalled:
                self._reason = Reason.READER_STALLED.name
            elif late:
                self._reason = Reason.DEADLINE_EXCEEDED.name
            if gone:
                raise asyncio.CancelledError from error
            return
        if isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception):
            return
        if not (isinstance(error, Refusal) and error.reason in TABLE):
            log.error("a handler failed", exc_info=error)
            error = Refusal(Reason.ENGINE_FAULT, "internal error")
        self._code = TABLE[error.reason].code
        self._reason = error.reason.name
        if self._reason in REFUSALS:
            cause = error.__cause__
            self._why = str(cause) if isinstance(cause, BadCredential) else error.message
        if error.reason is Reason.QUOTA_EXCEEDED:
            name = error.subject.name.removeprefix(PRINCIPAL_PREFIX)
            self._records.metrics.principals.quota_refused(name, error.field)
        status = status_of(error, self.id)
        trailers = trailers_of(status, error, self.id)
        try:
            await self._context.abort(self._code, status.message, trailers)
        except grpc.aio.InternalError as failed:  # the client is gone
            raise asyncio.CancelledError from failed
        except grpc.aio.AbortError as aborted:
            forget_after_call(aborted)
            raise


V = TypeVar("V")


def _set(variable: ContextVar[V], value: V) -> Callable[[], None]:
    """Sets a variable; returns what undoes that."""
    token: Token[V] = variable.set(value)
    return lambda: variable.reset(token)


def _given_id(request: Any) -> str:
    given = getattr(request, "request_id", "") or getattr(
        getattr(request, "request", None), "request_id", ""
    )
    return given if isinstance(given, str) and is_request_id(given) else ""
