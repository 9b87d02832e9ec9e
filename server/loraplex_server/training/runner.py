"""Runs one job to its end: the trainer's process, its events, and delivering the adapter."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from loraplex_adapters.store import Record
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_training.report.events import Exported, JobStatus, RunStarted, Saved
from loraplex_training.report.lines import decode

from loraplex_server.access.principals import Principal
from loraplex_server.training import failure
from loraplex_server.training.child import Child
from loraplex_server.training.history.events import JobEventRecord
from loraplex_server.training.history.history import JobHistory
from loraplex_server.training.history.recording import TrainerNotes
from loraplex_server.training.jobs import (
    CheckpointRecord,
    FailureRecord,
    JobOrder,
    JobOwner,
    JobRecord,
    ResultRecord,
    State,
)
from loraplex_server.training.progress import RunProgress
from loraplex_server.training.trainer import LOG, MAX_CHECKPOINTS, Trainer

_SILENCE_SECONDS: Final = 5.0
"""Seconds without a line after which the output of a trainer that has ended is no longer read.
Another process may hold its pipe open."""

_KEEP_SECONDS: Final = 5.0
"""Shortest time between two writes of a job's progress to the disk."""

log = logging.getLogger(__name__)


class Halt(Enum):
    """Reason to stop a job before its end."""

    CANCELLED = auto()
    SHUTDOWN = auto()


class Destination(Protocol):
    """Receives trained adapters."""

    async def check(self, order: JobOrder, principal: Principal) -> None:
        """Raises Refusal if a name of the order is taken, or is not for the principal."""

    async def deliver(self, folder: Path, order: JobOrder, owner: JobOwner) -> ResultRecord:
        """Registers the adapter in `folder`. Raises Refusal."""

    async def keep(
        self, folder: Path, order: JobOrder, owner: JobOwner, step: int, again: bool
    ) -> Record:
        """Registers the adapter as it is after `step`. Raises Refusal.

        `again` says that the job has registered that step before.
        """

    async def drop(self, checkpoint: CheckpointRecord, owner: JobOwner) -> None:
        """Deletes an adapter that `keep` registered. Raises Refusal."""


