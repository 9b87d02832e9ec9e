"""Threads that read adapter files and compute merges while the engine's own thread steps.

There are two lanes. A read that requests wait for may take either; background tasks (reading ahead,
merging) take all but one together, so they never delay a read that is waited for.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.adapters.attempts import LOAD, MERGE, Announcements
from loraplex_server.engine.messages import AdapterRef, Failure
from loraplex_server.engine.runner.protocol import LoadedAdapter, MergedWeights, ModelRunner

log = logging.getLogger(__name__)

NICE = 10
"""Added to the niceness of loader threads (Linux)."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Task: read an adapter's files and pack its weights."""

    ref: AdapterRef


@dataclass(frozen=True, slots=True, eq=False)
class MergeWeights:
    """Task: compute an adapter's dense copies. Without `adapter`, its files are read first."""

    ref: AdapterRef
    adapter: LoadedAdapter | None


LoaderTask = Read | MergeWeights


@dataclass(frozen=True, slots=True)
class LoaderResult:
    """Result of a task: `adapter` of `Read`, `copies` of `MergeWeights`, or a failure of either."""

    task: LoaderTask
    adapter: LoadedAdapter | None = None
    copies: MergedWeights | None = None
    failure: Failure | None = None
    seconds: float = 0.0


class Loader(Protocol):
    """Runs up to `lanes` (at least two) tasks at a time, off the engine's thread."""

    lanes: int

    def start(self, task: LoaderTask) -> None:
        """Starts a task. Called only while a lane is free."""

    def poll(self) -> LoaderResult | None:
        """Takes out one result; None if there is none. Never blocks."""


def execute(
    runner: ModelRunner, task: LoaderTask, clock: Callable[[], float] = time.monotonic
) -> LoaderResult:
    """Runs a task. Every exception becomes a failure whose text a client may see."""
    begun = clock()
    try:
        if isinstance(task, Read):
            adapter = _read(runner, task.ref)
            return LoaderResult(task, adapter=adapter, seconds=clock() - begun)
        copies = runner.merge_adapter(task.adapter or _read(runner, task.ref))
        return LoaderResult(task, copies=copies, seconds=clock() - begun)
    except Exception as error:
        doing = "reading" if isinstance(task, Read) else "merging"
        failure = failure_of(error, f"{doing} adapter {task.ref.digest}")
        return LoaderResult(task, failure=failure, seconds=clock() - begun)


def failure_of(error: Exception, doing: str) -> Failure:
    """The failure to report for `error`; anything that is not a `Refusal` is logged instead."""
    if isinstance(error, Refusal):
        return Failure(error.reason, error.message)
    log.error("%s failed", doing, exc_info=error)
    return Failure(Reason.ENGINE_FAULT, "the adapter could not be loaded")


def _read(runner: ModelRunner, ref: AdapterRef) -> LoadedAdapter:
    reach("adapter.read")
    return runner.read_adapter(ref)


class ThreadLoader:
    """A `Loader` with one thread per lane; each calls `wake` after every task."""

    def __init__(
        self,
        runner: ModelRunner,
        wake: Callable[[], None] = lambda: None,
        lanes: int = 2,
        attempts: Announcements | None = None,
    ) -> None:
        self._runner = runner
        self._wake = wake
        self._attempts = attempts or Announcements()
        self._tasks: queue.SimpleQueue[LoaderTask] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[LoaderResult] = queue.SimpleQueue()
        self.lanes = lanes
        for lane in range(lanes):
            name = f"adapter loader {lane}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def start(self, task: LoaderTask) -> None:
        self._tasks.put(task)

    def poll(self) -> LoaderResult | None:
        try:
            return self._results.get_nowait()
        except queue.Empty:
            return None

    def _work(self) -> None:
        _lower_priority()
        while True:
            task = self._tasks.get()
            with self._attempts.of(task.ref.digest, LOAD if isinstance(task, Read) else MERGE):
                result = execute(self._runner, task)
            self._results.put(result)
            self._wake()


def _lower_priority() -> None:
    """Raises this thread's niceness by `NICE`; on Linux only.

    A forward pass ends with the slowest of its threads, so a loader that takes a tenth of one core
    from one of them slows every row by that tenth. Niceness and not an idle class: under full load
    a load must still end, and idle cores are used in full either way. On Linux niceness belongs to
    the thread; elsewhere it belongs to the whole process, where raising it would gain nothing.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nicer = min(os.getpriority(os.PRIO_PROCESS, thread) + NICE, 19)
        os.setpriority(os.PRIO_PROCESS, thread, nicer)


class LoadLanes:
    """The tasks that a loader runs; one lane is kept free of background tasks."""

    def __init__(self, loader: Loader) -> None:
        assert loader.lanes >= 2, "background tasks would take the only lane"
        self._loader = loader
        self._is_background: dict[LoaderTask, bool] = {}

    def is_free(self, background: bool) -> bool:
        """Whether a task may start now."""
        if len(self._is_background) >= self._loader.lanes:
            return False
        return not background or sum(self._is_background.values()) < self._loader.lanes - 1

    def start(self, task: LoaderTask, background: bool) -> None:
        """Starts a task. A lane must be free for it."""
        assert self.is_free(background), "a task is started without a lane"
        self._is_background[task] = background
        self._loader.start(task)

    def finished(self) -> list[LoaderResult]:
        """Takes out the results of the tasks that ended since the last call."""
        results: list[LoaderResult] = []
        while (result := self._loader.poll()) is not None:
            del self._is_background[result.task]
            results.append(result)
        return results
