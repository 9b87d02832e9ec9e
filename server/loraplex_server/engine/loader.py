"""The thread that reads adapter files, so that the engine's own thread never touches a file."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from loraplex_adapters.errors import AdapterError

from loraplex_server.engine.messages import AdapterRef, Failure
from loraplex_server.engine.runner import LoadedAdapter

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What came of reading `ref`: an adapter or a failure."""

    ref: AdapterRef
    adapter: LoadedAdapter | None
    failure: Failure | None


class Loader(Protocol):
    """Reads one adapter at a time, beside the engine's thread."""

    def start(self, ref: AdapterRef) -> None:
        """Begins to read. Called only when nothing is being read."""

    def poll(self) -> ReadResult | None:
        """The result, once, when there is one. Never waits."""


def read(read_adapter: Callable[[AdapterRef], LoadedAdapter], ref: AdapterRef) -> ReadResult:
    """Reads an adapter; every exception becomes a failure whose text is safe to show."""
    try:
        return ReadResult(ref, read_adapter(ref), None)
    except Exception as error:
        return ReadResult(ref, None, failure_of(error, f"reading adapter {ref.digest}"))


def failure_of(error: Exception, doing: str) -> Failure:
    """The failure to report: an `AdapterError`'s own words; anything else goes to the log."""
    if isinstance(error, AdapterError):
        return Failure(error.reason, error.message)
    log.error("%s failed", doing, exc_info=error)
    return Failure("ENGINE_FAULT", "the adapter could not be loaded")


class ThreadLoader:
    """A `Loader` with a thread of its own; `wake` is called from it after every read."""

    def __init__(
        self,
        read_adapter: Callable[[AdapterRef], LoadedAdapter],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._read_adapter = read_adapter
        self._wake = wake
        self._refs: queue.SimpleQueue[AdapterRef] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[ReadResult] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="adapter loader", daemon=True).start()

    def start(self, ref: AdapterRef) -> None:
        self._refs.put(ref)

    def poll(self) -> ReadResult | None:
        try:
            return self._results.get_nowait()
        except queue.Empty:
            return None

    def _work(self) -> None:
        while True:
            self._results.put(read(self._read_adapter, self._refs.get()))
            self._wake()
