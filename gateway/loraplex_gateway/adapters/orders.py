"""Registers, loads and removes adapters on the orders of HTTP requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from loraplex import (
    AdapterNotFound,
    AsyncClient,
    DeadlineExceeded,
    InvalidRequest,
    LoraplexError,
    PermissionDenied,
    Registration,
    UploadNotFound,
    Validation,
)
from loraplex.sources.foreign_ids import SOURCE_LABEL, name_of
from loraplex.uploads import Files
from starlette.requests import Request

from loraplex_gateway.adapters.pulling import Puller
from loraplex_gateway.adapters.sources import ImportedPath, RemoteAddress, SentFolder, Sources
from loraplex_gateway.context import Context, bearer
from loraplex_gateway.errors import ApiError
from loraplex_gateway.models.ids import is_legal

UNLOAD_SECONDS: Final = 1.0
"""Seconds that an unload waits for the running requests; after that the server ends it alone."""

_SIGNATURE: Final = "model.sig"
_MAX_SIGNATURE: Final = 1 << 18
_MAX_LABEL: Final = 256


@dataclass(frozen=True, slots=True)
class Order:
    """What to register an adapter as.

    Attributes:
        model: id of the adapter in later requests.
        replace: whether an id that has other bytes moves to these.
        load: whether the adapter is loaded onto the device.
        labels, chat_template, eos_token_ids, signature: as in the client's `register_adapter`.
    """

    model: str
    replace: bool = False
    load: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    chat_template: str = ""
    eos_token_ids: tuple[int, ...] = ()
    signature: bytes = b""


class AdapterOrders:
    """The adapters that requests bring and remove, with what their callers may do."""

    def __init__(self, context: Context) -> None:
        """Raises SettingsError."""
        self._context = context
        self._sources = Sources(context.settings)
        self._puller = Puller(context.settings, self._sources.allowed)

    async def register(
        self, request: Request, order: Order, where: str, param: str
    ) -> Registration:
        """Registers the adapter that `where` names, the value of the request's field `param`.

        Repeating it with the same bytes changes nothing. Raises ApiError and LoraplexError;
        AdapterConflict if the id has other bytes and the order does not replace them.
        """
        client = self._context.client_for(request)
        name, order = await self.named(client, order)
        if len(where) <= _MAX_LABEL:
            order = replace(order, labels={SOURCE_LABEL: where, **order.labels})
        async with self._found(client, where, param) as (source, upload_id):
            if isinstance(source, ImportedPath):
                return await self._imported(client, name, source, order, param)
            known = await _registered_already(client, name, source.folder, order)
            if known is not None:
                return known
            return await self.send(client, name, source.folder, order, upload_id)

    async def validate(self, request: Request, where: str, param: str) -> Validation:
        """What is wrong with the adapter that `where` names. Registers nothing."""
        client = self._context.client_for(request)
        async with self._found(client, where, param) as (source, upload_id):
            if isinstance(source, ImportedPath):
                return await client.validate_adapter(source.path)
            return await self.examine(client, source.folder, upload_id)

    async def examine(self, client: AsyncClient, folder: Path, upload_id: str) -> Validation:
        """What is wrong with the adapter in a local folder, which is sent as an upload."""
        files = await asyncio.to_thread(Files.read, folder)
        try:
            await client.stage_adapter(folder, upload_id=upload_id)
        except UploadNotFound:  # it has expired while the files were fetched or received
            upload_id = await client.stage_adapter(folder)
        try:
            return await client.validate_adapter(upload_id=upload_id, other_files=files.others)
        finally:
            await discard(client, upload_id)

    async def send(
        self, client: AsyncClient, name: str, folder: Path, order: Order, upload_id: str
    ) -> Registration:
        """Registers the adapter in a local folder as `name`, by an upload that was begun."""
        signature = order.signature or await asyncio.to_thread(_signature_in, folder)

        async def upload(upload_id: str) -> Registration:
            return await client.upload_adapter(
                *(name, folder),
                replace=order.replace,
                load=order.load,
                labels=order.labels,
                chat_template=order.chat_template,
                eos_token_ids=order.eos_token_ids,
                signature=signature,
                upload_id=upload_id,
            )

        try:
            found = await upload(upload_id)
        except UploadNotFound:  # it has expired while the files were fetched or received
            found = await upload("")
        self._context.ids.forget()
        return found

    async def remove(self, request: Request, model: str) -> None:
        """Removes an adapter from the device, and its id from those that requests can name.

        Running requests finish. An id that is an alias is deleted alone. The adapter's versions
        stay in the store until the operator collects garbage. Raises ApiError (404).
        """
        client, ids = self._context.client_for(request), self._context.ids
        if is_legal(model) and "@" in model:
            text = f"{model} is one version of a name; unload it with /v1/adapters/{model}/unload"
            raise ApiError(400, text, param="model")
        found = await ids.adapter(client, model, bearer(request))
        if not found:
            raise ApiError(400, f"{model} is the base model, which stays", param="model")
        info = await client.get_adapter(found)
        try:
            if info.name != found:
                await client.delete_alias(found)
                return
            held = f"{info.name}@{info.digest}"
            # What still uses the adapter goes on; the order is carried out when that has ended.
            with contextlib.suppress(PermissionDenied, DeadlineExceeded, AdapterNotFound):
                await client.unload_adapter(held, timeout=UNLOAD_SECONDS)
            await client.delete_adapter(info.name)
        finally:
            ids.forget()

    async def named(self, client: AsyncClient, order: Order) -> tuple[str, Order]:
        """The name to register an adapter as, and the order with the label of another id.

        Raises ApiError (400).
        """
        model, base = order.model, await self._context.ids.base(client)
        if model in (base.name, *self._context.settings.served_names):
            raise ApiError(400, f"{model} is the id of the base model", param="name")
        if is_legal(model) and "@" in model:
            text = f"{model} means one version of a name; give the name without @"
            raise ApiError(400, text, param="name")
        try:
            name, labels = name_of(model)
        except ValueError as error:
            text = f"the adapter's id cannot be used: {error}"
            raise ApiError(400, text, param="name") from None
        return name, replace(order, labels={**order.labels, **labels})

    @asynccontextmanager
    async def _found(
        self, client: AsyncClient, where: str, param: str
    ) -> AsyncIterator[tuple[ImportedPath | SentFolder, str]]:
        """The files that `where` names, fetched if need be, and an upload for them.

        The upload is begun before anything is looked at, so that nobody learns of files, or makes
        the gateway fetch some, who may not register adapters.
        """
        upload_id = await client.start_upload()
        try:
            source = await asyncio.to_thread(self._sources.find, where, param)
            if isinstance(source, RemoteAddress):
                async with self._puller.pulled(source.address) as folder:
                    yield SentFolder(folder), upload_id
            else:
                yield source, upload_id
        finally:
            await discard(client, upload_id)

    async def _imported(
        self, client: AsyncClient, name: str, source: ImportedPath, order: Order, param: str
    ) -> Registration:
        try:
            found = await client.register_adapter(
                *(name, source.path),
                replace=order.replace,
                load=order.load,
                labels=order.labels,
                chat_template=order.chat_template,
                eos_token_ids=order.eos_token_ids,
                signature=order.signature,
            )
        except InvalidRequest as error:
            if any(violation.field == "path" for violation in error.violations):
                text = f"{param}: {error.message}"
                raise ApiError(404, text, param=param, code="not_found") from None
            raise
        self._context.ids.forget()
        return found


async def discard(client: AsyncClient, upload_id: str) -> None:
    """Drops an upload, unless its adapter is registered."""
    with contextlib.suppress(LoraplexError):
        await client.abort_upload(upload_id)


async def _registered_already(
    client: AsyncClient, name: str, folder: Path, order: Order
) -> Registration | None:
    """The adapter, loaded if ordered, if the name has these bytes; None if that is not certain.

    Controllers repeat their orders, and the bytes need not be sent each time.
    """
    if order.chat_template or order.eos_token_ids or order.signature:
        return None
    try:
        known = await client.get_adapter(name)
        files = await asyncio.to_thread(Files.read, folder)
        if known.digest != files.digest or known.name != name or known.unservable is not None:
            return None
        if any(known.labels.get(key) != text for key, text in order.labels.items()):
            return None
        if order.load:
            known = await client.load_adapter(name)
    except (AdapterNotFound, PermissionDenied):
        return None
    return Registration(known, created=False)


def _signature_in(folder: Path) -> bytes:
    """The signature that lies beside the adapter's files; b"" if there is none."""
    file = folder / _SIGNATURE
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _MAX_SIGNATURE:
            return b""
        return file.read_bytes()
    except OSError:
        return b""
