"""API messages that describe adapters: the store's record and the engine's status in one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.message import Message
from loraplex.v1 import adapter_pb2
from loraplex_adapters.format.examine import Report
from loraplex_adapters.store import OpenUpload
from loraplex_model.base.refusal import Problem

from loraplex_server.engine.messages import AdapterStatus
from loraplex_server.registry.view import AdapterRow

_STATES: Final = {
    "host": adapter_pb2.ADAPTER_STATE_STORED,
    "loading": adapter_pb2.ADAPTER_STATE_LOADING,
    "resident": adapter_pb2.ADAPTER_STATE_RESIDENT,
    "draining": adapter_pb2.ADAPTER_STATE_DRAINING,
}


def adapter(row: AdapterRow, obstacle: Problem | None = None) -> adapter_pb2.Adapter:
    """Describes a version, or an adapter that only the engine holds because its name is gone.

    `obstacle` is why the version is not served.
    """
    message = adapter_pb2.Adapter(digest=row.digest)
    if row.record is not None:
        message = adapter_pb2.Adapter(**_shared(adapter_pb2.Adapter, row.record))
        message.create_time.FromDatetime(row.record.created_at)
    if obstacle is not None:
        message.unservable.CopyFrom(
            adapter_pb2.AdapterFinding(**_shared(adapter_pb2.AdapterFinding, obstacle))
        )
    _place(message, row.status)
    return message


def judgement(report: Report, notes: Sequence[str]) -> adapter_pb2.ValidateAdapterResponse:
    """All problems of an adapter's files, or the adapter's properties if there are none."""
    found = report.spec.notes if report.spec else ()
    reply = adapter_pb2.ValidateAdapterResponse(notes=[*notes, *found])
    for finding in report.findings:
        reply.findings.add(**_shared(adapter_pb2.AdapterFinding, finding))
    if spec := report.spec:
        described = _shared(adapter_pb2.AdapterSpec, spec)
        reply.spec.CopyFrom(adapter_pb2.AdapterSpec(**described, device_bytes=spec.packed_bytes))
    return reply


def upload(found: OpenUpload) -> adapter_pb2.OpenUpload:
    """An unfinished upload."""
    message = adapter_pb2.OpenUpload(upload_id=found.id, **_shared(adapter_pb2.OpenUpload, found))
    message.change_time.FromNanoseconds(int(found.changed * 1e9))
    message.expire_time.FromNanoseconds(int(found.expires * 1e9))
    return message


def _shared(kind: type[Message], value: Any) -> dict[str, Any]:
    """The attributes of `value` that are named like fields of the message `kind`."""
    names = kind.DESCRIPTOR.fields_by_name
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _place(message: adapter_pb2.Adapter, status: AdapterStatus | None) -> None:
    message.state = adapter_pb2.ADAPTER_STATE_STORED
    message.tier = adapter_pb2.ADAPTER_TIER_DISK
    if status is None:
        return
    message.state = _STATES[status.state]
    if status.state in {"resident", "draining"}:
        message.tier = adapter_pb2.ADAPTER_TIER_DEVICE
        message.device_bytes = status.bytes
    elif status.host_bytes:
        message.tier = adapter_pb2.ADAPTER_TIER_HOST
    message.devices.extend(status.devices)
    message.host_bytes = status.host_bytes
    message.merged_bytes = status.merged_bytes
    message.pinned = status.pinned
    message.active_requests = status.refs
    if status.last_used:
        # The engine uses this machine's monotonic clock.
        used = time.time() - (time.monotonic() - status.last_used)
        message.last_use_time.FromNanoseconds(int(used * 1e9))
    if status.load_seconds:
        message.load_duration.FromNanoseconds(int(status.load_seconds * 1e9))
