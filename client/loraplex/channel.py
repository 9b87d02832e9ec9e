"""Channels to a server: their options, retries and deadlines.

Retries are gRPC's own (a service config), so they respect the deadline, the server's pushback and a
token bucket, and never repeat a stream that has produced a message.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any, TypedDict

import grpc

from loraplex.access.keys import ClientKey
from loraplex.access.options import ClientAccess

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 120.0  # seconds
HEALTH_TIMEOUT = 5.0  # seconds

_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

_ONCE = (
    "AbortUpload",
    "DeleteAdapter",
    "DeleteAlias",
    "RestoreAdapter",
    "SetAlias",
    "StartUpload",
    "UploadAdapter",
)

SERVICE_CONFIG: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # `grpc.health.v1` is not listed: a health check reports the first answer.
    "methodConfig": [
        {
            "name": [
                {"service": "loraplex.v1.GenerationService"},
                {"service": "loraplex.v1.AdapterService"},
                {"service": "loraplex.v1.TrainingService"},
            ],
            "retryPolicy": _RETRY_POLICY,
        },
        # Repeating one of these calls after it succeeded would fail or leave an unused upload.
        {"name": [{"service": "loraplex.v1.AdapterService", "method": method} for method in _ONCE]},
    ],
    # With more than half of the bucket spent, failures are reported instead of retried.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Finds a restarted server within the retries; gRPC's default can take a minute.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A connection for each channel: otherwise all those of a process share one, which the server
    # allows 256 calls at once.
    ("grpc.use_local_subchannel_pool", 1),
    # Log-probabilities of a long prompt can exceed gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
)

_HEALTH_CHECKED = json.dumps(
    {**SERVICE_CONFIG, "healthCheckConfig": {"serviceName": "loraplex.v1.GenerationService"}}
)


def options(target: str) -> tuple[tuple[str, Any], ...]:
    """Returns the options of a channel to `target`.

    A target that may stand for several servers, such as `ipv4:10.0.0.1:50051,10.0.0.2:50051` or
    `dns:///loraplex:50051`, is watched: calls go to the servers that report to be serving, and so
    not to one that is about to stop. With a single server this would only hide why it refuses.
    """
    if "," in target or target.startswith("dns:"):
        return (("grpc.service_config", _HEALTH_CHECKED), *OPTIONS[1:])
    return OPTIONS


Metadata = tuple[tuple[str, str | bytes], ...]


class CallArguments(TypedDict):
    """The arguments that every stub call takes besides its request."""

    timeout: float | None
    wait_for_ready: bool | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class CallDefaults:
    """A client's settings for its calls.

    `timeout` is in seconds; None means no deadline. With `wait_for_ready`, a call waits for a
    server until its deadline; otherwise it fails once its retries are used up. `repr` shows neither
    `metadata` nor `key`.
    """

    timeout: float | None
    wait_for_ready: bool
    metadata: Metadata = field(repr=False)
    key: ClientKey | None = field(default=None, repr=False)

    def arguments(self, timeout: float | None) -> CallArguments:
        """Returns the arguments of a call; a `timeout` of None means the client's."""
        return {
            "timeout": self.timeout if timeout is None else timeout,
            "wait_for_ready": self.wait_for_ready,
            "metadata": self._sent(),
        }

    def unbounded(self, timeout: float | None) -> CallArguments:
        """Returns the arguments of a call of any length; None means no deadline."""
        return {**self.arguments(None), "timeout": timeout}

    def probe(self, timeout: float) -> CallArguments:
        """Returns the arguments of a health check, which waits for no server and carries no key."""
        return {"timeout": timeout, "wait_for_ready": False, "metadata": self.metadata}

    def _sent(self) -> Metadata:
        """The metadata of the next call, with the key and the caller's current trace.

        Retries by gRPC send it again. A trace that the caller's own metadata name stays.
        """
        own = self.metadata if self.key is None else (*self.metadata, *self.key.metadata())
        if any(name == "traceparent" for name, _ in self.metadata):
            return own
        return (*own, *trace_metadata())


_TRACE_HEADERS = ("traceparent", "tracestate")


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The metadata `traceparent` and `tracestate` of the current span; empty if there is none.

    OpenTelemetry is a dependency of programs that have spans, not of this package. It is never
    imported here first: without it there is no current span.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple((key, carrier[key]) for key in _TRACE_HEADERS if carrier.get(key))


def connect(target: str, access: ClientAccess) -> grpc.Channel:
    """Returns a channel that connects at its first call, unencrypted without credentials."""
    sent = (*options(target), *access.options)
    if access.credentials is None:
        return grpc.insecure_channel(target, sent)
    return grpc.secure_channel(target, access.credentials, sent)


def connect_aio(target: str, access: ClientAccess) -> grpc.aio.Channel:
    """Returns a channel of `grpc.aio`, bound to the running event loop."""
    sent = (*options(target), *access.options)
    if access.credentials is None:
        return grpc.aio.insecure_channel(target, sent)
    return grpc.aio.secure_channel(target, access.credentials, sent)
