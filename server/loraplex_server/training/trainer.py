"""The trainer's program: its configuration, its command lines and its plan of a job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_training.report.events import Failed
from loraplex_training.report.lines import decode
from loraplex_training.spec import parse as options

from loraplex_server.runtime.lanes import Lane, Lanes
from loraplex_server.training import failure, memory
from loraplex_server.training.child import Child
from loraplex_server.training.jobs import JobOrder, JobRecord

CONFIG: Final = "job.toml"
DATA: Final = "data.jsonl"
EVAL_DATA: Final = "eval.jsonl"
LOG: Final = "trainer.log"
PLAN_LOG: Final = "plan.log"
RUN: Final = "run"

INPUT_REASONS: Final = frozenset(
    {Reason.CONFIG_INVALID, Reason.METHOD_INVALID, Reason.DATA_INVALID}
)
"""The trainer's reasons for which a job's request is at fault."""

MAX_CHECKPOINTS: Final = 8
"""Most adapters of a job that are registered while it runs and kept."""

PLAN_SECONDS: Final = 300.0
STOP_SECONDS: Final = 20.0
"""Seconds that a trainer may take to save when it is stopped, before it is killed."""
_PLAN_LINES: Final = 10
"""Number of the last lines of output in which the plan is looked for."""

log = logging.getLogger(__name__)


class TrainerPlan(msgspec.Struct, frozen=True):
    """The memory that a run needs, from `plan --json`.

    Attributes:
        bytes: estimated peak.
        available_bytes: free bytes of the GPU; None if the device is the CPU.
    """

    bytes: int
    device: str = "cpu"
    available_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Trainer:
    """The trainer's program with the settings of the operator.

    Attributes:
        program: command to run, without `run`, `resume` or `plan` and their arguments.
        run: options of the run that the operator fixes (model, device, ...), by the trainer's keys.
        memory: largest number of bytes that a job may need; 0 allows all that are free.
        threads: number of CPU threads.
        environment: variables that the program gets in addition to those of this process.
        timeout: longest duration of a job in seconds; 0 is no limit.
        patience: seconds that a trainer may take to save when it is stopped.
        lane: threads that read and write the files of jobs.
    """

    program: Sequence[str]
    run: Mapping[str, str]
    memory: int = 0
    threads: int = 1
    timeout: float = 0.0
    patience: float = STOP_SECONDS
    lane: Lane = field(default_factory=lambda: Lanes().training)
    environment: Mapping[str, str] = field(default_factory=dict)

    def configuration(self, order: JobOrder, folder: Path, with_eval_data: bool) -> str:
        """Returns the TOML for one job in `folder`.

        Raises Refusal(FIELD_INVALID) with all problems, their fields being the trainer's keys.
        """
        flags = {
            **self.run,
            "threads": str(self.threads),
            "out": str(folder / RUN),
            "data": str(folder / DATA),
            **{name: str(value) for name, value in order.settings.items()},
            "name": order.name,
            "method": order.method,
        }
        if order.checkpoints:
            flags["keep_evaluated"] = str(MAX_CHECKPOINTS)
        if with_eval_data:
            flags["eval_data"] = str(folder / EVAL_DATA)
        try:
            return options.to_toml(options.read(flags, order.options))
        except Refusal as error:
            raise _invalid(error.reason, error.problems) from error

    async def plan(self, folder: Path) -> TrainerPlan:
        """Estimates the memory of the job in `folder`; the trainer checks its options and data.

        Raises Refusal: FIELD_INVALID with all problems, their fields being the trainer's keys;
        TRAINING_MEMORY, DEADLINE_EXCEEDED; ENGINE_FAULT if the trainer failed.
        """
        command = [*self.program, "plan", "--config", str(folder / CONFIG), "--json"]
        try:
            child = await self.start(command, folder / PLAN_LOG)
        except OSError as error:
            log.error("the trainer cannot be started: %s", error)
            raise Refusal(Reason.ENGINE_FAULT, "the trainer cannot be started") from error
        lines: deque[bytes] = deque(maxlen=_PLAN_LINES)
        try:
            async with asyncio.timeout(PLAN_SECONDS):
                async for line in child.lines():
                    lines.append(line)
                status = await child.wait()
        except TimeoutError:
            text = f"the trainer's plan was not ready after {PLAN_SECONDS:g} s"
            raise Refusal(Reason.DEADLINE_EXCEEDED, text) from None
        finally:
            child.kill()
        for line in reversed(lines) if status == 0 else ():
            with contextlib.suppress(msgspec.DecodeError):
                return msgspec.json.decode(line, type=TrainerPlan)
        raise await self.lane.run(_plan_refusal, lines, status, folder / PLAN_LOG)

    def require(self, plan: TrainerPlan, held: int) -> None:
        """Raises Refusal(TRAINING_MEMORY) if there is not enough memory for the planned job.

        `held` bytes belong to the trainer that runs now; it will have ended before the job starts.
        """
        free = plan.available_bytes if plan.device != "cpu" else memory.available()
        memory.check(plan.bytes, None if free is None else free + held, self.memory)

    def require_memory(self, job: JobRecord) -> None:
        """Checks the memory again for a job that is about to start, if it runs on the CPU.

        Raises Refusal(TRAINING_MEMORY).
        """
        if self.run.get("device") == "cpu":
            memory.check(job.estimated_bytes, memory.available(), self.memory)

    def command(self, job: JobRecord, folder: Path) -> list[str]:
        """Returns the command that trains a job, from its last checkpoint if there is one."""
        run = folder / RUN
        if run.exists():
            if resumable(run):
                return [*self.program, "resume", str(run), "--events", "-"]
            shutil.rmtree(run)
        return [*self.program, "run", "--config", str(folder / CONFIG), "--events", "-"]

    def begins(self, command: Sequence[str]) -> bool:
        """Returns whether a command of `command` begins a job instead of continuing it."""
        return command[len(self.program)] == "run"

    async def start(self, command: Sequence[str], log: Path) -> Child:
        """Starts a command; its standard error is appended to `log`. Raises OSError."""
        variables = {**self.environment, "OMP_NUM_THREADS": str(self.threads)}
        return await Child.start(command, log, variables)


def resumable(run: Path) -> bool:
    """Returns whether a run's directory has a checkpoint."""
    with contextlib.suppress(FileNotFoundError):
        return any(not entry.name.startswith(".") for entry in (run / "checkpoints").iterdir())
    return False


def _plan_refusal(lines: Iterable[bytes], status: int, log_file: Path) -> Refusal:
    """Returns the refusal for a `plan` that ended with `status` and without a plan."""
    out_of_memory = status == -signal.SIGKILL
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(failed := decode(line), Failed):
                if failed.reason in INPUT_REASONS:
                    return _invalid(failed.reason, failed.problems)
                out_of_memory |= failed.reason is Reason.OUT_OF_MEMORY
    if out_of_memory:
        text = "the memory ran out while the trainer examined the job"
        return Refusal(Reason.TRAINING_MEMORY, text)
    log.error("plan ended with %d: %s", status, "; ".join(failure.tail(log_file)[-3:]))
    return Refusal(Reason.ENGINE_FAULT, "the trainer's plan failed")


def _invalid(reason: Reason, problems: Sequence[Problem]) -> Refusal:
    """Returns FIELD_INVALID with the trainer's problems, each with the trainer's own reason."""
    found = [
        Problem(p.field, failure.without_paths(p.message)[: failure.MAX_LINE], reason)
        for p in problems
    ]
    return Refusal(Reason.FIELD_INVALID, found[0].message, problems=found)
