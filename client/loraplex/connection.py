"""A connection to a server as the calls use it: blocking for `Client`, awaited for `AsyncClient`.

Every call is written once, as a coroutine that waits for nothing but its connection. The methods of
a blocking connection block instead of suspending, so with one such a coroutine runs to its end in a
single step.
"""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ParamSpec, Self, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import channel
from loraplex.access.keys import ClientKey
from loraplex.access.options import AccessOptions, open_access
from loraplex.errors import from_rpc_error, invalid
from loraplex.v1 import (
    adapter_pb2_grpc,
    engine_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
    training_pb2_grpc,
)

P = ParamSpec("P")
Q = TypeVar("Q")
R = TypeVar("R")
T = TypeVar("T")


class Stubs:
    """The stubs of all services, typed as those of `grpc.aio` for both kinds of channel."""

    def __init__(self, opened: Any) -> None:
        generation: Any = generation_pb2_grpc.GenerationServiceStub(opened)
        adapters: Any = adapter_pb2_grpc.AdapterServiceStub(opened)
        training: Any = training_pb2_grpc.TrainingServiceStub(opened)
        model: Any = model_pb2_grpc.ModelServiceStub(opened)
        engine: Any = engine_pb2_grpc.EngineServiceStub(opened)
        self.generation: generation_pb2_grpc.GenerationServiceAsyncStub = generation
        self.adapters: adapter_pb2_grpc.AdapterServiceAsyncStub = adapters
        self.training: training_pb2_grpc.TrainingServiceAsyncStub = training
        self.model: model_pb2_grpc.ModelServiceAsyncStub = model
        self.engine: engine_pb2_grpc.EngineServiceAsyncStub = engine
        self.health: Any = health_pb2_grpc.HealthStub(opened)


class ServerConnection(ABC):
    """A connection to a server, with the arguments of `Client`.

    The first call contacts the server, not the constructor. The constructor reads the files that
    the options name, and raises InvalidRequest.
    """

    def __init__(
        self,
        target: str,
        timeout: float | None,
        wait_for_ready: bool,
        credentials: grpc.ChannelCredentials | None,
        metadata: Sequence[tuple[str, str | bytes]],
        options: AccessOptions,
    ) -> None:
        self._target = target
        self._owns_channel = True
        if any(name.lower() == "authorization" for name, _ in metadata):
            if options.get("key") or options.get("key_file"):
                raise invalid("key", "is given twice, since metadata has authorization as well")
            options = {**options, "key": ""}  # the environment's is not for these calls
        self._access = open_access(target, credentials, options)
        self.defaults = channel.CallDefaults(
            timeout, wait_for_ready, tuple(metadata), self._access.key
        )

    @property
    @abstractmethod
    def stubs(self) -> Stubs:
        """The stubs on this connection's channel."""

    async def call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        """Returns the reply to one request. Raises LoraplexError."""
        reply: R = await self._reply(method, request, self.defaults.arguments(timeout))
        return reply

    async def pages(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> list[R]:
        """Returns the replies to a request for a page and to those for all following pages."""
        found: list[Any] = []
        while not found or found[-1].next_page_token:
            if found:
                cast(Any, request).page_token = found[-1].next_page_token
            found.append(await self.call(method, request, timeout))
        return found

    async def send(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[Q, R],
        messages: Iterator[Q],
        timeout: float | None,
    ) -> R:
        """Returns the reply to a stream of messages. Raises LoraplexError."""
        arguments = self.defaults.unbounded(timeout)
        reply: R = await self._reply(method, self._outgoing(messages), arguments)
        return reply

    async def probe(self, request: health_pb2.HealthCheckRequest, timeout: float) -> int:
        """Returns the serving status of a service. Raises LoraplexError."""
        reply = await self._reply(self.stubs.health.Check, request, self.defaults.probe(timeout))
        status: int = reply.status
        return status

    async def _reply(self, method: Any, sent: Any, arguments: channel.CallArguments) -> Any:
        try:
            return await self._finished(method(sent, **arguments))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def for_caller(self, key: str, metadata: channel.Metadata) -> Self:
        """Returns a connection with the key of somebody else, over the channel of this one.

        Raises InvalidRequest if the key would leave this machine unencrypted.
        """
        if key and not self._access.is_private:
            raise invalid("key", "it is not sent, because the connection is not encrypted")
        other = self._over_same_channel()
        other._owns_channel = False
        other.defaults = dataclasses.replace(
            self.defaults,
            metadata=(*self.defaults.metadata, *metadata),
            key=ClientKey(key, "key") if key else None,
        )
        return other

    def _over_same_channel(self) -> Self:
        return copy.copy(self)

    @abstractmethod
    async def _finished(self, call: Any) -> Any:
        """Returns the reply of a unary call, given what its stub returned."""

    @abstractmethod
    def _outgoing(self, messages: Iterator[Q]) -> Iterator[Q] | AsyncIterator[Q]:
        """Returns the messages as a stub takes them."""

    @abstractmethod
    async def offload(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function that reads files; in a thread, if it would block an event loop."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Waits between two attempts."""


class BlockingConnection(ServerConnection):
    """A connection whose coroutines block the calling thread and never suspend."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._channel = channel.connect(self._target, self._access)
        self._stubs = Stubs(self._channel)

    @property
    def stubs(self) -> Stubs:
        return self._stubs

    async def _finished(self, call: Any) -> Any:
        return call

    def _outgoing(self, messages: Iterator[Q]) -> Iterator[Q]:
        return messages

    async def offload(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - blocking is its purpose

    def close(self) -> None:
        if self._owns_channel:
            self._channel.close()


class AsyncConnection(ServerConnection):
    """A connection for the event loop that runs at its first call, when its channel is opened."""

    @functools.cached_property
    def _channel(self) -> grpc.aio.Channel:
        return channel.connect_aio(self._target, self._access)

    @functools.cached_property
    def stubs(self) -> Stubs:
        return Stubs(self._channel)

    def _over_same_channel(self) -> Self:
        other = copy.copy(self)
        # Both are made at the first use, which may be the copy's.
        other.__dict__.update(_channel=self._channel, stubs=self.stubs)
        return other

    async def _finished(self, call: Any) -> Any:
        return await call

    async def _outgoing(self, messages: Iterator[Q]) -> AsyncIterator[Q]:
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            yield message

    async def offload(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(function, *args, **kwargs)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        if self._owns_channel and "_channel" in self.__dict__:
            await self._channel.close()
