"""Checks the requests of AdapterService; each function returns the problems of one request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loraplex.v1 import adapter_pb2
from loraplex_adapters.format.files import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from loraplex_adapters.signing import MAX_BUNDLE_BYTES
from loraplex_adapters.store.index.ids import did_you_mean
from loraplex_adapters.store.index.labels import suggested_key
from loraplex_adapters.store.index.texts import MAX_EOS_TOKENS, MAX_TEMPLATE_BYTES
from loraplex_model.base.refusal import Problem

from loraplex_server.rpc.calls.bounds import (
    MAX_FILE_NAME,
    MAX_LABEL_VALUE,
    MAX_LABELS,
    MAX_OTHER_FILES,
    MAX_PAGE_TOKEN,
    MAX_PATH_BYTES,
)
from loraplex_server.rpc.calls.ids import adapter_id_fault, name_fault
from loraplex_server.rpc.messages.validate import RequestChecks

MAX_PAGE: Final = 1000
MAX_DRAIN_SECONDS: Final = 86_400
MAX_CHUNK_BYTES: Final = 1 << 20

_OF_A_REGISTRATION: Final = (
    "name",
    "replace",
    "load",
    "labels",
    "chat_template",
    "eos_token_ids",
    "signature",
)
_LABEL_FORM: Final = "the key must match [a-z0-9][a-z0-9._/-]{0,62}"
_RAISE: Final = "; the server's setting max_adapter_file raises the limit"
_UPLOAD_FORM: Final = "is not an id of StartUpload"
_LABEL: Final = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_UPLOAD: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def register(request: adapter_pb2.RegisterAdapterRequest) -> list[Problem]:
    """Problems of a registration. The path is only checked further when it is opened."""
    checks = RequestChecks("")
    checks.name("name", request.name)
    checks.size("path", request.path, MAX_PATH_BYTES)
    labels("labels", request.labels, checks)
    _texts(request, checks)
    return checks.problems


def adapter_id(text: str) -> list[Problem]:
    """Problems of the `adapter_id` of an adapter call, which must not be empty."""
    fault = adapter_id_fault(text)
    return [Problem("adapter_id", fault)] if fault else []


def name(text: str, field: str = "name") -> list[Problem]:
    """Problems of a name without a version, or of an alias."""
    fault = name_fault(text)
    return [Problem(field, fault)] if fault else []


def page(request: adapter_pb2.ListAdaptersRequest) -> list[Problem]:
    """Problems of a request for a page."""
    checks = RequestChecks("")
    checks.between("page_size", request.page_size, 0, MAX_PAGE)
    good = len(request.page_token) <= MAX_PAGE_TOKEN
    checks.require(good, "page_token", "is not a token of this server")
    labels("labels", request.labels, checks)
    return checks.problems


def unload(request: adapter_pb2.UnloadAdapterRequest) -> list[Problem]:
    """Problems of an order to unload."""
    checks = RequestChecks("")
    checks.adapter_id("adapter_id", request.adapter_id)
    if request.HasField("drain"):
        seconds = request.drain.seconds + request.drain.nanos / 1e9
        checks.between("drain", seconds, 0, MAX_DRAIN_SECONDS)
    return checks.problems


def label(request: adapter_pb2.LabelAdapterRequest) -> list[Problem]:
    """Problems of a change of labels."""
    checks = RequestChecks("")
    checks.adapter_id("adapter_id", request.adapter_id)
    checks.require(bool(request.set or request.remove), "set", "must be set unless `remove` is")
    labels("set", request.set, checks)
    if checks.at_most("remove", request.remove, MAX_LABELS):
        _keys("remove", request.remove, checks)
    both = [key for key in request.remove[:MAX_LABELS] if key in request.set]
    checks.require(not both, "remove", "must not name a label that is also set")
    return checks.problems


def alias(request: adapter_pb2.SetAliasRequest) -> list[Problem]:
    """Problems of the setting of an alias."""
    checks = RequestChecks("")
    checks.name("alias", request.alias)
    checks.adapter_id("adapter_id", request.adapter_id)
    if request.expected:
        checks.adapter_id("expected", request.expected)
    return checks.problems


def upload_id(text: str) -> list[Problem]:
    """Problems of an upload's id."""
    return [] if _UPLOAD.fullmatch(text) else [Problem("upload_id", _UPLOAD_FORM)]


