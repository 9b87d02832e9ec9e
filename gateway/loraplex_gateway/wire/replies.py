"""JSON responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

_encode = msgspec.json.Encoder().encode


def reply(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A response with a JSON value."""
    return Response(_encode(value), status, headers, "application/json")
