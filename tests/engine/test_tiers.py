"""Host memory, reading ahead, pins, deadlines: where adapters are, and what that costs others."""

from __future__ import annotations

import os
import sys
import threading

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleAdapter, OracleRunner, continuation
from loraplex_model.base.faults import injected
from loraplex_server.engine.adapters.loader import NICE, Read, ThreadLoader
from loraplex_server.engine.messages import AdapterRef, AdapterStatus, Load, SetPinned, Unload

pytestmark = pytest.mark.usefixtures("pace")


def engine_with(
    budget: int = 100, host: int = 100, slots: int = 8, device: str = "cpu", **limits: int
) -> Engine:
    runner = OracleRunner(
        num_blocks=200,
        adapter_budget_bytes=budget,
        host_budget_bytes=host,
        num_slots=slots,
        device=device,
    )
    return Engine(runner, **limits)


def load(engine: Engine, ref: AdapterRef, op: int) -> None:
    engine.core.control(Load(op, ref))
    engine.run()


def status(engine: Engine) -> dict[str, AdapterStatus]:
    return {s.digest.removeprefix("sha256:"): s for s in engine.core.adapters.statuses()}


def states(engine: Engine) -> dict[str, str]:
    return {name: s.state for name, s in status(engine).items()}


# host memory


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_an_evicted_adapter_comes_back_without_a_file(device: str) -> None:
    engine = engine_with(device=device, host=200)
    for op, name in enumerate("aba", 1):
        load(engine, adapter(name, nbytes=60), op)
    assert engine.loader.started == ["sha256:a", "sha256:b"]
    assert [done.tier for done in engine.loads] == ["disk", "disk", "host"]
    assert states(engine) == {"a": "resident", "b": "host"}
    shared = 0 if device == "cpu" else 60
    assert [status(engine)[name].host_bytes for name in "ab"] == [shared, 60]
    engine.submit(1, [1], 3, adapters=[adapter("a", nbytes=60)])
    engine.run()
    assert engine.tokens(1) == continuation([1], [("sha256:a", 1.0)], 3)


def test_without_a_host_budget_it_is_read_again() -> None:
    engine = engine_with(host=0)
    for op, name in enumerate("aba", 1):
        load(engine, adapter(name, nbytes=60), op)
    assert len(engine.loader.started) == 3
    assert {done.tier for done in engine.loads} == {"disk"}


def test_what_costs_more_to_read_stays_longer() -> None:
    engine = engine_with(budget=100, host=0)
    for op, (name, seconds) in enumerate([("slow", 5.0), ("fast", 0.1)], 1):
        engine.core.control(Load(op, adapter(name, nbytes=50)))
        engine.step()
        engine.loader.finish(seconds=seconds)
        engine.run()
    load(engine, adapter("new", nbytes=50), 3)
    assert set(states(engine)) == {"slow", "new"}
    assert status(engine)["slow"].load_seconds == 5.0


def test_unloading_leaves_nothing_in_host_memory() -> None:
    engine = engine_with()
    for op, name in enumerate("ab", 1):
        load(engine, adapter(name, nbytes=60), op)
    assert states(engine) == {"a": "host", "b": "resident"}
    for op, name in enumerate("ab", 3):
        engine.core.control(Unload(op, f"sha256:{name}"))
    engine.run()
    assert states(engine) == {}
    assert engine.core.adapters.host.nbytes == 0


# reading ahead


def test_what_waits_for_room_does_not_hold_up_the_reading_of_others() -> None:
    engine = engine_with(budget=100, host=100)
    engine.submit(1, [1], 20, adapters=[adapter("a", nbytes=100)])
    engine.step()
    engine.loader.finish()
    engine.step()
    for id, name in [(2, "b"), (3, "c"), (4, "d")]:
        engine.submit(id, [id], 2, adapters=[adapter(name, nbytes=40)])
    for _ in range(4):
        engine.step()
        while engine.loader.jobs:
            engine.loader.finish()
    assert engine.outcome(1) is None
    assert engine.loader.started == [f"sha256:{name}" for name in "abcd"]
    assert states(engine)["c"] == states(engine)["d"] == "host"
    engine.run()
    assert engine.last is not None
    stats = engine.last.stats
    assert (stats.prefetches, stats.prefetch_hits) == (2, 2)
    assert len(engine.loader.started) == 4
    for id, name in [(2, "b"), (3, "c"), (4, "d")]:
        assert engine.tokens(id) == continuation([id], [(f"sha256:{name}", 1.0)], 2)


