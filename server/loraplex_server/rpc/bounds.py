"""Bounds of every list and text of every request, checked before a handler sees the request.

A list that is too long is refused by its length, which does not depend on its entries. The checks
of the handlers are stricter; these limit what the handlers have to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from loraplex_model.base.refusal import Problem

MAX_MESSAGE_BYTES: Final = 4 << 20
MAX_TOKEN_IDS: Final = 1 << 20
MAX_TURNS: Final = 4096
MAX_MIX: Final = 8
MAX_LOGIT_BIAS: Final = 300
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_BYTES: Final = 64
MAX_STOP_TOKENS: Final = 64
MAX_REQUEST_ID: Final = 128
MAX_LABELS: Final = 32
MAX_LABEL_VALUE: Final = 256
MAX_STATES: Final = 16
MAX_OPTIONS: Final = 64
MAX_OPTION_BYTES: Final = 4096
MAX_PATH_BYTES: Final = 4096
MAX_PAGE_TOKEN: Final = 512
MAX_SYSTEM_BYTES: Final = 16 << 10
MAX_WORD_BYTES: Final = 512
MAX_NAME: Final = 256
"""Characters of a name, an id, a digest or the key of a map. The handlers' checks are stricter."""

MAX_LISTED: Final = 32
"""Most problems listed in one answer."""

_SHOWN: Final = 64
"""Characters of a map's key that the path of a field shows."""

_TEXTS: Final = frozenset({FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES})

ENTRIES: Final[Mapping[str, int]] = MappingProxyType(
    {
        f"loraplex.v1.{field}": most
        for field, most in {
            "GenerateRequest.mix": MAX_MIX,
            "TokenIds.ids": MAX_TOKEN_IDS,
            "ChatMessages.messages": MAX_TURNS,
            "SamplingParams.logit_bias": MAX_LOGIT_BIAS,
            "StopConditions.strings": MAX_STOP_STRINGS,
            "StopConditions.token_ids": MAX_STOP_TOKENS,
            "RegisterAdapterRequest.labels": MAX_LABELS,
            "ListAdaptersRequest.labels": MAX_LABELS,
            "LabelAdapterRequest.set": MAX_LABELS,
            "LabelAdapterRequest.remove": MAX_LABELS,
            "UploadHeader.labels": MAX_LABELS,
            "TrainingMethod.options": MAX_OPTIONS,
            "TrainingDelivery.labels": MAX_LABELS,
            "ListJobsRequest.states": MAX_STATES,
        }.items()
    }
)
"""Most entries of each repeated field and map, by the field's full name."""

