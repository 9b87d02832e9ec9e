"""What can go wrong, as exceptions: one class per thing a caller would do differently.

Every error of a call is a `LoraplexError`. It is built from the `google.rpc.Status` that the server
sends; where there is none (no server, a proxy in between), from the bare gRPC status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

REQUEST_ID_TRAILER = "x-request-id"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field (or, for a refused adapter, one subject) and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """Everything known about a failed call. `retry_after` is in seconds; None: no hint."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    retry_after: float | None = None
    request_id: str = ""
    resource: str = ""


class LoraplexError(Exception):
    """A call that failed.

    `reason` is a stable upper-snake-case word ("" when the server gave none), `message` a sentence
    for people, `metadata` the reason's parameters, `violations` the fields at fault, `retry_after`
    the seconds after which the server suggests another try, `resource` the name that was not found
    or is taken, `request_id` what the server's log calls this request.
    """

    def __init__(self, details: ErrorDetails) -> None:
        super().__init__(details)
        self.details = details
        self.code = details.code
        self.message = details.message
        self.reason = details.reason
        self.metadata = details.metadata
        self.violations = details.violations
        self.retry_after = details.retry_after
        self.request_id = details.request_id
        self.resource = details.resource

    def __str__(self) -> str:
        text = self.message or self.code.name
        # The server's sentence often repeats the only violation.
        extra = [v for v in self.violations if v.description not in text]
        if extra:
            text += " [" + "; ".join(f"{v.field}: {v.description}" for v in extra) + "]"
        return f"{text} ({self.reason})" if self.reason else text


class InvalidRequest(LoraplexError):
    """The request is wrong: a field out of range, a prompt that is too long. See `violations`."""


class NotFound(LoraplexError):
    """What the request names does not exist."""


class AdapterNotFound(NotFound):
    """No adapter of that name, version or digest is registered. See `resource`."""


class AdapterConflict(LoraplexError):
    """The name is taken by an adapter with other bytes; register with `replace=True` to move it."""


class FailedPrecondition(LoraplexError):
    """The server is not in a state to do this. See `violations`."""


class AdapterRejected(FailedPrecondition):
    """This adapter cannot be served: corrupt, unsupported, too large, or for another base."""


class UploadNotFound(NotFound):
    """There is no such upload: it has expired, or its adapter is registered."""


class UploadOutOfStep(FailedPrecondition):
    """A piece did not follow what is there, or a file is incomplete; go on from `get_upload`."""


class JobNotFound(NotFound):
    """There is no such training job: it was never there, or the server has forgotten it."""


class JobConflict(LoraplexError):
    """The request id was used for a training job with other content. See `resource`."""


class AdapterUnloaded(LoraplexError):
    """The adapter was unloaded by force while the request ran. Trying again loads it again."""


class Unavailable(LoraplexError):
    """No server there, or one that is overloaded, draining or restarting. See `retry_after`."""


class DeadlineExceeded(LoraplexError):
    """The call's timeout passed; the server has stopped working on it."""


class Cancelled(LoraplexError):
    """The call was cancelled, by this side or by the server."""


class PermissionDenied(LoraplexError):
    """The caller is not known, or may not do this."""


class ResourceExhausted(LoraplexError):
    """A quota or a message size limit was met."""


class Unsupported(LoraplexError):
    """The server does not know this call; it may be older than the client."""


class ServerFault(LoraplexError):
    """A fault inside the server. Report it with `request_id`."""


_BY_REASON: dict[str, type[LoraplexError]] = {
    "ADAPTER_NOT_FOUND": AdapterNotFound,
    "ADAPTER_CONFLICT": AdapterConflict,
    "ADAPTER_INVALID": AdapterRejected,
    "ADAPTER_UNSUPPORTED": AdapterRejected,
    "BASE_MODEL_MISMATCH": AdapterRejected,
    "RANK_TOO_LARGE": AdapterRejected,
    "ADAPTER_TOO_LARGE": AdapterRejected,
    "ADAPTER_UNLOADED": AdapterUnloaded,
    "UPLOAD_NOT_FOUND": UploadNotFound,
    "UPLOAD_OFFSET": UploadOutOfStep,
    "JOB_NOT_FOUND": JobNotFound,
    "JOB_CONFLICT": JobConflict,
}

