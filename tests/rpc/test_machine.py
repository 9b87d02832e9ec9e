"""The RPC layer, the real engine and the real store, under whatever clients may do at once.

The oracle's tokens tell which weights computed them at which position, so a wrong digest, a lost or
repeated token or another request's KV block is a wrong number. Every call must end in exactly one
way that is allowed for it, and afterwards nothing may be held for anybody.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex.v1 import adapter_pb2
from rpc.harness import (
    Running,
    ask,
    expected,
    refusal,
    running,
    streamed,
    until,
    write_adapter,
    write_prompt,
)
from rpc.test_robustness import at_rest

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ["a", "b", "c", "d"]
ALIAS = "live"
LORAS, PROMPTS = range(5), (5, 6)
"""Seeds of the adapters' directories: those of PROMPTS have as many virtual tokens."""
VIRTUAL: dict[str, int] = {}
"""By digest."""


@dataclass(frozen=True)
class Generate:
    """A stream of `n` completions; `leave_after` messages the client is gone, or at `deadline`."""

    adapters: tuple[tuple[str, float], ...]
    prompt: tuple[int, ...]
    new: int
    leave_after: int | None
    deadline: float | None
    n: int = 1


@dataclass(frozen=True)
class Register:
    name: str
    seed: int


@dataclass(frozen=True)
class Load:
    name: str


@dataclass(frozen=True)
class Unload:
    name: str
    force: bool


@dataclass(frozen=True)
class Delete:
    name: str


@dataclass(frozen=True)
class Restore:
    name: str


@dataclass(frozen=True)
class SetAlias:
    name: str


@dataclass(frozen=True)
class Pin:
    name: str
    pinned: bool


@dataclass(frozen=True)
class Merge:
    name: str
    merged: bool


@dataclass(frozen=True)
class KillEngine:
    pass


@dataclass(frozen=True)
class Settle:
    """Lets the calls that were begun get on."""

    turns: int


names = st.sampled_from(NAMES)
called = st.sampled_from([*NAMES, ALIAS])
mixes = st.one_of(
    called.map(lambda name: ((name, 1.0),)),
    st.lists(
        st.tuples(names, st.sampled_from([1.0, 0.5, -1.0])), max_size=3, unique_by=lambda t: t[0]
    ).map(tuple),
)
generations = st.builds(
    Generate,
    adapters=mixes,
    prompt=st.lists(st.integers(20, 60), min_size=1, max_size=40).map(tuple),
    new=st.integers(0, 40),
    n=st.sampled_from([1, 1, 1, 2, 5]),
    leave_after=st.none() | st.none() | st.integers(0, 10),
    deadline=st.none() | st.none() | st.sampled_from([0.001, 0.02]),
)
others = st.one_of(
    st.builds(Register, names, st.integers(0, PROMPTS[-1])),
    st.builds(Load, names),
    st.builds(Unload, names, st.booleans()),
    st.builds(Delete, names),
    st.builds(Restore, names),
    st.builds(SetAlias, names),
    st.builds(Pin, names, st.booleans()),
    st.builds(Merge, names, st.booleans()),
    st.builds(Settle, st.integers(1, 30)),
)
operations = st.lists(
    st.tuples(generations, generations, generations | others, others), min_size=3, max_size=12
).map(lambda groups: [operation for group in groups for operation in group])


@dataclass(eq=False)
class Call:
    """A call while it runs: what has happened meanwhile that may end it.

    Attributes:
        met_kill: the engine was being replaced when the call began, or was killed while it ran.
        unloaded: seeds of the adapters that were unloaded by force while it ran.
    """

    met_kill: bool
    unloaded: set[int]


