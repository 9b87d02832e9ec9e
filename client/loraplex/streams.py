"""Running calls of the blocking client: a completion, a watch, a file that is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, Self, TypeVar

import grpc

from loraplex.errors import from_rpc_error
from loraplex.jobs.data import DataPieces
from loraplex.replies import Receiver, Transcript, WatchLog
from loraplex.results import AdapterEvent, AdapterTable, Completion, Delta, Finished, Started
from loraplex.training import JobLog, TrainingJob

T = TypeVar("T")


class RunningCall(Generic[T]):
    """An iterator over what a running call sends.

    Leaving the `with` block, `cancel`, or dropping the last reference ends the call on the server.
    """

    def __init__(self, call: Any, receiver: Receiver[Any, T]) -> None:
        self._call: grpc._CallIterator[Any] = call
        self._receiver = receiver
        self._cancelled = False

    def cancel(self) -> None:
        """Cancels the call, from any thread. A watch then ends, a completion raises Cancelled."""
        self._cancelled = True
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        return self._next()

    def _next(self) -> T:
        cancelled = False
        try:
            for message in self._call:
                item = self._receiver.receive(message)
                if item is not None:
                    return item
        except grpc.RpcError as error:
            cancelled = self._cancelled and error.code() is grpc.StatusCode.CANCELLED
            if not cancelled:
                raise from_rpc_error(error) from error
        self._receiver.end(cancelled)
        raise StopIteration


class Stream(RunningCall[Delta | Finished]):
    """A running completion: an iterator over its deltas.

    The deltas of several completions come interleaved; each has its `index`. `started` is None
    before the first delta, `finished` before the end. Leaving the `with` block,
    `cancel`, or dropping the last reference cancels the completion on the server.
    """

    _receiver: Transcript

    def __init__(self, call: Any, completions: int = 1) -> None:
        super().__init__(call, Transcript(completions))

    def __next__(self) -> Delta:
        while isinstance(item := self._next(), Finished):
            pass
        return item

    def parts(self) -> Iterator[Delta | Finished]:
        """Yields the deltas, and the end of each completion as soon as it has ended.

        Iterating over the stream itself tells the ends by `finishes` alone.
        """
        while True:
            try:
                item = self._next()
            except StopIteration:
                return
            yield item

    @property
    def started(self) -> Started | None:
        """The head of the stream."""
        return self._receiver.started

    @property
    def finished(self) -> Finished | None:
        """The end of the completion, of the first one if there are several.

        None until all of them have ended.
        """
        return self._receiver.finished

    @property
    def finishes(self) -> Mapping[int, Finished]:
        """The completions that have ended, by their index."""
        return self._receiver.finishes

    def completion(self) -> Completion:
        """Reads to the end; returns the whole completion, including deltas read before."""
        for _ in self:
            pass
        return self._receiver.completion()


class Watch(RunningCall[AdapterTable | AdapterEvent]):
    """A running watch of the adapters: an iterator over the table and its changes."""

    def __init__(self, call: Any) -> None:
        super().__init__(call, WatchLog())


class JobWatch(RunningCall[TrainingJob]):
    """A running watch of a job: an iterator over its states, the last of which is final.

    Ending the watch does not end the job.
    """

    def __init__(self, call: Any) -> None:
        super().__init__(call, JobLog())


class DataReading(RunningCall[bytes]):
    """An uploaded file that is being read: an iterator over pieces of its bytes."""

    def __init__(self, call: Any) -> None:
        super().__init__(call, DataPieces())
