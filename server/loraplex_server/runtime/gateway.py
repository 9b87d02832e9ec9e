"""The gateway beside the server: a process of its own, started, watched and stopped by the server.

It is a client of the server, over a Unix socket in a directory that is the server's alone. If it
ends, its connections are lost and it is started again; the server goes on.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from loraplex_server.access.settings import gateway_address, is_loopback
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit
from loraplex_server.rpc.server import Address, RpcServer
from loraplex_server.runtime.failures import StartFailure, needed
from loraplex_server.runtime.watched import WatchedTask
from loraplex_server.training import launch as launcher

PACKAGES: Final = ("loraplex_gateway", "starlette", "uvicorn", "httptools", "msgspec")
METRICS_VARIABLE: Final = "LORAPLEX_GATEWAY_METRICS"
"""Variable of the gateway with the URL of the server's metrics; "" keeps them away from HTTP."""
START_SECONDS: Final = 60.0
"""Seconds that the process may take to listen."""
STOP_SECONDS: Final = 4.0
"""Seconds that the process has to end after SIGTERM."""
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Bounds of the pause before another start, which doubles with each that follows soon."""
SETTLED_SECONDS: Final = 60.0
"""Seconds after which a process that ends is not counted as failing at its start."""

_READY: Final = b"ready: http "
_NO_NICENESS: Final = "0"

log = logging.getLogger(__name__)


class GatewayProcess:
    """The process, if the settings ask for it. It ends with the server, also if that is killed.

    Attributes:
        address: HOST:PORT of HTTP, once it has been started.
    """

    def __init__(self) -> None:
        self.address = ""
        self._command: list[str] = []
        self._folder: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._watch: WatchedTask | None = None
        self._complaint = ""

    def __str__(self) -> str:
        """Where it listens, as a part of the line that tells that the server is ready."""
        return f" http {self.address}" if self.address else ""

    async def start(self, config: Config, rpc: RpcServer, admin: Address) -> None:
        """Returns once HTTP is answered, or at once if no gateway is wanted. Raises StartFailure.

        The server listens for it at a socket of its own from now on.
        """
        if not config.gateway:
            return
        for package in PACKAGES:
            if importlib.util.find_spec(package) is None:
                text = f"gateway needs the package {package}: install loraplex[gateway]"
                raise StartFailure(ServerExit.BAD_CONFIG, text)
        with needed(ServerExit.BAD_CONFIG, "cannot make the gateway's socket"):
            self._folder = Path(tempfile.mkdtemp(prefix="loraplex-"))  # nobody else may enter it
            target = f"unix:{self._folder / 'grpc.sock'}"
            rpc.bind_socket(target)
        self._command = command_of(config, target, admin)
        try:
            async with asyncio.timeout(START_SECONDS):
                self.address = await self._launch()
        except TimeoutError:
            self._complaint = f"it is not ready after {START_SECONDS:g} s"
        if not self.address:
            code = await self._end(0.0)
            in_use = code == ServerExit.PORT_IN_USE
            text = self._complaint or f"it ended with exit code {code}"
            failure = ServerExit.PORT_IN_USE if in_use else ServerExit.BAD_CONFIG
            raise StartFailure(failure, f"the gateway does not start: {text}")
        # A port that was free is kept for later starts.
        self._command[self._command.index("--port") + 1] = self.address.rpartition(":")[2]
        self._watch = WatchedTask(self._keep(), "gateway")

    async def stop(self) -> None:
        """Ends the process, which answers running requests before. Idempotent."""
        if self._watch is not None:
            await self._watch.stop()
        await self._end(STOP_SECONDS)
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _launch(self) -> str:
        """Starts the process; returns where it listens, "" if it has ended."""
        start = [sys.executable, "-I", "-S", launcher.__file__]  # standard library only
        self._complaint = ""
        self._process = process = await asyncio.create_subprocess_exec(
            *(*start, str(os.getpid()), _NO_NICENESS, *self._command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the server, which stops the gateway
        )
        assert process.stdout is not None
        assert process.stderr is not None
        self._reading = asyncio.create_task(self._pass_on(process.stderr))
        line = await process.stdout.readline()
        if line.startswith(_READY):
            return line.removeprefix(_READY).decode("ascii", "replace").strip()
        await process.wait()
        await self._reading
        return ""

    async def _keep(self) -> None:
        """Starts the process again whenever it ends."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            code = await self._wait()
            if time.monotonic() - began >= SETTLED_SECONDS:
                pause = FIRST_PAUSE
            log.error("the gateway ended (%d); it is started again in %g s", code, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if await self._launch():
                log.info("the gateway is back at %s", self.address)

    async def _wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    async def _end(self, patience: float) -> int:
        """Sends SIGTERM, and SIGKILL after `patience` seconds; returns the exit code."""
        if self._process is None:
            return 0
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM if patience else signal.SIGKILL)
        try:
            return await asyncio.wait_for(self._process.wait(), patience or None)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return await self._process.wait()
        finally:
            if self._reading is not None:
                self._reading.cancel()

    async def _pass_on(self, errors: asyncio.StreamReader) -> None:
        """Logs what the process writes to standard error, which names no prompt."""
        while True:
            try:
                line = await errors.readline()
            except ValueError:  # longer than the reader takes; the rest follows
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            if text.startswith("error: "):
                self._complaint = text.removeprefix("error: ")
            log.warning("gateway: %s", text)


def command_of(config: Config, target: str, admin: Address) -> list[str]:
    """The command line of the gateway. What it lacks is read from `LORAPLEX_GATEWAY_*`."""
    host, port = gateway_address(config.gateway)
    command = [sys.executable, "-m", "loraplex_gateway", "--host", host, "--port", str(port)]
    command += ["--target", target, "--drain-seconds", f"{STOP_SECONDS / 2:g}"]
    if config.tls_certificate is not None:
        command += ["--certificate", str(config.tls_certificate)]
        command += ["--private-key", str(config.tls_key)]
    elif config.insecure:
        command += ["--insecure"]
    is_shown = is_loopback(host) or config.public_metrics
    if is_shown and METRICS_VARIABLE not in os.environ:
        local = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - not bound
        where = Address(local.get(admin.host, admin.host), admin.port)
        command += ["--metrics", f"http://{where}/metrics"]
    return command
