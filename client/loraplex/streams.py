"""Running calls of the blocking client: a completion, and a watch of the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import grpc

from loraplex import replies
from loraplex.errors import cancelled_here, from_rpc_error
from loraplex.results import AdapterEvent, AdapterTable, Completion, Delta, Finished, Started
from loraplex.v1 import adapter_pb2, generation_pb2


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


class Watch:
    """A running watch: iterate it for the table and its changes.

    Leaving the `with` block, `cancel`, or dropping the last reference ends it on the server too.
    """

    def __init__(self, call: grpc._CallIterator[adapter_pb2.WatchAdaptersResponse]) -> None:
        self._call = call
        self._log = replies.WatchLog()
        self._cancelled = False

    def cancel(self) -> None:
        """Stop; from any thread. A reader then sees the end."""
        self._cancelled = True
        self._call.cancel()

    close = cancel

    def __iter__(self) -> Iterator[AdapterTable | AdapterEvent]:
        return self

    def __next__(self) -> AdapterTable | AdapterEvent:
        try:
            for message in self._call:
                news = self._log.feed(message)
                if news is not None:
                    return news
        except grpc.RpcError as error:
            if not self._cancelled or error.code() is not grpc.StatusCode.CANCELLED:
                raise from_rpc_error(error) from error
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
