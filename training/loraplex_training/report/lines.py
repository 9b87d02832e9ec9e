"""Events as lines of JSON, for another process that follows a run. Imports no torch.

A line is an object with the event's name under "event" and its fields next to it. As in protobuf's
JSON, a number that JSON cannot represent is a string: "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, get_args

import msgspec
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.report.events import Event

STDOUT: Final = "-"
_WORDS: Final = ("NaN", "Infinity", "-Infinity")
_FLOATS: Final[Mapping[str, frozenset[str]]] = {
    kind.__name__: frozenset(
        field.name
        for field in msgspec.structs.fields(kind)
        if float in (field.type, *get_args(field.type))
    )
    for kind in get_args(Event)
}
"""Fields of each event that may hold one of `_WORDS`."""


def encode(event: Event) -> str:
    """Returns the event's line, without a line end."""
    fields = msgspec.to_builtins(event, enc_hook=str)
    return json.dumps({name: _in_json(value) for name, value in fields.items()}, allow_nan=False)


def decode(line: str | bytes) -> Event:
    """Returns the event of a line.

    Unknown fields are ignored, so that an older reader understands a newer writer. Raises
    ValueError for a line that is not an event.
    """
    fields = json.loads(line)
    if isinstance(fields, dict) and isinstance(kind := fields.get("event"), str):
        for name in _FLOATS.get(kind, ()):
            if fields.get(name) in _WORDS:
                fields[name] = float(fields[name])
    event: Event = msgspec.convert(fields, Event, dec_hook=lambda kind, value: kind(value))
    return event


class EventLines:
    """An `Observer` that writes events to a file as lines. It stops when the reader has gone."""

    def __init__(self, file: IO[str]) -> None:
        self._file: IO[str] | None = file

    def on(self, event: Event) -> None:
        if self._file is None:
            return
        try:
            self._file.write(encode(event) + "\n")
            self._file.flush()
        except OSError:
            self._file = None


@contextmanager
def opened(events: str) -> Iterator[EventLines]:
    """Appends events to the file of that name; `STDOUT` is standard output.

    Raises Refusal(CONFIG_INVALID) if the file cannot be opened.
    """
    if events == STDOUT:
        yield EventLines(sys.stdout)
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(events).open("a", encoding="utf-8"))
        except OSError as error:
            raise Refusal(Reason.CONFIG_INVALID, f"--events {events}: {error.strerror}") from None
        yield EventLines(file)


def _in_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
