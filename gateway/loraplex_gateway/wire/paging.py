"""The parameters of lists, and lists as OpenAI's clients know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from starlette.requests import Request

from loraplex_gateway.errors import ApiError

_MOST_DIGITS: Final = 9


def limit_of(request: Request, default: int, most: int) -> int:
    """The parameter `limit`. Raises ApiError (400)."""
    text = request.query_params.get("limit", str(default))
    is_number = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    if not is_number or not 1 <= int(text) <= most:
        raise ApiError(400, f"limit: must be 1 to {most}", param="limit", code="invalid_value")
    return int(text)


def page_of(found: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """The first `limit` entries; there are more if `found` is longer."""
    data = list(found[:limit])
    return {
        "object": "list",
        "data": data,
        "has_more": len(found) > limit,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
