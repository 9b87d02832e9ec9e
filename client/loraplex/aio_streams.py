"""Running calls of the asyncio client: a completion, and a watch of the adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from loraplex import replies
from loraplex.errors import cancelled_here, from_rpc_error
from loraplex.results import AdapterEvent, AdapterTable, Completion, Delta, Finished, Started
from loraplex.v1 import adapter_pb2, generation_pb2

M = TypeVar("M")


class AsyncCall(Generic[M]):
    """See `Call`: the same members, with `async with`."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[Any, M]) -> None:
        self._call = call
        self._messages = aiter(call)
        self._cancelled = False

    def cancel(self) -> None:
        """Stop. A reader then sees the end, of a completion Cancelled."""
        self._cancelled = True
        self._call.cancel()

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    async def _message(self) -> M | None:
        """The next one; None at the end. Raises LoraplexError."""
        try:
            return await anext(self._messages)
        except StopAsyncIteration:
            return None
        except asyncio.CancelledError:
            # grpc.aio raises this for a cancelled reader and for a cancelled call alike.
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                self._call.cancel()
                raise
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        self._stopped()
        return None

    def _stopped(self) -> None:
        """Called at the end of a call that was cancelled here."""


class AsyncStream(AsyncCall[generation_pb2.GenerateStreamResponse]):
    """See `Stream`: the same members, with `async for`. Cancelling the reader cancels the call."""

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[Any, generation_pb2.GenerateStreamResponse]
    ) -> None:
        super().__init__(call)
        self._transcript = replies.Transcript()

    @property
    def started(self) -> Started | None:
        return self._transcript.started

    @property
    def finished(self) -> Finished | None:
        return self._transcript.finished

    async def completion(self) -> Completion:
        """See `Stream.completion`."""
        async for _ in self:
            pass
        return self._transcript.completion()

    def __del__(self) -> None:
        # Its iterator keeps a dropped grpc.aio call alive; a loop that is gone has none to cancel.
        with contextlib.suppress(RuntimeError):
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while (message := await self._message()) is not None:
            delta = self._transcript.feed(message)
            if delta is not None:
                return delta
        self._transcript.close()
        raise StopAsyncIteration

    def _stopped(self) -> None:
        raise cancelled_here()


class AsyncWatch(AsyncCall[adapter_pb2.WatchAdaptersResponse]):
    """See `Watch`: the same members, with `async for`."""

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[Any, adapter_pb2.WatchAdaptersResponse]
    ) -> None:
        super().__init__(call)
        self._log = replies.WatchLog()

    def __aiter__(self) -> AsyncIterator[AdapterTable | AdapterEvent]:
        return self

    async def __anext__(self) -> AdapterTable | AdapterEvent:
        while (message := await self._message()) is not None:
            news = self._log.feed(message)
            if news is not None:
                return news
        raise StopAsyncIteration
