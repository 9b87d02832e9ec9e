"""`/v1/files`: upload, list, describe, download and delete files of examples.

Bytes are passed on while they arrive, in both directions, so a file's size costs no memory here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final

from loraplex import AsyncDataReading, DataNotFound, LoraplexError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from loraplex_gateway import errors
from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError
from loraplex_gateway.files.form import FileForm
from loraplex_gateway.files.objects import PURPOSE, data_id, file_object, no_file
from loraplex_gateway.wire.paging import limit_of, page_of

MOST_LISTED: Final = 10_000

_PARAMS: Final = {"chunk": "file", "start.filename": "file", "start.labels": "file",
           "start.request_id": "idempotency-key"}  # fmt: skip


def routes(context: Context) -> list[BaseRoute]:
    """The routes of files."""
    files = FileRoutes(context)
    return [
        Route("/v1/files", files.create, methods=["POST"]),
        Route("/v1/files", files.listed, methods=["GET"]),
        Route("/v1/files/{file}", files.one, methods=["GET"]),
        Route("/v1/files/{file}", files.delete, methods=["DELETE"]),
        Route("/v1/files/{file}/content", files.content, methods=["GET"]),
    ]


class FileRoutes:
    """The handlers of files."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """Stores the file of a form."""
        training = self._context.client_for(request).training
        form = FileForm(request)
        try:
            await form.open()
            if "purpose" in form.fields:  # a wrong one is refused before the file is sent
                _require_fields(form)
            stored = await training.forward_data(
                _checked(form),
                filename=form.filename,
                request_id=request.headers.get("idempotency-key", ""),
                timeout=self._context.settings.request_seconds,
            )
        except ApiError:
            await form.discard()
            raise
        except LoraplexError as error:
            await form.discard()
            raise errors.of(error, _PARAMS) from None
        return JSONResponse(file_object(stored))

    async def listed(self, request: Request) -> Response:
        """Lists a page of files."""
        query = request.query_params
        limit, order = limit_of(request, MOST_LISTED, MOST_LISTED), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order: must be asc or desc", param="order", code="invalid_value")
        found = await self._context.client_for(request).training.list_data()
        if query.get("purpose", PURPOSE) != PURPOSE:
            found = []
        if order == "asc":
            found.reverse()
        if "after" in query:
            after = data_id(query["after"], "after")
            found = [f for f in found if (f.data_id > after) == (order == "asc")]
            found = [f for f in found if f.data_id != after]
        return JSONResponse(page_of([file_object(file) for file in found], limit))

    async def one(self, request: Request) -> Response:
        """Describes a file."""
        file = request.path_params["file"]
        training = self._context.client_for(request).training
        try:
            return JSONResponse(file_object(await training.get_data(data_id(file))))
        except DataNotFound:
            raise no_file(file) from None

    async def content(self, request: Request) -> Response:
        """Sends a file's bytes."""
        file = request.path_params["file"]
        training = self._context.client_for(request).training
        try:
            described = await training.get_data(data_id(file))
            pieces = training.read_data(described.data_id)
            first = await anext(aiter(pieces), b"")
        except DataNotFound:
            raise no_file(file) from None
        headers = {
            "content-length": str(described.size_bytes),
            "content-disposition": "attachment",
        }
        body = _pieces(first, pieces)
        return StreamingResponse(body, headers=headers, media_type="application/octet-stream")

    async def delete(self, request: Request) -> Response:
        """Deletes a file."""
        file = request.path_params["file"]
        training = self._context.client_for(request).training
        try:
            await training.delete_data(data_id(file))
        except DataNotFound:
            raise no_file(file) from None
        return JSONResponse({"id": file, "object": "file", "deleted": True})


async def _checked(form: FileForm) -> AsyncIterator[bytes]:
    """The file's bytes. Raises ApiError after the last of them if a field of the form is wrong."""
    async with aclosing(form.content()) as pieces:
        async for piece in pieces:
            yield piece
    _require_fields(form)


def _require_fields(form: FileForm) -> None:
    """Raises ApiError (400) for fields that ask for something else than a file for fine-tuning."""
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise ApiError(400, "purpose: is missing", param="purpose", code="missing_parameter")
    if purpose != PURPOSE:
        text = f"purpose: {purpose[:50]!r} is not supported here; files are for {PURPOSE!r}"
        raise ApiError(400, text, param="purpose", code="invalid_value")
    for field in form.fields:
        if field != "purpose":
            name = field[:100]
            text = f"{name}: is not supported here; files are kept until they are deleted"
            raise ApiError(400, text, param=name, code="unknown_parameter")


async def _pieces(first: bytes, rest: AsyncDataReading) -> AsyncGenerator[bytes, None]:
    """All pieces of a file. If the server fails, the connection ends before the file does."""
    async with rest:
        if first:
            yield first
        async for piece in rest:
            yield piece
