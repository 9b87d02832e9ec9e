"""Receives an adapter's files as a form, in bounded memory, and registers or checks them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import msgspec
from loraplex import AdapterRejected, AsyncClient
from loraplex.uploads import CONFIG_FILE, WEIGHTS_FILE
from msgspec import Meta
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loraplex_gateway.adapters import describe
from loraplex_gateway.adapters.orders import AdapterOrders, Order, discard
from loraplex_gateway.adapters.sources import MAX_CONFIG_BYTES
from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError
from loraplex_gateway.wire import bodies

_MOST_FILES: Final = 64
_MOST_FIELDS: Final = 16
_ROLES: Final = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
_SIGNATURE: Final = "model.sig"
_TOO_LARGE: Final = "request_too_large"
_JSON_FIELDS: Final = ("labels", "eos_token_ids", "replace", "load", "validate_only")


class UploadForm(msgspec.Struct):
    """The fields of the form that are no files."""

    name: str = ""
    replace: bool = False
    load: bool = False
    labels: dict[str, str] = {}
    chat_template: str = ""
    eos_token_ids: list[Annotated[int, Meta(ge=0, lt=1 << 32)]] = []
    validate_only: bool = False


async def receive(context: Context, orders: AdapterOrders, request: Request) -> Response:
    """Registers or checks the adapter in a form. Raises ApiError and LoraplexError.

    An upload is begun at the server before the first byte is read, so that a caller who may not
    register adapters sends none.
    """
    client = context.client_for(request)
    upload_id = await client.start_upload()
    try:
        form = await _parsed(request, context.settings.max_upload_bytes)
        try:
            return await _taken(orders, client, form, upload_id)
        finally:
            await form.close()
    finally:
        await discard(client, upload_id)


async def _taken(
    orders: AdapterOrders, client: AsyncClient, form: FormData, upload_id: str
) -> Response:
    """Sends the form's files to the server, which registers or checks them."""
    fields = _fields(form)
    with TemporaryDirectory(prefix="loraplex-upload-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        await asyncio.to_thread(_lay_out, form, folder)
        try:
            if fields.validate_only:
                report = await orders.examine(client, folder, upload_id)
                return JSONResponse(describe.validation(report))
            name, order = await orders.named(client, _order(fields))
            done = await orders.send(client, name, folder, order, upload_id)
        except AdapterRejected as error:
            raise _without(folder, error) from None
    return JSONResponse(describe.registration(done), 201 if done.created else 200)


async def _parsed(request: Request, most: int) -> FormData:
    """The form; its files are on disk. Raises ApiError (400, 408, 413, 507)."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    parser = MultiPartParser(
        request.headers, _bounded(request, most), max_files=_MOST_FILES, max_fields=_MOST_FIELDS
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}") from None
    except OSError:
        raise ApiError(507, "the gateway has no room for the upload", should_retry=False) from None


async def _bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body in pieces. Raises ApiError: too many bytes, or none for too long."""
    count = 0
    async for piece in bodies.pieces_of(request):
        count += len(piece)
        if count > most:
            raise _too_large(most)
        yield piece


def _fields(form: FormData) -> UploadForm:
    """The form's fields. Raises ApiError (400)."""
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            continue
        if name in values:
            raise ApiError(400, f"{name} is given twice", param=name)
        values[name] = value
    for name in _JSON_FIELDS:
        text = values.get(name)
        if text is not None:
            try:
                values[name] = msgspec.json.decode(text) if text else None
            except msgspec.DecodeError:
                raise ApiError(400, f"{name}: the text is not JSON", param=name) from None
    return bodies.convert(values, UploadForm)


def _order(fields: UploadForm) -> Order:
    return Order(
        fields.name,
        fields.replace,
        fields.load,
        labels=fields.labels,
        chat_template=fields.chat_template,
        eos_token_ids=tuple(fields.eos_token_ids),
    )


def _lay_out(form: FormData, folder: Path) -> None:
    """Writes the form's files as an adapter's folder. Blocks; raises ApiError.

    Of files that are no part of an adapter only the names are kept, for the server's notes.
    """
    for field, value in form.multi_items():
        if not isinstance(value, UploadFile):
            continue
        name = _name(field, value.filename or "")
        target = folder / name
        if target.exists():
            raise ApiError(400, f"there are two files {name}", param=field)
        if name == CONFIG_FILE and (value.size or 0) > MAX_CONFIG_BYTES:
            raise ApiError(400, f"{name} has more than {MAX_CONFIG_BYTES} bytes", param=field)
        try:
            with target.open("xb") as written:
                if name in (CONFIG_FILE, WEIGHTS_FILE, _SIGNATURE):
                    shutil.copyfileobj(value.file, written, 1 << 20)
        except OSError:
            text = "the gateway has no room for the upload"
            raise ApiError(507, text, should_retry=False) from None
        value.file.close()


def _name(field: str, given: str) -> str:
    """The name of a file in the adapter's folder, from its field or else its own name."""
    if field in _ROLES:
        return _ROLES[field]
    if field == "signature":
        return _SIGNATURE
    name = given.replace("\\", "/").rpartition("/")[2]
    if not name.isprintable() or len(name.encode()) > 128 or name.strip(".") == "":
        raise ApiError(400, "a file has no usable name", param=field)
    return name


def _without(folder: Path, error: AdapterRejected) -> ApiError:
    """The error without the folder of the gateway in it."""
    if not error.message.startswith(str(folder)):
        raise error
    text = error.message.removeprefix(f"{folder}: ")
    return ApiError(400, text, code=error.reason.lower() or None, param=_field(error))


def _field(error: AdapterRejected) -> str | None:
    return error.violations[0].field if error.violations else None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the upload has more than {most} bytes", code=_TOO_LARGE)
