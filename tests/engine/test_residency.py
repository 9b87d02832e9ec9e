"""Adapters come, are shared, make room and go, and who does not ask for them does not notice."""

from __future__ import annotations

import numpy as np
import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleAdapter, OracleRunner, continuation
from loraplex_server.engine.messages import AdapterRef, Load, Unload

pytestmark = pytest.mark.usefixtures("pace")


def engine_with(budget: int = 100, slots: int = 8, **limits: int) -> Engine:
    return Engine(
        OracleRunner(num_blocks=200, adapter_budget_bytes=budget, num_slots=slots), **limits
    )


def load(engine: Engine, ref: AdapterRef, op: int) -> None:
    engine.core.control(Load(op, ref))
    engine.run()


def resident(engine: Engine) -> dict[str, int]:
    """Name to references."""
    slots = engine.core.adapters.slots
    return {d.removeprefix("sha256:"): r.refs for d, r in slots.residents.items()}


def states(engine: Engine) -> dict[str, str]:
    return {s.digest.removeprefix("sha256:"): s.state for s in engine.core.adapters.statuses()}


def test_a_load_is_shared_by_all_who_wait_for_it_and_repeating_it_is_free() -> None:
    engine = engine_with()
    for id in (1, 2, 3):
        engine.submit(id, [id], 2, adapters=[adapter("a")])
    engine.core.control(Load(1, adapter("a")))
    engine.core.control(Load(2, adapter("a")))
    engine.run()
    load(engine, adapter("a"), 3)
    assert engine.loader.started == ["sha256:a"]
    assert len(engine.loads) == 1
    assert {op: done.error for op, done in engine.controls.items()} == {1: None, 2: None, 3: None}
    assert all(engine.outcome(id) == "length" for id in (1, 2, 3))


@pytest.mark.lock_step
def test_waiting_for_an_adapter_blocks_nobody_else() -> None:
    engine = engine_with()
    load(engine, adapter("a"), 1)
    engine.submit(1, [1], 3, adapters=[adapter("slow")])
    engine.submit(2, [2], 3, adapters=[adapter("a")])
    engine.submit(3, [3], 3)
    for _ in range(3):
        engine.step()
    assert engine.outcome(2) == engine.outcome(3) == "length"
    assert engine.outcome(1) is None
    engine.run()
    assert engine.tokens(1) == continuation([1], [("sha256:slow", 1.0)], 3)


@pytest.mark.parametrize("fail", ["ADAPTER_INVALID", "BASE_MODEL_MISMATCH", "crash"])
def test_a_bad_adapter_fails_those_who_wait_for_it_and_evicts_nobody(fail: str) -> None:
    engine = engine_with(budget=100, slots=1)
    load(engine, adapter("good", nbytes=100), 1)
    bad = adapter("bad", fail=fail)
    engine.submit(1, [1], 2, adapters=[bad])
    engine.submit(2, [2], 2, adapters=[adapter("good", nbytes=100)])
    engine.core.control(Load(2, bad))
    engine.run()
    reason = "ENGINE_FAULT" if fail == "crash" else fail
    assert engine.outcome(1) == reason
    error = engine.controls[2].error
    assert error is not None
    assert error.reason == reason
    assert "secret" not in error.message
    assert engine.outcome(2) == "length"
    assert resident(engine) == {"good": 0}
    assert engine.core.adapters.slots.evictions == 0
    assert engine.loads[-1].error == error


def test_the_least_recently_used_makes_room() -> None:
    engine = engine_with(budget=100)
    for op, name in enumerate("abc", 1):
        load(engine, adapter(name, nbytes=30), op)
    engine.submit(1, [1], 2, adapters=[adapter("a", nbytes=30)])
    engine.run()
    load(engine, adapter("d", nbytes=30), 9)
    assert set(resident(engine)) == {"a", "c", "d"}


def test_slots_are_bounded_too() -> None:
    engine = engine_with(budget=1000, slots=2)
    for op, name in enumerate("abc", 1):
        load(engine, adapter(name), op)
    assert set(resident(engine)) == {"b", "c"}