@dataclass
class Story:
    """What one example has done so far, and so what may happen to its calls.

    Attributes:
        seeds: of the adapters that a name may stand for.
        running: the calls that run now, and forced unloads that run now with their seeds.
    """

    up: Running
    restarts: int
    killed: bool = False
    seeds: dict[str, set[int]] = field(default_factory=dict)
    running: set[Call] = field(default_factory=set)
    unloading: dict[Call, set[int]] = field(default_factory=dict)

    def stands_for(self, name: str) -> set[int]:
        """Seeds of the adapters that a name or the alias may stand for, now or in this example."""
        if name == ALIAS:  # it may point to what an earlier example left
            return {*LORAS, *PROMPTS}
        return self.seeds.setdefault(name, set())

    def kill(self) -> None:
        """Kills the engine, and notes it for every call that runs."""
        self.killed = True
        for call in self.running:
            call.met_kill = True
        assert self.up.server.engine.pid is not None
        os.kill(self.up.server.engine.pid, signal.SIGKILL)

    @property
    def is_engine_away(self) -> bool:
        """Whether a killed engine has not been replaced yet."""
        engine = self.up.server.engine
        return self.killed and not (engine.restarts > self.restarts and engine.ready)

    async def do(self, operation: object) -> None:
        """Makes a call; what ends it must have happened while it ran."""
        call = Call(self.is_engine_away, set().union(*self.unloading.values()))
        self.running.add(call)
        if isinstance(operation, Register):
            self.stands_for(operation.name).add(operation.seed)
        if isinstance(operation, Unload) and operation.force:
            self.unloading[call] = self.stands_for(operation.name)
            for other in self.running:
                other.unloaded |= self.unloading[call]
        try:
            await self.make(operation, call)
        finally:
            self.running.remove(call)
            self.unloading.pop(call, None)

    async def make(self, operation: object, call: Call) -> None:
        up = self.up
        try:
            match operation:
                case Generate():
                    await self.generate(operation)
                case Register(name, seed):
                    request = adapter_pb2.RegisterAdapterRequest(
                        name=name, path=f"seed-{seed}", replace=True
                    )
                    told = (await up.adapters.RegisterAdapter(request)).adapter
                    assert told.virtual_tokens == (seed in PROMPTS) * seed
                case Load(name):
                    reply = await up.adapters.LoadAdapter(
                        adapter_pb2.LoadAdapterRequest(adapter_id=name)
                    )
                    assert reply.adapter.name == name
                case Unload(name, force):
                    await up.adapters.UnloadAdapter(
                        adapter_pb2.UnloadAdapterRequest(adapter_id=name, force=force)
                    )
                case Delete(name):
                    await up.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name))
                case Restore(name):
                    await up.adapters.RestoreAdapter(adapter_pb2.RestoreAdapterRequest(name=name))
                case SetAlias(name):
                    await up.adapters.SetAlias(
                        adapter_pb2.SetAliasRequest(alias=ALIAS, adapter_id=name)
                    )
                case Pin(name, True):
                    await up.adapters.PinAdapter(adapter_pb2.PinAdapterRequest(adapter_id=name))
                case Pin(name, False):
                    await up.adapters.UnpinAdapter(adapter_pb2.UnpinAdapterRequest(adapter_id=name))
                case Merge(name, True):
                    await up.adapters.MergeAdapter(adapter_pb2.MergeAdapterRequest(adapter_id=name))
                case Merge(name, False):
                    await up.adapters.UnmergeAdapter(
                        adapter_pb2.UnmergeAdapterRequest(adapter_id=name)
                    )
        except grpc.aio.AioRpcError as error:
            self.judge(operation, call, error)

    async def generate(self, operation: Generate) -> None:
        """Every token that arrives is the right one for the digests that the stream named."""
        mix = [{"adapter_id": name, "weight": weight} for name, weight in operation.adapters]
        request = ask(*operation.prompt, new=operation.new, mix=mix, n=operation.n)
        call = self.up.generation.GenerateStream(streamed(request), timeout=operation.deadline)
        events, tokens = [], list[int]()
        while operation.leave_after is None or len(events) < operation.leave_after:
            event = await call.read()
            if event is grpc.aio.EOF:
                break
            events.append(event)
            if event.WhichOneof("event") == "started":
                state = [(r.digest, r.weight) for r in event.started.adapters]
                seen = [(r.name, r.weight) for r in event.started.adapters]
                if operation.adapters != ((ALIAS, 1.0),):
                    assert seen == [pytest.approx(pair) for pair in operation.adapters]
                virtual = VIRTUAL.get(state[0][0], 0) if state else 0
                tokens = expected(list(operation.prompt), operation.new, mix=state, virtual=virtual)
            got: list[list[int]] = [[] for _ in range(operation.n)]
            for each in events:
                got[each.delta.index] += each.delta.token_ids
            assert all(part == tokens[: len(part)] for part in got)
        else:
            call.cancel()
            return
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[0] == "started"
        ended = [event.finished.index for event in events if event.HasField("finished")]
        assert sorted(ended) == list(range(operation.n))
        assert kinds[-1] == "finished"
        assert [len(part) for part in got] == [operation.new] * operation.n

    def judge(self, operation: object, call: Call, error: grpc.aio.AioRpcError) -> None:
        """Only what somebody did to this call may have gone wrong."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            assert isinstance(operation, Generate)
            assert operation.deadline is not None
            return
        allowed = {"ADAPTER_NOT_FOUND"}
        if isinstance(operation, Generate):
            if any(weight != 1.0 for _, weight in operation.adapters):
                allowed.add("ADAPTER_NOT_MIXABLE")
            if len(operation.adapters) > 1:  # what is pinned or merged may leave no room for all
                allowed |= {"ADAPTER_NOT_MIXABLE", "ADAPTER_TOO_LARGE"}
            if operation.deadline is not None:  # it cannot end in time, by measured rates
                allowed.add("DEADLINE_UNMEETABLE")
        if isinstance(operation, Pin | Merge):
            allowed |= {"PIN_BUDGET", "MERGE_BUDGET", "MERGE_UNSUPPORTED"}
        if isinstance(operation, Merge):  # it does not hold its adapter before it has begun
            allowed.add("ADAPTER_UNLOADED")
        if isinstance(operation, Restore):
            allowed.add("ADAPTER_CONFLICT")  # the name is not deleted
        if call.met_kill:
            allowed.add("ENGINE_RESTARTED")
        if call.unloaded & self.used_by(operation):
            allowed.add("ADAPTER_UNLOADED")
        assert refusal(error).reason in allowed, operation

    def used_by(self, operation: object) -> set[int]:
        """Seeds of the adapters that a call may use."""
        if isinstance(operation, Generate):
            return set().union(*(self.stands_for(name) for name, _ in operation.adapters))
        name = getattr(operation, "name", None)
        return set() if name is None else self.stands_for(name)


@asynccontextmanager
async def machine(folder: Path, **options: Any) -> AsyncIterator[Running]:
    """A server with little room in every tier, and the adapters to register."""
    for seed in LORAS:
        write_adapter(folder / "import" / f"seed-{seed}", seed)
    for seed in PROMPTS:
        write_prompt(folder / "import" / f"seed-{seed}", seed, seed)
    size = sum(file.stat().st_size for file in (folder / "import" / "seed-0").iterdir())
    tight = {
        "num_blocks": 40,
        "prefix_blocks": 4,
        "adapter_budget_bytes": 3 * size + 100,
        "host_budget_bytes": 2 * size + 100,
        "merge_budget_bytes": size + 100,
        "merges_files": True,
        "num_slots": 3,
    }
    options = {"max_running": 6, "token_budget": 16, "engine_options": tight, **options}
    async with running(folder, **options) as server:
        for tokens in PROMPTS:  # a call may meet an adapter before its registration is answered
            told = await server.adapters.RegisterAdapter(
                adapter_pb2.RegisterAdapterRequest(name="known", path=f"seed-{tokens}")
            )
            VIRTUAL[told.adapter.digest] = tokens
            await server.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="known"))
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with machine(tmp_path_factory.mktemp("machine")) as server:
        yield server


async def tell(up: Running, program: list[object]) -> None:
    """Runs a program: calls begin in its order and overlap as they may."""
    story = Story(up, up.server.engine.restarts)
    tasks = []
    for seed, name in enumerate(NAMES):
        await story.do(Register(name, seed))
    for operation in program:
        if isinstance(operation, Settle):
            for _ in range(operation.turns):
                await asyncio.sleep(0.0005)
        elif isinstance(operation, KillEngine):
            story.kill()
        else:
            tasks.append(asyncio.create_task(story.do(operation)))
            await asyncio.sleep(0)
    # All of them, or what one failing example leaves running would disturb the next.
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
    engine = up.server.engine
    await until(lambda: engine.ready)
    await until(lambda: at_rest(up))
    within_budgets(up)
    if story.killed:
        return  # a new engine loads again what the old one held, and tells of it with its next step
    for digest in list(engine.adapters):
        await engine.unload(digest, force=True)
    await until(lambda: not engine.adapters and at_rest(up))
    if engine.stats is not None:
        held = engine.stats
        assert (held.adapter_bytes, held.host_bytes, held.merged_bytes) == (0, 0, 0)
        assert held.prefix_blocks == 0


def within_budgets(up: Running) -> None:
    """What the engine tells that it holds is no more than it may."""
    hello, stats = up.server.engine.hello, up.server.engine.stats
    if stats is not None:
        assert stats.adapter_bytes <= hello.adapter_budget_bytes
        assert stats.host_bytes <= hello.host_budget_bytes
        assert stats.merged_bytes <= hello.merge_budget_bytes
        assert stats.prefix_blocks <= hello.prefix_blocks


@pytest.mark.fault("right-weights-excused")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=operations)
async def test_whatever_clients_do_every_answer_is_right_and_nothing_is_left(
    up: Running, program: list[object]
) -> None:
    await tell(up, program)


@pytest.mark.fault("right-weights-excused")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=operations, after=operations)
async def test_an_engine_killed_anywhere_costs_only_what_ran(
    up: Running, before: list[object], after: list[object]
) -> None:
    restarts = up.server.engine.restarts
    await tell(up, [*before, KillEngine(), *after])
    await until(lambda: up.server.engine.restarts == restarts + 1 and up.server.engine.ready)
    await until(lambda: at_rest(up))
