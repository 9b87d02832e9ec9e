"""The error table: every way in which a call can be refused or fail, and how a client sees it.

A row binds a stable reason to a gRPC code and to the detail that goes with it. Handlers raise
`RpcError`; the interceptor alone turns it into a status. Every status carries a
`google.rpc.ErrorInfo`; `UNAVAILABLE` ones also say when to try again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from loraplex_adapters.errors import AdapterError

from loraplex_server.engine.messages import Failure

DOMAIN: Final = "loraplex"

_STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"
_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"


class Detail(Enum):
    """What a status carries beside its ErrorInfo."""

    NONE = "none"
    BAD_REQUEST = "BadRequest"
    RESOURCE = "ResourceInfo"
    PRECONDITION = "PreconditionFailure"
    QUOTA = "QuotaFailure"
    RETRY = "RetryInfo"


class Reason(Enum):
    """Why a call was refused or failed. The name goes over the wire and never changes."""

    FIELD_INVALID = "a field is out of its bounds; all that are wrong are listed"
    PROMPT_TOO_LONG = "the prompt leaves no room for a token in the model's context"
    REQUEST_MALFORMED = "the bytes are no message of this method"
    ADAPTER_NOT_FOUND = "no such adapter, or no such version of it"
    ADAPTER_CONFLICT = "the name is taken by other bytes, and `replace` was not set"
    ADAPTER_INVALID = "the adapter's files are damaged or contradict themselves"
    ADAPTER_UNSUPPORTED = "the adapter uses what this server does not serve"
    BASE_MODEL_MISMATCH = "the adapter does not fit the base model"
    RANK_TOO_LARGE = "its rank is above the server's limit"
    ADAPTER_TOO_LARGE = "it would not fit the adapter memory even alone"
    ADAPTER_CORRUPT = "its bytes in the store have changed since they were registered"
    ADAPTER_UNLOADED = "it was unloaded by force while the request ran"
    ADAPTER_NOT_MIXABLE = "it has virtual tokens: it can be used alone and with weight 1 only"
    PIN_BUDGET = "pinned adapters would take more of the device than they may"
    MERGE_BUDGET = "the dense copies do not fit the memory for them"
    MERGE_UNSUPPORTED = "it changes no matrix of the layers: there is nothing to merge"
    UPLOAD_NOT_FOUND = "no such upload: it has expired, or its adapter is registered"
    UPLOAD_OFFSET = "a piece does not follow what is there, or a file is not complete"
    TRAINING_DISABLED = "the operator has not turned training on"
    TRAINING_ELSEWHERE = "another server still looks after the training jobs"
    TRAINING_MEMORY = "the job would take more memory than there is, or than it may"
    JOB_NOT_FOUND = "no such training job, or it has been forgotten"
    JOB_CONFLICT = "the request id was used for another training job"
    JOB_QUEUE_FULL = "as many training jobs wait as may"
    STORE_FULL = "the adapter store's disk is full"
    STORE_UNAVAILABLE = "the adapter store cannot be read or written"
    OVERLOADED = "the queue is full, in requests or in tokens"
    DRAINING = "the server is shutting down"
    ENGINE_RESTARTED = "the engine is being started, or died under the request"
    DEADLINE_EXCEEDED = "the call's deadline passed, or an upload or a job's check took too long"
    READER_STALLED = "the client stopped reading its stream"
    NON_FINITE_LOGITS = "this request's logits were not finite; its batch mates are untouched"
    ENGINE_FAULT = "a fault of the server; the log has it under the request's id"


@dataclass(frozen=True, slots=True)
class Row:
    """How a reason looks to a client. `retry_seconds` is 0 where trying again would not help."""

    code: grpc.StatusCode
    detail: Detail = Detail.NONE
    retry_seconds: float = 0.0


_CODE = grpc.StatusCode

TABLE: Final[Mapping[Reason, Row]] = MappingProxyType(
    {
        Reason.FIELD_INVALID: Row(_CODE.INVALID_ARGUMENT, Detail.BAD_REQUEST),
        Reason.PROMPT_TOO_LONG: Row(_CODE.INVALID_ARGUMENT, Detail.BAD_REQUEST),
        Reason.REQUEST_MALFORMED: Row(_CODE.INVALID_ARGUMENT),
        Reason.ADAPTER_NOT_FOUND: Row(_CODE.NOT_FOUND, Detail.RESOURCE),
        Reason.ADAPTER_CONFLICT: Row(_CODE.ALREADY_EXISTS, Detail.RESOURCE),
        Reason.ADAPTER_INVALID: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.ADAPTER_UNSUPPORTED: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.BASE_MODEL_MISMATCH: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.RANK_TOO_LARGE: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.ADAPTER_TOO_LARGE: Row(_CODE.FAILED_PRECONDITION, Detail.PRECONDITION),
        Reason.ADAPTER_CORRUPT: Row(_CODE.DATA_LOSS, Detail.RESOURCE),
        Reason.ADAPTER_UNLOADED: Row(_CODE.ABORTED, Detail.RESOURCE),
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
        Reason.STORE_FULL: Row(_CODE.RESOURCE_EXHAUSTED, Detail.QUOTA),
        Reason.STORE_UNAVAILABLE: Row(_CODE.UNAVAILABLE, Detail.RETRY, 2.0),
        Reason.OVERLOADED: Row(_CODE.UNAVAILABLE, Detail.RETRY, 0.5),
        Reason.DRAINING: Row(_CODE.UNAVAILABLE, Detail.RETRY, 1.0),
        Reason.ENGINE_RESTARTED: Row(_CODE.UNAVAILABLE, Detail.RETRY, 2.0),
        Reason.DEADLINE_EXCEEDED: Row(_CODE.DEADLINE_EXCEEDED),
        Reason.READER_STALLED: Row(_CODE.ABORTED),
        Reason.NON_FINITE_LOGITS: Row(_CODE.INTERNAL),
        Reason.ENGINE_FAULT: Row(_CODE.INTERNAL),
    }
)


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of a request that is wrong, and what it must be."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorSubject:
    """What an error is about: `name` of a resource, or the field of an adapter's files."""

    kind: str = ""
    name: str = ""


