"""The programs of `test_machine` against two engines: the same promises, whichever answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from loraplex_server.engine.group.group import EngineGroup
from loraplex_server.engine.group.joining import join_hellos
from rpc.harness import Running, until
from rpc.test_machine import KillEngine, machine, operations, tell
from rpc.test_robustness import at_rest

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Both:
    """The group as the programs see one engine: together ready, and one of them to be killed."""

    def __init__(self, group: EngineGroup) -> None:
        self.group = group
        self.victim = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    @property
    def ready(self) -> bool:
        return all(member.client.ready for member in self.group.members)

    @property
    def restarts(self) -> int:
        return sum(member.client.restarts for member in self.group.members)

    @property
    def pid(self) -> int | None:
        self.victim = 1 - self.victim
        return self.group.members[self.victim].client.pid

    @property
    def stats(self) -> Any:
        return self.group._stats.idle()

    @property
    def hello(self) -> Any:
        return join_hellos([member.client.hello for member in self.group.members])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with machine(tmp_path_factory.mktemp("machine"), devices="cpu,cpu") as server:
        group = server.server.engine
        assert isinstance(group, EngineGroup)
        server.server.engine = Both(group)  # type: ignore[assignment]
        yield server


def nothing_is_left(up: Running) -> None:
    group = up.server.engine.group  # type: ignore[attr-defined]
    assert len(group._routes) == 0
    loads = group._routes.loads
    assert [(load.weight, load.expected) for load in loads] == [(0, {})] * len(loads)


@pytest.mark.fault("right-weights-excused")
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=operations)
async def test_whatever_clients_do_every_answer_is_right_and_nothing_is_left(
    up: Running, program: list[object]
) -> None:
    await tell(up, program)
    nothing_is_left(up)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=operations, after=operations)
async def test_an_engine_killed_anywhere_costs_only_what_ran(
    up: Running, before: list[object], after: list[object]
) -> None:
    restarts = up.server.engine.restarts
    await tell(up, [*before, KillEngine(), *after])
    await until(lambda: up.server.engine.restarts == restarts + 1 and up.server.engine.ready)
    await until(lambda: at_rest(up))
    nothing_is_left(up)
