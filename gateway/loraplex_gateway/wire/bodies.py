"""Reads JSON bodies into typed values, with the field's name in every refusal."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from loraplex_gateway.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)

HARMLESS = frozenset(
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "session_id extra_headers".split()
)
"""Fields of OpenAI's requests that change no answer, so they are ignored."""

_PATH = re.compile(r" - at `\$\.?(.*)`$")


async def body_of(request: Request, limit: int) -> bytes:
    """The whole body. Raises ApiError (413) if it has more than `limit` bytes."""
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > limit:
            raise ApiError(
                413, f"the body has more than {limit} bytes", code="request_too_large"
            )
    return bytes(found)


async def read(
    request: Request, kind: type[T], limit: int, ignored: frozenset[str] = HARMLESS
) -> T:
    """The JSON body as a `kind`. Raises ApiError (400, 413).

    A field that is null counts as left out, and so do the fields in `ignored`. Every other field
    that `kind` does not have is refused: it would change the answer if it were understood.
    """
    return convert(loads(await body_of(request, limit)), kind, ignored)


def loads(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises ApiError (400)."""
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return found


def convert(values: dict[str, Any], kind: type[T], ignored: frozenset[str] = HARMLESS) -> T:
    """A decoded object as a `kind`; `read` says how."""
    known = set(kind.__struct_encode_fields__)
    given = {name: value for name, value in values.items() if value is not None}
    for name in given.keys() - known - ignored:
        raise ApiError(
            400,
            f"Unrecognized request argument supplied: {name}; it is not supported here",
            param=name,
            code="unknown_parameter",
        )
    try:
        return msgspec.convert({name: given[name] for name in given.keys() & known}, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise refused(str(error)) from None


def refused(text: str) -> ApiError:
    """The error for a value of a wrong type, from msgspec's sentence about it."""
    found = _PATH.search(text)
    if found is None:
        missing = re.search(r"missing required field `(.*?)`", text)
        return ApiError(400, text, param=missing[1] if missing else None, code="invalid_value")
    path = found[1]
    missing = re.search(r"missing required field `(.*?)`", text)
    if missing:
        path = f"{path}.{missing[1]}"
    return ApiError(400, f"{path}: {text[: found.start()]}", param=path, code="invalid_value")
