"""The check of forms as the front uses it: replaceable processes, and what they have found."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec
from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_server.forms.form import CheckedForm, StructureForm
from loraplex_server.forms.process import framed
from loraplex_server.series import Series

PROCESSES: Final = 2
"""Processes that check at once. They are started when they are needed."""
MOST_WAITING: Final = 128
"""Forms that may wait for a process; more are refused as overload."""
MOST_KEPT: Final = 1024
KEPT_BYTES: Final = 16 << 20
"""Checks that are remembered, in number and by the size of their grammars."""
START_SECONDS: Final = 60.0
"""Seconds that a process may take until it has read the tokenizer."""
LATE_SECONDS: Final = 60.0
"""Seconds for which a form that took too long is refused at once."""

log = logging.getLogger(__name__)

_TOO_LONG: Final = "takes too long to compile; simplify it"
_TOO_MUCH: Final = "takes too much memory to compile; simplify it"


class FormChecker:
    """Checks forms in processes of their own. For one event loop."""

    def __init__(self, command: Sequence[str], seconds: float, series: Series) -> None:
        """`command` starts a process (`CheckSetup`); a check takes at most `seconds`."""
        self._free: asyncio.Queue[_CheckProcess] = asyncio.Queue()
        self._all = [_CheckProcess(command) for _ in range(PROCESSES)]
        for process in self._all:
            self._free.put_nowait(process)
        self._seconds = seconds
        self._series = series
        self._running: dict[bytes, asyncio.Task[CheckedForm]] = {}
        self._kept: OrderedDict[bytes, tuple[CheckedForm, float]] = OrderedDict()
        self._kept_bytes = 0

    async def grammar(self, form: StructureForm, field: str) -> str:
        """The grammar of a form. Raises Refusal, which names `field` if the form is at fault."""
        checked = await self._check(form)
        self._series.structure_checks.labels("refused" if checked.problem else "accepted").inc()
        if checked.problem:
            problem = Problem(field, checked.problem)
            text = f"{field}: {checked.problem}"
            raise Refusal(Reason.STRUCTURE_INVALID, text, problems=[problem])
        return checked.grammar

    async def close(self) -> None:
        """Ends the processes. Checks that run are refused."""
        for process in self._all:
            await process.kill()

    async def _check(self, form: StructureForm) -> CheckedForm:
        digest = form.digest
        if (found := self._find(digest)) is not None:
            return found
        task = self._running.get(digest)
        if task is None:
            if len(self._running) >= PROCESSES + MOST_WAITING:
                text = "too many requests wait for the check of their structure; try again later"
                raise Refusal(Reason.OVERLOADED, text)
            task = asyncio.create_task(self._compute(form, digest), name="check of a form")
            task.add_done_callback(lambda _: self._running.pop(digest, None))
            self._running[digest] = task
        # A caller that leaves does not disturb the process, nor others with the same form.
        return await asyncio.shield(task)

    async def _compute(self, form: StructureForm, digest: bytes) -> CheckedForm:
        process = await self._free.get()
        begun, until = time.monotonic(), float("inf")
        try:
            await process.ensure()
            begun = time.monotonic()
            checked = await process.check(form, self._seconds)
        except TimeoutError:
            log.warning("the check of a structure took too long; its process is replaced")
            checked, until = CheckedForm(problem=_TOO_LONG), time.monotonic() + LATE_SECONDS
        except _ProcessEnded:
            log.warning("the check of a structure ended its process, which is replaced")
            checked = CheckedForm(problem=_TOO_MUCH)
        finally:
            self._free.put_nowait(process)
        self._series.structure_check_seconds.observe(time.monotonic() - begun)
        self._keep(digest, checked, until)
        return checked

    def _find(self, digest: bytes) -> CheckedForm | None:
        found = self._kept.get(digest)
        if found is None:
            return None
        if found[1] < time.monotonic():
            self._drop(digest)
            return None
        self._kept.move_to_end(digest)
        return found[0]

    def _keep(self, digest: bytes, checked: CheckedForm, until: float) -> None:
        self._kept[digest] = checked, until
        self._kept_bytes += len(checked.grammar)
        while len(self._kept) > MOST_KEPT or self._kept_bytes > KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, digest: bytes) -> None:
        checked, _ = self._kept.pop(digest)
        self._kept_bytes -= len(checked.grammar)


class _ProcessEnded(Exception):
    """The process has ended during a check."""


class _CheckProcess:
    """One process, or none: it is started by `ensure`, and killed when a check fails."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    async def ensure(self) -> None:
        """Starts the process, if there is none. Raises Refusal(ENGINE_FAULT) if it does not start.

        A process of which it is not known why it has not started says so in its standard error.
        """
        if self._process is not None and self._process.returncode is None:
            return
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C in the terminal is for the server
            )
            await self._answer(START_SECONDS)
        except (OSError, TimeoutError, _ProcessEnded):
            await self.kill()
            log.error("the process that checks structures does not start")
            text = "structured output is not available; see the server's log"
            raise Refusal(Reason.ENGINE_FAULT, text) from None
        except BaseException:
            await self.kill()
            raise

    async def check(self, form: StructureForm, seconds: float) -> CheckedForm:
        """The check of a form. The process is killed if this raises TimeoutError, _ProcessEnded."""
        assert self._process is not None, "no process was started"
        assert self._process.stdin is not None, "the process has no standard input"
        try:
            self._process.stdin.write(framed(form))
            return await self._answer(seconds)
        except BaseException:
            await self.kill()
            raise

    async def _answer(self, seconds: float) -> CheckedForm:
        assert self._process is not None, "no process was started"
        source = self._process.stdout
        assert source is not None, "the process has no standard output"
        try:
            async with asyncio.timeout(seconds):
                size = int.from_bytes(await source.readexactly(4), "little")
                return msgspec.msgpack.decode(await source.readexactly(size), type=CheckedForm)
        except (EOFError, ConnectionError):
            raise _ProcessEnded from None

    async def kill(self) -> None:
        """Kills the process, if there is one, and waits for its end."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
        if process is not None:
            await process.wait()
