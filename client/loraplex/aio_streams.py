"""Running calls of the asyncio client: a completion, a watch, a file that is read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Generic, Self, TypeVar

import grpc

from loraplex.errors import from_rpc_error
from loraplex.jobs.data import DataPieces
from loraplex.replies import Receiver, Transcript, WatchLog
from loraplex.results import AdapterEvent, AdapterTable, Completion, Delta, Finished, Started
from loraplex.training import JobLog, TrainingJob

T = TypeVar("T")


class AsyncRunningCall(Generic[T]):
    """Like `RunningCall`, with `async with` and `async for`."""

    def __init__(self, call: Any, receiver: Receiver[Any, T]) -> None:
        self._call: grpc.aio.UnaryStreamCall[Any, Any] = call
        self._messages = aiter(self._call)
        self._receiver = receiver
        self._cancelled = False

    def cancel(self) -> None:
        """Cancels the call. A watch then ends, a completion raises Cancelled."""
        self._cancelled = True
        self._call.cancel()

    async def aclose(self) -> None:
        """Cancels the call."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        return await self._next()

    async def _next(self) -> T:
        cancelled = False
        try:
            async for message in self._messages:
                item = self._receiver.receive(message)
                if item is not None:
                    return item
        except asyncio.CancelledError:
            # grpc.aio raises this for a cancelled reader and for a cancelled call alike.
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                self._call.cancel()
                raise
            cancelled = True
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        self._receiver.end(cancelled)
        raise StopAsyncIteration


class AsyncStream(AsyncRunningCall[Delta | Finished]):
    """Like `Stream`, with `async for`. Cancelling the reading task cancels the completion."""

    _receiver: Transcript

    def __init__(self, call: Any, completions: int = 1) -> None:
        super().__init__(call, Transcript(completions))

    async def __anext__(self) -> Delta:
        while isinstance(item := await self._next(), Finished):
            pass
        return item

    async def parts(self) -> AsyncIterator[Delta | Finished]:
        """Like `Stream.parts`."""
        while True:
            try:
                item = await self._next()
            except StopAsyncIteration:
                return
            yield item

    @property
    def started(self) -> Started | None:
        """The head of the stream; None before the first delta."""
        return self._receiver.started

    @property
    def finished(self) -> Finished | None:
        """Like `Stream.finished`."""
        return self._receiver.finished

    @property
    def finishes(self) -> Mapping[int, Finished]:
        """The completions that have ended, by their index."""
        return self._receiver.finishes

    async def completion(self) -> Completion:
        """Like `Stream.completion`."""
        async for _ in self:
            pass
        return self._receiver.completion()

    def __del__(self) -> None:
        # The iterator keeps a dropped grpc.aio call alive. A closed loop has no call to cancel.
        with contextlib.suppress(RuntimeError):
            self._call.cancel()


class AsyncWatch(AsyncRunningCall[AdapterTable | AdapterEvent]):
    """Like `Watch`, with `async for`."""

    def __init__(self, call: Any) -> None:
        super().__init__(call, WatchLog())


class AsyncJobWatch(AsyncRunningCall[TrainingJob]):
    """Like `JobWatch`, with `async for`."""

    def __init__(self, call: Any) -> None:
        super().__init__(call, JobLog())


class AsyncDataReading(AsyncRunningCall[bytes]):
    """Like `DataReading`, with `async for`."""

    def __init__(self, call: Any) -> None:
        super().__init__(call, DataPieces())
