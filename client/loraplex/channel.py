"""How a client reaches a server: channel options, retries, deadlines; shared by both clients.

Retries are gRPC's own (a service config), so they respect the deadline, the server's pushback and a
token bucket, and never repeat a stream that has produced a message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import grpc

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
    # `grpc.health.v1` is not listed: a health check reports what is, at once.
    "methodConfig": [
        {
            "name": [
                {"service": "loraplex.v1.GenerationService"},
                {"service": "loraplex.v1.AdapterService"},
                {"service": "loraplex.v1.TrainingService"},
            ],
            "retryPolicy": _RETRY_POLICY,
        },
        # Repeating one of these that did happen would answer wrongly, or leave something behind.
        {"name": [{"service": "loraplex.v1.AdapterService", "method": method} for method in _ONCE]},
    ],
    # While more than half of the bucket is spent, failures are reported instead of retried.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that restarts is found again within the retries, not after gRPC's default minute.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Log-probabilities of a long prompt outgrow gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
)

Metadata = tuple[tuple[str, str | bytes], ...]


class CallArguments(TypedDict):
    """What every stub call takes beside its request."""

    timeout: float | None
    wait_for_ready: bool | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class CallDefaults:
    """A client's settings for its calls.

    `timeout` is in seconds, None for no deadline. With `wait_for_ready` a call waits, up to its
    deadline, for a server to appear; without, it fails when the retries are spent.
    """

    timeout: float | None
    wait_for_ready: bool
    metadata: Metadata

    def arguments(self, timeout: float | None) -> CallArguments:
        """For one call; None takes the client's timeout."""
        return {
            "timeout": self.timeout if timeout is None else timeout,
            "wait_for_ready": self.wait_for_ready,
            "metadata": self.metadata,
        }

    def unbounded(self, timeout: float | None) -> CallArguments:
        """For a call that has no usual length; None is no deadline."""
        return {**self.arguments(None), "timeout": timeout}

    def probe(self, timeout: float) -> CallArguments:
        """For a health check, which never waits for a server."""
        return {"timeout": timeout, "wait_for_ready": False, "metadata": self.metadata}


def call_defaults(
    timeout: float | None, wait_for_ready: bool, metadata: Sequence[tuple[str, str | bytes]]
) -> CallDefaults:
    return CallDefaults(timeout, wait_for_ready, tuple(metadata))


def connect(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A channel for `Client`; without credentials in plain text. Connects at the first call."""
    if credentials is None:
        return grpc.insecure_channel(target, OPTIONS)
    return grpc.secure_channel(target, credentials, OPTIONS)


def connect_aio(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel for `AsyncClient`, bound to the running event loop."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, OPTIONS)
    return grpc.aio.secure_channel(target, credentials, OPTIONS)
