"""Errors of HTTP calls: OpenAI's shape, and the statuses that its clients act on.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Clients repeat what fails with 408, 409, 429 or 5xx unless `x-should-retry` forbids it.
"""

from __future__ import annotations

import json
import math
from typing import Any

import grpc
from loraplex import LoraplexError
from starlette.responses import JSONResponse, Response

RETRY_HEADER = "retry-after"
SHOULD_RETRY = "x-should-retry"
REQUEST_ID = "x-request-id"


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
        return JSONResponse(self.body, self.status, self.headers)


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
    504: "timeout_error",
}

# What a reason of the server becomes: status, code, and whether clients may repeat the request.
_REASONS: dict[str, tuple[int, str | None, bool | None]] = {
    "ADAPTER_NOT_FOUND": (404, "model_not_found", None),
    "PROMPT_TOO_LONG": (400, "context_length_exceeded", None),
    "CREDENTIALS_MISSING": (401, "invalid_api_key", None),
    "CREDENTIALS_INVALID": (401, "invalid_api_key", None),
    "QUOTA_EXCEEDED": (429, "rate_limit_exceeded", None),
    "DATA_FULL": (429, "data_full", False),
    "ADAPTER_CONFLICT": (409, "adapter_conflict", False),
    "ADAPTER_UNLOADED": (409, "adapter_unloaded", None),
    "NON_FINITE_LOGITS": (500, "non_finite_logits", False),
    "ENGINE_FAULT": (500, "engine_fault", False),
    "ADAPTER_CORRUPT": (500, "adapter_corrupt", False),
    "DEADLINE_UNMEETABLE": (503, "deadline_unmeetable", None),
}

_STATUSES: dict[grpc.StatusCode, tuple[int, bool | None]] = {
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


def of(error: LoraplexError, params: dict[str, str] | None = None) -> ApiError:
    """The error of HTTP for one of the server's.

    `params` maps fields of the server's request to those of the HTTP request, where they differ.
    """
    status, retry = _STATUSES.get(error.code, (500, False))
    code: str | None = error.reason.lower() or None
    if error.reason in _REASONS:
        status, code, retry = _REASONS[error.reason]
    param = "model" if code == "model_not_found" else None
    for violation in error.violations if status == 400 else ():
        field = violation.field
        param = (params or {}).get(field) or field.rpartition(".")[2] or None
        break
    return ApiError(
        status,
        error.sentence if error.violations else error.message or error.code.name,
        param=param,
        code=code,
        retry_after=error.retry_after,
        should_retry=retry,
        request_id=error.request_id,
    )


def not_found(model: str) -> ApiError:
    """The error for a model that does not exist for the caller."""
    return ApiError(
        404, f"The model `{model}` does not exist.", param="model", code="model_not_found"
    )
