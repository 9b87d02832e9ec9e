"""The error table: every way in which a call can be refused or fail, and how a client sees it.

A row of the table gives a reason its gRPC code and the kind of detail in its status. Handlers raise
`Refusal`, and only the interceptor turns it into a status. Every status has a
`google.rpc.ErrorInfo`; a status with code UNAVAILABLE, or of a refusal that knows the time itself,
also says when to try again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final
from urllib.parse import quote

import grpc
from google.protobuf import message
from google.rpc import error_details_pb2, status_pb2
from loraplex_model.base.refusal import NO_SUBJECT, Problem, Reason, Refusal, Subject

DOMAIN: Final = "loraplex"

_STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"
_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"


class Detail(Enum):
    """Kind of the detail that a status has in addition to its ErrorInfo."""

    NONE = "none"
    BAD_REQUEST = "BadRequest"
    RESOURCE = "ResourceInfo"
    PRECONDITION = "PreconditionFailure"
    QUOTA = "QuotaFailure"
    RETRY = "RetryInfo"


@dataclass(frozen=True, slots=True)
class Row:
    """The gRPC code and detail of a reason.

    `retry_seconds` is the pause after which a client may try again, where the refusal gives no
    other; 0 if that would not help.
    """

    code: grpc.StatusCode
    detail: Detail = Detail.NONE
    retry_seconds: float = 0.0


_CODE = grpc.StatusCode

TABLE: Final[Mapping[Reason, Row]] = MappingProxyType(
    {
        Reason.FIELD_INVALID: Row(_CODE.INVALID_ARGUMENT, Detail.BAD_REQUEST),
        Reason.PROMPT_TOO_LONG: Row(_CODE.INVALID_ARGUMENT, Detail.BAD_REQUEST),
        Reason.STRUCTURE_INVALID: Row(_CODE.INVALID_ARGUMENT, Detail.BAD_REQUEST),
        Reason.STRUCTURE_FAILED: Row(_CODE.INVALID_ARGUMENT, Detail.BAD_REQUEST),
        Reason.REQUEST_MALFORMED: Row(_CODE.INVALID_ARGUMENT),
        Reason.CREDENTIALS_MISSING: Row(_CODE.UNAUTHENTICATED),
        Reason.CREDENTIALS_INVALID: Row(_CODE.UNAUTHENTICATED),
        Reason.PERMISSION_DENIED: Row(_CODE.PERMISSION_DENIED),
        Reason.QUOTA_EXCEEDED: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.ADAPTER_NOT_FOUND: Row(_CODE.NOT_FOUND, Detail.RESOURCE),
        Reason.ADAPTER_CONFLICT: Row(_CODE.ALREADY_EXISTS, Detail.RESOURCE),
        Reason.ADAPTER_INVALID: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.SIGNATURE_INVALID: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.ADAPTER_UNSUPPORTED: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.BASE_MODEL_MISMATCH: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.RANK_TOO_LARGE: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.ADAPTER_TOO_LARGE: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.ADAPTER_CORRUPT: Row(_CODE.DATA_LOSS, Detail.RESOURCE),
        Reason.ADAPTER_UNLOADED: Row(_CODE.ABORTED, Detail.RESOURCE),
        Reason.ADAPTER_QUARANTINED: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.ADAPTER_NOT_MIXABLE: Row(_CODE.INVALID_ARGUMENT, Detail.BAD_REQUEST),
        Reason.PIN_BUDGET: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.MERGE_BUDGET: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.MERGE_UNSUPPORTED: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.UPLOAD_NOT_FOUND: Row(_CODE.NOT_FOUND, Detail.RESOURCE),
        Reason.UPLOAD_OFFSET: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.TRAINING_DISABLED: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.TRAINING_ELSEWHERE: Row(_CODE.UNAVAILABLE, Detail.RETRY, 2.0),
        Reason.TRAINING_MEMORY: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.JOB_NOT_FOUND: Row(_CODE.NOT_FOUND, Detail.RESOURCE),
        Reason.JOB_CONFLICT: Row(_CODE.ALREADY_EXISTS, Detail.RESOURCE),
        Reason.JOB_QUEUE_FULL: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.DATA_NOT_FOUND: Row(_CODE.NOT_FOUND, Detail.RESOURCE),
        Reason.DATA_CONFLICT: Row(_CODE.ALREADY_EXISTS, Detail.RESOURCE),
        Reason.DATA_FULL: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.DATA_CORRUPT: Row(_CODE.DATA_LOSS, Detail.RESOURCE),
        Reason.STORE_FULL: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.STORE_UNAVAILABLE: Row(_CODE.UNAVAILABLE, Detail.RETRY, 2.0),
        Reason.OVERLOADED: Row(_CODE.UNAVAILABLE, Detail.RETRY, 0.5),
        Reason.DRAINING: Row(_CODE.UNAVAILABLE, Detail.RETRY, 1.0),
        Reason.ENGINE_RESTARTED: Row(_CODE.UNAVAILABLE, Detail.RETRY, 2.0),
        Reason.REQUEST_QUARANTINED: Row(_CODE.FAILED_PRECONDITION),
        Reason.DEADLINE_EXCEEDED: Row(_CODE.DEADLINE_EXCEEDED),
        Reason.DEADLINE_UNMEETABLE: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.READER_STALLED: Row(_CODE.ABORTED),
        Reason.NON_FINITE_LOGITS: Row(_CODE.INTERNAL),
        Reason.ENGINE_FAULT: Row(_CODE.INTERNAL),
    }
)


def invalid(problems: Sequence[Problem]) -> Refusal:
    """FIELD_INVALID with everything that is wrong with a request."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Refusal(Reason.FIELD_INVALID, f"{first.field}: {first.message}{more}", problems=problems)


