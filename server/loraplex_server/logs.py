"""Log lines as text or JSON, each with its request's id and caller. Prompts are never logged."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

from loraplex_server.telemetry.trace import TRACE

REQUEST_ID: Final[ContextVar[str]] = ContextVar("loraplex_request_id", default="")
"""Id of the RPC that the current task serves; "" outside of RPCs."""

PRINCIPAL: Final[ContextVar[str]] = ContextVar("loraplex_principal", default="")
"""Name of the principal whose RPC the current task serves; "" outside of RPCs, or if callers are not
authenticated."""

NOTES: Final[ContextVar[dict[str, Any] | None]] = ContextVar("loraplex_notes", default=None)
"""Fields for the line that reports the end of the current RPC; None outside of RPCs."""

AUDIT: Final = "loraplex.audit"
"""Name of the logger of the audit log, if that has no file of its own."""

LogFormat: TypeAlias = Literal["text", "json"]

_SPECIAL: Final = frozenset('"=\\')
"""Characters, besides white space, for which the value of a field is quoted."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object with time, level, logger, message and extra fields.

    `fields` are in every line.
    """

    def __init__(self, **fields: str) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return printable(json.dumps(line, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """Formats a record as `time level message key=value`, for a terminal.

    No text of a client can begin a line, a field or a sequence of control characters: a value that
    is not a plain word is quoted as in JSON, an argument of the message that looks like fields is
    quoted too, and the lines of a traceback are indented.
    """

    def __init__(self, form: str = "%(asctime)s %(levelname)-7s %(message)s") -> None:
        super().__init__(form, "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.message = printable(_message(record))
        record.asctime = self.formatTime(record, self.datefmt)
        pairs = [f"{key}={_value(value)}" for key, value in _extra(record).items()]
        lines = [" ".join([self.formatMessage(record), *pairs])]
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            lines += [f"    {printable(line)}" for line in trace]
        return "\n".join(lines)


def printable(text: str) -> str:
    """The text with every character that is not printable written as in JSON, such as `\\u001b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _value(value: object) -> str:
    """The value of a field: a plain word as it is, anything else quoted."""
    text = str(value)
    plain = text and text.isprintable() and not any(c in _SPECIAL or c.isspace() for c in text)
    return text if plain else printable(json.dumps(text, ensure_ascii=False))


def _message(record: logging.LogRecord) -> str:
    """The record's message. Arguments of it that contain `key=value` are quoted."""
    given = record.args
    if not given:
        return record.getMessage()
    if isinstance(given, Mapping):
        return str(record.msg) % {key: _argument(value) for key, value in given.items()}
    return str(record.msg) % tuple(_argument(value) for value in given)


def _argument(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    # A field has no blank before its "="; a setting in the log, `name = value`, has one.
    looks_like_fields = any(before[-1:].strip() for before in text.split("=")[:-1])
    return json.dumps(text, ensure_ascii=False) if looks_like_fields else value


def note(**fields: Any) -> None:
    """Adds fields to the line that reports the end of the current RPC, if there is one."""
    if (notes := NOTES.get()) is not None:
        notes.update(fields)


def configure(form: LogFormat, level: str) -> None:
    """Sends log lines to standard error in the given format. To be called once, at start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(_add_call)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger(AUDIT).setLevel(logging.INFO)  # kept whatever the level of other lines
    _log_warnings(form)


def configure_engine(device: str = "", form: LogFormat = "text") -> None:
    """Sends log lines of the engine process to standard error. To be called once, at start.

    `device` names the engine's device, if there are several engines. In JSON every line has the
    fields `process` ("engine") and, with several engines, `device`.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        where = {"device": device} if device else {}
        handler.setFormatter(JsonFormatter(process="engine", **where))
    else:
        engine = f"engine {device}" if device else "engine"
        handler.setFormatter(TextFormatter(f"%(levelname)s {engine} %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _log_warnings(form)


def _log_warnings(form: LogFormat) -> None:
    """Has Python's warnings logged where every line is to be JSON."""
    logging.captureWarnings(form == "json")


def _add_call(record: logging.LogRecord) -> bool:
    if request_id := REQUEST_ID.get():
        record.request_id = request_id
    if principal := PRINCIPAL.get():
        record.principal = principal
    if (trace := TRACE.get()) is not None:
        record.trace_id = trace.trace_id
    return True


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
