"""The threads that read adapter files and compute merges, so that the engine's own never does.

There are two lanes. What somebody's turn waits for may take both; what is done in the background
(reading ahead, merging) at most one, so it never stands in the way of a read that is waited for.
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

from loraplex_server.engine.messages import AdapterRef, Failure
from loraplex_server.engine.runner.protocol import LoadedAdapter, MergedWeights, ModelRunner

log = logging.getLogger(__name__)

NICER_BY = 10


@dataclass(frozen=True, slots=True)
class Read:
    """The job of reading an adapter from the store."""

    ref: AdapterRef


@dataclass(frozen=True, slots=True)
class MergeWeights:
    """The job of computing dense copies; the adapter is read first if None is given."""

    ref: AdapterRef
    adapter: LoadedAdapter | None


Job = Read | MergeWeights


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What came of reading `ref`: an adapter or a failure, and how long it took."""

    ref: AdapterRef
    adapter: LoadedAdapter | None
    failure: Failure | None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What came of merging `ref`: dense copies or a failure, and how long it took."""

    ref: AdapterRef
    merged: MergedWeights | None
    failure: Failure | None
    seconds: float = 0.0


Result = ReadResult | MergeResult


class Loader(Protocol):
    """Does jobs beside the engine's thread, `lanes` (two or more) at a time."""

    lanes: int

    def start(self, job: Job) -> None:
        """Begins a job. Called only when a lane is free."""

    def poll(self) -> Result | None:
        """A result, once, when there is one. Never waits."""


def work(runner: ModelRunner, job: Job, clock: Callable[[], float] = time.monotonic) -> Result:
    """Does a job; every exception becomes a failure whose text is safe to show."""
    begun = clock()
    match job:
        case Read():
            try:
                adapter = _read(runner, job.ref)
                return ReadResult(job.ref, adapter, None, clock() - begun)
            except Exception as error:
                failure = failure_of(error, f"reading adapter {job.ref.digest}")
                return ReadResult(job.ref, None, failure, clock() - begun)
        case MergeWeights():
            try:
                merged = runner.merge_adapter(job.adapter or _read(runner, job.ref))
                return MergeResult(job.ref, merged, None, clock() - begun)
            except Exception as error:
                failure = failure_of(error, f"merging adapter {job.ref.digest}")
                return MergeResult(job.ref, None, failure, clock() - begun)


def failure_of(error: Exception, doing: str) -> Failure:
    """The failure to report: an `Refusal`'s own words; anything else goes to the log."""
    if isinstance(error, Refusal):
        return Failure(error.reason, error.message)
    log.error("%s failed", doing, exc_info=error)
    return Failure(Reason.ENGINE_FAULT, "the adapter could not be loaded")


def _read(runner: ModelRunner, ref: AdapterRef) -> LoadedAdapter:
    reach("adapter.read")
    return runner.read_adapter(ref)


class ThreadLoader:
    """A `Loader` with a thread for each lane; `wake` is called from them after every job."""

    def __init__(
        self, runner: ModelRunner, wake: Callable[[], None] = lambda: None, lanes: int = 2
    ) -> None:
        self._runner = runner
        self._wake = wake
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self.lanes = lanes
        for lane in range(lanes):
            name = f"adapter loader {lane}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def start(self, job: Job) -> None:
        self._jobs.put(job)

    def poll(self) -> Result | None:
        try:
            return self._results.get_nowait()
        except queue.Empty:
            return None

    def _work(self) -> None:
        _step_back()
        while True:
            self._results.put(work(self._runner, self._jobs.get()))
            self._wake()


def _step_back() -> None:
    """Lowers this thread's priority.

    A pass ends when the slowest of its threads does, so a loader that takes a tenth of one core
    from one of them slows every row by that tenth. Niceness, not an idle class: under full load a
    load must still come to its end, and idle cores are used in full either way. On Linux niceness
    belongs to the thread; elsewhere to the whole process, where it would help nobody.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nicer = min(os.getpriority(os.PRIO_PROCESS, thread) + NICER_BY, 19)
        os.setpriority(os.PRIO_PROCESS, thread, nicer)


class Desk:
    """Hands jobs to a loader, and keeps one lane free of background work."""

    def __init__(self, loader: Loader) -> None:
        assert loader.lanes >= 2, "background work would take the only lane"
        self._loader = loader
        self._busy = 0
        self._background: set[tuple[type[Job], str]] = set()

    @property
    def is_quiet(self) -> bool:
        """Whether no lane is busy, so that nothing but the pass itself takes processor time."""
        return self._busy == 0

    def has_lane(self, background: bool) -> bool:
        """Whether such a job may start now."""
        if self._busy >= self._loader.lanes:
            return False
        return not background or len(self._background) < self._loader.lanes - 1

    def start(self, job: Job, background: bool) -> None:
        """Begins a job. There must be a lane for it."""
        assert self.has_lane(background), "a job is started without a lane"
        self._busy += 1
        if background:
            self._background.add((type(job), job.ref.digest))
        self._loader.start(job)

    def finished(self) -> list[Result]:
        """Takes out what jobs have come to since the last call."""
        results: list[Result] = []
        while (result := self._loader.poll()) is not None:
            self._busy -= 1
            kind = Read if isinstance(result, ReadResult) else MergeWeights
            self._background.discard((kind, result.ref.digest))
            results.append(result)
        return results
