"""Threads that build matchers and compute masks, beside the forward passes."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

STACK_BYTES = 64 << 20
"""Stack of a thread. The front's check of a grammar has a smaller one, so that no grammar which it
has accepted needs more than there is here."""

Job = Callable[[], None]

log = logging.getLogger(__name__)


class Workers:
    """A few threads, started with the first job. Without threads, jobs run at once in `run`."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._started = False
        self._ended = threading.Condition()

    def run(self, job: Job) -> None:
        """Runs a job, which must not raise, in one of the threads."""
        if not self._threads:
            job()
            return
        if not self._started:
            self._started = True
            self._start()
        self._jobs.put(job)

    def wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Waits until `holds()`, which may change whenever a job ends, or until time is up.

        Returns the last `holds()`. For one thread only, which starts the jobs.
        """
        with self._ended:
            return self._ended.wait_for(holds, seconds)

    def _start(self) -> None:
        before = threading.stack_size(STACK_BYTES)
        try:
            for at in range(self._threads):
                name = f"structure {at}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        while True:
            self._jobs.get()()
            with self._ended:
                self._ended.notify_all()
