"""One job from its turn to its end: the trainer's process, what it tells, and the hand-over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from pathlib import Path
from typing import Final, Protocol

from loraplex_model.base.refusal import Reason, Refusal
from loraplex_training.report import lines as event_lines
from loraplex_training.report.events import JobState, Saved

from loraplex_server.training import failure as verdict
from loraplex_server.training.child import Child
from loraplex_server.training.jobs import Error, Job, Order, Result, State
from loraplex_server.training.progress import Course
from loraplex_server.training.trainer import LOG, Trainer

_SILENCE_SECONDS: Final = 5.0
"""After so long without a line, the output of a trainer that has ended is given up: another process
may hold its pipe."""

_KEEP_SECONDS: Final = 5.0
"""The least time between two writes of a job's progress to the disk."""

log = logging.getLogger(__name__)


class Halt(Enum):
    """Why a job is stopped before its end."""

    CANCELLED = auto()
    SHUTDOWN = auto()


class Destination(Protocol):
    """Where adapters go."""

    async def check(self, order: Order) -> None:
        """Raises Refusal where the order's names would not be free."""

    async def deliver(self, folder: Path, order: Order) -> Result:
        """Registers the adapter in `folder`. Raises Refusal."""


class Runner:
    """Runs one job. `update` is told of every state of it; with True it is to be kept on disk."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        trainer: Trainer,
        destination: Destination,
        update: Callable[[Job, bool], Awaitable[None]],
    ) -> None:
        self.job = job
        self._folder = folder
        self._trainer = trainer
        self._destination = destination
        self._update = update
        self._child: Child | None = None
        self._halt: Halt | None = None
        self._lines = 0
        self.tokens = 0

    async def run(self) -> Job:
        """The job as it ended, or INTERRUPTED. Runs once."""
        begun = self.job.started or time.time()
        await self._be(self.job.change(state=State.RUNNING, started=begun), keep=True)
        try:
            if not self.job.made:
                await self._train()
            if self._halt is Halt.CANCELLED:
                return self._ended(State.CANCELLED)
            result = await self._destination.deliver(self._folder / self.job.made, self.job.order)
            return self._ended(State.SUCCEEDED, result=result)
        except _Stopped as stopped:
            return stopped.job
        except Refusal as refusal:
            problem = Error(refusal.reason, refusal.message)
            return self._ended(State.FAILED, error=problem)

    async def halt(self, why: Halt, patience: float) -> None:
        """Ends the trainer: it may save for `patience` seconds. Returns when it has ended."""
        if self._halt is not Halt.CANCELLED:
            self._halt = why
        if self._child is not None:
            await self._child.stop(patience)

    async def _train(self) -> None:
        """Until the adapter is made. Raises _Stopped with the job where there is none."""
        self._trainer.require_memory(self.job)
        course = Course(self.job.progress)
        status, late = await self._supervise(course)
        self.tokens = course.tokens
        if self._halt is Halt.CANCELLED:
            raise _Stopped(self._ended(State.CANCELLED))
        made = self._made(course) if status == 0 else None
        if made is None and self._halt is Halt.SHUTDOWN:
            raise _Stopped(self.job.change(state=State.INTERRUPTED))
        if made is None:
            error = verdict.of(status, course, self._folder / LOG)
            if late:
                text = f"it ran for more than {self._trainer.timeout:g} s and was stopped"
                error = Error("TIMEOUT", text, error.log)
            raise _Stopped(self._ended(State.FAILED, error=error))
        ending = verdict.without_paths(course.ended.reason) if course.ended else ""
        job = self.job.change(made=str(made), ending=ending, peak_bytes=course.peak_bytes)
        await self._be(job, keep=True)

    async def _supervise(self, course: Course) -> tuple[int, bool]:
        """Runs the process; its exit status, and whether it was stopped for taking too long."""
        if self._halt is not None:
            return -1, False
        command = await asyncio.to_thread(self._trainer.command, self.job, self._folder)
        try:
            child = await self._trainer.start(command, self._folder / LOG)
        except OSError as error:
            log.error("the trainer cannot be started: %s", error)
            raise Refusal(Reason.TRAINER_CRASHED, "the trainer cannot be started") from error
        following = asyncio.create_task(self._follow(child, course))
        self._child = child
        late = False
        try:
            if self._halt is not None:  # it came while the process was being started
                await child.stop(0.0)
            try:
                async with asyncio.timeout(self._trainer.timeout or None):
                    status = await child.wait()
            except TimeoutError:
                late = True
                status = await child.stop(self._trainer.patience)
            lines = -1
            while not following.done() and lines != self._lines:
                lines = self._lines
                await asyncio.wait({following}, timeout=_SILENCE_SECONDS)
            return status, late
        finally:
            child.kill()
            following.cancel()
            self._child = None

    async def _follow(self, child: Child, course: Course) -> None:
        kept = 0.0
        async for line in child.lines():
            self._lines += 1
            try:
                event = event_lines.decode(line)
            except (ValueError, TypeError):
                log.debug("training job %s: no event: %.200r", self.job.id, line)
                continue
            course.feed(event)
            job = self.job.change(
                progress=course.progress,
                estimated_bytes=course.estimated_bytes or self.job.estimated_bytes,
            )
            now = time.monotonic()
            keep = isinstance(event, Saved) and now - kept >= _KEEP_SECONDS
            if keep:
                kept = now
            await self._be(job, keep)

    def _made(self, course: Course) -> Path | None:
        """Where the adapter is, relative to the job's folder; None if none was made."""
        good = course.ended is None or course.ended.state in {
            JobState.FINISHED,
            JobState.STOPPED_EARLY,
        }
        if course.published is None or not good:
            return None
        try:
            return course.published.path.absolute().relative_to(self._folder)
        except ValueError:
            log.error("training job %s: its adapter is elsewhere", self.job.id)
            return None

    def _ended(self, state: State, **fields: object) -> Job:
        return self.job.change(state=state, ended=time.time(), **fields)

    async def _be(self, job: Job, keep: bool) -> None:
        self.job = job
        await self._update(job, keep)


class _Stopped(Exception):
    """The job ends here, as it is."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.state.value)
        self.job = job
