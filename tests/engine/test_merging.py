"""Merging by order: within the budget, undone at will, and nobody's tokens change."""

from __future__ import annotations

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation
from loraplex_server.engine.adapters.loader import MergeWeights, Read
from loraplex_server.engine.messages import AdapterRef, Load, Merge, SetPinned, Unload, Unmerge

pytestmark = pytest.mark.usefixtures("pace")


def engine_with(budget: int = 100, host: int = 0, device: str = "cpu") -> Engine:
    runner = OracleRunner(
        num_blocks=200,
        num_slots=8,
        merge_budget_bytes=budget,
        host_budget_bytes=host,
        device=device,
    )
    return Engine(runner)


def a(**options: int | bool) -> AdapterRef:
    return adapter("a", **{"nbytes": 100, "merge_nbytes": 60, **options})


def reason(engine: Engine, op: int) -> str | None:
    error = engine.controls[op].error
    return error.reason if error else None


def merged(engine: Engine) -> dict[str, int]:
    table = engine.core.adapters.statuses()
    return {s.digest.removeprefix("sha256:"): s.merged_bytes for s in table if s.merged_bytes}


def test_a_merge_loads_computes_beside_the_steps_and_is_used_by_lone_rows_at_weight_one() -> None:
    engine = engine_with()
    engine.core.control(Merge(1, a()))
    for id, refs in [(1, []), (2, [a()]), (3, [adapter("b")]), (4, [a(), adapter("b")])]:
        engine.submit(id, [id], 30, adapters=refs)
    engine.submit(5, [5], 30, adapters=[adapter("a", 0.5, nbytes=100, merge_nbytes=60)])
    while not any(isinstance(job, MergeWeights) for job in engine.loader.jobs):
        while engine.loader.jobs:
            engine.loader.finish()
        engine.step()
    before = len(engine.outputs[1])
    for _ in range(3):
        engine.step()
    assert len(engine.outputs[1]) == before + 3
    assert 1 not in engine.controls
    while engine.loader.jobs:
        engine.loader.finish(seconds=2.0)
    engine.step()  # publishes b, which was read meanwhile; one thing a step
    assert 1 not in engine.controls
    engine.step()
    assert reason(engine, 1) is None
    assert merged(engine) == {"a": 60}
    assert engine.last is not None
    assert (engine.last.stats.merged_rows, engine.last.stats.merged_bytes) == (1, 60)
    assert [(done.digest, done.merged, done.seconds) for done in engine.merges] == [
        ("sha256:a", True, 2.0)
    ]
    engine.run()
    assert engine.tokens(2) == continuation([2], [("sha256:a", 1.0)], 30)
    engine.core.control(Unmerge(2, "sha256:a"))
    engine.run()
    assert reason(engine, 2) is None
    assert merged(engine) == {}
    assert engine.runner.merges == {}
    assert [done.merged for done in engine.merges] == [True, False]


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    engine = engine_with(budget=100)
    engine.core.control(Merge(1, a()))
    engine.run()
    engine.core.control(Merge(2, adapter("b", merge_nbytes=41)))
    engine.run()
    assert reason(engine, 2) == "MERGE_BUDGET"
    assert merged(engine) == {"a": 60}
    assert not any(isinstance(job, MergeWeights) for job in engine.loader.jobs)
    engine.core.control(Merge(3, adapter("c", merge_nbytes=40)))
    engine.run()
    assert merged(engine) == {"a": 60, "c": 40}


def test_what_changes_no_matrix_or_cannot_be_had_is_refused_by_name() -> None:
    engine = engine_with()
    engine.core.control(Merge(1, adapter("bias", merge_nbytes=0)))
    engine.core.control(Merge(2, adapter("bad", fail="ADAPTER_INVALID")))
    engine.core.control(Merge(3, a(merge_fail=True)))
    engine.core.control(Merge(4, adapter("large", nbytes=501, merge_nbytes=1)))
    engine.run()
    reasons = [reason(engine, op) for op in (1, 2, 3, 4)]
    assert reasons == ["MERGE_UNSUPPORTED", "ADAPTER_INVALID", "ENGINE_FAULT", "PIN_BUDGET"]
    assert "secret" not in str(engine.controls[3])
    # A failed merge is counted as a merge: an alert watches these.
    failed = [(done.digest, done.merged) for done in engine.merges if done.error]
    assert failed == [("sha256:bias", True), ("sha256:a", True)]
    assert merged(engine) == {}
    assert engine.core.adapters.merging.reserved_nbytes == 0


