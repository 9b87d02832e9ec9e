"""Errors of HTTP calls: OpenAI's shape, and the statuses that its clients act on.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Clients repeat what fails with 408, 409, 429 or 5xx unless `x-should-retry` forbids it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import grpc
from loraplex import LoraplexError
from starlette.responses import JSONResponse, Response

RETRY_HEADER: Final = "retry-after"
SHOULD_RETRY: Final = "x-should-retry"
REQUEST_ID: Final = "x-request-id"

_UNAVAILABLE_SECONDS: Final = 1.0
"""Pause after which a client may try again if the server itself could not say."""

log = logging.getLogger(__name__)


class ApiError(Exception):
    """A refused or failed request, as its caller gets it.

    Attributes:
        status: HTTP status.
        message: a sentence that says what is wrong and what to do.
        type: OpenAI's class of the error, such as "invalid_request_error".
        param: field of the request that is at fault; None if it is none.
        code: a stable word, such as "model_not_found"; None without one.
        retry_after: seconds after which another attempt makes sense; None if unknown.
        should_retry: whether a client may repeat the request by itself; None leaves it to the
            status.
        request_id: the server's id of the request; "" if it has none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "api_error")
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.request_id = request_id

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, also of an error in the middle of a stream."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers for clients that repeat requests by themselves, and the request's id."""
        found = {}
        if self.retry_after is not None:
            found[RETRY_HEADER] = str(max(1, math.ceil(self.retry_after)))
            found[f"{RETRY_HEADER}-ms"] = str(math.ceil(1000 * self.retry_after))
        if self.should_retry is not None:
            found[SHOULD_RETRY] = json.dumps(self.should_retry)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.request_id:
            found[REQUEST_ID] = self.request_id
        return found

    def response(self) -> Response:
        """The response with the body and the headers."""
        return JSONResponse(self.body, self.status, self.headers)


_TYPES: Final = MappingProxyType(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        408: "timeout_error",
        409: "conflict_error",
        413: "invalid_request_error",
        415: "invalid_request_error",
        422: "invalid_request_error",
        429: "rate_limit_error",
        499: "client_closed_request",
        503: "service_unavailable_error",
        504: "timeout_error",
    }
)

# What a reason of the server becomes: status, code, and whether clients may repeat the request.
_REASONS: Final[Mapping[str, tuple[int, str, bool | None]]] = MappingProxyType(
    {
        "ADAPTER_NOT_FOUND": (404, "model_not_found", None),
        "PROMPT_TOO_LONG": (400, "context_length_exceeded", None),
        "CREDENTIALS_MISSING": (401, "invalid_api_key", None),
        "CREDENTIALS_INVALID": (401, "invalid_api_key", None),
        "QUOTA_EXCEEDED": (429, "rate_limit_exceeded", None),
        "ADAPTER_CONFLICT": (409, "adapter_conflict", False),
        "ADAPTER_UNLOADED": (409, "adapter_unloaded", None),
        "PIN_BUDGET": (409, "pin_budget", False),
        "MERGE_BUDGET": (409, "merge_budget", False),
        "DATA_FULL": (429, "data_full", False),
        "STORE_FULL": (507, "store_full", False),
        "NON_FINITE_LOGITS": (500, "non_finite_logits", False),
        "ENGINE_FAULT": (500, "engine_fault", False),
        "ADAPTER_CORRUPT": (500, "adapter_corrupt", False),
        "DEADLINE_UNMEETABLE": (503, "deadline_unmeetable", None),
    }
)

_STATUSES: Final[Mapping[grpc.StatusCode, tuple[int, bool | None]]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: (400, None),
        grpc.StatusCode.OUT_OF_RANGE: (400, None),
        grpc.StatusCode.FAILED_PRECONDITION: (400, None),
        grpc.StatusCode.UNAUTHENTICATED: (401, None),
        grpc.StatusCode.PERMISSION_DENIED: (403, None),
        grpc.StatusCode.NOT_FOUND: (404, None),
        grpc.StatusCode.ALREADY_EXISTS: (409, False),
        grpc.StatusCode.ABORTED: (409, None),
        grpc.StatusCode.RESOURCE_EXHAUSTED: (429, None),
        grpc.StatusCode.CANCELLED: (499, False),
        grpc.StatusCode.UNIMPLEMENTED: (501, False),
        grpc.StatusCode.UNAVAILABLE: (503, None),
        grpc.StatusCode.DEADLINE_EXCEEDED: (504, False),
    }
)


def of(error: LoraplexError, params: Mapping[str, str] | None = None) -> ApiError:
    """The error of HTTP for one of the server's.

    `params` maps fields of the server's request to those of the HTTP request, where they differ;
    what follows a mapped field, such as an index, is kept.
    """
    status, retry = _STATUSES.get(error.code, (500, False))
    code = error.reason.lower() or None
    if error.reason in _REASONS:
        status, code, retry = _REASONS[error.reason]
    elif error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not error.reason:
        # gRPC itself says this of a message that is larger than the server takes.
        status, code, retry = 413, "request_too_large", False
    param = "model" if code == "model_not_found" else None
    message = error.message or error.code.name
    if status == 400 and error.violations:
        at_fault = [(param_of(v.field, params or {}), v.description) for v in error.violations]
        param = at_fault[0][0] or None
        if error.reason in ("FIELD_INVALID", "STRUCTURE_INVALID"):
            message = "; ".join(f"{name}: {text}" if name else text for name, text in at_fault)
    retry_after = error.retry_after
    if status == 503 and retry_after is None:
        retry_after = _UNAVAILABLE_SECONDS
    return ApiError(
        status,
        message,
        param=param,
        code=code,
        retry_after=retry_after,
        should_retry=retry,
        request_id=error.request_id,
    )


def param_of(field: str, params: Mapping[str, str]) -> str:
    """The field of the HTTP request for one of the server's request, which a stream has within."""
    field = field.removeprefix("request.")
    for ours, theirs in params.items():
        rest = field.removeprefix(ours)
        if rest != field and (not rest or rest[0] in ".["):
            return theirs + rest
    return field.removeprefix("sampling.").removeprefix("stop.")


def not_found(model: str, request_id: str = "") -> ApiError:
    """The error for a model that does not exist for the caller."""
    shown = model if len(model) <= 256 else f"{model[:256]}..."
    return ApiError(
        404,
        f"The model `{shown}` does not exist.",
        param="model",
        code="model_not_found",
        request_id=request_id,
    )


def fault(error: Exception, scope: Mapping[str, Any]) -> ApiError:
    """The error for a fault of the gateway, which is logged.

    Neither the answer nor the log has the text of the error, which may quote what was sent.
    """
    bare = RuntimeError(type(error).__name__).with_traceback(error.__traceback__)
    log.error("%s failed: %s", scope.get("method", ""), type(error).__name__, exc_info=bare)
    return ApiError(500, "internal error of the gateway", should_retry=False)
