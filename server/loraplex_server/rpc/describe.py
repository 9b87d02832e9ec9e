"""API messages that describe adapters: the store's record and the engine's status in one."""

from __future__ import annotations

import time
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from loraplex.v1 import adapter_pb2
from loraplex_adapters.format.examine import Report
from loraplex_adapters.format.spec import CheckedAdapter
from loraplex_adapters.store import Record

from loraplex_server.engine.messages import AdapterStatus

_STATES: Final = {
    "host": adapter_pb2.ADAPTER_STATE_STORED,
    "loading": adapter_pb2.ADAPTER_STATE_LOADING,
    "resident": adapter_pb2.ADAPTER_STATE_RESIDENT,
    "draining": adapter_pb2.ADAPTER_STATE_DRAINING,
}


def adapter(record: Record, status: AdapterStatus | None) -> adapter_pb2.Adapter:
    """Describes a version; `status` is None if it is not in the engine."""
    message = adapter_pb2.Adapter(
        name=record.name,
        version=record.version,
        digest=record.digest,
        peft_type=record.peft_type,
        rank=record.rank,
        target_modules=record.target_modules,
        size_bytes=record.size_bytes,
        base_model=record.base_model,
        aliases=record.aliases,
        labels=record.labels,
        provenance=record.provenance,
        virtual_tokens=record.virtual_tokens,
    )
    message.create_time.FromDatetime(record.created_at)
    _place(message, status)
    return message


def nameless(digest: str, status: AdapterStatus | None) -> adapter_pb2.Adapter:
    """Describes an adapter whose name was deleted or replaced while the engine holds it."""
    message = adapter_pb2.Adapter(digest=digest)
    _place(message, status)
    return message


def judgement(report: Report) -> adapter_pb2.ValidateAdapterResponse:
    """All problems of an adapter's files, or the adapter's properties if there are none."""
    return adapter_pb2.ValidateAdapterResponse(
        findings=[
            adapter_pb2.AdapterFinding(reason=f.reason, field=f.field, message=f.message)
            for f in report.findings
        ],
        spec=None if report.spec is None else _spec(report.spec),
    )


def _spec(spec: CheckedAdapter) -> adapter_pb2.AdapterSpec:
    return adapter_pb2.AdapterSpec(
        digest=spec.digest,
        peft_type=spec.peft_type,
        rank=spec.rank,
        target_modules=spec.target_modules,
        size_bytes=spec.size_bytes,
        device_bytes=spec.packed_bytes,
        virtual_tokens=spec.virtual_tokens,
        base_model=spec.base_model,
        provenance=spec.provenance,
    )


def _place(message: adapter_pb2.Adapter, status: AdapterStatus | None) -> None:
    if status is None:
        message.state = adapter_pb2.ADAPTER_STATE_STORED
        message.tier = adapter_pb2.ADAPTER_TIER_DISK
        return
    message.state = _STATES[status.state]
    on_device = status.state in {"resident", "draining"}
    if on_device:
        message.tier = adapter_pb2.ADAPTER_TIER_DEVICE
        message.device_bytes = status.bytes
    elif status.host_bytes:
        message.tier = adapter_pb2.ADAPTER_TIER_HOST
    else:
        message.tier = adapter_pb2.ADAPTER_TIER_DISK
    message.host_bytes = status.host_bytes
    message.merged_bytes = status.merged_bytes
    message.pinned = status.pinned
    message.active_requests = status.refs
    if status.last_used:
        # The engine uses this machine's monotonic clock.
        ago = time.monotonic() - status.last_used
        message.last_use_time.CopyFrom(_timestamp(time.time() - ago))
    if status.load_seconds:
        message.load_duration.CopyFrom(_duration(status.load_seconds))


def _timestamp(seconds: float) -> Timestamp:
    made = Timestamp()
    made.FromNanoseconds(int(seconds * 1e9))
    return made


def _duration(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(int(seconds * 1e9))
    return made
