"""Events as JSON lines, for whoever follows a run from another process. Imports no torch.

A line is an object with the event's name under "event" and its fields beside it. As in protobuf's
JSON, a number that JSON cannot hold is a string: "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from loraplex_training.report import events
from loraplex_training.report.events import Event

_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in get_args(Event)}
_HINTS = {name: get_type_hints(kind, vars(events)) for name, kind in _KINDS.items()}


def encode(event: Event) -> str:
    """One line, without its end."""
    values = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
    return json.dumps({"event": type(event).__name__, **values}, allow_nan=False)


def decode(line: str | bytes) -> Event:
    """The event of a line.

    Fields that it has beside the event's own are left out, so that an older reader understands a
    newer writer. Raises ValueError for what is no event.
    """
    data = json.loads(line)
    name = data.get("event") if isinstance(data, dict) else None
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"no event of a training run: {str(name)[:40]!r}")
    values = {key: _typed(data[key], hint) for key, hint in _HINTS[kind.__name__].items()
              if key in data}  # fmt: skip
    try:
        event: Event = kind(**values)
    except TypeError as error:
        raise ValueError(f"{name} is not whole: {error}") from None
    return event


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _typed(value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_typed(item, get_args(hint)[0]) for item in value)
    if NoneType in (kinds := get_args(hint)):  # X | None
        return None if value is None else _typed(value, kinds[0])
    if hint is float and isinstance(value, str | int):
        return float(value)
    if isinstance(hint, type) and issubclass(hint, Enum | Path):
        return hint(value)
    if not isinstance(value, hint):
        raise ValueError(f"{value!r} is no {hint.__name__}")
    return value
