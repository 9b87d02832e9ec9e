"""The errors of calls: one class for each kind that a caller would handle differently.

Every error of a call is a `LoraplexError`. It is built from the `google.rpc.Status` that the server
sends or, without one (no server, or a proxy in between), from the bare gRPC status.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """A field of the request, or a subject such as an adapter, and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """Everything known about a failed call; `LoraplexError` describes the fields."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    retry_after: float | None = None
    request_id: str = ""
    resource: str = ""


class LoraplexError(Exception):
    """A failed call.

    `reason` is a stable upper-snake-case word ("" if the server gave none), `message` a sentence
    for people, `metadata` the parameters of the reason, and `violations` the fields at fault.
    `retry_after` is the number of seconds after which the server suggests another attempt, None
    without a suggestion. `resource` is the name that was not found or is taken. `request_id`
    identifies the request in the server's log.
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

    @property
    def advice(self) -> str:
        """What the caller can do about it; "" if the message says it."""
        return ""

    def __str__(self) -> str:
        return f"{self.sentence}; {self.advice}" if self.advice else self.sentence

    @property
    def sentence(self) -> str:
        """The message with the violations that it does not name, and the reason."""
        text = self.message or self.code.name
        # The server's sentence often repeats its only violation.
        extra = [v for v in self.violations if v.description not in text]
        if extra:
            text += " [" + "; ".join(f"{v.field}: {v.description}" for v in extra) + "]"
        return f"{text} ({self.reason})" if self.reason else text


class InvalidRequest(LoraplexError):
    """The request is invalid, such as a field out of range or a prompt that is too long.

    `violations` names the fields.
    """


class NotFound(LoraplexError):
    """The request names something that does not exist."""


class AdapterNotFound(NotFound):
    """No adapter of that name, version or digest is registered; `resource` is the name."""


class AdapterConflict(LoraplexError):
    """The name belongs to an adapter with other bytes. Register with `replace=True` to move it."""


class FailedPrecondition(LoraplexError):
    """The state of the server does not allow the call; `violations` says why."""


class AdapterRejected(FailedPrecondition):
    """The adapter is corrupt, unsupported, too large or made for another base model."""


class UploadNotFound(NotFound):
    """The upload does not exist: it has expired, or its adapter is registered already."""


class UploadOutOfStep(FailedPrecondition):
    """A chunk does not continue the uploaded bytes, or a file is incomplete.

    `get_upload` says where to continue.
    """


class JobNotFound(NotFound):
    """The training job does not exist, or the server no longer remembers it."""


class DataNotFound(NotFound):
    """The file of examples does not exist."""


class DataConflict(LoraplexError):
    """The request id belongs to a file of examples with other bytes; `resource` is that file."""


class JobConflict(LoraplexError):
    """The request id belongs to a training job with other content; `resource` is that job."""


class AdapterUnloaded(LoraplexError):
    """The adapter was unloaded by force during the request. A new request loads it again."""


class Unavailable(LoraplexError):
    """The server cannot be reached, or is overloaded, shutting down or restarting.

    `retry_after` says when to try again, if the server knows.
    """


class DeadlineExceeded(LoraplexError):
    """The call took longer than its timeout. The server has stopped working on it."""


class Cancelled(LoraplexError):
    """The call was cancelled by the client or by the server."""


class PermissionDenied(LoraplexError):
    """The caller is not allowed to make this call, or is not known (`Unauthenticated`)."""

    @property
    def advice(self) -> str:
        return "ask the operator of the server for a role that allows it"


class Unauthenticated(PermissionDenied):
    """The call carried no key, or one that the server does not accept (any more)."""

    @property
    def advice(self) -> str:
        return "give a valid key with key or key_file, or set LORAPLEX_KEY or LORAPLEX_KEY_FILE"


class ResourceExhausted(LoraplexError):
    """A quota or a limit on the size of messages is exhausted."""


class QuotaExceeded(ResourceExhausted):
    """The caller has used what it may use of the server.

    `retry_after` is the time in seconds after which the next attempt can succeed; None if waiting
    does not help, as with a quota of stored bytes. No call is repeated for it, except the pieces of
    an upload.
    """

    @property
    def advice(self) -> str:
        if self.retry_after is None:
            return "free some of what you use, or ask the operator of the server for more"
        return f"try again in {self.retry_after:g} s"


class Unsupported(LoraplexError):
    """The server does not offer this call; it may be older than the client."""


class ServerFault(LoraplexError):
    """An internal error of the server. Its log has details under `request_id`."""


