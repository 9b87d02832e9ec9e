"""The blocking client. Safe to share between threads."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import channel, replies, requests, uploads
from loraplex.errors import (
    LoraplexError,
    Unavailable,
    UploadNotFound,
    from_rpc_error,
)
from loraplex.jobs import Training
from loraplex.requests import GenerateOptions
from loraplex.results import (
    AdapterInfo,
    Completion,
    HealthStatus,
    Registration,
    UploadProgress,
    Validation,
)
from loraplex.streams import Stream, Watch
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

Q = TypeVar("Q")
R = TypeVar("R")


class Client:
    """A connection to a server, used as a context manager or closed with `close`.

    `timeout` is the default deadline of a call in seconds (None: none); each call may give its
    own. `wait_for_ready` makes calls wait for a server instead of raising Unavailable after a few
    retries. `metadata` goes with every call. Without `credentials` the connection is in plain text.
    `training` holds the calls for training jobs.
    """

    def __init__(
        self,
        target: str = channel.DEFAULT_TARGET,
        *,
        timeout: float | None = channel.DEFAULT_TIMEOUT,
        wait_for_ready: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        self._defaults = channel.call_defaults(timeout, wait_for_ready, metadata)
        self._channel = channel.connect(target, credentials)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.training = Training(self._channel, self._defaults)

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """The whole completion at once. Options: see `GenerateOptions`. Raises LoraplexError."""
        request = requests.generate(prompt, **options)
        return replies.completion(self._call(self._generation.Generate, request, timeout))

    def stream(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """The completion piece by piece. Options: see `GenerateOptions`."""
        request = generation_pb2.GenerateStreamRequest(request=requests.generate(prompt, **options))
        return Stream(self._generation.GenerateStream(request, **self._defaults.arguments(timeout)))

    def register_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        load: bool = False,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Registration:
        """Register the PEFT directory `path`, relative to the server's import root, as `name`.

        `replace` lets a taken name move to these bytes as a new version; `load` also makes it
        resident. Raises AdapterRejected or AdapterConflict.
        """
        request = requests.register(name, path, replace, load, labels or {})
        return replies.registration(self._call(self._adapters.RegisterAdapter, request, timeout))

    def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """One adapter. Raises AdapterNotFound."""
        request = adapter_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return replies.adapter(self._call(self._adapters.GetAdapter, request, timeout).adapter)

    def list_adapters(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> list[AdapterInfo]:
        """All registered adapters by name, or those that have all these labels.

        `page_size` and `timeout` are for each page's call.
        """
        found: list[AdapterInfo] = []
        token = ""
        while True:
            request = requests.page(page_size, token, labels or {})
            page = self._call(self._adapters.ListAdapters, request, timeout)
            found += map(replies.adapter, page.adapters)
            token = page.next_page_token
            if not token:
                return found

    def load_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Make an adapter resident; returns when it is."""
        request = adapter_pb2.LoadAdapterRequest(adapter_id=adapter_id)
        return replies.adapter(self._call(self._adapters.LoadAdapter, request, timeout).adapter)

    def unload_adapter(
        self,
        adapter_id: str,
        *,
        force: bool = False,
        drain: float | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Take an adapter off the device once its requests finish; with `force`, abort them.

        With `drain`, those that still run after so many seconds are aborted then.
        """
        request = requests.unload(adapter_id, force, drain)
        return replies.adapter(self._call(self._adapters.UnloadAdapter, request, timeout).adapter)

    def delete_adapter(self, name: str, *, timeout: float | None = None) -> None:
        """Forget a name. Running requests finish. Raises AdapterNotFound."""
        request = adapter_pb2.DeleteAdapterRequest(name=name)
        self._call(self._adapters.DeleteAdapter, request, timeout)

    def list_versions(self, name: str, *, timeout: float | None = None) -> list[AdapterInfo]:
        """All versions of a name, the newest first. Raises AdapterNotFound."""
        request = adapter_pb2.ListAdapterVersionsRequest(name=name)
        reply = self._call(self._adapters.ListAdapterVersions, request, timeout)
        return [replies.adapter(version) for version in reply.adapters]

    def validate_adapter(
        self, path: str = "", *, upload_id: str = "", timeout: float | None = None
    ) -> Validation:
        """Everything that is wrong with an adapter, without registering it.

        It is the directory `path` below the server's import root, or what `stage_adapter` sent.
        """
        request = requests.validate(path, upload_id)
        return replies.validation(self._call(self._adapters.ValidateAdapter, request, timeout))

    def label_adapter(
        self,
        adapter_id: str,
        labels: Mapping[str, str] | None = None,
        *,
        remove: Sequence[str] = (),
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Put labels on a version, and take others off it."""
        request = requests.label(adapter_id, labels or {}, remove)
        reply = self._call(self._adapters.LabelAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    def set_alias(
        self,
        alias: str,
        adapter_id: str,
        *,
        expected: str | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """Point an alias to the version that `adapter_id` names now.

        With `expected`, only if it points there until now ("": if there is no such alias yet).
        Raises AdapterConflict.
        """
        request = requests.alias(alias, adapter_id, expected)
        reply = self._call(self._adapters.SetAlias, request, timeout)
        return replies.adapter(reply.adapter)

    def delete_alias(self, alias: str, *, timeout: float | None = None) -> None:
        """Remove an alias; what it points to stays. Raises AdapterNotFound."""
        request = adapter_pb2.DeleteAliasRequest(alias=alias)
        self._call(self._adapters.DeleteAlias, request, timeout)

    def restore_adapter(self, name: str, *, timeout: float | None = None) -> AdapterInfo:
        """Bring a deleted name back, with its versions."""
        request = adapter_pb2.RestoreAdapterRequest(name=name)
        reply = self._call(self._adapters.RestoreAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    def pin_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Make an adapter resident and keep it so. Raises ResourceExhausted."""
        request = adapter_pb2.PinAdapterRequest(adapter_id=adapter_id)
        reply = self._call(self._adapters.PinAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    def unpin_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Let a pinned adapter be evicted again."""
        request = adapter_pb2.UnpinAdapterRequest(adapter_id=adapter_id)
        reply = self._call(self._adapters.UnpinAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    def merge_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Give an adapter's requests dense weights; others are not touched.

        Raises ResourceExhausted when there is no room for them.
        """
        request = adapter_pb2.MergeAdapterRequest(adapter_id=adapter_id)
        reply = self._call(self._adapters.MergeAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    def unmerge_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """Drop an adapter's dense weights; its answers are bit for bit those of before."""
        request = adapter_pb2.UnmergeAdapterRequest(adapter_id=adapter_id)
        reply = self._call(self._adapters.UnmergeAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    def upload_adapter(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        replace: bool = False,
        load: bool = False,
        labels: Mapping[str, str] | None = None,
        upload_id: str = "",
        progress: uploads.Progress | None = None,
        timeout: float | None = None,
    ) -> Registration:
        """Send the PEFT directory `folder` of this machine to the server, as `name`.

        What breaks on the way is continued, also on a server that was started again; `upload_id`
        (of `start_upload`) continues what another process began. `progress` may be called on
        another thread. `timeout` is for each stream, and None is no deadline. Raises as
        `register_adapter`.
        """
        files = uploads.Files.read(folder)
        order = uploads.Order(name, replace, load, labels)
        return self._upload(files, order, upload_id, progress, timeout)

    def stage_adapter(
        self,
        folder: str | os.PathLike[str],
        *,
        upload_id: str = "",
        progress: uploads.Progress | None = None,
        timeout: float | None = None,
    ) -> str:
        """Send a directory without registering it; its upload id, for `validate_adapter`.

        `abort_upload` drops it; `upload_adapter` with the id registers it.
        """
        files = uploads.Files.read(folder)
        upload_id = upload_id or self.start_upload()
        self._upload(files, uploads.Order(), upload_id, progress, timeout)
        return upload_id

    def start_upload(self, *, timeout: float | None = None) -> str:
        """The id of a new upload; `upload_adapter` gets one by itself."""
        request = adapter_pb2.StartUploadRequest()
        return self._call(self._adapters.StartUpload, request, timeout).upload_id

    def get_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadProgress:
        """How much of an upload is there. Raises UploadNotFound."""
        request = adapter_pb2.GetUploadRequest(upload_id=upload_id)
        return replies.upload(self._call(self._adapters.GetUpload, request, timeout))

    def abort_upload(self, upload_id: str, *, timeout: float | None = None) -> None:
        """Drop an upload and its bytes. Raises UploadNotFound."""
        request = adapter_pb2.AbortUploadRequest(upload_id=upload_id)
        self._call(self._adapters.AbortUpload, request, timeout)

    def watch_adapters(self, *, timeout: float | None = None) -> Watch:
        """The table of adapters, then every change of it; `timeout` None is no deadline.

        Iterate it: first an AdapterTable, then AdapterEvents. When the reader was too slow for the
        changes, another table comes, with `resync` set. It ends when it is cancelled; a server that
        shuts down or is lost raises Unavailable.
        """
        request = adapter_pb2.WatchAdaptersRequest()
        return Watch(self._adapters.WatchAdapters(request, **self._defaults.unbounded(timeout)))

    def health(self, service: str = "", *, timeout: float = channel.HEALTH_TIMEOUT) -> HealthStatus:
        """What the server says of itself, or of one service. Raises Unavailable if none answers."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            return replies.health(
                self._health.Check(request, **self._defaults.probe(timeout)).status
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def close(self) -> None:
        """Close the connection; calls that are running are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _upload(
        self,
        files: uploads.Files,
        order: uploads.Order,
        upload_id: str,
        progress: uploads.Progress | None,
        timeout: float | None,
    ) -> Registration:
        """Sends until all is there; drops what it began when going on is pointless."""
        begun = not upload_id
        upload_id = upload_id or self.start_upload()
        attempts = uploads.Attempts()
        while True:
            there = None
            try:
                there = self.get_upload(upload_id)
                messages = uploads.stream(files, order, upload_id, there, progress)
                return self._send(messages, timeout)
            except LoraplexError as error:
                if isinstance(error, UploadNotFound) and attempts.made and order.name:
                    # The reply was lost, not the upload: it is registered.
                    found = self.get_adapter(order.name)
                    if found.digest == files.digest:
                        return Registration(found, created=True)
                pause = attempts.pause(error, there)
                if pause is None:
                    if begun and not isinstance(error, Unavailable):
                        with contextlib.suppress(LoraplexError):
                            self.abort_upload(upload_id)
                    raise
            time.sleep(pause)

    def _send(
        self, messages: Iterator[adapter_pb2.UploadAdapterRequest], timeout: float | None
    ) -> Registration:
        try:
            reply = self._adapters.UploadAdapter(messages, **self._defaults.unbounded(timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return replies.registration(reply)

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        try:
            return method(request, **self._defaults.arguments(timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
