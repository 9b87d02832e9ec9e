"""Several engine processes over the oracle as one, for the tests of the group."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from engine.oracle import continuation
from engine.test_process import Observer, ask, drain
from loraplex_server.engine.group.devices import EnginePlacement
from loraplex_server.engine.group.group import EngineGroup
from loraplex_server.engine.messages import AdapterRef, StepReport
from loraplex_server.engine.process.limits import SupervisionLimits


class GroupEvents(Observer):
    """Writes down what it is told of a group."""

    def __init__(self) -> None:
        super().__init__()
        self.partial: list[StepReport] = []

    def on_partial_loss(self, report: StepReport) -> None:
        self.partial.append(report)
        self._changed.set()


def make(
    commands: Sequence[list[str]],
    placements: Sequence[EnginePlacement] | None = None,
    **limits: Any,
) -> tuple[EngineGroup, GroupEvents]:
    """A group that is not started, on CPUs unless `placements` are given."""
    placements = placements or [EnginePlacement("cpu", number) for number in range(len(commands))]
    limits = {"first_pause": 0.01, "longest_pause": 0.1, **limits}
    events = GroupEvents()
    engines = list(zip(placements, commands, strict=True))
    return EngineGroup(engines, events, SupervisionLimits(**limits)), events


@asynccontextmanager
async def group(
    *commands: list[str], **limits: Any
) -> AsyncIterator[tuple[EngineGroup, GroupEvents]]:
    """A group that has started; stopped in the end."""
    engines, events = make(commands, **limits)
    await engines.start()
    try:
        yield engines, events
    finally:
        await engines.stop()


def adapter(name: str, **options: object) -> AdapterRef:
    return AdapterRef(f"sha256:{name}", json.dumps({"nbytes": 5, **options}))


def ready(engines: EngineGroup) -> list[bool]:
    return [member.client.ready for member in engines.members]


def devices(engines: EngineGroup, ref: AdapterRef) -> list[str]:
    """The devices that hold an adapter."""
    status = engines.adapters.get(ref.digest)
    return [] if status is None else status.devices


def kill(engines: EngineGroup, number: int) -> None:
    (pid,) = engines.members[number].client.pids
    os.kill(pid, signal.SIGKILL)


async def tell(
    engines: EngineGroup, *refs: AdapterRef, prompt: Sequence[int] = (3, 4), count: int = 5
) -> str | None:
    """Sends a request, checks its tokens if it is answered, and returns how it ended."""
    id = time.monotonic_ns()
    try:
        stream = engines.submit(ask(id, list(prompt), count, adapters=list(refs)))
        tokens, outcome = await drain(stream)
    finally:
        engines.abort(id)
    if outcome == "length":
        mix = [(ref.digest, ref.weight) for ref in refs]
        assert tokens == continuation(list(prompt), mix, count)
    return outcome


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not fact():  # noqa: ASYNC110  (several engines have no common event)
            await asyncio.sleep(0.005)
