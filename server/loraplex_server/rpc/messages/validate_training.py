"""Checks the requests of TrainingService. The trainer itself checks the values of its options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from loraplex.v1 import training_pb2
from loraplex_model.base.refusal import Problem

from loraplex_server.rpc.calls.bounds import (
    MAX_FILE_NAME,
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_PATH_BYTES,
    MAX_REQUEST_ID,
    MAX_STATES,
    MAX_SYSTEM_BYTES,
    MAX_WORD_BYTES,
)
from loraplex_server.rpc.calls.ids import is_request_id
from loraplex_server.rpc.messages.validate import RequestChecks
from loraplex_server.rpc.messages.validate_adapters import MAX_CHUNK_BYTES, MAX_PAGE, labels

MAX_INLINE: Final = 3 << 20

MAX_CHECKPOINTED: Final = 50
"""Most characters of a name to which "-step-1000000" can be added."""

MAX_EVENTS_PAGE: Final = 10_000

MAX_DIGITS: Final = 12
"""Most digits of an event's number."""

_OPTION: Final = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_JOB: Final = re.compile(r"[0-9a-f-]{1,64}", re.ASCII)
_FILES: Final = ("loftq_source",)
"""Options that name a directory: a client must not choose one of the server's."""


def create(request: training_pb2.CreateJobRequest) -> list[Problem]:
    """Returns the problems of a request for a new job, its examples aside."""
    checks = RequestChecks("")
    if request.request_id:
        text = f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters"
        checks.require(is_request_id(request.request_id), "request_id", text)
    spec = request.spec
    checks.name("spec.name", spec.name)
    _options(spec.method.options, checks)
    checks.require(
        not (spec.HasField("epochs") and spec.HasField("steps")),
        "spec.steps",
        "must not be set with `epochs`",
    )
    checks.require(
        not (spec.HasField("eval_fraction") and request.HasField("eval_data")),
        "spec.eval_fraction",
        "must not be set with `eval_data`",
    )
    _short("spec.system", spec.system, MAX_SYSTEM_BYTES, checks)
    for field, word in (
        ("method.name", spec.method.name),
        ("optimiser.name", spec.optimiser.name),
        ("optimiser.schedule", spec.optimiser.schedule),
        ("learn", spec.learn),
        ("metric", spec.metric),
    ):
        _short(f"spec.{field}", word, MAX_WORD_BYTES, checks)
    _data(request, checks)
    delivery = request.delivery
    if delivery.alias:
        checks.name("delivery.alias", delivery.alias)
        checks.require(
            delivery.alias != spec.name, "delivery.alias", "must not be the adapter's name"
        )
    labels("delivery.labels", delivery.labels, checks)
    checks.require(
        not delivery.checkpoints or len(spec.name) <= MAX_CHECKPOINTED,
        "spec.name",
        f"must have at most {MAX_CHECKPOINTED} characters with `delivery.checkpoints`",
    )
    return checks.problems


def events(request: training_pb2.ListJobEventsRequest) -> list[Problem]:
    """Returns the problems of a request for a page of events."""
    checks = RequestChecks("")
    checks.between("page_size", request.page_size, 0, MAX_EVENTS_PAGE)
    token = request.page_token
    good = not token or (token.isascii() and token.isdigit() and len(token) <= MAX_DIGITS)
    checks.require(good, "page_token", "is not a token of this server")
    return [*job_id(request.job_id), *checks.problems]


def start(request: training_pb2.UploadDataRequest) -> list[Problem]:
    """Returns the problems of the first message of an upload."""
    if request.WhichOneof("part") != "start":
        return [Problem("start", "must be the first message")]
    checks, given = RequestChecks(""), request.start
    if given.request_id:
        text = f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters"
        checks.require(is_request_id(given.request_id), "start.request_id", text)
    good = len(given.filename) <= MAX_FILE_NAME and given.filename.isprintable()
    text = f"must have at most {MAX_FILE_NAME} characters, all of them printable"
    checks.require(good, "start.filename", text)
    labels("start.labels", given.labels, checks)
    return checks.problems


def chunk(request: training_pb2.UploadDataRequest) -> list[Problem]:
    """Returns the problems of a message after the first one of an upload."""
    good = request.WhichOneof("part") == "chunk" and 0 < len(request.chunk) <= MAX_CHUNK_BYTES
    text = f"every message after the first must hold 1 to {MAX_CHUNK_BYTES} bytes"
    return [] if good else [Problem("chunk", text)]


def data_page(request: training_pb2.ListDataRequest) -> list[Problem]:
    """Returns the problems of a request for a page of files."""
    checks = RequestChecks("")
    checks.between("page_size", request.page_size, 0, MAX_PAGE)
    good = not request.page_token or _JOB.fullmatch(request.page_token) is not None
    checks.require(good, "page_token", "is not a token of this server")
    return checks.problems


def data_id(text: str) -> list[Problem]:
    """Returns the problems of a file's id."""
    good = _JOB.fullmatch(text) is not None
    return [] if good else [Problem("data_id", "is not the id of a file of examples")]


def page(request: training_pb2.ListJobsRequest) -> list[Problem]:
    """Returns the problems of a request for a page of jobs."""
    checks = RequestChecks("")
    checks.between("page_size", request.page_size, 0, MAX_PAGE)
    good = not request.page_token or _JOB.fullmatch(request.page_token) is not None
    checks.require(good, "page_token", "is not a token of this server")
    known = training_pb2.TrainingJobState.values()
    checks.at_most("states", request.states, MAX_STATES)
    for i, state in enumerate(request.states[:MAX_STATES]):
        good = state in known and state != training_pb2.TRAINING_JOB_STATE_UNSPECIFIED
        checks.require(good, f"states[{i}]", "is not a state")
    return checks.problems


def job_id(text: str) -> list[Problem]:
    """Returns the problems of a job's id."""
    good = _JOB.fullmatch(text) is not None
    return [] if good else [Problem("job_id", "is not the id of a job")]


def _options(options: Mapping[str, str], checks: RequestChecks) -> None:
    where = "spec.method.options"
    if not checks.at_most(where, options, MAX_OPTIONS):
        return
    for key, value in options.items():
        field, good = f"{where}[{key[:64]}]", _OPTION.fullmatch(key) is not None
        checks.require(good, field, "the key must match [a-z][a-z0-9_]{0,63}")
        checks.require(key not in _FILES, field, "must not name a file of the server")
        _short(field, value, MAX_OPTION_BYTES, checks)


def _data(request: training_pb2.CreateJobRequest, checks: RequestChecks) -> None:
    inline = 0
    for field in ("data", "eval_data"):
        data: training_pb2.TrainingData = getattr(request, field)
        inline += len(data.jsonl)
        match data.WhichOneof("source"):
            case "path":
                checks.size(f"{field}.path", data.path, MAX_PATH_BYTES)
            case "data_id":
                good = _JOB.fullmatch(data.data_id) is not None
                checks.require(good, f"{field}.data_id", "is not the id of a file of examples")
            case "jsonl":
                checks.require(bool(data.jsonl), f"{field}.jsonl", "must not be empty")
            case _ if field == "data" or request.HasField(field):
                checks.add(f"{field}.source", "`jsonl`, `path` or `data_id` must be set")
    text = f"must be at most {MAX_INLINE} bytes in all; upload a larger file with UploadData"
    checks.require(inline <= MAX_INLINE, "data.jsonl", text)


def _short(field: str, text: str, most: int, checks: RequestChecks) -> None:
    good = len(text.encode()) <= most and "\0" not in text
    checks.require(good, field, f"must have at most {most} bytes and no NUL")
