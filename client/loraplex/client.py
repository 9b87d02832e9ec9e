"""The blocking client. Safe to share between threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import channel, replies, requests
from loraplex.errors import cancelled_here, from_rpc_error
from loraplex.requests import GenerateOptions
from loraplex.results import (
    AdapterInfo,
    Completion,
    Delta,
    Finished,
    HealthStatus,
    Registration,
    Started,
)
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

Q = TypeVar("Q")
R = TypeVar("R")


class Client:
    """A connection to a server, used as a context manager or closed with `close`.

    `timeout` is the default deadline of a call in seconds (None: none); each call may give its
    own. `wait_for_ready` makes calls wait for a server instead of raising Unavailable after a few
    retries. `metadata` goes with every call. Without `credentials` the connection is in plain text.
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
        timeout: float | None = None,
    ) -> Registration:
        """Register the PEFT directory `path`, relative to the server's import root, as `name`.

        `replace` lets a taken name move to these bytes as a new version; `load` also makes it
        resident. Raises AdapterRejected or AdapterConflict.
        """
        request = adapter_pb2.RegisterAdapterRequest(
            name=name, path=path, replace=replace, load=load
        )
        return replies.registration(self._call(self._adapters.RegisterAdapter, request, timeout))

    def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """One adapter. Raises AdapterNotFound."""
        request = adapter_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return replies.adapter(self._call(self._adapters.GetAdapter, request, timeout).adapter)

    def list_adapters(
        self, *, page_size: int = 0, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """All registered adapters by name; `page_size` and `timeout` are for each page's call."""
        found: list[AdapterInfo] = []
        token = ""
        while True:
            request = adapter_pb2.ListAdaptersRequest(page_size=page_size, page_token=token)
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
        self, adapter_id: str, *, force: bool = False, timeout: float | None = None
    ) -> AdapterInfo:
        """Take an adapter off the device once its requests finish; with `force`, abort them."""
        request = adapter_pb2.UnloadAdapterRequest(adapter_id=adapter_id, force=force)
        return replies.adapter(self._call(self._adapters.UnloadAdapter, request, timeout).adapter)

    def delete_adapter(self, name: str, *, timeout: float | None = None) -> None:
        """Forget a name. Running requests finish. Raises AdapterNotFound."""
        request = adapter_pb2.DeleteAdapterRequest(name=name)
        self._call(self._adapters.DeleteAdapter, request, timeout)

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

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        try:
            return method(request, **self._defaults.arguments(timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


class Stream:
    """A running completion: iterate it for its deltas.

    `started` and `finished` are None until those messages have come: `started` before the first
    delta, `finished` once the iteration has ended. Leaving the `with` block, `cancel`, or dropping
    the last reference cancels what is still running on the server.
    """

    def __init__(self, call: grpc._CallIterator[generation_pb2.GenerateStreamResponse]) -> None:
        self._call = call
        self._transcript = replies.Transcript()
        self._cancelled = False

    @property
    def started(self) -> Started | None:
        return self._transcript.started

    @property
    def finished(self) -> Finished | None:
        return self._transcript.finished

    def completion(self) -> Completion:
        """Read to the end; everything as one value, deltas read before included."""
        for _ in self:
            pass
        return self._transcript.completion()

    def cancel(self) -> None:
        """Stop; from any thread. A reader then gets Cancelled. After the end it does nothing."""
        self._cancelled = True
        self._call.cancel()

    close = cancel

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        try:
            for message in self._call:
                delta = self._transcript.feed(message)
                if delta is not None:
                    return delta
        except grpc.RpcError as error:
            if self._cancelled and error.code() is grpc.StatusCode.CANCELLED:
                raise cancelled_here() from None
            raise from_rpc_error(error) from error
        self._transcript.close()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