def test_reading_ahead_leaves_a_lane_to_whoever_is_waited_for() -> None:
    engine = engine_with()
    for id, name in enumerate("abcd", 1):
        engine.submit(id, [id], 2, adapters=[adapter(name, nbytes=20)])
    engine.step()
    assert engine.loader.started == ["sha256:a", "sha256:b"]
    engine.core.abort(1)
    engine.core.abort(2)
    engine.loader.finish(0)
    engine.step()
    assert engine.loader.started[2:] == ["sha256:c"]


def test_reading_ahead_never_pushes_out_what_others_wait_for() -> None:
    engine = engine_with(budget=100, host=50)
    engine.submit(1, [1], 30, adapters=[adapter("a", nbytes=100)])
    engine.step()
    engine.loader.finish()
    engine.step()
    for id, name in enumerate("bcde", 2):
        engine.submit(id, [id], 2, adapters=[adapter(name, nbytes=40)])
    for _ in range(6):
        engine.step()
        while engine.loader.jobs:
            engine.loader.finish()
    assert states(engine)["c"] == "host"
    assert engine.core.adapters.host.evictions == 0
    engine.run()
    assert all(engine.outcome(id) == "length" for id in range(1, 6))


def test_a_bad_adapter_that_is_read_ahead_fails_its_own_requests_only() -> None:
    engine = engine_with()
    engine.submit(1, [1], 2, adapters=[adapter("a")])
    engine.submit(2, [2], 2, adapters=[adapter("bad", fail="ADAPTER_INVALID")])
    engine.submit(3, [3], 2, adapters=[adapter("c")])
    engine.step()
    engine.loader.finish(1)
    engine.step()
    assert engine.outcome(2) == "ADAPTER_INVALID"
    engine.run()
    assert engine.outcome(1) == engine.outcome(3) == "length"


@pytest.mark.lock_step
def test_a_burst_of_loads_publishes_one_adapter_a_step() -> None:
    engine = engine_with(budget=1000, host=1000, slots=100)
    engine.submit(1, [1], 150, adapters=[])
    engine.step()
    for op in range(60):
        engine.core.control(Load(op, adapter(f"n{op}", nbytes=10)))
    published = 0
    while len(engine.controls) < 60:
        while engine.loader.jobs:
            engine.loader.finish()
        before = len(engine.outputs[1])
        engine.step()
        now = sum(slot is not None for slot in engine.runner.slots)
        assert now - published <= 1
        assert len(engine.outputs[1]) == before + 1
        published = now
    assert published == 60


def test_an_engine_that_only_loads_does_not_wait_between_publications() -> None:
    engine = engine_with(host=100)
    for op in (1, 2):
        engine.core.control(Load(op, adapter(f"n{op}", nbytes=10)))
    engine.step()
    while engine.loader.jobs:
        engine.loader.finish()
    engine.step()
    assert set(engine.controls) == {1}
    assert engine.core.wait_seconds() == 0.0
    engine.step()
    assert set(engine.controls) == {1, 2}
    assert engine.core.wait_seconds() is None


# pins


def test_a_pinned_adapter_is_loaded_and_never_evicted_until_it_is_unpinned() -> None:
    engine = engine_with(host=0)
    engine.core.control(SetPinned(1, adapter("a", nbytes=40), True))
    engine.run()
    assert status(engine)["a"].pinned
    for op, name in enumerate("bcd", 10):
        load(engine, adapter(name, nbytes=50), op)
    assert set(states(engine)) == {"a", "d"}
    engine.core.control(SetPinned(2, adapter("a", nbytes=40), False))
    load(engine, adapter("e", nbytes=50), 20)
    assert set(states(engine)) == {"d", "e"}
    assert all(done.error is None for done in engine.controls.values())


def test_pins_take_half_of_the_memory_and_what_is_refused_stays_loaded_unpinned() -> None:
    engine = engine_with()
    for op, nbytes in [(1, 30), (2, 21)]:
        engine.core.control(SetPinned(op, adapter(f"p{op}", nbytes=nbytes), True))
    engine.run()
    error = engine.controls[2].error
    assert error is not None
    assert error.reason == "PIN_BUDGET"
    assert [status(engine)[name].pinned for name in ("p1", "p2")] == [True, False]
    load(engine, adapter("half", nbytes=50), 3)
    assert engine.controls[3].error is None


def test_what_does_not_fit_beside_the_pinned_is_refused_and_evicts_nobody() -> None:
    engine = engine_with()
    engine.core.control(SetPinned(1, adapter("p", nbytes=50), True))
    load(engine, adapter("b", nbytes=50), 2)
    engine.submit(1, [1], 2, adapters=[adapter("large", nbytes=51)])
    engine.run()
    assert engine.outcome(1) == "ADAPTER_TOO_LARGE"
    assert states(engine)["b"] == "resident"


