"""`loraplex-server` as a child process: started on free ports, awaited, stopped with SIGTERM."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from loraplex import Client, HealthStatus, LoraplexError

READY = re.compile(r"ready: grpc (\S+) admin (\S+) (?:manage \S+ )?(?:http (\S+) )?")

Progress = Callable[[float, str], None]
"""Called as `progress(seconds since the start, last line of the server's log)` every second."""


class ServerError(Exception):
    """The server did not start or did not stop; the message says what to do."""


def exit_on_sigterm() -> None:
    """Turns SIGTERM into SystemExit, so that a script that is terminated stops its server."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


class Server:
    """A server that runs for the duration of a `with` statement.

    Attributes:
        address: host:port of the gRPC services.
        admin: host:port of /metrics.
        http: host:port of the gateway; "" without the setting `gateway`.
        ready_s: seconds from the start of the process until its health was SERVING.
        exit_code: exit code of the process, after it has been stopped.
    """

    def __init__(
        self,
        settings: Mapping[str, object],
        log: Path,
        progress: Progress | None = None,
        timeout: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` become flags of `loraplex-server serve`, which writes its log to `log`.

        `environment` is added to the variables of this process.
        """
        self._settings = {"port": 0, "admin_port": 0, **settings}
        self._log = log
        self._progress = progress
        self._timeout = timeout
        self._environment = environment or {}
        self._process: subprocess.Popen[str] | None = None
        self.address = ""
        self.admin = ""
        self.http = ""
        self.ready_s = 0.0
        self.exit_code: int | None = None

    def start(self) -> None:
        """Returns when the server is serving. Raises ServerError."""
        command = [str(Path(sys.executable).with_name("loraplex-server")), "serve"]
        for name, value in self._settings.items():
            word = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{word}" if value else f"--no-{word}")
            else:
                command += [f"--{word}", str(value)]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, **self._environment},
                    start_new_session=True,  # Ctrl-C reaches this process, which stops that one
                )
        except OSError as error:
            raise ServerError(
                f"cannot run {command[0]}: {error.strerror}; install the project first (make setup)"
            ) from error
        try:
            self._await_ready(began)
            with Client(self.address) as client:
                while client.health() is not HealthStatus.SERVING:
                    self._check_time(began)
                    time.sleep(0.01)
        except LoraplexError as error:
            self.stop()
            raise ServerError(f"the server is up but does not answer: {error}") from error
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began

    @property
    def pid(self) -> int:
        """Process id of the front process. Raises ServerError if it has not been started."""
        if self._process is None:
            raise ServerError("the server was never started")
        return self._process.pid

    def stop(self, grace: float = 60.0) -> int:
        """Sends SIGTERM, and SIGKILL after `grace` seconds. Returns the exit code. Idempotent."""
        process = self._process
        if process is None:
            raise ServerError("the server was never started")
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self.exit_code = process.returncode
        return process.returncode

    def _log_tail(self) -> list[str]:
        """The last lines of the log."""
        with self._log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            return file.read().decode(errors="replace").splitlines()

    def _await_ready(self, began: float) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        while True:
            readable, _, _ = select.select([process.stdout], [], [], 1.0)
            if not readable:
                self._check_time(began)
                if self._progress is not None:
                    self._progress(time.monotonic() - began, next(reversed(self._log_tail()), ""))
                continue
            line = process.stdout.readline()
            if not line:
                process.wait()
                said = [line for line in self._log_tail() if line.startswith("error: ")]
                why = said[-1].removeprefix("error: ") if said else "it named no error"
                code = process.returncode
                raise ServerError(f"the server ended with exit code {code}: {why} ({self._log})")
            match = READY.match(line)
            if match:
                self.address, self.admin, http = match.groups()
                self.http = http or ""
                return

    def _check_time(self, began: float) -> None:
        if time.monotonic() - began > self._timeout:
            raise ServerError(
                f"the server was not ready within {self._timeout:.0f} s; see its log: {self._log}"
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