_NOBODY: Final = ErrorSubject()


class RpcError(Exception):
    """An error for the client. `message` and all else in it is shown to the caller as it is."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        violations: Sequence[Violation] = (),
        subject: ErrorSubject = _NOBODY,
    ) -> None:
        super().__init__(f"{reason.name}: {message}")
        self.reason = reason
        self.message = message
        self.violations = violations
        self.subject = subject

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code."""
        return TABLE[self.reason].code


def invalid(violations: Sequence[Violation]) -> RpcError:
    """FIELD_INVALID with all that is wrong with a request."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    text = f"{first.field}: {first.description}{more}"
    return RpcError(Reason.FIELD_INVALID, text, violations=violations)


def from_failure(
    failure: Failure, subject: ErrorSubject = _NOBODY, field: str = "adapter_id"
) -> RpcError:
    """The engine's typed error; a reason outside the table is an ENGINE_FAULT.

    `field` is the request's that is at fault where the error is the client's.
    """
    reason = Reason.__members__.get(failure.reason, Reason.ENGINE_FAULT)
    message = "internal error" if reason is Reason.ENGINE_FAULT else failure.message
    wrong = TABLE[reason].detail is Detail.BAD_REQUEST
    found = [Violation(field, message)] if wrong else []
    return RpcError(reason, message, violations=found, subject=subject)


def from_adapter_error(error: AdapterError, subject: ErrorSubject, field: str) -> RpcError:
    """The store's typed error; `field` is the request's, for findings that name none."""
    reason = Reason.__members__.get(error.reason, Reason.ENGINE_FAULT)
    if reason is Reason.ENGINE_FAULT:
        return RpcError(reason, "internal error")
    found = [Violation(f.field or field, f.message) for f in error.findings]
    return RpcError(reason, error.message, violations=found, subject=subject)


def status_of(error: RpcError, request_id: str) -> status_pb2.Status:
    """The rich status of an error."""
    reason, row = error.reason, TABLE[error.reason]
    info = error_details_pb2.ErrorInfo(
        reason=reason.name, domain=DOMAIN, metadata={"request_id": request_id}
    )
    details: list[message.Message] = [info]
    match row.detail:
        case Detail.BAD_REQUEST:
            details.append(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(
                            field=v.field, description=v.description, reason=reason.name
                        )
                        for v in error.violations
                    ]
                )
            )
        case Detail.RESOURCE:
            details.append(
                error_details_pb2.ResourceInfo(
                    resource_type=error.subject.kind,
                    resource_name=error.subject.name,
                    description=error.message,
                )
            )
        case Detail.PRECONDITION:
            found = error.violations or [Violation(error.subject.name, error.message)]
            details.append(
                error_details_pb2.PreconditionFailure(
                    violations=[
                        error_details_pb2.PreconditionFailure.Violation(
                            type=reason.name, subject=v.field, description=v.description
                        )
                        for v in found
                    ]
                )
            )
        case Detail.QUOTA:
            short = error_details_pb2.QuotaFailure.Violation(
                subject=error.subject.name, description=error.message
            )
            details.append(error_details_pb2.QuotaFailure(violations=[short]))
        case Detail.RETRY:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(row.retry_seconds * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        case Detail.NONE:
            pass
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=row.code.value[0], message=error.message, details=packed)


def trailers_of(error: RpcError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata that goes with the error's code and message."""
    trailers: list[tuple[str, str | bytes]] = [
        (_STATUS_DETAILS_KEY, status_of(error, request_id).SerializeToString()),
        ("x-request-id", request_id),
    ]
    row = TABLE[error.reason]
    if row.detail is Detail.RETRY:
        trailers.append((_PUSHBACK_KEY, str(round(row.retry_seconds * 1000))))
    return tuple(trailers)
