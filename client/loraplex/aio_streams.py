"""Running calls of the asyncio client: a completion, and a watch of the adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc

from loraplex import replies
from loraplex.errors import cancelled_here, from_rpc_error
from loraplex.results import AdapterEvent, AdapterTable, Completion, Delta, Finished, Started
from loraplex.v1 import adapter_pb2, generation_pb2


class AsyncStream:
    """See `Stream`: the same members, with `async for`. Cancelling the reader cancels the call."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[
            generation_pb2.GenerateStreamRequest, generation_pb2.GenerateStreamResponse
        ],
    ) -> None:
        self._call = call
        self._messages = aiter(call)
        self._transcript = replies.Transcript()
        self._cancelled = False

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

    def cancel(self) -> None:
        """Stop. A reader then gets Cancelled. After the end it does nothing."""
        self._cancelled = True
        self._call.cancel()

    async def aclose(self) -> None:
        self.cancel()

    def __del__(self) -> None:
        # Its iterator keeps a dropped grpc.aio call alive; a loop that is gone has none to cancel.
        with contextlib.suppress(RuntimeError):
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        try:
            async for message in self._messages:
                delta = self._transcript.feed(message)
                if delta is not None:
                    return delta
        except asyncio.CancelledError:
            # grpc.aio raises this for a cancelled reader and for a cancelled call alike.
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                self._call.cancel()
                raise
            raise cancelled_here() from None
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        self._transcript.close()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncWatch:
    """See `Watch`: the same members, with `async for`."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[
            adapter_pb2.WatchAdaptersRequest, adapter_pb2.WatchAdaptersResponse
        ],
    ) -> None:
        self._call = call
        self._messages = aiter(call)
        self._log = replies.WatchLog()
        self._cancelled = False

    def cancel(self) -> None:
        """Stop. A reader then sees the end."""
        self._cancelled = True
        self._call.cancel()

    async def aclose(self) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[AdapterTable | AdapterEvent]:
        return self

    async def __anext__(self) -> AdapterTable | AdapterEvent:
        try:
            async for message in self._messages:
                news = self._log.feed(message)
                if news is not None:
                    return news
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                self._call.cancel()
                raise
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
