"""What the front uses of its engine, which is one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from loraplex_server.engine.messages import AdapterRef, AdapterStatus, Hello, StepReport, Submit
from loraplex_server.engine.process.client import EngineClient
from loraplex_server.engine.process.observer import EngineObserver
from loraplex_server.engine.process.stream import OutputStream
from loraplex_server.engine.statistics import BatchView


class Engine(Protocol):
    """One engine (`EngineClient`) or several as one (`EngineGroup`); see these for the methods."""

    @property
    def hello(self) -> Hello:
        """What each of the engines reported when it became ready."""

    @property
    def ready(self) -> bool:
        """Whether requests are accepted now."""

    @property
    def pids(self) -> list[int]:
        """Process ids of all engine processes."""

    @property
    def adapters(self) -> Mapping[str, AdapterStatus]:
        """Adapters in the engines, by digest."""

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Adapters that are not given to an engine, by digest, each with the reason."""

    def submit(self, message: Submit) -> OutputStream:
        """Sends a request. Every failure arrives as an output. `abort` must follow in any case."""

    def abort(self, request_id: int) -> None:
        """Ends a request, if it has not ended, and forgets it."""

    def release(self, digest: str) -> None:
        """Allows a quarantined adapter again."""

    async def load(self, ref: AdapterRef) -> None:
        """Makes an adapter resident. Raises `Refusal`, as do all orders."""

    async def unload(self, digest: str, force: bool = False, deadline: float | None = None) -> None:
        """Removes an adapter from every device; returns when it is gone."""

    async def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Makes an adapter resident and forbids its eviction, or allows it."""

    async def merge(self, ref: AdapterRef) -> None:
        """Makes dense copies for an adapter."""

    async def unmerge(self, digest: str) -> None:
        """Drops an adapter's dense copies."""

    async def look(self) -> BatchView:
        """The batch as it is now; of several engines their batches together. Raises `Refusal`."""

    async def start(self) -> Hello:
        """Starts the processes. Raises `Refusal`, and `BaseChanged` if they serve other bases."""

    async def stop(self) -> None:
        """Ends the processes."""


@dataclass(frozen=True, slots=True)
class EngineMember:
    """One engine of a server, and the name of its device."""

    device: str
    client: EngineClient


class GroupObserver(EngineObserver, Protocol):
    """Receives the events of several engines, joined.

    A `StepReport` has the outputs and the duration of one engine's step, the sums of the engines'
    other numbers, and the joined table. `on_restart` is called when the last engine that was up is
    lost, and `on_ready` with the sum of budgets and blocks when the first one is up again.
    """

    def on_partial_loss(self, report: StepReport) -> None:
        """An engine was lost, and others are up. `report` is what they report together."""
