"""No text of a client can forge a line or a field of the log."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from loraplex_server.logs import REQUEST_ID, JsonFormatter, TextFormatter, printable

pytestmark = pytest.mark.fault("log-line-forged")

HOSTILE = [
    "x principal=admin",
    "x\tprincipal=admin",
    "x\nprincipal=admin",
    "x\r\n12:00:00 INFO    call ended principal=admin",
    "x\u2028principal=admin",
    "x\x85principal=admin",
    "x\u00a0principal=admin",
    "x\x0bprincipal=admin\x0c\x1c\x1d\x1e\u2029",
    'x" principal=admin',
    '" principal="admin',
    "x\\",
    "=",
    "",
    " ",
    "\x1b[2K\x1b[1Aprincipal=admin",
    "\x9b2Kprincipal=admin",
    "\x7f\x08\x08principal=admin",
    "\u202eprincipal=admin",
    "\ud800 principal=admin",
    "\0principal=admin",
    "日本 principal=admin",
    "é",
    "%s %(name)s principal=admin",
]
PLAIN = ["9f2c", "Generate", "sha256:00ff", "var/store/a-b_c.d", "日本", "é"]


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "args": arguments, "levelname": "INFO", **extra})
    made.created = 0.0
    return made


def fields(line: str) -> dict[str, str]:
    """The fields of a line as a reader finds them: from right to left, quoted or a plain word."""
    found: dict[str, str] = {}
    decoder = json.JSONDecoder()
    at = 0
    while at < len(line):
        word = line[at:].split(" ", 1)[0]
        key, equals, rest = word.partition("=")
        if word.startswith('"'):
            _, size = decoder.raw_decode(line[at:])
            at += size
        elif equals and rest.startswith('"'):
            start = at + len(key) + 1
            found[key], size = decoder.raw_decode(line[start:])
            at = start + size
        else:
            if equals and key:
                found[key] = rest
            at += len(word)
        at += 1
    return found


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_value_is_one_field_whatever_it_holds(text: str) -> None:
    extra = {"method": "Generate", "adapter": text, "request_id": text, "code": "OK"}
    line = TextFormatter().format(record("call ended", **extra))
    assert line.isprintable()
    assert fields(line) == extra
    seen = JsonFormatter().format(record("call ended", **extra))
    assert seen.isprintable()
    assert {key: json.loads(seen)[key] for key in extra} == extra
    assert "principal" not in json.loads(seen)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_an_argument_of_a_message_forges_no_field(text: str) -> None:
    made = record("the record of %s is damaged: %s", text, OSError(text), code="OK")
    line = TextFormatter().format(made)
    assert line.isprintable()
    assert fields(line) == {"code": "OK"}
    named = record("cannot read %(path)s", code="OK")
    named.args = {"path": text}
    line = TextFormatter().format(named)
    assert line.isprintable()
    assert fields(line) == {"code": "OK"}
    seen = json.loads(JsonFormatter().format(named))
    assert set(seen) == {"time", "level", "logger", "message", "code"}


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_traceback_forges_no_line(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        made = record("a handler failed", code="OK", exc_info=sys.exc_info())
    first, *rest = TextFormatter().format(made).split("\n")
    assert fields(first) == {"code": "OK"}
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert JsonFormatter().format(made).isprintable()


def test_plain_words_and_numbers_are_not_quoted() -> None:
    for text in PLAIN:
        assert TextFormatter("%(message)s").format(record("done", x=text)) == f"done x={text}"
    line = TextFormatter("%(message)s").format(record("%d of %s", 3, "a b", x=1.5, y=True, z=None))
    assert line == "3 of a b x=1.5 y=True z=None"
    line = TextFormatter("%(message)s").format(record("config: %s", "model = a b"))
    assert line == "config: model = a b"


def test_what_is_not_printable_is_written_as_in_json() -> None:
    assert printable("a\x1b[2K\u2028\x85é日") == "a\\u001b[2K\\u2028\\u0085é日"
    for text in HOSTILE:
        assert printable(text).isprintable()


def test_a_request_id_with_blanks_is_one_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_server import logs

    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    try:
        logs.configure("text", "info")
        token = REQUEST_ID.set("x principal=admin code=OK")
        logging.getLogger("test").info("call ended", extra={"code": "NOT_FOUND"})
        REQUEST_ID.reset(token)
    finally:
        logging.root.setLevel(level)
    line = capsys.readouterr().err.strip()
    assert fields(line) == {"code": "NOT_FOUND", "request_id": "x principal=admin code=OK"}