def test_an_unload_takes_the_pin_back_and_so_does_an_unpin_on_its_way() -> None:
    engine = engine_with()
    engine.core.control(SetPinned(1, adapter("a"), True))
    engine.run()
    engine.core.control(Unload(2, "sha256:a"))
    engine.run()
    assert states(engine) == {}
    engine.core.control(SetPinned(3, adapter("a"), True))
    engine.step()
    engine.core.control(SetPinned(4, adapter("a"), False))
    engine.run()
    assert not status(engine)["a"].pinned
    assert all(done.error is None for done in engine.controls.values())


# unloading with a deadline


def test_an_unload_aborts_at_its_deadline_those_who_still_run_and_not_those_who_wait() -> None:
    engine = engine_with()
    for id, count in [(1, 3), (2, 90)]:
        engine.submit(id, [id], count, adapters=[adapter("a")])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.control(Unload(1, "sha256:a", deadline=engine.clock.now + 10))
    engine.submit(3, [3], 2, adapters=[adapter("a")])
    for _ in range(4):
        engine.step()
    assert engine.outcome(1) == "length"
    assert engine.outcome(2) is None
    engine.clock.now += 10
    engine.step()
    assert engine.outcome(2) == "ADAPTER_UNLOADED"
    assert engine.controls[1].error is None
    engine.run()
    assert engine.tokens(3) == continuation([3], [("sha256:a", 1.0)], 2)


def test_an_unload_wakes_the_engine_at_its_deadline() -> None:
    engine = engine_with()
    engine.core.control(Load(1, adapter("a")))
    engine.submit(1, [1], 2, adapters=[adapter("a")])
    engine.step()
    engine.core.control(Unload(2, "sha256:a", deadline=engine.clock.now + 5))
    engine.step()
    assert engine.core.wait_seconds() == 5.0
    engine.clock.now += 5
    engine.run()
    error = engine.controls[1].error
    assert error is not None
    assert error.reason == engine.outcome(1) == "ADAPTER_UNLOADED"
    assert engine.controls[2].error is None
    assert states(engine) == {}


# the table


@pytest.mark.lock_step
def test_while_rows_run_new_references_are_told_now_and_then_and_the_last_ones_always() -> None:
    engine = engine_with()
    load(engine, adapter("a"), 1)
    engine.submit(1, [1], 90)
    engine.submit(2, [2], 8, adapters=[adapter("a")])
    tables: list[int] = []
    for _ in range(8):
        done = engine.step()
        engine.clock.now += 0.1
        if done is not None and done.adapters is not None:
            tables.append(done.adapters[0].refs)
    assert tables == [1, 0]
    engine.core.abort(1)
    engine.run()
    assert status(engine)["a"].last_used > 0.0


# faults


@pytest.mark.parametrize("point", ["adapter.read", "adapter.publish"])
def test_a_fault_on_the_way_of_an_adapter_is_the_fault_of_its_load(point: str) -> None:
    engine = engine_with()
    load(engine, adapter("good", nbytes=10), 1)

    def fail(reached: str) -> None:
        if reached == point:
            raise OSError("a secret of the disk")

    with injected(fail):
        engine.submit(1, [1], 2, adapters=[adapter("a", nbytes=90)])
        engine.submit(2, [2], 2, adapters=[adapter("good", nbytes=10)])
        engine.run()
    assert engine.outcome(1) == "ENGINE_FAULT"
    assert engine.outcome(2) == "length"
    load(engine, adapter("a", nbytes=90), 2)
    assert engine.controls[2].error is None


@pytest.mark.parametrize("point", ["engine.before_step", "after"])
def test_a_fault_in_a_step_costs_its_rows_and_nobody_else(point: str, pace: str) -> None:
    if point == "after":
        point = "engine.after_sample" if pace == "lock-step" else "engine.after_read"
    engine = engine_with(max_running=1)
    engine.submit(1, [1], 4)
    engine.submit(2, [2], 4)

    def fail(reached: str) -> None:
        if reached == point:
            raise RuntimeError("a secret of the step")

    with injected(fail):
        while engine.outcome(1) is None:
            engine.step()
    engine.run()
    assert engine.outcome(1) == "ENGINE_FAULT"
    assert engine.tokens(2) == continuation([2], [], 4)
    engine.core.check()


# the threads


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to a thread only on Linux")
def test_loader_threads_step_back_for_the_engine() -> None:
    seen: list[int] = []
    woken = threading.Event()

    class Runner(OracleRunner):
        def read_adapter(self, ref: AdapterRef) -> OracleAdapter:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().read_adapter(ref)

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    loader = ThreadLoader(Runner(), wake=woken.set)
    loader.start(Read(adapter("a")))
    assert woken.wait(60)
    assert loader.poll() is not None
    assert seen == [min(before + NICE, 19)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