def header(header: adapter_pb2.UploadHeader, max_weights_bytes: int) -> list[Problem]:
    """Problems of the first message of an upload."""
    checks = RequestChecks("header.")
    checks.require(not upload_id(header.upload_id), "upload_id", _UPLOAD_FORM)
    if header.stage_only:
        for field in (
            "name",
            "replace",
            "load",
            "labels",
            "chat_template",
            "eos_token_ids",
            "signature",
        ):
            checks.require(not getattr(header, field), field, "must not be set with `stage_only`")
    else:
        checks.name("name", header.name)
    sizes = (
        ("config_size", CONFIG_FILE, header.config_size, MAX_CONFIG_BYTES, ""),
        ("weights_size", WEIGHTS_FILE, header.weights_size, max_weights_bytes, _RAISE),
    )
    for field, file, size, most, advice in sizes:
        text = f"{file} has {size} bytes; 1 to {most} are accepted{advice}"
        checks.require(1 <= size <= most, field, text)
    if header.expected_digest:
        good = _DIGEST.fullmatch(header.expected_digest) is not None
        checks.require(good, "expected_digest", 'must be "sha256:" and 64 hex digits')
    labels("labels", header.labels, checks)
    _texts(header, checks)
    _files("other_files", header.other_files, checks)
    return checks.problems


def chunk(chunk: adapter_pb2.UploadChunk) -> list[Problem]:
    """Problems of one piece of an upload, taken by itself."""
    checks = RequestChecks("chunk.")
    files = {adapter_pb2.ADAPTER_FILE_CONFIG, adapter_pb2.ADAPTER_FILE_WEIGHTS}
    checks.require(chunk.file in files, "file", "must be CONFIG or WEIGHTS")
    checks.between("data", len(chunk.data), 1, MAX_CHUNK_BYTES)
    return checks.problems


def validation(request: adapter_pb2.ValidateAdapterRequest) -> list[Problem]:
    """Problems of a request to validate an adapter."""
    checks = RequestChecks("")
    match request.WhichOneof("source"):
        case "path":
            checks.size("path", request.path, MAX_PATH_BYTES)
        case "upload_id":
            checks.require(not upload_id(request.upload_id), "upload_id", _UPLOAD_FORM)
        case None:
            checks.add("source", "one of `path` or `upload_id` must be set")
    _files("other_files", request.other_files, checks)
    return checks.problems


def labels(field: str, given: Mapping[str, str], checks: RequestChecks) -> None:
    """Adds the problems of a version's labels."""
    if not checks.at_most(field, given, MAX_LABELS):
        return
    _keys(field, given, checks)
    for key, value in given.items():
        # The store checks again; a refusal here names the key.
        good = len(value) <= MAX_LABEL_VALUE and value.isprintable()
        text = f"the value must have at most {MAX_LABEL_VALUE} characters, all printable"
        checks.require(good, f"{field}[{key}]", text)


def _texts(
    request: adapter_pb2.RegisterAdapterRequest | adapter_pb2.UploadHeader, checks: RequestChecks
) -> None:
    """Adds the problems of a chat template, end tokens and a signature that a version brings."""
    size, most = len(request.chat_template.encode()), MAX_TEMPLATE_BYTES
    checks.require(size <= most, "chat_template", f"must have at most {most} bytes")
    checks.at_most("eos_token_ids", request.eos_token_ids, MAX_EOS_TOKENS)
    size, most = len(request.signature), MAX_BUNDLE_BYTES
    checks.require(size <= most, "signature", f"must have at most {most} bytes")


def _files(field: str, names: Sequence[str], checks: RequestChecks) -> None:
    if checks.at_most(field, names, MAX_OTHER_FILES):
        longest = max((len(name.encode()) for name in names), default=0)
        checks.require(
            longest <= MAX_FILE_NAME, field, f"names must have at most {MAX_FILE_NAME} bytes"
        )


def _keys(field: str, keys: Iterable[str], checks: RequestChecks) -> None:
    for key in keys:
        if _LABEL.fullmatch(key) is None:
            hint = did_you_mean(suggested_key(key))
            checks.add(f"{field}[{key[:64]}]", _LABEL_FORM + hint)
