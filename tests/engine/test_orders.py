"""Orders about adapters: given up ones are withdrawn, and open ones slow down no step."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, command, continuation
from engine.test_process import Observer, ask, drain, engine
from loraplex_model.base.refusal import Refusal
from loraplex_server.engine.messages import AdapterRef, Load, Merge, SetPinned, Unload, Unmerge
from loraplex_server.engine.process.client import EngineClient

pytestmark = pytest.mark.usefixtures("pace")

try:
    from loraplex_server.engine.messages import Withdraw
except ImportError:  # so that the test fails, and not its import, where orders stay for ever
    Withdraw = None  # type: ignore[assignment, misc]


def lines_of_a_step(engine: Engine) -> int:
    """Lines of Python that a step executes: a measure of its work that no other load changes."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        engine.step()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.fault("abandoned-orders")
@pytest.mark.parametrize("kind", ["different adapters", "one adapter", "unloads"])
@pytest.mark.parametrize("host_budget_bytes", [0, 200])
def test_the_work_of_a_step_does_not_grow_with_the_open_orders(
    kind: str, host_budget_bytes: int
) -> None:
    lines = {}
    for orders in (100, 1000):
        runner = OracleRunner(num_blocks=400, host_budget_bytes=host_budget_bytes)
        engine = Engine(runner, max_running=2)
        engine.submit(1, [1], 500, adapters=[adapter("a", nbytes=500)])
        while engine.loader.jobs or not engine.tokens(1):
            while engine.loader.jobs:
                engine.loader.finish()
            engine.step()
        for op in range(orders):
            match kind:
                case "different adapters":
                    order = Load(op, adapter(f"x{op}", nbytes=100))
                case "one adapter":
                    order = Load(op, adapter("x", nbytes=100))
                case _:
                    order = Unload(op, "sha256:a", deadline=engine.clock.now + 1000 + op)
            engine.core.control(order)
        engine.step()
        engine.step()
        assert engine.outcome(1) is None
        lines[orders] = lines_of_a_step(engine)
        assert not engine.controls, "the orders were to be open"
    assert lines[1000] < 1.2 * lines[100]


@pytest.mark.fault("abandoned-orders")
def test_orders_for_one_adapter_share_a_want_and_are_answered_in_their_order() -> None:
    engine = Engine(OracleRunner(merge_budget_bytes=100))
    ref = adapter("a", nbytes=10, merge_nbytes=10)
    for op in range(1, 100, 3):
        engine.core.control(Load(op, ref))
        engine.core.control(SetPinned(op + 1, ref, True))
        engine.core.control(Merge(op + 2, ref))
    assert len(engine.core.adapters.residency._wants.naming("sha256:a")) == 1
    engine.run()
    assert engine.loader.started == ["sha256:a"]
    assert all(done.error is None for done in engine.controls.values())
    answered = [op for op in engine.controls if op % 3]
    assert answered == sorted(answered)
    (status,) = engine.core.adapters.statuses()
    assert (status.pinned, status.merged_bytes) == (True, 10)


@pytest.mark.fault("abandoned-orders")
def test_what_is_wanted_for_withdrawn_orders_alone_is_not_loaded_pinned_or_merged() -> None:
    engine = Engine(OracleRunner(merge_budget_bytes=100))
    refs = {name: adapter(name, nbytes=10, merge_nbytes=10) for name in "abcdef"}
    orders = [
        Load(1, refs["a"]),
        Load(2, refs["b"]),
        SetPinned(3, refs["c"], True),
        Merge(4, refs["d"]),
        Load(5, refs["e"]),
        Load(6, refs["e"]),
        SetPinned(7, refs["f"], True),
        Load(8, refs["f"]),
    ]
    for order in orders:
        engine.core.control(order)
    for op in (2, 3, 4, 5, 7, 99):
        engine.core.control(Withdraw(op))
    engine.run()
    assert set(engine.controls) == {1, 6, 8}
    assert engine.loader.started == ["sha256:a", "sha256:e", "sha256:f"]
    assert not any(status.pinned for status in engine.core.adapters.statuses())
    engine.core.check()


@pytest.mark.fault("abandoned-orders")
def test_withdrawn_unloads_and_unmerges_are_carried_out_and_not_answered() -> None:
    engine = Engine(OracleRunner(merge_budget_bytes=100))
    ref = adapter("a", nbytes=10, merge_nbytes=10)
    engine.submit(1, [1], 30, adapters=[ref])
    for _ in range(3):
        engine.step()
        while engine.loader.jobs:
            engine.loader.finish()
    assert engine.tokens(1)
    engine.core.control(Merge(1, ref))
    engine.core.control(Unmerge(2, ref.digest))
    engine.core.control(Withdraw(2))
    engine.step()
    for op in range(3, 203):
        engine.core.control(Unload(op, ref.digest, deadline=engine.clock.now + 400 - op))
        engine.core.control(Withdraw(op))
    # Nothing is kept of the withdrawn ones but the earliest deadline.
    assert len(engine.core.adapters.residency._unloads._digests) == 1
    engine.step()
    engine.clock.now += 198.0
    engine.step()
    assert engine.outcome(1) == "ADAPTER_UNLOADED"
    engine.run()
    assert set(engine.controls) == {1}
    assert engine.core.adapters.statuses() == []
    assert engine.runner.merges == {}


async def turns_until(holds: Callable[[], bool]) -> None:
    """Turns of the event loop, at most a hundred, until something holds."""
    for _ in range(100):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not hold after a hundred turns")


@asynccontextmanager
async def full_engine() -> AsyncIterator[tuple[EngineClient, Observer]]:
    """An engine whose only slot belongs to request 1 until the request is aborted."""
    options = {"num_slots": 1, "num_blocks": 5000, "max_context": 1 << 16, "step_seconds": 0.02}
    async with engine(command(adapter_budget_bytes=100, **options)) as (client, observer):
        stream = client.submit(ask(1, [3], 10_000, adapters=[AdapterRef("sha256:busy", "{}")]))
        assert await stream.take()
        yield client, observer


@pytest.mark.fault("abandoned-orders")
@pytest.mark.lock_step
async def test_orders_whose_callers_are_gone_are_withdrawn_from_the_engine() -> None:
    async with full_engine() as (client, observer):
        gone = [
            asyncio.create_task(client.load(AdapterRef(f"sha256:{i}", "{}"))) for i in range(1000)
        ]
        await turns_until(lambda: len(client._pending) == 1000)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        last = asyncio.create_task(client.load(AdapterRef("sha256:last", "{}")))
        await turns_until(lambda: bool(client._pending))
        client.abort(1)
        # Adapters are loaded in the order of their orders: those given up would come before.
        await last
        assert [load.digest for load in observer.loads] == ["sha256:busy", "sha256:last"]
        assert not client._pending


@pytest.mark.fault("abandoned-orders")
@pytest.mark.lock_step
async def test_more_orders_than_may_wait_are_refused_at_once() -> None:
    async with full_engine() as (client, _):
        ref = AdapterRef("sha256:other", "{}")
        tasks = [asyncio.create_task(client.load(ref)) for _ in range(8000)]
        await turns_until(lambda: sum(task.done() for task in tasks) + len(client._pending) == 8000)
        refused = [task.exception() for task in tasks if task.done()]
        assert len(refused) == 8000 - 1024
        assert {error.reason for error in refused if isinstance(error, Refusal)} == {"OVERLOADED"}
        client.abort(1)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(outcome is None for outcome in outcomes) == 1024
        assert await drain(client.submit(ask(2, [3]))) == (continuation([3], [], 5), "length")