def test_repeating_a_merge_is_free_and_unmerging_what_is_not_merged_succeeds() -> None:
    engine = engine_with()
    for op in (1, 2):
        engine.core.control(Merge(op, a()))
    engine.core.control(Unmerge(3, "sha256:other"))
    engine.run()
    engine.core.control(Merge(4, a()))
    engine.run()
    assert [reason(engine, op) for op in (1, 2, 3, 4)] == [None] * 4
    assert len(engine.merges) == 1


def test_orders_for_one_adapter_take_effect_in_their_order() -> None:
    engine = engine_with()
    engine.core.control(Merge(1, a()))
    engine.core.control(Unmerge(2, "sha256:a"))
    engine.step()
    assert 2 not in engine.controls
    engine.run()
    assert [reason(engine, op) for op in (1, 2)] == [None, None]
    assert list(engine.controls) == [1, 2]
    assert merged(engine) == {}


def test_an_adapter_merged_by_order_is_not_evicted_and_one_unloaded_gives_all_back() -> None:
    engine = engine_with()
    engine.core.control(Merge(1, a()))
    engine.run()
    for op, name in enumerate("bcdefghi", 10):
        engine.core.control(Load(op, adapter(name, nbytes=300)))
        engine.run()
    assert merged(engine) == {"a": 60}
    engine.core.control(Unload(2, "sha256:a"))
    engine.run()
    assert engine.runner.merges == {}
    assert engine.merges[-1].merged is False


def test_an_unload_while_it_is_computed_ends_the_merge() -> None:
    engine = engine_with()
    engine.core.control(Load(1, a()))
    engine.run()
    engine.core.control(Merge(2, a()))
    engine.step()
    assert isinstance(engine.loader.jobs[0], MergeWeights)
    engine.core.control(Unload(3, "sha256:a"))
    engine.step()
    assert reason(engine, 3) is None
    engine.run()
    assert reason(engine, 2) == "ADAPTER_UNLOADED"
    engine.core.check()


def test_copies_computed_for_an_earlier_stay_on_the_device_are_not_used() -> None:
    engine = engine_with()
    engine.core.control(Load(1, a()))
    engine.run()
    engine.core.control(Merge(2, a()))
    engine.step()
    engine.core.control(Unload(3, "sha256:a"))
    engine.step()
    engine.core.control(Load(4, a()))
    engine.step()
    engine.loader.finish(1)
    engine.step()
    assert reason(engine, 4) is None
    engine.run()
    assert reason(engine, 2) == "ADAPTER_UNLOADED"
    assert engine.runner.merges == {}


def test_a_merge_does_not_stand_in_the_way_of_a_read() -> None:
    engine = engine_with(host=1000)
    engine.core.control(Load(1, a()))
    engine.run()
    engine.core.control(Merge(2, a()))
    engine.step()
    engine.core.control(Load(3, adapter("b")))
    engine.core.control(Load(4, adapter("c")))
    engine.step()
    assert [type(job) for job in engine.loader.jobs] == [MergeWeights, Read]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_on_an_accelerator_without_a_host_copy_the_adapter_is_read_again(device: str) -> None:
    engine = engine_with(device=device)
    engine.core.control(Load(1, a()))
    engine.run()
    engine.core.control(Merge(2, a()))
    engine.step()
    (job,) = engine.loader.jobs
    assert isinstance(job, MergeWeights)
    assert (job.adapter is None) is (device != "cpu")
    engine.run()
    assert merged(engine) == {"a": 60}


def test_merged_and_pinned_ones_take_half_of_the_memory_together() -> None:
    engine = engine_with(budget=1000)
    engine.core.control(Merge(1, adapter("a", nbytes=300, merge_nbytes=1)))
    engine.core.control(SetPinned(2, adapter("b", nbytes=200), True))
    engine.core.control(SetPinned(3, adapter("c", nbytes=1), True))
    engine.core.control(Merge(4, adapter("d", nbytes=1, merge_nbytes=1)))
    engine.run()
    assert [reason(engine, op) for op in (1, 2, 3, 4)] == [None, None, "PIN_BUDGET", "PIN_BUDGET"]
    engine.core.control(Unmerge(5, "sha256:a"))
    engine.core.control(SetPinned(6, adapter("c", nbytes=1), True))
    engine.run()
    assert reason(engine, 6) is None
