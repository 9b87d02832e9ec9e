"""Bounds of every list and text of every request, checked before a handler sees the request.

A list that is too long is refused by its length, which does not depend on its entries. The checks
of the handlers are stricter; these limit what the handlers have to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from loraplex_adapters.signing import MAX_BUNDLE_BYTES
from loraplex_adapters.store.index.texts import MAX_TEMPLATE_BYTES
from loraplex_model.base.refusal import Problem

MAX_MESSAGE_BYTES: Final = 4 << 20
MAX_TOKEN_IDS: Final = 1 << 20
MAX_TEXTS: Final = 2048
MAX_TURNS: Final = 4096
MAX_TOOLS: Final = 128
MAX_TOOL_CALLS: Final = 128
MAX_PARTS: Final = 64
MAX_JSON_BYTES: Final = 65536
MAX_TEMPLATE_VARIABLES: Final = 32
MAX_TEMPLATE_VALUE_BYTES: Final = 8192
MAX_OTHER_FILES: Final = 256
MAX_FILE_NAME: Final = 255
MAX_MIX: Final = 8
MAX_LOGIT_BIAS: Final = 300
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_BYTES: Final = 64
MAX_STOP_TOKENS: Final = 64
MAX_STRUCTURE_BYTES: Final = 1 << 20
MAX_CHOICES: Final = 1024
MAX_REQUEST_ID: Final = 128
MAX_CACHE_SALT: Final = 128
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

MAX_SHOWN: Final = 64
"""Characters of a map's key that the path of a field shows."""

_TEXTS: Final = frozenset({FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES})

ENTRIES: Final[Mapping[str, int]] = MappingProxyType(
    {
        f"loraplex.v1.{field}": most
        for field, most in {
            "GenerateRequest.mix": MAX_MIX,
            "TokenIds.ids": MAX_TOKEN_IDS,
            "EmbedRequest.inputs": MAX_TEXTS,
            "ChatMessages.messages": MAX_TURNS,
            "ChatMessages.tools": MAX_TOOLS,
            "ChatMessages.chat_template_kwargs": MAX_TEMPLATE_VARIABLES,
            "ChatMessage.parts": MAX_PARTS,
            "ChatMessage.tool_calls": MAX_TOOL_CALLS,
            "SamplingParams.logit_bias": MAX_LOGIT_BIAS,
            "StopConditions.strings": MAX_STOP_STRINGS,
            "StopConditions.token_ids": MAX_STOP_TOKENS,
            "Choices.texts": MAX_CHOICES,
            "RegisterAdapterRequest.labels": MAX_LABELS,
            "RegisterAdapterRequest.eos_token_ids": MAX_STOP_TOKENS,
            "ListAdaptersRequest.labels": MAX_LABELS,
            "LabelAdapterRequest.set": MAX_LABELS,
            "LabelAdapterRequest.remove": MAX_LABELS,
            "UploadHeader.labels": MAX_LABELS,
            "UploadHeader.eos_token_ids": MAX_STOP_TOKENS,
            "UploadHeader.other_files": MAX_OTHER_FILES,
            "ValidateAdapterRequest.other_files": MAX_OTHER_FILES,
            "TrainingMethod.options": MAX_OPTIONS,
            "TrainingDelivery.labels": MAX_LABELS,
            "ListJobsRequest.states": MAX_STATES,
            "DetokenizeRequest.token_ids": MAX_TOKEN_IDS,
            "UploadDataStart.labels": MAX_LABELS,
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
            "GenerateRequest.cache_salt": MAX_CACHE_SALT,
            "AdapterWeight.adapter_id": MAX_NAME,
            "EmbedRequest.adapter_id": MAX_NAME,
            "EmbedRequest.request_id": MAX_REQUEST_ID,
            "EmbedInput.text": MAX_MESSAGE_BYTES,
            "ChatMessage.role": MAX_NAME,
            "ChatMessage.content": MAX_MESSAGE_BYTES,
            "ChatMessage.tool_call_id": MAX_NAME,
            "ChatMessage.name": MAX_NAME,
            "ChatMessage.reasoning_content": MAX_MESSAGE_BYTES,
            "ChatMessages.tools": MAX_JSON_BYTES,
            "ChatMessages.ChatTemplateKwargsEntry.key": MAX_NAME,
            "ContentPart.text": MAX_MESSAGE_BYTES,
            "TemplateValue.string_value": MAX_TEMPLATE_VALUE_BYTES,
            "TemplateValue.json_value": MAX_TEMPLATE_VALUE_BYTES,
            "ToolCall.id": MAX_NAME,
            "ToolCall.name": MAX_NAME,
            "ToolCall.arguments": MAX_JSON_BYTES,
            "StructuredOutput.json_schema": MAX_STRUCTURE_BYTES,
            "StructuredOutput.regex": MAX_STRUCTURE_BYTES,
            "StructuredOutput.grammar": MAX_STRUCTURE_BYTES,
            "Choices.texts": MAX_STRUCTURE_BYTES,
            "StopConditions.strings": MAX_STOP_STRING_BYTES,
            "RegisterAdapterRequest.name": MAX_NAME,
            "RegisterAdapterRequest.path": MAX_PATH_BYTES,
            "RegisterAdapterRequest.chat_template": MAX_TEMPLATE_BYTES,
            "RegisterAdapterRequest.signature": MAX_BUNDLE_BYTES,
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
            "UploadHeader.chat_template": MAX_TEMPLATE_BYTES,
            "UploadHeader.signature": MAX_BUNDLE_BYTES,
            "UploadHeader.other_files": MAX_FILE_NAME,
            "ValidateAdapterRequest.other_files": MAX_FILE_NAME,
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
            "ListJobEventsRequest.job_id": MAX_NAME,
            "ListJobEventsRequest.page_token": MAX_PAGE_TOKEN,
            "TrainingData.data_id": MAX_NAME,
            "UploadDataRequest.chunk": MAX_MESSAGE_BYTES,
            "UploadDataStart.filename": MAX_FILE_NAME,
            "UploadDataStart.request_id": MAX_REQUEST_ID,
            "UploadDataStart.LabelsEntry.key": MAX_NAME,
            "UploadDataStart.LabelsEntry.value": MAX_LABEL_VALUE,
            "GetDataRequest.data_id": MAX_NAME,
            "ListDataRequest.page_token": MAX_PAGE_TOKEN,
            "ReadDataRequest.data_id": MAX_NAME,
            "DeleteDataRequest.data_id": MAX_NAME,
            "RenderChatRequest.adapter_id": MAX_NAME,
            "TokenizeRequest.text": MAX_MESSAGE_BYTES,
        }.items()
    }
)
"""Most characters of each string and most bytes of each `bytes`, by the field's full name."""


