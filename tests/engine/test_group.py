"""Several engines as one: where requests and orders go, and what the loss of one costs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from engine.groups import adapter, devices, group, kill, make, ready, tell, until
from engine.oracle import command
from engine.test_lost_engine import Ends, fails, switched
from engine.test_process import ask, drain
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.engine.group.devices import EnginePlacement
from loraplex_server.engine.process.identity import BaseChanged
from loraplex_server.engine.process.supervisor import EngineLost

SLOW = {"step_seconds": 0.01, "num_blocks": 400}


async def test_an_adapter_is_used_where_it_is_and_a_hot_one_spreads() -> None:
    async with group(command(**SLOW), command(**SLOW)) as (engines, events):
        a, b = adapter("a", seconds=0.1), adapter("b", seconds=0.1)
        assert await asyncio.gather(*(tell(engines, a) for _ in range(4))) == ["length"] * 4
        assert devices(engines, a) == ["cpu:0"], "it was on its way there"
        await asyncio.gather(tell(engines, count=30), tell(engines, b))
        assert devices(engines, b) == ["cpu:1"], "the other engine had nothing to do"
        assert await tell(engines, a) == "length"
        assert len(events.loads) == 2
        answers = [tell(engines, a, prompt=[i, 9], count=20) for i in range(40)]
        assert set(await asyncio.gather(*answers)) == {"length"}
        assert devices(engines, a) == ["cpu:0", "cpu:1"]
        assert len(events.loads) == 3
        assert [load.weight for load in engines._routes.loads] == [0, 0]
        assert await tell(engines, a, b) == "length", "a mix goes where all of it is"
        assert len(events.loads) == 3


async def test_an_unload_removes_an_adapter_everywhere_and_keeps_its_promises() -> None:
    async with group(command(**SLOW), command(**SLOW)) as (engines, _):
        a = adapter("a")

        async def on_both() -> None:
            for member in engines.members:
                await member.client.load(a)
            assert devices(engines, a) == ["cpu:0", "cpu:1"]

        await on_both()
        long = [asyncio.create_task(tell(engines, a, count=60)) for _ in range(2)]
        await until(lambda: engines.adapters[a.digest].refs == 2)
        unload = asyncio.create_task(engines.unload(a.digest))
        await until(lambda: engines.adapters[a.digest].state == "draining")
        assert not unload.done()
        assert await asyncio.gather(*long) == ["length"] * 2
        await unload
        assert a.digest not in engines.adapters
        for terms in ({"force": True}, {"deadline": time.monotonic() + 0.1}):
            await on_both()
            long = [asyncio.create_task(tell(engines, a, count=5000 // 20)) for _ in range(2)]
            await until(lambda: engines.adapters[a.digest].refs == 2)
            await asyncio.wait_for(engines.unload(a.digest, **terms), 2)
            assert await asyncio.gather(*long) == ["ADAPTER_UNLOADED"] * 2
            assert a.digest not in engines.adapters


async def test_pins_and_merges_are_made_where_the_adapter_is_and_undone_everywhere() -> None:
    options = {"merge_budget_bytes": 100}
    async with group(command(**options), command(**options)) as (engines, _):
        a = adapter("a", merge_nbytes=7)
        await engines.members[1].client.load(a)
        await engines.pin(a, True)
        await engines.merge(a)
        status = engines.adapters[a.digest]
        assert (status.pinned, status.merged_bytes, status.devices) == (True, 7, ["cpu:1"])
        await engines.members[0].client.load(a)
        await engines.merge(a)
        assert engines.adapters[a.digest].merged_bytes == 14
        await engines.pin(a, True)
        pinned = [m.client.adapters[a.digest].pinned for m in engines.members]
        assert pinned == [False, True]
        await engines.unmerge(a.digest)
        await engines.pin(a, False)
        status = engines.adapters[a.digest]
        assert (status.pinned, status.merged_bytes) == (False, 0)
        big = adapter("big", merge_nbytes=1000)
        assert await fails(engines.merge(big)) == "MERGE_BUDGET"


async def test_an_abandoned_order_is_withdrawn_from_every_engine() -> None:
    async with group(command(**SLOW), command(**SLOW)) as (engines, _):
        a = adapter("a")
        for member in engines.members:
            await member.client.load(a)
        requests = [asyncio.create_task(tell(engines, a, count=200)) for _ in range(2)]
        await until(lambda: engines.adapters[a.digest].refs == 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engines.unload(a.digest), 0.05)
        assert not any(member.client._pending for member in engines.members)
        for request in requests:
            request.cancel()
        await until(lambda: a.digest not in engines.adapters)  # it was being unloaded already


@pytest.mark.fault("engine-lost-again")
async def test_a_killed_engine_costs_its_own_requests_and_comes_back_with_its_adapters() -> None:
    async with group(command(**SLOW), command(**SLOW)) as (engines, events):
        a, b = adapter("a"), adapter("b")
        await engines.members[0].client.pin(a, True)
        await engines.members[1].client.load(b)
        on = {name: [asyncio.create_task(tell(engines, ref, prompt=[i, 5], count=40))
                     for i in range(6)] for name, ref in {"a": a, "b": b}.items()}  # fmt: skip
        await until(lambda: engines.adapters[a.digest].refs == engines.adapters[b.digest].refs == 6)
        kill(engines, 0)
        assert await asyncio.gather(*on["a"]) == ["ENGINE_RESTARTED"] * 6
        assert ready(engines) == [False, True]
        assert engines.ready
        assert await tell(engines, a) == "length", "it is loaded where an engine is up"
        assert await tell(engines) == "length"
        assert await asyncio.gather(*on["b"]) == ["length"] * 6
        await until(lambda: ready(engines) == [True, True])
        await until(lambda: devices(engines, a) == ["cpu:0", "cpu:1"])
        assert engines.members[0].client.adapters[a.digest].pinned
        assert devices(engines, b) == ["cpu:1"]
        assert (events.restarts, len(events.partial), events.readies) == (0, 1, 1)
        assert [cause for cause, _ in events.deaths] == ["signal"]


async def test_what_is_unloaded_while_its_engine_is_away_is_not_restored() -> None:
    async with group(command(), command(), first_pause=0.5) as (engines, _):
        a, b = adapter("a"), adapter("b")
        for ref in (a, b):
            await engines.members[0].client.pin(ref, True)
        kill(engines, 0)
        await until(lambda: not all(ready(engines)))
        await engines.unload(a.digest)
        await engines.pin(b, False)
        assert ready(engines) == [False, True]
        await until(lambda: all(ready(engines)) and devices(engines, b) == ["cpu:0"])
        assert not engines.adapters[b.digest].pinned
        assert a.digest not in engines.adapters


async def test_without_any_engine_calls_fail_as_with_one_and_all_come_back() -> None:
    async with group(command(), command(), first_pause=0.3) as (engines, events):
        a = adapter("a")
        await engines.load(a)
        for number in (0, 1):
            kill(engines, number)
        await until(lambda: not engines.ready)
        assert await tell(engines, a) == "ENGINE_RESTARTED"
        for order in (engines.load(a), engines.unload(a.digest), engines.pin(a, False)):
            assert await fails(order) == "ENGINE_RESTARTED"
        await until(lambda: all(ready(engines)))
        assert await tell(engines, a) == "length"
        assert (events.restarts, len(events.partial), events.readies) == (1, 1, 2)


@pytest.mark.fault("adapter-kills-engines")
async def test_deaths_are_counted_across_engines() -> None:
    async with group(command(), command(), command(), first_pause=0.2) as (engines, events):
        bad = adapter("bad", kills="publish")
        assert await fails(engines.load(bad)) == "ENGINE_RESTARTED"
        assert await tell(engines, bad) == "ENGINE_RESTARTED"
        assert await tell(engines, bad) == "ADAPTER_QUARANTINED"
        assert await fails(engines.load(bad)) == "ADAPTER_QUARANTINED"
        assert engines.ready
        assert len(events.deaths) <= 2
        await until(lambda: all(ready(engines)))
        assert sum(member.client.restarts for member in engines.members) == 2
        engines.release(bad.digest)
        assert not engines.quarantined


async def test_a_request_that_ends_engines_does_not_reach_all_of_them() -> None:
    commands = [command(crash_token=7) for _ in range(3)]
    async with group(*commands, first_pause=0.05) as (engines, _):
        outcomes: list[str | None] = []
        while outcomes[-1:] != ["REQUEST_QUARANTINED"]:
            outcomes.append(await tell(engines, prompt=[7]))
            assert engines.ready
            assert await tell(engines) == "length", "others are served all the time"
            await asyncio.sleep(0.02)
        assert set(outcomes[:-1]) == {"ENGINE_RESTARTED"}
        restarts = [member.client.restarts for member in engines.members]
        assert sum(restarts) == 4
        assert restarts.count(0) == 1


@pytest.mark.fault("engine-lost-again")
async def test_an_engine_that_stays_away_is_tried_until_all_have_given_up(tmp_path: Path) -> None:
    failing = ["/bin/false"]
    first, flag = switched(tmp_path, command(), failing)
    (tmp_path / "second").mkdir()
    second, other_flag = switched(tmp_path / "second", command(), failing)
    ends = Ends()
    async with group(first, second, most_ends=2, give_up=0.0) as (engines, events):
        flag.touch()
        kill(engines, 0)
        await until(lambda: len(events.deaths) > 6)
        assert engines.members[0].client.has_given_up
        assert not ends.errors
        assert await tell(engines) == "length"
        flag.unlink()
        await until(lambda: all(ready(engines)))
        for each in (flag, other_flag):
            each.touch()
        for number in (0, 1):
            kill(engines, number)
        assert isinstance(await ends.first(), EngineLost)
        assert not engines.ready


@pytest.mark.fault("restarted-engine-other-base")
async def test_engines_with_different_bases_do_not_start() -> None:
    engines, _ = make([command(), command(fingerprint="sha256:other")])
    with pytest.raises(BaseChanged, match=r"cpu:0, now cpu:1.*fingerprint: oracle, now sha256"):
        await engines.start()
    assert not engines.pids


async def test_engines_may_differ_in_the_kind_of_their_device() -> None:
    engines, _ = make([command(device="cuda:0"), command(device="cuda:1")])
    await engines.start()
    await engines.stop()


async def test_a_failed_start_names_the_device_and_ends_the_others() -> None:
    engines, _ = make([command(), command(), command(refuse="NO_CUDA")])
    with pytest.raises(Refusal, match=r"^cpu:2: this model cannot be served$"):
        await engines.start()
    assert not engines.pids


async def test_a_cancelled_start_leaves_no_process() -> None:
    engines, _ = make([command(), command()])
    starting = asyncio.create_task(engines.start())
    await until(lambda: len(engines.pids) == 2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not engines.pids


def visible(pid: int) -> str:
    """The GPUs that a process sees, from its environment."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (found,) = [v.decode() for v in variables if v.startswith(b"CUDA_VISIBLE_DEVICES=")]
    return found.partition("=")[2]