def test_an_adapter_in_use_stays_and_the_newcomer_waits_for_it() -> None:
    engine = engine_with(budget=100)
    engine.submit(1, [1], 6, adapters=[adapter("a", nbytes=60)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.submit(2, [2], 2, adapters=[adapter("b", nbytes=60)])
    engine.step()
    engine.loader.finish()
    for _ in range(3):
        engine.step()
        assert set(resident(engine)) == {"a"}
    engine.run()
    assert engine.tokens(1) == continuation([1], [("sha256:a", 1.0)], 6)
    assert engine.tokens(2) == continuation([2], [("sha256:b", 1.0)], 2)


def test_an_idle_adapter_leaves_before_one_in_use_however_recent_it_is() -> None:
    engine = engine_with(budget=100)
    engine.submit(1, [1], 50, adapters=[adapter("old", nbytes=50)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.submit(2, [2], 1, adapters=[adapter("recent", nbytes=50)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.control(Load(1, adapter("new", nbytes=50)))
    engine.step()
    engine.loader.finish()
    engine.step()
    assert resident(engine) == {"old": 1, "new": 0}


def run_two_adapters(engine: Engine) -> None:
    """Requests 1 (9 tokens) and 2 (90) run on a, request 3 (90) on b; the budget is full."""
    for id, count, name in [(1, 9, "a"), (2, 90, "a"), (3, 90, "b")]:
        engine.submit(id, [id], count, adapters=[adapter(name, nbytes=50)])
    for _ in range(3):
        engine.step()
        if engine.loader.reading is not None:
            engine.loader.finish()
    engine.step()
    assert engine.outcome(1) is None
    assert resident(engine) == {"a": 2, "b": 1}


def test_who_is_asked_to_make_room_stays_asked_and_the_others_stay_open() -> None:
    engine = engine_with(budget=100)
    run_two_adapters(engine)
    engine.submit(4, [4], 2, adapters=[adapter("c", nbytes=50)])
    engine.step()
    engine.loader.finish()
    while engine.outcome(1) is None:
        engine.step()
    engine.step()
    engine.submit(5, [5], 2, adapters=[adapter("a", nbytes=50)])
    engine.submit(6, [6], 2, adapters=[adapter("b", nbytes=50)])
    for _ in range(3):
        engine.step()
    assert engine.tokens(5) == []
    assert engine.outcome(6) == "length"
    engine.core.abort(4)
    for _ in range(3):
        engine.step()
    assert engine.outcome(5) == "length"


def test_room_that_a_drain_will_free_is_waited_for_and_nobody_else_is_asked() -> None:
    engine = engine_with(budget=100)
    run_two_adapters(engine)
    engine.core.control(Unload(1, "sha256:b"))
    engine.submit(4, [4], 2, adapters=[adapter("c", nbytes=50)])
    engine.step()
    engine.loader.finish()
    engine.submit(5, [5], 2, adapters=[adapter("a", nbytes=50)])
    for _ in range(3):
        engine.step()
    assert engine.outcome(5) == "length"
    engine.core.abort(3)
    for _ in range(3):
        engine.step()
    assert engine.outcome(4) == "length"


@pytest.mark.lock_step
def test_when_room_is_wanted_no_longer_all_are_open_again_at_once() -> None:
    engine = engine_with(budget=100)
    engine.submit(1, [1], 90, adapters=[adapter("a", nbytes=50)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.submit(2, [2], 2, adapters=[adapter("b", nbytes=60)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.submit(3, [3], 2, adapters=[adapter("slow", nbytes=50)])
    engine.submit(4, [4], 1, adapters=[adapter("a", nbytes=50)])
    engine.step()
    assert engine.tokens(4) == []
    engine.core.abort(1)
    engine.core.abort(2)
    engine.step()
    assert engine.loader.reading == adapter("slow", nbytes=50)
    assert engine.outcome(4) == "length"


def test_steady_traffic_on_one_adapter_cannot_starve_another() -> None:
    engine = engine_with(budget=100)
    engine.submit(1, [1], 4, adapters=[adapter("busy", nbytes=60)])
    engine.submit(2, [2], 2, adapters=[adapter("rare", nbytes=60)])
    for id in range(3, 60):
        engine.submit(id, [id], 4, adapters=[adapter("busy", nbytes=60)])
        if engine.loader.reading is not None:
            engine.loader.finish()
        engine.step()
    assert engine.outcome(2) == "length"
    engine.run()


def test_two_mixes_that_do_not_fit_together_take_turns() -> None:
    engine = engine_with(budget=100)
    a, b, c, d = (adapter(name, nbytes=40) for name in "abcd")
    engine.submit(1, [1], 3, adapters=[a, b])
    engine.submit(2, [2], 3, adapters=[c, d])
    engine.submit(3, [3], 3, adapters=[b, c])
    engine.run()
    assert [engine.outcome(id) for id in (1, 2, 3)] == ["length"] * 3
    assert engine.tokens(3) == continuation([3], [("sha256:b", 1.0), ("sha256:c", 1.0)], 3)


def test_a_mix_is_weighted_and_does_not_depend_on_the_order_it_is_written_in() -> None:
    engine = engine_with()
    engine.submit(1, [1], 4, adapters=[adapter("a", 0.5), adapter("b", -2.0)])
    engine.submit(2, [1], 4, adapters=[adapter("b", -2.0), adapter("a", 0.25), adapter("a", 0.25)])
    engine.run()
    for batch in engine.runner.batches:
        one, other = np.split(batch.mix_slots, [batch.mix_starts[1]])
        assert one.tolist() == other.tolist()
    expected = continuation([1], [("sha256:a", 0.5), ("sha256:b", -2.0)], 4)
    assert engine.tokens(1) == engine.tokens(2) == expected


@pytest.mark.parametrize("names", [["huge"], ["a", "b", "c"]])
def test_what_can_never_fit_is_refused_and_costs_the_others_nothing(names: list[str]) -> None:
    engine = engine_with(budget=100)
    load(engine, adapter("good", nbytes=10), 1)
    size = {"huge": 101}
    refs = [adapter(name, nbytes=size.get(name, 40)) for name in names]
    engine.submit(1, [1], 2, adapters=refs)
    engine.submit(2, [2], 2, adapters=[adapter("good", nbytes=10)])
    engine.run()
    assert engine.outcome(1) == "ADAPTER_TOO_LARGE"
    assert engine.outcome(2) == "length"


def test_unload_waits_for_running_requests_and_newcomers_have_it_loaded_again() -> None:
    engine = engine_with()
    engine.submit(1, [1], 5, adapters=[adapter("a")])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.control(Unload(1, "sha256:a"))
    engine.submit(2, [2], 2, adapters=[adapter("a")])
    engine.submit(3, [3], 2, adapters=[adapter("b")])
    engine.step()
    assert states(engine) == {"a": "draining", "b": "loading"}
    assert 1 not in engine.controls
    assert engine.tokens(2) == []
    engine.run()
    assert engine.controls[1].error is None
    assert engine.tokens(1) == continuation([1], [("sha256:a", 1.0)], 5)
    assert engine.tokens(2) == continuation([2], [("sha256:a", 1.0)], 2)
    assert engine.loader.started == ["sha256:a", "sha256:b", "sha256:a"]


@pytest.mark.lock_step
def test_a_drain_does_not_keep_other_adapters_from_loading() -> None:
    engine = engine_with()
    engine.submit(1, [1], 50, adapters=[adapter("a")])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.control(Unload(1, "sha256:a"))
    engine.submit(2, [2], 2, adapters=[adapter("a")])
    engine.submit(3, [3], 2, adapters=[adapter("b")])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.step()
    assert engine.outcome(3) == "length"
    assert engine.outcome(1) is None


def test_a_forced_unload_ends_its_requests_and_only_them() -> None:
    engine = engine_with()
    engine.submit(1, [1], 50, adapters=[adapter("a")])
    engine.submit(2, [2], 8, adapters=[adapter("b")])
    engine.submit(3, [3], 8, adapters=[adapter("a"), adapter("b")])
    for _ in range(4):
        if engine.loader.reading is not None:
            engine.loader.finish()
        engine.step()
    engine.core.control(Unload(1, "sha256:a", force=True))
    engine.step()
    assert engine.outcome(1) == engine.outcome(3) == "ADAPTER_UNLOADED"
    assert engine.controls[1].error is None
    assert set(resident(engine)) == {"b"}
    engine.run()
    assert engine.tokens(2) == continuation([2], [("sha256:b", 1.0)], 8)


def test_a_forced_unload_ends_a_load_that_is_under_way() -> None:
    engine = engine_with()
    engine.core.control(Load(1, adapter("a")))
    engine.submit(1, [1], 2, adapters=[adapter("a")])
    engine.step()
    engine.core.control(Unload(2, "sha256:a", force=True))
    engine.run()
    error = engine.controls[1].error
    assert error is not None
    assert error.reason == engine.outcome(1) == "ADAPTER_UNLOADED"
    assert engine.controls[2].error is None
    assert resident(engine) == {}


def test_unloading_what_is_not_there_succeeds() -> None:
    engine = engine_with()
    engine.core.control(Unload(1, "sha256:a"))
    engine.step()
    assert engine.controls[1].error is None


def test_an_unload_during_a_load_lets_those_who_wait_finish_and_then_frees_it() -> None:
    engine = engine_with()
    engine.core.control(Load(1, adapter("a")))
    engine.submit(1, [1], 4, adapters=[adapter("a")])
    engine.step()
    engine.core.control(Unload(2, "sha256:a"))
    engine.loader.finish()
    engine.step()
    engine.submit(2, [2], 2, adapters=[adapter("a")])
    engine.step()
    assert engine.controls[1].error is None
    assert 2 not in engine.controls
    engine.run()
    assert engine.outcome(1) == engine.outcome(2) == "length"
    assert engine.controls[2].error is None
    assert len(engine.loader.started) == 2


def test_an_abandoned_load_keeps_no_memory() -> None:
    engine = engine_with()
    engine.submit(1, [1], 2, adapters=[adapter("a")])
    engine.step()
    engine.core.abort(1)
    engine.run()
    assert resident(engine) == {}
    assert engine.core.adapters.residency.fetching.staged is None


def test_an_unload_of_what_waits_for_room_is_answered_when_nobody_wants_it_any_more() -> None:
    engine = engine_with(budget=100)
    engine.submit(1, [1], 90, adapters=[adapter("a", nbytes=60)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.submit(2, [2], 2, adapters=[adapter("b", nbytes=60)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.control(Unload(1, "sha256:b"))
    engine.step()
    assert 1 not in engine.controls
    engine.core.abort(2)
    engine.step()
    assert engine.controls[1].error is None
    assert set(resident(engine)) == {"a"}


def test_a_failure_to_publish_is_the_failure_of_that_load_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_with()
    load(engine, adapter("good"), 1)
    publish = engine.runner.publish_adapter

    def fail_once(slot: int, loaded: OracleAdapter, blocks: list[int]) -> None:
        monkeypatch.setattr(engine.runner, "publish_adapter", publish)
        raise MemoryError("a secret of the device")

    monkeypatch.setattr(engine.runner, "publish_adapter", fail_once)
    engine.submit(1, [1], 2, adapters=[adapter("a")])
    engine.submit(2, [2], 2, adapters=[adapter("good")])
    engine.run()
    assert engine.outcome(1) == "ENGINE_FAULT"
    assert engine.outcome(2) == "length"
    load(engine, adapter("a"), 2)
    assert engine.controls[2].error is None


def test_the_table_is_sent_when_it_has_changed_and_only_then() -> None:
    engine = engine_with()
    engine.submit(1, [1], 4, adapters=[adapter("a", nbytes=7)])
    tables = []
    while not engine.core.idle:
        if engine.loader.reading is not None:
            engine.loader.finish()
        done = engine.step()
        if done is not None and done.adapters is not None:
            tables.append([(s.state, s.bytes, s.refs) for s in done.adapters])
    assert tables == [[("loading", 0, 0)], [("resident", 7, 1)], [("resident", 7, 0)]]


def copying(polls: int, budget: int = 100) -> Engine:
    """An engine whose device needs several steps to copy an adapter."""
    runner = OracleRunner(num_blocks=200, adapter_budget_bytes=budget, copy_polls=polls)
    return Engine(runner)


def test_requests_go_on_while_an_adapter_is_copied_to_the_device() -> None:
    engine = copying(polls=5)
    engine.submit(1, [1], 20)
    engine.submit(2, [2], 2, adapters=[adapter("a")])
    engine.step()
    engine.loader.finish()
    before = len(engine.tokens(1))
    for _ in range(5):
        engine.step()
    assert resident(engine) == {}
    assert len(engine.tokens(1)) == before + 5
    engine.step()
    assert resident(engine) == {"a": 1}
    engine.run()
    assert engine.tokens(2) == continuation([2], [("sha256:a", 1.0)], 2)


def test_the_time_of_the_copy_belongs_to_the_load() -> None:
    engine = copying(polls=3)
    engine.submit(1, [1], 2, adapters=[adapter("a")])
    engine.step()
    engine.loader.finish(seconds=2.0)
    for _ in range(4):
        engine.step()
        engine.clock.now += 1.0
    engine.run()
    assert engine.loads[0].seconds == 5.0


def test_a_copy_that_nobody_wants_any_more_gives_way_to_the_next_adapter() -> None:
    engine = copying(polls=4)
    engine.submit(1, [1], 2, adapters=[adapter("a", nbytes=90)])
    engine.submit(2, [2], 2, adapters=[adapter("b", nbytes=90)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.abort(1)
    engine.run()
    assert resident(engine) == {"b": 0}
    assert engine.tokens(2) == continuation([2], [("sha256:b", 1.0)], 2)


def test_an_adapter_unloaded_while_it_is_copied_ends_whoever_wants_it() -> None:
    engine = copying(polls=4)
    engine.submit(1, [1], 2, adapters=[adapter("a")])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.control(Unload(9, "sha256:a", force=True))
    engine.run()
    assert engine.outcome(1) == "ADAPTER_UNLOADED"
    assert engine.controls[9].error is None
    assert resident(engine) == {}