class Runner:
    """Runs one job. `update` receives each of its states, and whether to write it to the disk.

    What the trainer reports is recorded in `history`.
    """

    def __init__(
        self,
        job: JobRecord,
        folder: Path,
        trainer: Trainer,
        destination: Destination,
        update: Callable[[JobRecord, bool], Awaitable[None]],
        history: JobHistory,
    ) -> None:
        self.job = job
        self._folder = folder
        self._trainer = trainer
        self._destination = destination
        self._update = update
        self._history = history
        self._registering = False
        self._child: Child | None = None
        self._halt: Halt | None = None
        self._lines = 0
        self.tokens = 0

    async def run(self) -> JobRecord:
        """Returns the job once it has ended or is INTERRUPTED. Runs once."""
        begun = self.job.started or time.time()
        await self._change(self.job.change(state=State.RUNNING, started=begun), keep=True)
        try:
            if not self.job.made and (stopped := await self._train()) is not None:
                return stopped
            if self._halt is Halt.CANCELLED:
                return self._ended(State.CANCELLED)
            made, job = self._folder / self.job.made, self.job
            result = await self._destination.deliver(made, job.order, job.owner)
            return self._ended(State.SUCCEEDED, result=result)
        except Refusal as refusal:
            error = FailureRecord(refusal.reason, refusal.message)
            return self._ended(State.FAILED, error=error)

    async def halt(self, why: Halt, patience: float) -> None:
        """Stops the trainer, which may save for `patience` seconds, and waits for its end."""
        if self._halt is not Halt.CANCELLED:
            self._halt = why
        if self._child is not None:
            await self._child.stop(patience)

    async def _train(self) -> JobRecord | None:
        """Runs the trainer. Returns None once the adapter is made, else the job as it stopped."""
        self._trainer.require_memory(self.job)
        progress = RunProgress(self.job.progress, self.job.trained_tokens)
        status, late = await self._supervise(progress)
        self.tokens = progress.tokens
        if self._halt is Halt.CANCELLED:
            return self._ended(State.CANCELLED)
        made = self._made(progress) if status == 0 else None
        if made is None and self._halt is Halt.SHUTDOWN:
            return self.job.change(state=State.INTERRUPTED)
        if made is None:
            error = failure.of(status, progress, self._folder / LOG)
            if late:
                text = f"the job ran for more than {self._trainer.timeout:g} s and was stopped"
                error = FailureRecord(Reason.TIMEOUT, text, error.log)
            return self._ended(State.FAILED, error=error)
        ending = failure.without_paths(progress.ended.reason) if progress.ended else ""
        job = self.job.change(made=str(made), ending=ending, peak_bytes=progress.peak_bytes)
        await self._change(job, keep=True)
        return None

    async def _supervise(self, progress: RunProgress) -> tuple[int, bool]:
        """Runs the process; returns its exit status and whether it exceeded the time limit."""
        if self._halt is not None:
            return -1, False
        command = await self._trainer.lane.run(self._trainer.command, self.job, self._folder)
        if self._trainer.begins(command):
            await self._history.rewind(-1)
        try:
            child = await self._trainer.start(command, self._folder / LOG)
        except OSError as error:
            log.error("the trainer cannot be started: %s", error)
            raise Refusal(Reason.TRAINER_CRASHED, "the trainer cannot be started") from error
        following = asyncio.create_task(self._follow(child, progress))
        following.add_done_callback(partial(_on_followed, child))
        self._child = child
        late = False
        try:
            if self._halt is not None:  # set while the process was being started
                await child.stop(0.0)
            try:
                async with asyncio.timeout(self._trainer.timeout or None):
                    status = await child.wait()
            except TimeoutError:
                late = True
                status = await child.stop(self._trainer.patience)
            lines = -1
            while not following.done() and (lines != self._lines or self._registering):
                lines = self._lines
                await asyncio.wait({following}, timeout=_SILENCE_SECONDS)
            if following.done():
                following.result()  # raises what ended the reading
            return status, late
        finally:
            child.kill()
            following.cancel()
            self._child = None

    async def _follow(self, child: Child, progress: RunProgress) -> None:
        kept, notes = 0.0, TrainerNotes()
        async for line in child.lines():
            self._lines += 1
            try:
                event = decode(line)
            except ValueError:
                log.debug("training job %s: not an event: %.200r", self.job.id, line)
                continue
            progress.feed(event)
            job = self.job.change(
                progress=progress.state,
                estimated_bytes=progress.estimated_bytes or self.job.estimated_bytes,
                trained_tokens=progress.trained_tokens,
            )
            now = time.monotonic()
            keep = isinstance(event, Saved) and now - kept >= _KEEP_SECONDS
            if keep:
                kept = now
            await self._change(job, keep)
            if isinstance(event, RunStarted):
                await self._history.rewind(event.step)
            await self._history.add(*notes.take(event, progress))
            if isinstance(event, Exported) and self._halt is None:
                self._registering = True
                try:
                    await self._keep_checkpoint(event, progress)
                finally:
                    self._registering = False
        await self._history.add(*notes.end())

    async def _keep_checkpoint(self, event: Exported, progress: RunProgress) -> None:
        """Registers the adapter of an evaluation; deletes the oldest one beyond those to keep."""
        order, owner, known = self.job.order, self.job.owner, self.job.checkpoints
        made, now = self._below(event.path), progress.state
        if made is None or now is None or not order.checkpoints:
            return
        again = any(each.step == event.step for each in known)
        try:
            folder = self._folder / made
            record = await self._destination.keep(folder, order, owner, event.step, again)
        except Refusal as refusal:
            text = f"the adapter of step {event.step} was not registered: {refusal.message}"
            await self._history.add(JobEventRecord(message=text))
            return
        checkpoint = CheckpointRecord(
            step=event.step,
            name=record.name,
            version=record.version,
            digest=record.digest,
            time=time.time(),
            evaluation=now.evaluation,
            loss=now.loss,
        )
        found = [*(each for each in known if each.step != event.step), checkpoint]
        found.sort(key=lambda each: each.step)
        kept = tuple(found[-MAX_CHECKPOINTS:])
        await self._change(self.job.change(checkpoints=kept), keep=True)
        await self._history.add(JobEventRecord(checkpoint=checkpoint))
        for old in found[:-MAX_CHECKPOINTS]:
            try:
                await self._destination.drop(old, owner)
            except Refusal as refusal:
                log.warning("%s is not deleted: %s", old.name, refusal.message)

    def _made(self, progress: RunProgress) -> Path | None:
        """Returns the adapter's directory relative to the job's; None if none was made."""
        good = progress.ended is None or progress.ended.state in {
            JobStatus.FINISHED,
            JobStatus.STOPPED_EARLY,
        }
        if progress.published is None or not good:
            return None
        return self._below(progress.published.path)

    def _below(self, path: Path) -> Path | None:
        """Returns a path relative to the job's directory; None if it is outside."""
        try:
            return path.absolute().relative_to(self._folder)
        except ValueError:
            log.error("training job %s: its adapter is outside the job's directory", self.job.id)
            return None

    def _ended(self, state: State, **fields: object) -> JobRecord:
        return self.job.change(state=state, ended=time.time(), **fields)

    async def _change(self, job: JobRecord, keep: bool) -> None:
        self.job = job
        await self._update(job, keep)


def _on_followed(child: Child, following: asyncio.Task[None]) -> None:
    """Ends a trainer whose output is no longer read, since its writes would block for ever."""
    if not following.cancelled() and following.exception() is not None:
        child.kill()