_BY_CODE: dict[grpc.StatusCode, type[LoraplexError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AdapterConflict,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.INTERNAL: ServerFault,
    grpc.StatusCode.UNKNOWN: ServerFault,
    grpc.StatusCode.DATA_LOSS: ServerFault,
}


def from_rpc_error(error: grpc.RpcError) -> LoraplexError:
    """The typed error for what a stub of `grpc` or `grpc.aio` raised."""
    pairs: Any = error.trailing_metadata() or ()  # two shapes of it, one iteration
    trailers = {str(key): value for key, value in pairs}
    known: dict[str, Any] = {
        "retry_after": _pushback(trailers.get(PUSHBACK_TRAILER)),
        "request_id": _text(trailers.get(REQUEST_ID_TRAILER)),
    }
    known |= _rich(error)
    details = ErrorDetails(code=error.code(), message=error.details() or "", **known)
    kind = _BY_REASON.get(details.reason) or _BY_CODE.get(details.code, LoraplexError)
    return kind(details)


def invalid(field_name: str, description: str) -> InvalidRequest:
    """The error for an argument that no request can carry; raised before anything is sent."""
    return InvalidRequest(
        ErrorDetails(
            code=grpc.StatusCode.INVALID_ARGUMENT,
            message=f"{field_name}: {description}",
            reason="FIELD_INVALID",
            violations=(FieldViolation(field_name, description),),
        )
    )


def cancelled_here() -> Cancelled:
    """The error for reading a stream that this side cancelled."""
    return Cancelled(ErrorDetails(grpc.StatusCode.CANCELLED, "cancelled by the caller"))


def cut_short() -> ServerFault:
    """The error for a stream that ended well but without its last message."""
    return ServerFault(
        ErrorDetails(
            grpc.StatusCode.INTERNAL, "the stream ended before it finished", "STREAM_INCOMPLETE"
        )
    )


def _rich(error: grpc.RpcError) -> dict[str, Any]:
    """What the attached `google.rpc.Status` says, as `ErrorDetails` fields; {} if unsound."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # it contradicts the bare status, or is no Status at all
        return {}
    found: dict[str, Any] = {}
    violations: list[FieldViolation] = []
    for packed in status.details if status is not None else ():
        match _unpack(packed):
            case error_details_pb2.ErrorInfo() as info:
                found["reason"] = info.reason
                found["metadata"] = dict(info.metadata)
            case error_details_pb2.BadRequest() as bad:
                violations += _violations((v.field, v.description) for v in bad.field_violations)
            case (
                error_details_pb2.PreconditionFailure() | error_details_pb2.QuotaFailure() as unmet
            ):
                violations += _violations((v.subject, v.description) for v in unmet.violations)
            case error_details_pb2.RetryInfo() as retry:
                found["retry_after"] = retry.retry_delay.ToTimedelta().total_seconds()
            case error_details_pb2.ResourceInfo() as resource:
                found["resource"] = resource.resource_name
            case error_details_pb2.RequestInfo() as request if request.request_id:
                found["request_id"] = request.request_id
    if violations:
        found["violations"] = tuple(violations)
    return found


def _unpack(packed: Any) -> Any:
    """The message inside an Any, or None for a kind this client does not know."""
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.QuotaFailure,
        error_details_pb2.RetryInfo,
        error_details_pb2.ResourceInfo,
        error_details_pb2.RequestInfo,
    ):
        message = kind()
        try:
            if packed.Unpack(message):
                return message
        except DecodeError:
            return None
    return None


def _violations(pairs: Iterable[tuple[str, str]]) -> list[FieldViolation]:
    return [FieldViolation(where, what) for where, what in pairs]


def _pushback(value: str | bytes | None) -> float | None:
    """Seconds of a pushback trailer; a negative one means "do not retry" and is no hint."""
    try:
        milliseconds = int(_text(value))
    except ValueError:
        return None
    return milliseconds / 1000 if milliseconds >= 0 else None


def _text(value: str | bytes | None) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value or ""