TOTALS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {"loraplex.v1.ChatMessages.messages": {"parts": MAX_TURNS, "tool_calls": MAX_TURNS}}
)
"""Most entries that lists in the entries of a list have together, by the outer list's full name."""


_Findings: TypeAlias = list[tuple[str, str]]
"""What exceeds a bound: paths, below the place that was checked, and descriptions."""

_Check: TypeAlias = Callable[[Any], _Findings]
"""Checks the value of a field."""


def beyond_bounds(message: Message) -> list[Problem]:
    """Problems of the fields that exceed their bounds, at most `MAX_LISTED`.

    Visits the entries of those lists only that are short enough. Raises KeyError for a field of
    our messages that has no row in `ENTRIES` or `LENGTHS`.
    """
    return [Problem(path, text) for path, text in _beyond(message)[:MAX_LISTED]]


def _beyond(message: Message) -> _Findings:
    found: _Findings = []
    checks = _checks(message.DESCRIPTOR)
    for field, value in message.ListFields():
        check = checks.get(field.number)
        if check is not None:
            found += [(field.name + path, text) for path, text in check(value)]
    return found


@cache
def _checks(message: Descriptor) -> Mapping[int, _Check]:
    """The checks of a message's fields by their numbers. Numbers themselves need none."""
    made = {field.number: _check_of(field) for field in message.fields}
    return {number: check for number, check in made.items() if check is not None}


def _check_of(field: FieldDescriptor) -> _Check | None:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        key, value = (_check_of(entry.fields_by_name[name]) for name in ("key", "value"))
        return _map_check(ENTRIES[field.full_name], key, value)
    one = _text_check(field)
    if entry is not None:
        one = _message_check
    if not field.is_repeated:
        return one
    return _list_check(ENTRIES[field.full_name], one, TOTALS.get(field.full_name, {}))


def _message_check(value: Message) -> _Findings:
    return [(f".{path}", text) for path, text in _beyond(value)]


def _text_check(field: FieldDescriptor) -> _Check | None:
    if field.type not in _TEXTS:
        return None
    most = LENGTHS[field.full_name]
    if most >= MAX_MESSAGE_BYTES:
        return None  # no message has more
    unit = "bytes" if field.type == FieldDescriptor.TYPE_BYTES else "characters"

    def check(value: str | bytes) -> _Findings:
        return [("", f"must have at most {most} {unit}")] if len(value) > most else []

    return check


def _list_check(most: int, one: _Check | None, totals: Mapping[str, int]) -> _Check:
    def check(values: Any) -> _Findings:
        if len(values) > most:
            return _too_many(most)
        for inner, total in totals.items():
            if sum(len(getattr(value, inner)) for value in values) > total:
                return [("", f"must have at most {total} {inner} in all entries together")]
        found: _Findings = []
        for i, value in enumerate(values if one is not None else ()):
            if wrong := one(value):  # type: ignore[misc]
                found += [(f"[{i}]{path}", text) for path, text in wrong]
                if len(found) >= MAX_LISTED:
                    break
        return found

    return check


def _map_check(most: int, key: _Check | None, value: _Check | None) -> _Check:
    def check(values: Any) -> _Findings:
        if len(values) > most:
            return _too_many(most)
        found: _Findings = []
        for name, given in values.items():
            wrong = [f"the key {text}" for _, text in (key(name) if key else [])]
            wrong += [text for _, text in (value(given) if value else [])]
            found += [(f"[{str(name)[:MAX_SHOWN]}]", text) for text in wrong]
        return found

    return check


def _too_many(most: int) -> _Findings:
    return [("", f"must have at most {most} entries")]
