"""The settings of an engine process, handed over as one JSON argument."""

from __future__ import annotations

import sys

import msgspec

from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.process.pulse import BEAT_SECONDS
from loraplex_server.engine.runner.config import CustomRunner, RunnerConfig
from loraplex_server.logs import LogFormat


class EngineSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of an engine process."""

    runner: RunnerConfig | CustomRunner
    limits: EngineLimits = EngineLimits()
    beat_seconds: float = BEAT_SECONDS
    """Seconds between two signs of life."""
    log_format: LogFormat = "text"
    """Format of the process's log lines."""

    def command(self) -> list[str]:
        """The command line that starts the engine process with these settings."""
        argument = msgspec.json.encode(self).decode()
        return [sys.executable, "-m", "loraplex_server.engine.process.main", argument]

    @staticmethod
    def parse(argument: str) -> EngineSetup:
        """The settings in a command line's argument. Raises `msgspec.MsgspecError`."""
        return msgspec.json.decode(argument, type=EngineSetup)
