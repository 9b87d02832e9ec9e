"""Clients of a Loraplex server: `Client` blocks, `AsyncClient` awaits; their calls are the same.

    from loraplex import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Hello", adapter="pirate", max_new_tokens=32).text)

Importing this package loads gRPC and protobuf and nothing heavier.
"""

from __future__ import annotations

from loraplex.aio import AsyncClient, AsyncTraining
from loraplex.aio_streams import AsyncJobWatch, AsyncStream, AsyncWatch
from loraplex.client import Client, Training
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
    JobConflict,
    JobNotFound,
    LoraplexError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServerFault,
    Unavailable,
    Unsupported,
    UploadNotFound,
    UploadOutOfStep,
)
from loraplex.requests import GenerateOptions, Message
from loraplex.results import (
    AdapterEvent,
    AdapterEventKind,
    AdapterInfo,
    AdapterSpec,
    AdapterState,
    AdapterTable,
    AdapterTier,
    Completion,
    Delta,
    Finding,
    Finished,
    FinishReason,
    HealthStatus,
    Registration,
    ResolvedAdapter,
    Started,
    TokenLogprob,
    TokenLogprobs,
    UploadProgress,
    Usage,
    Validation,
)
from loraplex.streams import JobWatch, Stream, Watch
from loraplex.training import (
    Evaluation,
    JobError,
    JobProgress,
    JobResult,
    JobState,
    TrainingJob,
    TrainingOptions,
)

__all__ = [
    "AdapterConflict",
    "AdapterEvent",
    "AdapterEventKind",
    "AdapterInfo",
    "AdapterNotFound",
    "AdapterRejected",
    "AdapterSpec",
    "AdapterState",
    "AdapterTable",
    "AdapterTier",
    "AdapterUnloaded",
    "AsyncClient",
    "AsyncJobWatch",
    "AsyncStream",
    "AsyncTraining",
    "AsyncWatch",
    "Cancelled",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "Evaluation",
    "FailedPrecondition",
    "FieldViolation",
    "Finding",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "HealthStatus",
    "InvalidRequest",
    "JobConflict",
    "JobError",
    "JobNotFound",
    "JobProgress",
    "JobResult",
    "JobState",
    "JobWatch",
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
    "Training",
    "TrainingJob",
    "TrainingOptions",
    "Unavailable",
    "Unsupported",
    "UploadNotFound",
    "UploadOutOfStep",
    "UploadProgress",
    "Usage",
    "Validation",
    "Watch",
]
