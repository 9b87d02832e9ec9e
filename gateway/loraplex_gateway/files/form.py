"""A multipart form that holds one file, read as it arrives: only a chunk of it is in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from loraplex_gateway.errors import ApiError
from loraplex_gateway.wire.bodies import pieces_of

_DISCARDED_BYTES: Final = 64 << 20
_DISCARD_SECONDS: Final = 5.0

MAX_FIELDS: Final = 16
MAX_FIELD_BYTES: Final = 4096
FILE: Final = "file"
"""The name of the part with the file's bytes."""


class FileForm:
    """A form with fields and a file. Call `open` first; then read `content` to its end.

    Attributes:
        fields: the fields that have arrived. Clients may send them before and after the file.
        filename: the name that the client gives the file.
    """

    def __init__(self, request: Request) -> None:
        """Raises ApiError (400) if the body is no multipart form."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(400, "send the file as multipart/form-data, in a part named `file`")
        self.fields: dict[str, str] = {}
        self.filename = ""
        self._body = pieces_of(request)
        self._turn = asyncio.Lock()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._part_has_headers,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_ends,
                    "on_end": self._form_ends,
                },
            )
        except FormParserError as error:
            raise ApiError(400, f"the form's boundary cannot be used: {error}") from None
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = b"", b""
        self._field = ""
        self._content = bytearray()
        self._pieces: deque[bytes] = deque()
        self._has_file = False
        self._ended = False

    async def open(self) -> None:
        """Reads up to the file. Raises ApiError."""
        while not self._has_file:
            if not await self._advance():
                raise ApiError(400, "the form has no part `file`", param=FILE)

    async def content(self) -> AsyncGenerator[bytes, None]:
        """Yields the file's bytes, and reads the fields after it. Raises ApiError."""
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            if not await self._advance():
                break
        if not self._ended:
            raise ApiError(400, "the form ends before its last boundary")

    async def discard(self) -> None:
        """Reads on for a while without looking: many clients send everything before they listen.

        Whoever reads `content` may still wait for its next piece.
        """
        left = _DISCARDED_BYTES
        with suppress(TimeoutError, ApiError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while left >= 0 and (chunk := await self._read()) is not None:
                    left -= len(chunk)

    async def _advance(self) -> bool:
        """Parses the next bytes of the body; False at its end."""
        chunk = await self._read()
        if chunk is None:
            return False
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise ApiError(400, f"the form is damaged: {error}") from None
        return True

    async def _read(self) -> bytes | None:
        """The next bytes of the body; None at its end."""
        async with self._turn:
            return await anext(self._body, None)

    # what the parser reports

    def _part_begins(self) -> None:
        self._headers = {}
        self._content = bytearray()
        self._field = ""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _part_has_headers(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == FILE:
            if self._has_file:
                raise ApiError(400, "the form has two parts `file`", param=FILE)
            self._has_file = True
            self.filename = _filename(options.get(b"filename", b""))
        elif len(self.fields) >= MAX_FIELDS:
            raise ApiError(400, f"the form has more than {MAX_FIELDS} fields")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == FILE:
            self._pieces.append(data[start:end])
            return
        self._content += data[start:end]
        if len(self._content) > MAX_FIELD_BYTES:
            text = f"the field has more than {MAX_FIELD_BYTES} bytes"
            raise ApiError(400, text, param=self._field)

    def _part_ends(self) -> None:
        if self._field != FILE:
            self.fields[self._field] = self._content.decode("utf-8", "replace")

    def _form_ends(self) -> None:
        self._ended = True


def _filename(given: bytes) -> str:
    """The last part of a path, without what is not printable, as long as the server takes it."""
    name = given.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in name if letter.isprintable())[-255:]