async def test_each_process_sees_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa, 5,MIG-cc")
    placements = [EnginePlacement("cuda", 2), EnginePlacement("cuda", 0)]
    commands = [command(core_dumps=True) for _ in placements]  # else only root sees `environ`
    engines, _ = make(commands, placements)
    await engines.start()
    assert [visible(pid) for pid in engines.pids] == ["MIG-cc", "GPU-aa"]
    assert [member.device for member in engines.members] == ["cuda:2", "cuda:0"]
    await engines.stop()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,-1,3")
    engines, _ = make([command(), command()], placements)
    with pytest.raises(Refusal, match="there is no cuda:2") as refused:
        await engines.start()
    assert refused.value.reason is Reason.NO_CUDA


def test_without_an_outer_choice_the_number_is_that_of_cuda() -> None:
    assert EnginePlacement("cuda", 3).environment({})["CUDA_VISIBLE_DEVICES"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in EnginePlacement("cpu", 1).environment({})


async def test_a_stop_ends_all_streams_and_processes() -> None:
    async with group(command(**SLOW), command(**SLOW)) as (engines, _):
        streams = [engines.submit(ask(i, [i], 500)) for i in range(4)]
        await until(lambda: all(member.client.stats for member in engines.members))
        await engines.stop()
        assert [(await drain(stream))[1] for stream in streams] == ["DRAINING"] * 4
        assert not engines.pids
        assert (await drain(engines.submit(ask(9, [1]))))[1] == "DRAINING"
