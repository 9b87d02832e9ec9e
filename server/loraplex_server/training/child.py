"""A trainer process: started at low priority, read line by line, and reliably stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from loraplex_server.training import launch as launcher

NICENESS: Final = 19
MAX_LINE: Final = 1 << 20
"""Bytes of a line of output; longer lines are dropped."""

_CHUNK: Final = 1 << 16


class Child:
    """A process in a process group of its own, and its standard output."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> Child:
        """Starts `command`. Its standard error is appended to the file `log`. Raises OSError."""
        launch = [sys.executable, "-I", "-S", launcher.__file__]  # standard library only
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(*launch, str(os.getpid()), str(NICENESS), *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, **environment},
            )
        return cls(process)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yields the lines of standard output until that is closed. For one reader only."""
        stream = self._process.stdout
        assert stream is not None
        rest = b""
        skipping = False
        while chunk := await stream.read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not skipping:
                    yield line
                skipping = False
            if len(rest) > MAX_LINE:
                rest, skipping = b"", True
        if rest and not skipping:
            yield rest

    async def wait(self) -> int:
        """Waits for the end; returns the exit status, or minus the number of a fatal signal."""
        return await self._process.wait()

    async def stop(self, patience: float) -> int:
        """Sends SIGINT, kills the whole group after `patience` seconds, and returns as `wait`."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)
        try:
            return await asyncio.wait_for(self._process.wait(), patience)
        except TimeoutError:
            self.kill()
            return await self._process.wait()

    def kill(self) -> None:
        """Kills the process and everything that it started."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
