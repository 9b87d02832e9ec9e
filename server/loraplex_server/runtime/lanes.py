"""Worker threads for blocking work, separate for each class of work, with bounds on what waits.

If all blocking work shared its threads, 64 examinations of files would delay every look-up of a
name and every long prompt. Here each class of work has a lane of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Final, ParamSpec, TypeAlias, TypeVar

from loraplex_model.base.refusal import Reason, Refusal

P = ParamSpec("P")
T = TypeVar("T")

NICE: Final = 10
"""Added to the niceness of threads whose work delays no tokens (Linux)."""

_SWITCH_SECONDS: Final = 0.001
"""Longest time for which a thread keeps the interpreter's lock while work of a niced lane runs.

By default that is 5 ms, by which examinations in pure Python would delay each of the many short
turns of the event loop. At other times the shorter interval would only cost: it slowed answers by
2 % on two cores.
"""
_DEFAULT_SWITCH_SECONDS: Final = sys.getswitchinterval()

_Task: TypeAlias = "tuple[Future[Any], Callable[[], Any]] | None"


class Lane:
    """A few threads for one class of work, and a bound on the calls that wait for one of them.

    Threads start when they are needed. They do not keep the process alive, so that work which
    blocks for ever, such as a read from a disk that is away, cannot prevent the server's exit.
    """

    def __init__(self, name: str, threads: int, waiting: int, nice: int = 0) -> None:
        self.name = name
        self._most_threads = threads
        self._most = threads + waiting
        self._nice = nice
        self._free = asyncio.Semaphore(threads)
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._taken = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Number of calls whose work runs."""
        return self._running

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a thread."""
        return self._taken - self._running

    _working_niced: ClassVar[int] = 0
    """Number of pieces of work that run in niced lanes of this process."""

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns `work(*args, **kwargs)`, computed in one of the lane's threads.

        Work whose caller is cancelled is dropped if it still waits; once begun, it runs to its end.
        Raises what `work` raises, and Refusal(OVERLOADED) at once if too many calls wait.
        """
        if self._taken >= self._most:
            text = f"too many calls are waiting ({self.name}); try again later"
            raise Refusal(Reason.OVERLOADED, text)
        loop = asyncio.get_running_loop()
        self._taken += 1
        self._idle.clear()
        try:
            await self._free.acquire()
        except BaseException:
            self._leave()
            raise
        self._running += 1
        self._count_niced(1)
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on the work runs, whoever waits for it
        future.add_done_callback(lambda _: _call_soon(loop, self._done))
        self._tasks.put((future, partial(contextvars.copy_context().run, work, *args, **kwargs)))
        if len(self._threads) < min(self._taken, self._most_threads):
            self._start_thread()
        return await asyncio.wrap_future(future)

    async def close(self, patience: float) -> None:
        """Waits at most `patience` seconds for the running work, and ends the idle threads."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._idle.wait()
        for _ in self._threads:
            self._tasks.put(None)
        self._threads = []

    def _done(self) -> None:
        self._running -= 1
        self._count_niced(-1)
        self._free.release()
        self._leave()

    def _leave(self) -> None:
        self._taken -= 1
        if not self._taken:
            self._idle.set()

    def _count_niced(self, change: int) -> None:
        if self._nice:
            Lane._working_niced += change
            busy = Lane._working_niced > 0
            sys.setswitchinterval(_SWITCH_SECONDS if busy else _DEFAULT_SWITCH_SECONDS)

    def _start_thread(self) -> None:
        name = f"{self.name} {len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        _lower_priority(self._nice)
        while (task := self._tasks.get()) is not None:
            future, work = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del task, future, work  # an idle thread keeps nothing alive


class Lanes:
    """The lanes of one server.

    Attributes:
        count: readings of the store's change count, one at a time. A late reading means that the
            index is away, so no other work may delay it.
        index: look-ups and lists.
        known: look-ups of names that were known before a change.
        changes: changes of names, labels and aliases.
        validations: examinations that change nothing, which read whole files.
        registrations: registrations, which read and copy whole files.
        uploads: pieces of uploads, and their states.
        survey: regular counts over the whole store.
        text: tokenising.
        training: files of training jobs; the queue of jobs bounds what waits here.
    """

    def __init__(self) -> None:
        self.count = Lane("reading of the change count", threads=1, waiting=8)
        self.index = Lane("look-up", threads=2, waiting=256)
        self.known = Lane("look-up", threads=1, waiting=512)
        self.changes = Lane("change of names", threads=1, waiting=64)
        self.validations = Lane("validation", threads=1, waiting=64, nice=NICE)
        self.registrations = Lane("registration", threads=2, waiting=64, nice=NICE)
        self.uploads = Lane("receiving", threads=4, waiting=64, nice=NICE)
        self.survey = Lane("survey", threads=1, waiting=8, nice=NICE)
        self.text = Lane("tokenising", threads=2, waiting=320)
        self.training = Lane("work on training jobs", threads=2, waiting=1024, nice=NICE)

    def named(self) -> Mapping[str, Lane]:
        """All lanes by the names of their attributes."""
        return vars(self)

    async def close(self, patience: float) -> None:
        """Closes all lanes; see `Lane.close`."""
        await asyncio.gather(*(lane.close(patience) for lane in self.named().values()))


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Calls back on the loop; not at all if the loop was closed meanwhile."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _lower_priority(nice: int) -> None:
    """Raises this thread's niceness; on Linux only, where niceness belongs to the thread."""
    if nice and sys.platform == "linux":
        thread = threading.get_native_id()
        raised = min(os.getpriority(os.PRIO_PROCESS, thread) + nice, 19)
        os.setpriority(os.PRIO_PROCESS, thread, raised)
