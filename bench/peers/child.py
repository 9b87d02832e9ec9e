"""A compared program as a child process: started, paused between runs, ended as a group."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from peers.face import PeerError


class Child:
    """A process in a session of its own, so that signals reach its children too.

    `close` ends the group, and only that. While the child is paused, no process of the group runs.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Starts `command` with pipes to its input and output. Raises PeerError."""
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("wb") as errors:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                )
        except OSError as error:
            raise PeerError(f"cannot run {command[0]}: {error.strerror}") from error
        self._unread = b""

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def ask(self, message: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """Sends one JSON line and returns the next one. Raises PeerError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self.failed(f"ended: {error}") from error
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line of its output that is a JSON object. Raises PeerError after `seconds`."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                if line.startswith(b'{"peer"'):
                    answer: dict[str, Any] = json.loads(line)["peer"]
                    return answer
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[
                0
            ]:
                raise self.failed(f"did not answer within {seconds:.0f} s")
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                raise self.failed(f"ended with exit code {self.process.wait()}")
            self._unread += read

    def failed(self, why: str) -> PeerError:
        return PeerError(f"the compared program {why}; see its log: {self._log}")

    def close(self, grace: float = 20.0, reads_input: bool = True) -> None:
        """Closes its input, which ends a program that reads it; then SIGTERM, then SIGKILL."""
        process = self.process
        self.resume()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        for sent in (None, signal.SIGTERM, signal.SIGKILL)[0 if reads_input else 1 :]:
            if sent is not None:
                self._signal(sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
                break
        self._signal(signal.SIGKILL)  # children that outlived it

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