def require(problems: Sequence[Problem]) -> None:
    """Raises `invalid` if a request has problems."""
    if problems:
        raise invalid(problems)


def for_client(refusal: Refusal, subject: Subject = NO_SUBJECT, field: str = "") -> Refusal:
    """A refusal from behind the handlers as the client may see it.

    A reason outside the table becomes ENGINE_FAULT, without its message. `field` is the request's
    field at fault, for problems of INVALID_ARGUMENT that name none; `subject` is used unless the
    refusal has its own.
    """
    if refusal.reason not in TABLE or refusal.reason is Reason.ENGINE_FAULT:
        return Refusal(Reason.ENGINE_FAULT, "internal error", subject=subject)
    fallback = field if TABLE[refusal.reason].detail is Detail.BAD_REQUEST else ""
    return Refusal(
        refusal.reason,
        refusal.message,
        problems=[Problem(p.field or fallback, p.message, p.reason) for p in refusal.problems],
        subject=refusal.subject if refusal.subject != NO_SUBJECT else subject,
        retry_seconds=refusal.retry_seconds,
    )


Trailers = tuple[tuple[str, str | bytes], ...]

MAX_PAUSE_SECONDS: Final = 86_400.0
"""Longest pause that a client is told; after longer ones, a client must not wait for it."""

TRAILER_BYTES: Final = 6 << 10
"""Most bytes of trailing metadata as HTTP/2 counts them, encodings included. Peers and proxies
accept 8 KiB, which they may count together with headers of their own."""