# By the server's reason, and by the gRPC status for all other reasons.
_KINDS: dict[str | grpc.StatusCode, type[LoraplexError]] = {
    "ADAPTER_NOT_FOUND": AdapterNotFound,
    "ADAPTER_CONFLICT": AdapterConflict,
    "ADAPTER_INVALID": AdapterRejected,
    "SIGNATURE_INVALID": AdapterRejected,
    "ADAPTER_UNSUPPORTED": AdapterRejected,
    "BASE_MODEL_MISMATCH": AdapterRejected,
    "RANK_TOO_LARGE": AdapterRejected,
    "ADAPTER_TOO_LARGE": AdapterRejected,
    "ADAPTER_UNLOADED": AdapterUnloaded,
    "UPLOAD_NOT_FOUND": UploadNotFound,
    "UPLOAD_OFFSET": UploadOutOfStep,
    "JOB_NOT_FOUND": JobNotFound,
    "JOB_CONFLICT": JobConflict,
    "DATA_NOT_FOUND": DataNotFound,
    "DATA_CONFLICT": DataConflict,
    "QUOTA_EXCEEDED": QuotaExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AdapterConflict,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.INTERNAL: ServerFault,
    grpc.StatusCode.UNKNOWN: ServerFault,
    grpc.StatusCode.DATA_LOSS: ServerFault,
}

_DETAILS: dict[str, Any] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.QuotaFailure,
        error_details_pb2.RetryInfo,
        error_details_pb2.ResourceInfo,
        error_details_pb2.RequestInfo,
    )
}


def from_rpc_error(error: grpc.RpcError) -> LoraplexError:
    """Returns the typed error for an error of `grpc` or `grpc.aio`."""
    pairs: Any = (
        error.trailing_metadata() or ()
    )  # grpc and grpc.aio differ in its type, but not in iteration
    trailers = {str(key): value for key, value in pairs}
    known: dict[str, Any] = {
        "retry_after": _pushback(trailers.get(PUSHBACK_TRAILER)),
        "request_id": _text(trailers.get(REQUEST_ID_TRAILER)),
    }
    known |= _rich(error)
    details = ErrorDetails(code=error.code(), message=error.details() or "", **known)
    kind = _KINDS.get(details.reason) or _KINDS.get(details.code, LoraplexError)
    return kind(details)


def invalid(field_name: str, description: str) -> InvalidRequest:
    """Returns the error for an argument that no request can carry."""
    return InvalidRequest(
        ErrorDetails(
            code=grpc.StatusCode.INVALID_ARGUMENT,
            message=f"{field_name}: {description}",
            reason="FIELD_INVALID",
            violations=(FieldViolation(field_name, description),),
        )
    )


def cancelled_here() -> Cancelled:
    """Returns the error for reading a stream that the client cancelled."""
    return Cancelled(ErrorDetails(grpc.StatusCode.CANCELLED, "the client cancelled the call"))


def cut_short() -> ServerFault:
    """Returns the error for a stream that ended normally but without its last message."""
    return ServerFault(
        ErrorDetails(
            grpc.StatusCode.INTERNAL,
            "the stream ended without its last message",
            "STREAM_INCOMPLETE",
        )
    )


def _rich(error: grpc.RpcError) -> dict[str, Any]:
    """Returns the content of the attached `google.rpc.Status`, as fields of ErrorDetails.

    The result is empty if there is no Status or if it cannot be read.
    """
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # contradicts the bare status, or is no Status at all
        return {}
    found: dict[str, Any] = {}
    violations: list[FieldViolation] = []
    for packed in status.details if status is not None else ():
        match _unpack(packed):
            case error_details_pb2.ErrorInfo() as info:
                found["reason"] = info.reason
                found["metadata"] = dict(info.metadata)
            case error_details_pb2.BadRequest() as bad:
                violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
            case (
                error_details_pb2.PreconditionFailure() | error_details_pb2.QuotaFailure() as unmet
            ):
                violations += [FieldViolation(v.subject, v.description) for v in unmet.violations]
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
    """Returns the message inside an Any; None if its type is unknown or its bytes are invalid."""
    kind = _DETAILS.get(packed.TypeName())
    try:
        return kind.FromString(packed.value) if kind else None
    except DecodeError:
        return None


def _pushback(value: str | bytes | None) -> float | None:
    """Returns the seconds of a pushback trailer; None if it is negative, which forbids retries."""
    try:
        milliseconds = int(_text(value))
    except ValueError:
        return None
    return milliseconds / 1000 if milliseconds >= 0 else None


def _text(value: str | bytes | None) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value or ""
