"""`/console/`: the page and its files. `/` leads there.

The files are a part of the package and are read once. The page may load and call nothing but this
gateway, which its Content-Security-Policy makes browsers enforce.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError

_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "json": "application/json",
    "LICENSE": "text/plain; charset=utf-8",
}
"""What is served, by the ends of names."""

_FIRST: Final = "index.html"

HEADERS: Final = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'; require-trusted-types-for 'script'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Browsers ask each time, so that page and scripts are of one version after an upgrade.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}
"""Headers of every file of the console."""


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent.

    Attributes:
        data, packed: its bytes, and the same compressed with gzip.
        media_type: its type.
        tag: changes with the bytes.
    """

    data: bytes
    packed: bytes
    media_type: str
    tag: str


def routes(context: Context) -> list[BaseRoute]:
    if not context.settings.console:
        return []
    found = dict(_files(files("loraplex_gateway.console") / "static"))

    async def to_page(request: Request) -> Response:
        # Relative to the address asked for, since a proxy may serve the gateway below a prefix.
        return RedirectResponse("console/", headers={"cache-control": "no-cache"})

    async def one(request: Request) -> Response:
        file = found.get(request.path_params["path"] or _FIRST)
        if file is None:
            raise ApiError(404, "The console has no such file.")
        return _response(file, request)

    # No part of the interface that gateway/openapi.yaml describes: the page may change at any time.
    pages = (("/", to_page), ("/console", to_page), ("/console/{path:path}", one))
    return [
        Route(path, handler, methods=["GET"], include_in_schema=False) for path, handler in pages
    ]


def _response(file: StaticFile, request: Request) -> Response:
    """The file; 304 if the browser has these bytes."""
    headers = {**HEADERS, "etag": file.tag}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
        return Response(file.packed, headers=headers, media_type=file.media_type)
    return Response(file.data, headers=headers, media_type=file.media_type)


def _files(folder: Traversable, prefix: str = "") -> list[tuple[str, StaticFile]]:
    """The files below a folder, by their paths in it."""
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _files(entry, f"{prefix}{entry.name}/")
            continue
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type is None:
            continue
        data = entry.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        packed = gzip.compress(data, mtime=0)
        found.append((prefix + entry.name, StaticFile(data, packed, media_type, tag)))
    return found
