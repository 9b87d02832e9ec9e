"""Lanes: each class of blocking work has its own threads and its own bound."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from pathlib import Path

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.runtime.lanes import NICE, Lane, Lanes
from rpc.harness import until

pytestmark = pytest.mark.fault("validation-starves-calls")

SERVER = Path(__file__).resolve().parents[2] / "server" / "loraplex_server"


class Held:
    """Work that lasts until the test lets it end."""

    def __init__(self) -> None:
        self.begun = 0
        self.end = threading.Event()

    def work(self) -> int:
        self.begun += 1
        assert self.end.wait(20)
        return threading.get_ident()


async def test_what_exceeds_the_bound_is_refused_at_once_and_the_rest_is_done() -> None:
    lane, held = Lane("test", threads=2, waiting=3), Held()
    calls = [asyncio.create_task(lane.run(held.work)) for _ in range(5)]
    await until(lambda: held.begun == 2)
    with pytest.raises(Refusal) as refused:
        await lane.run(held.work)
    assert refused.value.reason is Reason.OVERLOADED
    held.end.set()
    assert len(set(await asyncio.gather(*calls))) == 2
    assert await lane.run(lambda: 7) == 7


class Result:
    """Something that can be referred to weakly."""


async def test_an_idle_thread_keeps_no_result_alive() -> None:
    lane = Lane("test", threads=1, waiting=2)
    result: Result | None = await lane.run(Result)
    left = weakref.ref(result)
    del result
    await until(lambda: left() is None)


async def test_what_is_given_up_while_it_waits_is_never_begun_and_leaves_its_place() -> None:
    lane, held = Lane("test", threads=1, waiting=2), Held()
    first = asyncio.create_task(lane.run(held.work))
    await until(lambda: held.begun == 1)
    for _ in range(50):
        waiting = [asyncio.create_task(lane.run(held.work)) for _ in range(2)]
        await asyncio.sleep(0)
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)
    # Work that has begun holds its thread, although nobody waits for it any more.
    first.cancel()
    await asyncio.wait({first})
    last = asyncio.create_task(lane.run(held.work))
    await asyncio.sleep(0)
    assert held.begun == 1
    held.end.set()
    await last
    assert held.begun == 2


async def test_an_error_of_the_work_reaches_the_caller() -> None:
    lane = Lane("test", threads=1, waiting=0)
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 // 0)
    assert await lane.run(lambda: 1) == 1


async def test_work_that_never_ends_holds_neither_other_lanes_nor_the_end() -> None:
    lanes, held = Lanes(), Held()
    calls = [asyncio.create_task(lanes.validations.run(held.work)) for _ in range(8)]
    await until(lambda: held.begun > 0)
    others = [lane for lane in vars(lanes).values() if lane is not lanes.validations]
    assert [await lane.run(lambda: 1) for lane in others] == [1] * len(others)
    await lanes.close(0.01)
    thread = next(t for t in threading.enumerate() if t.name.startswith(lanes.validations.name))
    assert thread.daemon, "it would keep the process alive"
    held.end.set()
    await asyncio.wait(calls)


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to a thread only on Linux")
async def test_work_on_files_gives_way_to_the_engine_and_look_ups_do_not() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    lanes, own = Lanes(), niceness()
    assert await lanes.validations.run(niceness) == min(own + NICE, 19)
    assert await lanes.registrations.run(niceness) == min(own + NICE, 19)
    assert await lanes.index.run(niceness) == own
    assert await lanes.text.run(niceness) == own


def test_no_call_uses_the_executor_that_all_would_share() -> None:
    shared = ("asyncio.to_thread", "run_in_executor(None")
    users = {
        str(file.relative_to(SERVER))
        for file in SERVER.rglob("*.py")
        if any(name in file.read_text() for name in shared)
    }
    # They use it at the start and at the end, for files and folders of the operator and to read how
    # much memory is used: for work that no client can cause.
    assert users <= {
        "access/identity/directory.py",
        "app.py",
        "declared/directory.py",
        "engine/process/supervisor.py",
        "runtime/gateway.py",
        "runtime/pressure.py",
    }


async def test_the_interpreters_lock_is_released_sooner_only_while_a_niced_lane_works() -> None:
    before = sys.getswitchinterval()
    files, text = Lane("files", threads=1, waiting=1, nice=1), Lane("text", threads=1, waiting=1)
    assert await files.run(sys.getswitchinterval) < before
    assert await text.run(sys.getswitchinterval) == before
    assert sys.getswitchinterval() == before
    await asyncio.gather(files.close(1.0), text.close(1.0))
