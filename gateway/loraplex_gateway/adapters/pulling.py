"""Fetches adapters by `loraplex pull`, a process that ends when the adapter is there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from loraplex.sources import AdapterAddress, AllowList

from loraplex_gateway.errors import ApiError
from loraplex_gateway.settings import GatewaySettings

MOST_AT_ONCE: Final = 2
"""Most processes that fetch at the same time; further requests wait for one of them."""

_NAME: Final = "adapter"
_SHOWN: Final = 500
_REFUSED: Final = 6
"""Exit status of `loraplex pull` for an adapter that cannot be fetched."""


class Puller:
    """Fetches into a temporary folder, with the credentials of the gateway's environment."""

    def __init__(self, settings: GatewaySettings, allowed: AllowList) -> None:
        self._settings = settings
        self._allowed = allowed
        self._places = asyncio.Semaphore(MOST_AT_ONCE)

    @asynccontextmanager
    async def pulled(self, address: AdapterAddress) -> AsyncIterator[Path]:
        """The folder with the adapter's files, which is removed at the end.

        Raises ApiError: 400 if the adapter cannot be fetched, 504 if it takes too long.
        """
        async with self._places:
            with TemporaryDirectory(prefix="loraplex-pull-", ignore_cleanup_errors=True) as place:
                await self._run(address, place)
                yield Path(place, _NAME)

    async def _run(self, address: AdapterAddress, place: str) -> None:
        command = [sys.executable, "-m", "loraplex", "pull", str(address), "--into", place]
        command += ["--name", _NAME, "--max-bytes", str(self._settings.max_upload_bytes)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env=_environment(self._allowed),
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._settings.pull_seconds):
                _, said = await process.communicate()
        except TimeoutError:
            text = f"{address} was not fetched within {self._settings.pull_seconds:g} s"
            raise ApiError(504, text, should_retry=False) from None
        finally:
            await _end(process)
        if process.returncode:
            line = said.decode("utf-8", "replace").strip().rpartition("\n")[2][:_SHOWN]
            text = line.removeprefix("loraplex: ") if process.returncode == _REFUSED else ""
            raise ApiError(400, text or f"{address} cannot be fetched", code="source_unreadable")


async def _end(process: Process) -> None:
    """Ends the process and what it started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _environment(allowed: AllowList) -> dict[str, str]:
    """The gateway's environment without its keys, and with the prefixes that are allowed.

    The process checks the prefixes again.
    """
    kept = {name: text for name, text in os.environ.items() if not name.startswith("LORAPLEX_")}
    return {**kept, "LORAPLEX_PULL_ALLOW": str(allowed), "HF_HUB_DISABLE_TELEMETRY": "1"}
