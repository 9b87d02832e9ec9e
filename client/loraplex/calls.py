"""The calls to a server, written once: `AsyncClient` inherits them, `Client` runs them."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2

from loraplex import channel, replies, requests, uploads
from loraplex.errors import LoraplexError, Unauthenticated, Unavailable, UploadNotFound
from loraplex.model.calls import ModelCalls
from loraplex.replies import read
from loraplex.requests import GenerateOptions, fill
from loraplex.results import (
    AdapterInfo,
    Completion,
    HealthStatus,
    Registration,
    UploadInfo,
    UploadProgress,
    Validation,
)
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc

Q = TypeVar("Q")


class _WithAdapter(Protocol):
    """A reply that holds an adapter."""

    @property
    def adapter(self) -> adapter_pb2.Adapter: ...


A = TypeVar("A", bound=_WithAdapter)


class Calls(ModelCalls):
    """All calls except those that return a stream. Every call may raise LoraplexError.

    `timeout` is the deadline of one call in seconds; None takes the client's.
    """

    async def generate(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Returns the whole completion at once. `GenerateOptions` lists the options."""
        request = requests.generate(prompt, **options)
        method = self._connection.stubs.generation.Generate
        return read(Completion, await self._call(method, request, timeout))

    async def register_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        load: bool = False,
        labels: Mapping[str, str] | None = None,
        chat_template: str = "",
        eos_token_ids: Sequence[int] = (),
        signature: bytes = b"",
        timeout: float | None = None,
    ) -> Registration:
        """Registers the PEFT directory `path`, relative to the server's import root, as `name`.

        With `replace`, a name that is taken moves to these bytes as a new version. With `load`, the
        adapter is made resident too. `chat_template` (Jinja source, which the server's operator
        must allow) and `eos_token_ids` take the place of the base model's for this version.
        `signature` is the content of a signature's file, which the operator may require. Raises
        AdapterRejected or AdapterConflict.
        """
        request = fill(
            adapter_pb2.RegisterAdapterRequest,
            name=name,
            path=path,
            replace=replace,
            load=load,
            labels=labels,
            chat_template=chat_template,
            eos_token_ids=eos_token_ids,
            signature=signature,
        )
        return read(Registration, await self._call(self._stub.RegisterAdapter, request, timeout))

    async def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Returns one adapter. Raises AdapterNotFound."""
        request = adapter_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return await self._adapter(self._stub.GetAdapter, request, timeout)

    async def list_adapters(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> list[AdapterInfo]:
        """Returns all registered adapters in the order of their names.

        With `labels`, only those whose current version has all of these labels. Each page is a call
        of its own, for which `page_size` (0: the server's choice) and `timeout` hold.
        """
        request = fill(adapter_pb2.ListAdaptersRequest, page_size=page_size, labels=labels)
        pages = await self._connection.pages(self._stub.ListAdapters, request, timeout)
        return [read(AdapterInfo, adapter) for page in pages for adapter in page.adapters]

    async def load_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Loads an adapter onto the device; returns once it is resident."""
        request = adapter_pb2.LoadAdapterRequest(adapter_id=adapter_id)
        return await self._adapter(self._stub.LoadAdapter, request, timeout)

    async def unload_adapter(
        self,
        adapter_id: str,
        *,
        force: bool = False,
        drain: float | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Removes an adapter from the device once its running requests have finished.

        With `force`, those requests are aborted at once; with `drain`, those that still run after
        that many seconds are aborted. The adapter stays registered.
        """
        request = requests.unload(adapter_id, force, drain)
        return await self._adapter(self._stub.UnloadAdapter, request, timeout)

    async def delete_adapter(self, name: str, *, timeout: float | None = None) -> None:
        """Deletes a name. Its running requests finish. Raises AdapterNotFound."""
        request = adapter_pb2.DeleteAdapterRequest(name=name)
        await self._call(self._stub.DeleteAdapter, request, timeout)

    async def list_versions(self, name: str, *, timeout: float | None = None) -> list[AdapterInfo]:
        """Returns all versions of a name, the newest first. Raises AdapterNotFound."""
        request = adapter_pb2.ListAdapterVersionsRequest(name=name)
        reply = await self._call(self._stub.ListAdapterVersions, request, timeout)
        return [read(AdapterInfo, version) for version in reply.adapters]

    async def validate_adapter(
        self,
        path: str = "",
        *,
        upload_id: str = "",
        other_files: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Validation:
        """Returns everything that is wrong with an adapter, without registering it.

        The adapter is either the directory `path` below the server's import root or what
        `stage_adapter` uploaded. `other_files` are names of further files in the directory that was
        uploaded, for the notes.
        """
        request = requests.validate(path, upload_id, other_files)
        return read(Validation, await self._call(self._stub.ValidateAdapter, request, timeout))

    async def label_adapter(
        self,
        adapter_id: str,
        labels: Mapping[str, str] | None = None,
        *,
        remove: Sequence[str] = (),
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Sets labels on a version, and removes the labels whose keys are in `remove`."""
        request = fill(
            adapter_pb2.LabelAdapterRequest, adapter_id=adapter_id, set=labels, remove=remove
        )
        return await self._adapter(self._stub.LabelAdapter, request, timeout)

    async def set_alias(
        self,
        alias: str,
        adapter_id: str,
        *,
        expected: str | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Points an alias to the version that `adapter_id` currently names.

        With `expected`, the alias moves only if it points to that version now; "" means that the
        alias must not exist yet. Otherwise raises AdapterConflict.
        """
        request = fill(
            adapter_pb2.SetAliasRequest, alias=alias, adapter_id=adapter_id, expected=expected
        )
        return await self._adapter(self._stub.SetAlias, request, timeout)

    async def delete_alias(self, alias: str, *, timeout: float | None = None) -> None:
        """Deletes an alias; its adapter stays. Raises AdapterNotFound."""
        request = adapter_pb2.DeleteAliasRequest(alias=alias)
        await self._call(self._stub.DeleteAlias, request, timeout)

    async def restore_adapter(self, name: str, *, timeout: float | None = None) -> AdapterInfo:
        """Restores a deleted name with all its versions."""
        request = adapter_pb2.RestoreAdapterRequest(name=name)
        return await self._adapter(self._stub.RestoreAdapter, request, timeout)

    async def pin_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Loads an adapter and keeps it resident until it is unpinned. Raises ResourceExhausted."""
        request = adapter_pb2.PinAdapterRequest(adapter_id=adapter_id)
        return await self._adapter(self._stub.PinAdapter, request, timeout)

    async def unpin_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Allows a pinned adapter to be evicted again."""
        request = adapter_pb2.UnpinAdapterRequest(adapter_id=adapter_id)
        return await self._adapter(self._stub.UnpinAdapter, request, timeout)

    async def merge_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Computes an adapter's requests with dense merged weights. Other requests are unaffected.

        Raises ResourceExhausted if the device has no room for the merged weights.
        """
        request = adapter_pb2.MergeAdapterRequest(adapter_id=adapter_id)
        return await self._adapter(self._stub.MergeAdapter, request, timeout)

    async def unmerge_adapter(
        self, adapter_id: str, *, timeout: float | None = None
    ) -> AdapterInfo:
        """Drops an adapter's merged weights. Its answers are bit for bit those before the merge."""
        request = adapter_pb2.UnmergeAdapterRequest(adapter_id=adapter_id)
        return await self._adapter(self._stub.UnmergeAdapter, request, timeout)

    async def upload_adapter(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        replace: bool = False,
        load: bool = False,
        labels: Mapping[str, str] | None = None,
        chat_template: str = "",
        eos_token_ids: Sequence[int] = (),
        signature: bytes = b"",
        upload_id: str = "",
        progress: uploads.Progress | None = None,
        timeout: float | None = None,
    ) -> Registration:
        """Uploads the local PEFT directory `folder` and registers it as `name`.

        An interrupted upload is resumed, even if the server has restarted meanwhile. `upload_id`
        (from `start_upload`) resumes an upload that another process started. `progress` may be
        called on another thread. `timeout` is the deadline of each stream; None sets no deadline.
        `chat_template`, `eos_token_ids` and `signature` are as in `register_adapter`. Raises
        AdapterRejected or AdapterConflict.
        """
        files = await self._connection.offload(uploads.Files.read, folder)
        header = files.header(
            upload_id,
            labels,
            name=name,
            replace=replace,
            load=load,
            chat_template=chat_template,
            eos_token_ids=eos_token_ids,
            signature=signature,
        )
        return await self._upload(files, header, progress, timeout)

    async def stage_adapter(
        self,
        folder: str | os.PathLike[str],
        *,
        upload_id: str = "",
        progress: uploads.Progress | None = None,
        timeout: float | None = None,
    ) -> str:
        """Uploads a local directory without registering it; returns its upload id.

        `validate_adapter` checks the upload, `upload_adapter` with its id registers it, and
        `abort_upload` drops it. `timeout` is the deadline of each stream; None sets no deadline.
        """
        files = await self._connection.offload(uploads.Files.read, folder)
        header = files.header(upload_id or await self.start_upload(), stage_only=True)
        await self._upload(files, header, progress, timeout)
        return header.upload_id

    async def start_upload(self, *, timeout: float | None = None) -> str:
        """Returns the id of a new upload. `upload_adapter` starts one itself if given no id."""
        request = adapter_pb2.StartUploadRequest()
        return (await self._call(self._stub.StartUpload, request, timeout)).upload_id

    async def get_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadProgress:
        """Returns how much of an upload has arrived. Raises UploadNotFound."""
        request = adapter_pb2.GetUploadRequest(upload_id=upload_id)
        return read(UploadProgress, await self._call(self._stub.GetUpload, request, timeout))

    async def list_uploads(self, *, timeout: float | None = None) -> list[UploadInfo]:
        """Returns the open uploads of all clients, the one that expires first at the front."""
        request = adapter_pb2.ListUploadsRequest()
        reply = await self._call(self._stub.ListUploads, request, timeout)
        return [read(UploadInfo, upload) for upload in reply.uploads]

    async def abort_upload(self, upload_id: str, *, timeout: float | None = None) -> None:
        """Drops an upload and its bytes. Raises UploadNotFound."""
        request = adapter_pb2.AbortUploadRequest(upload_id=upload_id)
        await self._call(self._stub.AbortUpload, request, timeout)

    async def health(
        self, service: str = "", *, timeout: float = channel.HEALTH_TIMEOUT
    ) -> HealthStatus:
        """Returns the health of the server or of one service. Raises Unavailable."""
        request = health_pb2.HealthCheckRequest(service=service)
        return replies.health(await self._connection.probe(request, timeout))

    async def _upload(
        self,
        files: uploads.Files,
        header: adapter_pb2.UploadHeader,
        progress: uploads.Progress | None,
        timeout: float | None,
    ) -> Registration:
        """Sends until everything has arrived.

        An upload started here is dropped if resuming it is pointless.
        """
        started = not header.upload_id
        header.upload_id = header.upload_id or await self.start_upload()
        attempts = uploads.Attempts()
        while True:
            arrived = None
            try:
                arrived = await self.get_upload(header.upload_id)
                messages = uploads.stream(files, header, arrived, progress)
                reply = await self._connection.send(self._stub.UploadAdapter, messages, timeout)
                return read(Registration, reply)
            except LoraplexError as error:
                if isinstance(error, UploadNotFound) and attempts.made and header.name:
                    # Only the reply was lost: the upload is complete and registered.
                    found = await self.get_adapter(header.name)
                    if found.digest == files.digest:
                        return Registration(found, created=True)
                pause = attempts.pause(error, arrived)
                if pause is None:
                    if started and not isinstance(error, Unavailable | Unauthenticated):
                        with contextlib.suppress(LoraplexError):
                            await self.abort_upload(header.upload_id)
                    raise
            await self._connection.sleep(pause)

    @property
    def _stub(self) -> adapter_pb2_grpc.AdapterServiceAsyncStub:
        return self._connection.stubs.adapters

    async def _adapter(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, A],
        request: Q,
        timeout: float | None,
    ) -> AdapterInfo:
        """Calls a method whose reply holds an adapter; returns the adapter."""
        return read(AdapterInfo, (await self._call(method, request, timeout)).adapter)