_STATUS_BYTES: Final = 4 << 10
"""Bytes of the status in base64. The rest of the trailer holds the message and the request id."""
_MESSAGE_BYTES: Final = 1 << 10
"""Bytes of the message after percent-encoding, which turns a byte into up to three."""
_PROBLEM_BYTES: Final = 512
_FIELD_BYTES: Final = 256
_MOST_PROBLEMS: Final = 64
_PLAIN: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""Characters that gRPC sends as they are."""


def status_of(error: Refusal, request_id: str) -> status_pb2.Status:
    """The rich status of a refusal, cut to what a trailer carries.

    Long texts are shortened and the last problems left out; the last entry then says how many.
    """
    problems = [
        Problem(_cut(p.field, _FIELD_BYTES), _cut(p.message, _PROBLEM_BYTES))
        for p in error.problems
    ]
    listed = problems[:_MOST_PROBLEMS]
    while True:
        left = len(problems) - len(listed)
        more = [Problem("", f"and {left} more")] if left else []
        status = _status(error, [*listed, *more], request_id)
        if len(listed) <= 1 or status.ByteSize() * 4 / 3 <= _STATUS_BYTES:
            return status
        listed = listed[: len(listed) * 3 // 4]


def _status(error: Refusal, problems: Sequence[Problem], request_id: str) -> status_pb2.Status:
    row, text = TABLE[error.reason], _cut_encoded(error.message, _MESSAGE_BYTES)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata={"request_id": request_id}
    )
    status = status_pb2.Status(code=row.code.value[0], message=text)
    for detail in (info, *_details(error, row, text, problems)):
        status.details.add().Pack(detail)
    if (pause := _pause_milliseconds(error)) is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(pause)
        status.details.add().Pack(retry)
    return status


def _pause_milliseconds(error: Refusal) -> int | None:
    """The pause after which a client may try again, rounded up; None if that would not help."""
    row = TABLE[error.reason]
    seconds = error.retry_seconds
    if seconds is None:
        seconds = row.retry_seconds if row.detail is Detail.RETRY else math.inf
    return math.ceil(seconds * 1000) if seconds <= MAX_PAUSE_SECONDS else None


def _details(
    error: Refusal, row: Row, text: str, problems: Sequence[Problem]
) -> Iterator[message.Message]:
    """The detail that the row asks for; the pause is added by `_status`."""
    kind, name = error.subject.kind, _cut(error.subject.name, _FIELD_BYTES)
    match row.detail:
        case Detail.NONE | Detail.RETRY:
            return
        case Detail.BAD_REQUEST:
            bad = error_details_pb2.BadRequest()
            for p in problems:
                bad.field_violations.add(field=p.field, description=p.message, reason=error.reason)
            yield bad
        case Detail.RESOURCE:
            yield error_details_pb2.ResourceInfo(
                resource_type=kind, resource_name=name, description=text
            )
        case Detail.PRECONDITION:
            unmet = error_details_pb2.PreconditionFailure()
            for p in problems:
                unmet.violations.add(
                    type=error.reason, subject=p.field or name, description=p.message
                )
            yield unmet
        case Detail.QUOTA:
            quota = error_details_pb2.QuotaFailure()
            quota.violations.add(
                subject=name, description=text, quota_id=_cut(error.field, _FIELD_BYTES)
            )
            yield quota


def _cut(text: str, limit: int) -> str:
    """The text in at most `limit` bytes of UTF-8; halves of surrogate pairs are written out."""
    data = text.encode(errors="backslashreplace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode(errors="ignore") + "…"


def _cut_encoded(text: str, limit: int) -> str:
    """The text in at most `limit` bytes after gRPC's percent-encoding of the message."""
    text = _cut(text, limit)
    if len(quote(text, safe=_PLAIN)) <= limit:
        return text
    end, room = 0, limit - len(quote("…"))
    for end, letter in enumerate(text):  # noqa: B007
        room -= len(quote(letter, safe=_PLAIN))
        if room < 0:
            break
    return text[:end] + "…"


def trailers_of(status: status_pb2.Status, error: Refusal, request_id: str) -> Trailers:
    """The trailing metadata that goes with the status of a refusal and its message."""
    trailers: list[tuple[str, str | bytes]] = [
        (_STATUS_DETAILS_KEY, status.SerializeToString()),
        ("x-request-id", request_id),
    ]
    if (pause := _pause_milliseconds(error)) is not None:
        trailers.append((_PUSHBACK_KEY, str(pause)))
    return tuple(trailers)
