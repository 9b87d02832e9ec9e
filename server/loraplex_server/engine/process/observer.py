"""The events of the engine that the front observes."""

from __future__ import annotations

from typing import Protocol

from loraplex_server.engine.messages import Fatal, Hello, LoadDone, MergeDone, StepReport
from loraplex_server.engine.process.supervisor import Cause
from loraplex_server.engine.process.suspects import LossReport


class EngineObserver(Protocol):
    """Receives the engine's events. Called on the loop; must be quick and must not raise."""

    def on_step(self, done: StepReport) -> None:
        """A step ended; its outputs are in their streams."""

    def on_load(self, done: LoadDone) -> None:
        """An adapter load ended."""

    def on_merge(self, done: MergeDone) -> None:
        """A merge or an unmerge of an adapter ended or failed."""

    def on_restart(self) -> None:
        """The engine process was lost and its requests have failed; a new one will be started."""

    def on_death(self, cause: Cause, report: LossReport) -> None:
        """The lost process has ended, or a new one failed to start. `report` has the suspects."""

    def on_ready(self, hello: Hello) -> None:
        """The engine is ready, for the first time or again."""

    def on_fatal(self, fatal: Fatal) -> None:
        """A new process could not start; another attempt follows."""
