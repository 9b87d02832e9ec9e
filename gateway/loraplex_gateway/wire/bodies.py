"""Reads JSON bodies into typed values, with the field's name in every refusal."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from loraplex_gateway.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)

HARMLESS: Final = frozenset(
    {
        "extra_headers",
        "guided_decoding_backend",
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "spaces_between_special_tokens",
        "store",
        "user",
    }
)
"""Fields of OpenAI's and vLLM's requests that change no answer, so they are ignored."""

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "bad_words": ([],),
        "detokenize": (True,),
        "documents": ([],),
        "early_stopping": (False,),
        "functions": ([],),
        "include_reasoning": (True,),
        "length_penalty": (1.0,),
        "logits_processors": ([],),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "suffix": ("",),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
        "vllm_xargs": ({},),
    }
)
"""Values with which a field that is not supported changes no answer: clients send defaults, too."""

_INSTEAD: Final[Mapping[str, str]] = MappingProxyType(
    {"function_call": "tool_choice", "functions": "tools"}
)
"""The fields that have replaced others."""

BODY_SECONDS: Final = 60.0
"""Seconds that a body may take to arrive."""

SILENT_SECONDS: Final = 60.0
"""Silence after which a form is given up."""

LEAST_RATE: Final = 1024
"""Bytes in a second that a form must have on average, after the first SILENT_SECONDS."""

_PATH: Final = re.compile(r" - at `\$\.?(.*)`$")
_MISSING: Final = re.compile(r"(?:missing required|unknown) field `(.*?)`")


async def pieces_of(request: Request) -> AsyncGenerator[bytes, None]:
    """The body of a form as it arrives, however large.

    Raises ApiError: 408 if nothing comes for a minute, or almost nothing for longer; 415 for a body
    that is compressed; 499 if the client closes the connection.
    """
    require_plain(request)
    loop, pieces, count = asyncio.get_running_loop(), aiter(request.stream()), 0
    began = loop.time()
    while True:
        latest = began + SILENT_SECONDS + count / LEAST_RATE
        try:
            async with asyncio.timeout_at(min(latest, loop.time() + SILENT_SECONDS)):
                piece = await anext(pieces, None)
        except TimeoutError:
            text = f"nothing was received for {SILENT_SECONDS:g} s, or too little"
            raise ApiError(408, text, should_retry=False) from None
        except ClientDisconnect:
            raise ApiError(499, "the client closed the connection") from None
        if piece is None:
            return
        count += len(piece)
        yield piece


async def body_of(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises ApiError: 413 above `limit` bytes, 408 if it does not arrive, 415 if it is compressed.
    """
    require_plain(request)
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                found += chunk
                if len(found) > limit:
                    text = f"the body has more than {limit} bytes"
                    raise ApiError(413, text, code="request_too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client closed the connection") from None
    return bytes(found)


async def read(
    request: Request,
    kind: type[T],
    limit: int,
    ignored: frozenset[str] = HARMLESS,
    neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
) -> T:
    """The JSON body as a `kind`. Raises ApiError (400, 408, 413, 415).

    A field that is null counts as left out, and so do the fields in `ignored`, and those in
    `neutral` with one of the values there. Every other field that `kind` does not have is refused:
    it would change the answer if it were understood.
    """
    require_json(request)
    return convert(loads(await body_of(request, limit)), kind, ignored, neutral)


def require_json(request: Request) -> None:
    """Raises ApiError (415) unless the body's type is JSON.

    A page of another origin can send other types without asking the gateway first, so this also
    keeps web pages from calling a gateway that listens on the visitor's own machine.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind[-5:] == "+json"
    ):
        given = f"is {kind}" if kind else "is missing"
        raise ApiError(415, f"the header content-type {given}; it must be application/json")


def require_plain(request: Request) -> None:
    """Raises ApiError (415) for a body that is compressed, which nothing here unpacks."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        text = f"the header content-encoding is {coding[:64]}; send the body as it is"
        raise ApiError(415, text, code="unsupported_encoding")


def loads(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises ApiError (400)."""
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return found


def convert(
    values: Mapping[str, Any],
    kind: type[T],
    ignored: frozenset[str] = HARMLESS,
    neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
) -> T:
    """A decoded object as a `kind`; `read` says how."""
    known = frozenset(kind.__struct_encode_fields__)
    given = {name: value for name, value in values.items() if value is not None}
    for name in given.keys() - known - ignored:
        if given[name] not in neutral.get(name, ()):
            raise unsupported(name)
    try:
        return msgspec.convert({name: given[name] for name in given.keys() & known}, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise refused(str(error)) from None


def unsupported(param: str) -> ApiError:
    """The error for a field that is not supported, or not with this value."""
    name = param if len(param) <= 64 else f"{param[:64]}..."
    text = f"Unrecognized request argument supplied: {name}; it is not supported here"
    if name in _INSTEAD:
        text += f", use {_INSTEAD[name]} instead"
    return ApiError(400, text, param=name, code="unknown_parameter")


def invalid(param: str, text: str) -> ApiError:
    """The error for a field with a wrong value; `text` goes on after the field's name."""
    return ApiError(400, f"{param}: {text}", param=param, code="invalid_value")


def refused(text: str) -> ApiError:
    """The error for a value of a wrong type, from msgspec's sentence about it."""
    found, missing = _PATH.search(text), _MISSING.search(text)
    parts = [found[1] if found else "", missing[1] if missing else ""]
    path = ".".join(filter(None, parts))
    if not path:
        return ApiError(400, text, code="invalid_value")
    return invalid(path, text[: found.start()] if found else text)
