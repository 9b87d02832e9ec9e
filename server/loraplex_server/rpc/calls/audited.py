"""What the audit log says of requests and replies: names, ids, labels, digests and versions.

Fields that are not named here never reach the log: prompts, chat templates, paths, data.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.message import Message

from loraplex_server.rpc.calls.bounds import MAX_LABELS, MAX_NAME

_NAMES: Final = {
    "adapter_id": "adapter_id",
    "name": "adapter",
    "alias": "alias",
    "upload_id": "upload_id",
    "job_id": "job_id",
    "data_id": "data_id",
}
"""Fields of requests, and of their parts, that are recorded, and under which names."""

_PARTS: Final = ("header", "spec", "delivery", "start")
"""Fields of requests that are messages with names of their own."""

_LABELS: Final = {"labels": "labels", "set": "labels", "remove": "removed_labels"}
"""Fields with labels, which decide who may see an adapter."""


def about_request(request: Message) -> dict[str, Any]:
    """What a request is about. Its fields may be beyond all bounds; what is returned is not."""
    found: dict[str, Any] = {}
    for part in (request, *_parts(request)):
        fields = part.DESCRIPTOR.fields_by_name
        for field, name in _NAMES.items():
            if field in fields and (value := getattr(part, field)):
                found[name] = _cut(value)
        for field, name in _LABELS.items():
            if field in fields and (value := getattr(part, field)):
                found[name] = _labels(value)
    return found


def about_reply(reply: Message) -> dict[str, Any]:
    """The adapter, job, upload or file of examples that a reply describes."""
    found: dict[str, Any] = {}
    given: Any = reply
    fields = reply.DESCRIPTOR.fields_by_name
    if "adapter" in fields and reply.HasField("adapter"):
        adapter = given.adapter
        found |= {"adapter": adapter.name, "version": adapter.version, "digest": adapter.digest}
    if "job" in fields and reply.HasField("job"):
        found["job_id"] = given.job.job_id
        if given.job.HasField("result"):
            found |= {"version": given.job.result.version, "digest": given.job.result.digest}
    if "file" in fields and reply.HasField("file"):
        found |= {"data_id": given.file.data_id, "digest": given.file.digest}
    if "upload_id" in fields:
        found["upload_id"] = given.upload_id
    return found


def _parts(request: Message) -> list[Message]:
    fields = request.DESCRIPTOR.fields_by_name
    return [getattr(request, part) for part in _PARTS if part in fields and request.HasField(part)]


def _labels(value: Any) -> Any:
    """A map of labels, or a list of their keys, in bounds."""
    if hasattr(value, "items"):
        return {_cut(key): _cut(text) for key, text in list(value.items())[:MAX_LABELS]}
    return [_cut(key) for key in value[:MAX_LABELS]]


def _cut(text: str) -> str:
    return text[:MAX_NAME]
