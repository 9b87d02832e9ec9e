"""Talk to a Loraplex server: `Client` blocks, `AsyncClient` awaits, both speak the same words.

    from loraplex import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Hello", adapter="pirate", max_new_tokens=32).text)

Importing this package loads gRPC and protobuf, and nothing heavier.
"""

from __future__ import annotations

from loraplex.aio import AsyncClient, AsyncStream
from loraplex.client import Client, Stream
from loraplex.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    AdapterUnloaded,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidRequest,
    LoraplexError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServerFault,
    Unavailable,
    Unsupported,
)
from loraplex.requests import GenerateOptions, Message
from loraplex.results import (
    AdapterInfo,
    AdapterState,
    Completion,
    Delta,
    Finished,
    FinishReason,
    HealthStatus,
    Registration,
    ResolvedAdapter,
    Started,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "AdapterConflict",
    "AdapterInfo",
    "AdapterNotFound",
    "AdapterRejected",
    "AdapterState",
    "AdapterUnloaded",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "HealthStatus",
    "InvalidRequest",
    "LoraplexError",
    "Message",
    "NotFound",
    "PermissionDenied",
    "Registration",
    "ResolvedAdapter",
    "ResourceExhausted",
    "ServerFault",
    "Started",
    "Stream",
    "TokenLogprob",
    "TokenLogprobs",
    "Unavailable",
    "Unsupported",
    "Usage",
]