LENGTHS: Final[Mapping[str, int]] = MappingProxyType(
    {
        f"loraplex.v1.{field}": most
        for field, most in {
            "GenerateRequest.adapter_id": MAX_NAME,
            "GenerateRequest.prompt": MAX_MESSAGE_BYTES,
            "GenerateRequest.request_id": MAX_REQUEST_ID,
            "AdapterWeight.adapter_id": MAX_NAME,
            "ChatMessage.role": MAX_NAME,
            "ChatMessage.content": MAX_MESSAGE_BYTES,
            "StopConditions.strings": MAX_STOP_STRING_BYTES,
            "RegisterAdapterRequest.name": MAX_NAME,
            "RegisterAdapterRequest.path": MAX_PATH_BYTES,
            "RegisterAdapterRequest.LabelsEntry.key": MAX_NAME,
            "RegisterAdapterRequest.LabelsEntry.value": MAX_LABEL_VALUE,
            "GetAdapterRequest.adapter_id": MAX_NAME,
            "ListAdaptersRequest.page_token": MAX_PAGE_TOKEN,
            "ListAdaptersRequest.LabelsEntry.key": MAX_NAME,
            "ListAdaptersRequest.LabelsEntry.value": MAX_LABEL_VALUE,
            "LoadAdapterRequest.adapter_id": MAX_NAME,
            "UnloadAdapterRequest.adapter_id": MAX_NAME,
            "DeleteAdapterRequest.name": MAX_NAME,
            "RestoreAdapterRequest.name": MAX_NAME,
            "ListAdapterVersionsRequest.name": MAX_NAME,
            "LabelAdapterRequest.adapter_id": MAX_NAME,
            "LabelAdapterRequest.SetEntry.key": MAX_NAME,
            "LabelAdapterRequest.SetEntry.value": MAX_LABEL_VALUE,
            "LabelAdapterRequest.remove": MAX_NAME,
            "SetAliasRequest.alias": MAX_NAME,
            "SetAliasRequest.adapter_id": MAX_NAME,
            "SetAliasRequest.expected": MAX_NAME,
            "DeleteAliasRequest.alias": MAX_NAME,
            "UploadHeader.upload_id": MAX_NAME,
            "UploadHeader.name": MAX_NAME,
            "UploadHeader.expected_digest": MAX_NAME,
            "UploadHeader.LabelsEntry.key": MAX_NAME,
            "UploadHeader.LabelsEntry.value": MAX_LABEL_VALUE,
            "UploadChunk.data": MAX_MESSAGE_BYTES,
            "GetUploadRequest.upload_id": MAX_NAME,
            "AbortUploadRequest.upload_id": MAX_NAME,
            "ValidateAdapterRequest.path": MAX_PATH_BYTES,
            "ValidateAdapterRequest.upload_id": MAX_NAME,
            "PinAdapterRequest.adapter_id": MAX_NAME,
            "UnpinAdapterRequest.adapter_id": MAX_NAME,
            "MergeAdapterRequest.adapter_id": MAX_NAME,
            "UnmergeAdapterRequest.adapter_id": MAX_NAME,
            "CreateJobRequest.request_id": MAX_REQUEST_ID,
            "TrainingSpec.name": MAX_NAME,
            "TrainingSpec.learn": MAX_WORD_BYTES,
            "TrainingSpec.system": MAX_SYSTEM_BYTES,
            "TrainingSpec.metric": MAX_WORD_BYTES,
            "TrainingMethod.name": MAX_WORD_BYTES,
            "TrainingMethod.OptionsEntry.key": MAX_NAME,
            "TrainingMethod.OptionsEntry.value": MAX_OPTION_BYTES,
            "TrainingOptimiser.name": MAX_WORD_BYTES,
            "TrainingOptimiser.schedule": MAX_WORD_BYTES,
            "TrainingData.jsonl": MAX_MESSAGE_BYTES,
            "TrainingData.path": MAX_PATH_BYTES,
            "TrainingDelivery.alias": MAX_NAME,
            "TrainingDelivery.LabelsEntry.key": MAX_NAME,
            "TrainingDelivery.LabelsEntry.value": MAX_LABEL_VALUE,
            "GetJobRequest.job_id": MAX_NAME,
            "CancelJobRequest.job_id": MAX_NAME,
            "WatchJobRequest.job_id": MAX_NAME,
            "ListJobsRequest.page_token": MAX_PAGE_TOKEN,
        }.items()
    }
)
"""Most characters of each string and most bytes of each `bytes`, by the field's full name."""


def beyond_bounds(message: Message) -> list[Problem]:
    """Problems of the fields that exceed their bounds, at most `MAX_LISTED`.

    Visits the entries of those lists only that are short enough. Raises KeyError for a field of
    our messages that has no row in `ENTRIES` or `LENGTHS`.
    """
    found = []
    for problem in _message(message, ""):
        found.append(problem)
        if len(found) == MAX_LISTED:
            break
    return found


def _message(message: Message, path: str) -> Iterator[Problem]:
    for field, value in message.ListFields():
        where = path + field.name
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            yield from _map(entry.fields_by_name, field.full_name, value, where)
        elif field.is_repeated:
            yield from _list(field, value, where)
        elif entry is not None:
            yield from _message(value, where + ".")
        else:
            yield from _text(field, value, where)


def _list(field: FieldDescriptor, values: Any, where: str) -> Iterator[Problem]:
    if len(values) > ENTRIES[field.full_name]:
        yield _too_many(field.full_name, where)
    elif field.message_type is not None:
        for i, value in enumerate(values):
            yield from _message(value, f"{where}[{i}].")
    elif field.type in _TEXTS:
        for i, value in enumerate(values):
            yield from _text(field, value, f"{where}[{i}]")


def _map(entry: Any, name: str, values: Any, where: str) -> Iterator[Problem]:
    if len(values) > ENTRIES[name]:
        yield _too_many(name, where)
        return
    for key, value in values.items():
        shown = f"{where}[{str(key)[:_SHOWN]}]"
        yield from _text(entry["key"], key, shown)
        yield from _text(entry["value"], value, shown)


def _text(field: FieldDescriptor, value: Any, where: str) -> Iterator[Problem]:
    if field.type not in _TEXTS:
        return
    most = LENGTHS[field.full_name]
    if len(value) > most:
        unit = "bytes" if field.type == FieldDescriptor.TYPE_BYTES else "characters"
        part = "the key must" if field.full_name.endswith("Entry.key") else "must"
        yield Problem(where, f"{part} have at most {most} {unit}")


def _too_many(name: str, where: str) -> Problem:
    return Problem(where, f"must have at most {ENTRIES[name]} entries")
