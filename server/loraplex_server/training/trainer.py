"""How the trainer is called: its configuration, its command lines, and what it says beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_training.spec import parse as options
from loraplex_training.spec.fields import located

from loraplex_server.training import failure as verdict
from loraplex_server.training import memory
from loraplex_server.training.child import Child
from loraplex_server.training.jobs import Job, Order

CONFIG: Final = "job.toml"
DATA: Final = "data.jsonl"
EVAL_DATA: Final = "eval.jsonl"
LOG: Final = "trainer.log"
PLAN_LOG: Final = "plan.log"
RUN: Final = "run"

PLAN_SECONDS: Final = 300.0
STOP_SECONDS: Final = 20.0
"""How long a trainer that is cancelled may take to save before it is killed."""

log = logging.getLogger(__name__)


class Plan(msgspec.Struct, frozen=True):
    """What `plan --json` says of a run: memory in bytes, and what the device has free.

    `available_bytes` is None where the device is the CPU.
    """

    bytes: int
    device: str = "cpu"
    available_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Trainer:
    """The trainer's program and the settings that are the operator's.

    Attributes:
        program: what is run; `run`, `resume` or `plan` and their arguments are added.
        run: keys of a run in the trainer's configuration: model, device and so on.
        memory: bytes that it may take; 0 is what is free.
        threads: of its arithmetic.
        timeout: seconds that a job may run; 0 is for ever.
        patience: seconds that it may take to save when it is stopped.
    """

    program: Sequence[str]
    run: Mapping[str, str]
    memory: int = 0
    threads: int = 1
    timeout: float = 0.0
    patience: float = STOP_SECONDS

    def configuration(self, order: Order, folder: Path, with_eval_data: bool) -> str:
        """The TOML for one job in `folder`. Raises Refusal(FIELD_INVALID) with all problems."""
        flags = {
            **self.run,
            "threads": str(self.threads),
            "out": str(folder / RUN),
            "data": str(folder / DATA),
            **{name: str(value) for name, value in order.settings.items()},
            "name": order.name,
            "method": order.method,
        }
        if with_eval_data:
            flags["eval_data"] = str(folder / EVAL_DATA)
        try:
            return options.to_toml(options.read(flags, order.options))
        except Refusal as error:
            raise _refusal(error.reason, [located(p) for p in error.problems]) from error

    async def plan(self, folder: Path) -> Plan:
        """What the job in `folder` would take. The trainer reads its options and its data for that.

        Raises Refusal: FIELD_INVALID with all problems that it found, ENGINE_FAULT where it broke.
        """
        command = [*self.program, "plan", "--config", str(folder / CONFIG), "--json"]
        try:
            child = await self.start(command, folder / PLAN_LOG)
        except OSError as error:
            log.error("the trainer cannot be started: %s", error)
            raise Refusal(Reason.ENGINE_FAULT, "the trainer cannot be started") from error
        said: list[bytes] = []
        try:
            async with asyncio.timeout(PLAN_SECONDS):
                async for line in child.lines():
                    said.append(line)
                    del said[:-10]
                status = await child.wait()
        except TimeoutError:
            text = f"the trainer's plan was not ready after {PLAN_SECONDS:g} s"
            raise Refusal(Reason.DEADLINE_EXCEEDED, text) from None
        finally:
            child.kill()
        for line in reversed(said if status == 0 else ()):
            with contextlib.suppress(msgspec.DecodeError):
                return msgspec.json.decode(line, type=Plan)
        raise await asyncio.to_thread(_of_plan, status, folder / PLAN_LOG)

    def require(self, plan: Plan, held: int) -> None:
        """Raises Refusal(TRAINING_MEMORY) where there is no room for it.

        `held` bytes are those of a trainer that runs now and will be gone when its turn comes.
        """
        free = plan.available_bytes if plan.device != "cpu" else memory.available()
        memory.check(plan.bytes, None if free is None else free + held, self.memory)

    def require_memory(self, job: Job) -> None:
        """The same for a job whose turn has come, as far as can be told here."""
        if self.run.get("device") == "cpu":
            memory.check(job.estimated_bytes, memory.available(), self.memory)

    def command(self, job: Job, folder: Path) -> list[str]:
        """What trains it: from its last checkpoint if there is one, else from the beginning."""
        run = folder / RUN
        if run.exists():
            if resumable(run):
                return [*self.program, "resume", str(run), "--events", "-"]
            shutil.rmtree(run)
        return [*self.program, "run", "--config", str(folder / CONFIG), "--events", "-"]

    async def start(self, command: Sequence[str], log: Path) -> Child:
        """Starts it; what it complains of is added to `log`. Raises OSError."""
        return await Child.start(command, log, {"OMP_NUM_THREADS": str(self.threads)})


def resumable(run: Path) -> bool:
    """Whether a run's folder has a checkpoint."""
    with contextlib.suppress(FileNotFoundError):
        return any(not entry.name.startswith(".") for entry in (run / "checkpoints").iterdir())
    return False


def _of_plan(status: int, complaints: Path) -> Refusal:
    """Why there is no plan."""
    reason, problems = verdict.complaints(complaints)
    if reason in _FIELDS:
        return _refusal(reason, problems)
    if reason == "OUT_OF_MEMORY" or status == -signal.SIGKILL:
        return Refusal(Reason.TRAINING_MEMORY, "the memory ran out while the job was examined")
    log.error("plan ended with %d: %s", status, "; ".join(verdict.tail(complaints)[-3:]))
    return Refusal(Reason.ENGINE_FAULT, "the trainer's plan failed")


_FIELDS: Final = {"CONFIG_INVALID": "spec", "METHOD_INVALID": "spec.method", "DATA_INVALID": "data"}
"""The part of a request that is at fault."""


def _refusal(reason: str, problems: Sequence[str]) -> Refusal:
    found = tuple(verdict.without_paths(problem) for problem in problems) or ("it is not valid",)
    field = _FIELDS.get(reason, "spec")
    return Refusal(Reason.FIELD_INVALID, found[0], problems=[Problem(field, f) for f in found])
