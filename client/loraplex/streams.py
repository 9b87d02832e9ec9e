"""Running calls of the blocking client: a completion, and a watch of the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import grpc

from loraplex import replies
from loraplex.errors import cancelled_here, from_rpc_error
from loraplex.results import AdapterEvent, AdapterTable, Completion, Delta, Finished, Started
from loraplex.v1 import adapter_pb2, generation_pb2

M = TypeVar("M")


class Call(Generic[M]):
    """A running call that sends messages; what all of them share.

    Leaving the `with` block, `cancel`, or dropping the last reference ends it on the server too.
    """

    def __init__(self, call: grpc._CallIterator[M]) -> None:
        self._call = call
        self._cancelled = False

    def cancel(self) -> None:
        """Stop; from any thread. A reader then sees the end, of a completion Cancelled."""
        self._cancelled = True
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def _message(self) -> M | None:
        """The next one; None at the end. Raises LoraplexError."""
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            if not self._cancelled or error.code() is not grpc.StatusCode.CANCELLED:
                raise from_rpc_error(error) from error
        self._stopped()
        return None

    def _stopped(self) -> None:
        """Called at the end of a call that was cancelled here."""


class Stream(Call[generation_pb2.GenerateStreamResponse]):
    """A running completion: iterate it for its deltas.

    `started` and `finished` are None until those messages have come: `started` before the first
    delta, `finished` once the iteration has ended. Leaving the `with` block, `cancel`, or dropping
    the last reference cancels what is still running on the server.
    """

    def __init__(self, call: grpc._CallIterator[generation_pb2.GenerateStreamResponse]) -> None:
        super().__init__(call)
        self._transcript = replies.Transcript()

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

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while (message := self._message()) is not None:
            delta = self._transcript.feed(message)
            if delta is not None:
                return delta
        self._transcript.close()
        raise StopIteration

    def _stopped(self) -> None:
        raise cancelled_here()


class Watch(Call[adapter_pb2.WatchAdaptersResponse]):
    """A running watch: iterate it for the table and its changes."""

    def __init__(self, call: grpc._CallIterator[adapter_pb2.WatchAdaptersResponse]) -> None:
        super().__init__(call)
        self._log = replies.WatchLog()

    def __iter__(self) -> Iterator[AdapterTable | AdapterEvent]:
        return self

    def __next__(self) -> AdapterTable | AdapterEvent:
        while (message := self._message()) is not None:
            news = self._log.feed(message)
            if news is not None:
                return news
        raise StopIteration
