"""States of the front process that are read at a scrape are those that the process is in."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from loraplex.v1 import adapter_pb2 as pb
from loraplex_server.metrics import Metrics
from loraplex_server.registry.freshness import IndexFreshness
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.services.admission import Admission
from loraplex_server.runtime.lanes import Lanes
from loraplex_server.telemetry.states import watch_front
from prometheus_client import CollectorRegistry
from rpc.harness import CRASH, ask, running, until


def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def value(of: Metrics, name: str, **labels: str) -> float:
    found = of.registry.get_sample_value(f"loraplex_{name}", labels)
    assert found is not None, (name, labels)
    return found


async def test_a_lane_shows_what_runs_and_what_waits() -> None:
    seen, lanes, held = metrics(), Lanes(), threading.Event()
    watch_front(seen, lanes, CallGate())

    def work(lane: str) -> tuple[float, float]:
        return (
            value(seen, "lane_calls", lane=lane, state="running"),
            value(seen, "lane_calls", lane=lane, state="waiting"),
        )

    assert all(work(lane) == (0, 0) for lane in vars(lanes))
    calls = [asyncio.create_task(lanes.text.run(held.wait, 20)) for _ in range(5)]
    await until(lambda: work("text") == (2, 3))
    assert work("index") == (0, 0)
    calls[4].cancel()  # one that waits
    await until(lambda: work("text") == (2, 2))
    held.set()
    await asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: work("text") == (0, 0))
    await lanes.close(1.0)


def test_the_oldest_waiting_request_is_the_one_that_came_first() -> None:
    seen = metrics()
    admission = Admission(10, 100, seen)
    assert value(seen, "oldest_waiting_request_seconds") == 0
    first = admission.enter()
    with first:
        admission._waiting_since[first] -= 50
        second = admission.enter()
        with second:
            admission._waiting_since[second] -= 20
            assert 50 <= value(seen, "oldest_waiting_request_seconds") < 60
            first.run()
            assert 20 <= value(seen, "oldest_waiting_request_seconds") < 30
        assert value(seen, "oldest_waiting_request_seconds") == 0
    assert not admission._waiting_since, "a request that ended waits for ever"


async def test_the_age_of_the_index_is_that_of_the_last_answer() -> None:
    now = 100.0
    answers = [1]

    async def count() -> int:
        return answers.pop()

    freshness = IndexFreshness(count, lambda: None, lambda: now)
    now = 107.0
    assert freshness.age_seconds() == 7.0
    freshness.known(1)
    assert freshness.age_seconds() == 0.0
    now = 110.0
    await freshness.fresh()
    assert freshness.age_seconds() == 0.0
    now = 115.0
    await freshness.fresh()  # it does not answer
    assert freshness.age_seconds() == 5.0
    await freshness.close()


async def test_open_calls_counts_streams_and_watches(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        assert up.metric("open_calls") == 0
        watch = up.adapters.WatchAdapters(pb.WatchAdaptersRequest())
        await watch.read()
        assert up.metric("open_calls") == 1
        watch.cancel()
        await until(lambda: up.metric("open_calls") == 0)


async def test_the_part_of_the_kv_cache_in_use_follows_its_blocks(tmp_path: Path) -> None:
    slow = {"step_seconds": 0.02, "num_blocks": 64}
    async with running(tmp_path, engine_options=slow) as up:

        def used() -> float:
            return up.metric("kv_blocks", state="used")

        labels = {"block_size": "4", "num_blocks": "64"}
        assert up.metric("kv_cache_info", **labels) == 1
        assert up.metric("kv_usage_ratio") == 0
        call = up.generation.Generate(ask(new=40))
        await until(lambda: used() >= 4)
        assert up.metric("kv_usage_ratio") == used() / 64
        await call
        await until(lambda: used() == 0)
        assert up.metric("kv_usage_ratio") == 0
        crash = up.generation.Generate(ask(CRASH))
        await asyncio.gather(crash, return_exceptions=True)
        await until(lambda: up.metric("engine_ready") == 1)
        assert up.metric("kv_cache_info", **labels) == 1
        assert up.metric("kv_usage_ratio") == 0
