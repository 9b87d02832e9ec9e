"""Metrics: bounded labels, counters that only grow, and what the engine reports."""

from __future__ import annotations

import re

import pytest
from loraplex_model.base.refusal import Reason
from loraplex_server.engine.messages import (
    AdapterStatus,
    Failure,
    LoadDone,
    MergeDone,
    StepReport,
    StepStats,
)
from loraplex_server.metrics import Metrics
from loraplex_server.series import BASE_LABEL, OTHER_LABEL
from prometheus_client import CollectorRegistry, generate_latest


def fresh(labels: int = 200) -> Metrics:
    return Metrics(CollectorRegistry(), "1.2.3", labels)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"loraplex_{name}", labels)


def adapters_seen(metrics: Metrics) -> set[str]:
    text = generate_latest(metrics.registry).decode()
    return set(re.findall(r'adapter="([^"]+)"', text))


def step(**changes: object) -> StepStats:
    zero = dict.fromkeys(StepStats.__struct_fields__, 0)
    return StepStats(**{**zero, "mask_seconds": [], **changes})  # type: ignore[arg-type]


def test_ten_thousand_names_make_at_most_the_allowed_labels() -> None:
    metrics = fresh(labels=200)
    for i in range(5_000):
        metrics.adapter_registered(f"adapter-{i}")
    for i in range(10_000):  # half of them nobody registered
        metrics.generation_started([f"adapter-{i}"], 1)
        metrics.generation_ended([f"adapter-{i}"], "OK", 1)
    seen = adapters_seen(metrics)
    assert len(seen - {BASE_LABEL, OTHER_LABEL}) == 200
    assert value(metrics, "adapter_requests_total", adapter=OTHER_LABEL, code="OK") == 9_800
    assert len(generate_latest(metrics.registry)) < 200_000


def test_unknown_names_never_become_labels() -> None:
    metrics = fresh()
    metrics.generation_ended(["never-registered"], "OK", 1)
    assert adapters_seen(metrics) == {BASE_LABEL, OTHER_LABEL}


def test_a_deleted_adapter_takes_its_series_with_it_and_frees_its_place() -> None:
    metrics = fresh(labels=1)
    metrics.adapter_registered("a")
    metrics.generation_ended(["a"], "OK", 1)
    metrics.adapter_deleted("a")
    assert "a" not in adapters_seen(metrics)
    assert value(metrics, "adapters", state="registered") == 0
    metrics.generation_ended(["a"], "OK", 1)  # a request that outlived it
    assert "a" not in adapters_seen(metrics)
    metrics.adapter_registered("b")
    metrics.generation_ended(["b"], "OK", 1)
    assert "b" in adapters_seen(metrics)


def test_no_histogram_carries_an_adapter() -> None:
    metrics = fresh()
    metrics.adapter_registered("a")
    metrics.generation_started(["a"], 3)
    metrics.generation_ended(["a"], "OK", 4)
    for line in generate_latest(metrics.registry).decode().splitlines():
        assert not ("_bucket" in line and "adapter=" in line)


def test_counters_go_on_over_a_restart_of_the_engine() -> None:
    metrics = fresh()
    metrics.on_step(StepReport([], step(preemptions=3, evictions=2, host_evictions=4)))
    metrics.on_step(StepReport([], step(preemptions=5, evictions=2, prefetches=3, prefetch_hits=2)))
    metrics.on_restart()
    metrics.on_step(StepReport([], step(preemptions=1, evictions=1, prefetches=1)))
    assert value(metrics, "preemptions_total") == 6
    assert value(metrics, "adapter_evictions_total", tier="device") == 3
    assert value(metrics, "adapter_evictions_total", tier="host") == 4
    assert value(metrics, "adapter_prefetches_total") == 4
    assert value(metrics, "adapter_prefetch_hits_total") == 2
    assert value(metrics, "engine_restarts_total") == 1


def test_use_of_the_prefix_cache_is_counted_over_a_restart_and_its_blocks_are_not() -> None:
    metrics = Metrics(CollectorRegistry())
    before = step(kept_blocks=9, prefix_lookups=7, prefix_hits=3, prefix_evictions=2)
    metrics.on_step(StepReport([], before))
    assert value(metrics, "prefix_cache_blocks") == 9
    metrics.on_restart()
    assert value(metrics, "prefix_cache_blocks") == 0
    metrics.on_step(StepReport([], step(kept_blocks=1, prefix_lookups=2, prefix_hits=1)))
    assert value(metrics, "prefix_cache_blocks") == 1
    assert value(metrics, "prefix_cache_lookups_total") == 9
    assert value(metrics, "prefix_cache_hits_total") == 4
    assert value(metrics, "prefix_cache_evictions_total") == 2


def test_wasted_rows_and_lacks_of_memory_go_on_over_a_restart_too() -> None:
    metrics = fresh()
    metrics.on_step(StepReport([], step(wasted_rows=7, out_of_memory=1)))
    metrics.on_restart()
    metrics.on_step(StepReport([], step(wasted_rows=2)))
    metrics.on_step(StepReport([], step(wasted_rows=3, out_of_memory=1)))
    assert value(metrics, "wasted_rows_total") == 10
    assert value(metrics, "out_of_memory_total") == 2


def test_the_engines_table_becomes_gauges_and_is_empty_after_a_restart() -> None:
    metrics = fresh()
    table = [
        AdapterStatus("sha256:a", "resident", 10, 1, pinned=True, merged_bytes=7),
        AdapterStatus("sha256:b", "resident", 10, 0),
        AdapterStatus("sha256:c", "loading", 0, 1),
        AdapterStatus("sha256:d", "host", 0, 0, host_bytes=5),
    ]
    held = {"adapter_bytes": 20, "host_bytes": 5, "merged_bytes": 7, "prefix_blocks": 3}
    metrics.on_step(StepReport([], step(**held), table))
    counts = {"resident": 2, "loading": 1, "host": 1, "pinned": 1, "merged": 1, "draining": 0}
    for state, count in counts.items():
        assert value(metrics, "adapters", state=state) == count, state
    sizes = {"device": 20, "host": 5, "merged": 7}
    for tier, size in sizes.items():
        assert value(metrics, "adapter_bytes", tier=tier) == size, tier
    assert value(metrics, "adapter_prefix_blocks", state="used") == 3
    metrics.on_restart()
    for state in counts:
        assert value(metrics, "adapters", state=state) == 0, state
    for tier in sizes:
        assert value(metrics, "adapter_bytes", tier=tier) == 0, tier
    assert value(metrics, "adapter_prefix_blocks", state="used") == 0


@pytest.mark.fault("churn-grows-memory")
def test_memory_in_use_and_accounted_for_can_be_compared() -> None:
    metrics = fresh()
    metrics.on_step(StepReport([], step(memory_bytes=70, accounted_bytes=50, waiting_turns=4)))
    assert value(metrics, "engine_memory_bytes", kind="used") == 70
    assert value(metrics, "engine_memory_bytes", kind="accounted") == 50
    assert value(metrics, "sampling_waiting_requests") == 4
    metrics.on_restart()
    assert value(metrics, "engine_memory_bytes", kind="used") == 0
    assert value(metrics, "sampling_waiting_requests") == 0


def test_loads_are_counted_by_tier_and_result() -> None:
    metrics = fresh()
    metrics.on_load(LoadDone("sha256:a", 0.5))
    metrics.on_load(LoadDone("sha256:a", 0.01, tier="host"))
    metrics.on_load(LoadDone("sha256:b", 0.5, Failure(Reason.ADAPTER_INVALID, "torn")))
    assert value(metrics, "adapter_loads_total", tier="disk", result="ok") == 1
    assert value(metrics, "adapter_loads_total", tier="host", result="ok") == 1
    assert value(metrics, "adapter_loads_total", tier="disk", result="error") == 1
    assert value(metrics, "adapter_load_seconds_count", tier="disk") == 1
    assert value(metrics, "adapter_load_seconds_sum", tier="host") == 0.01


def test_merges_are_counted_by_change_and_result() -> None:
    metrics = fresh()
    metrics.on_merge(MergeDone("sha256:a", True, 0.5))
    metrics.on_merge(MergeDone("sha256:a", False, 0.0))
    failed = Failure(Reason.MERGE_BUDGET, "no room")
    metrics.on_merge(MergeDone("sha256:c", True, 0.0, error=failed))
    for change, result in (("merge", "ok"), ("merge", "error"), ("unmerge", "ok")):
        labels = {"change": change, "cause": "order", "result": result}
        assert value(metrics, "adapter_merges_total", **labels) == 1, labels
    assert value(metrics, "adapter_merge_seconds_count") == 1


def test_what_is_active_is_counted_by_adapter_and_survives_deletions() -> None:
    metrics = fresh()
    metrics.adapter_registered("a")
    with metrics.generation([]), metrics.generation(["a"]):
        assert value(metrics, "adapter_active_requests", adapter="a") == 1
        assert value(metrics, "adapter_active_requests", adapter=BASE_LABEL) == 1
        metrics.adapter_deleted("a")
        metrics.adapter_registered("a")
        with metrics.generation(["a"]):
            assert value(metrics, "adapter_active_requests", adapter="a") == 1
    # The one that outlived the deletion took nothing from its successor's number.
    assert value(metrics, "adapter_active_requests", adapter="a") == 0
    assert value(metrics, "adapter_active_requests", adapter=BASE_LABEL) == 0
    metrics.generation_ended(["a"], "OK", 1)
    assert (value(metrics, "adapter_last_use_timestamp_seconds", adapter="a") or 0) > 0


def test_each_cause_for_not_serving_adapters_is_set_on_its_own() -> None:
    metrics = fresh()
    metrics.unservable({"base": 1, "missing": 2})
    metrics.unservable({"quarantined": 3})
    metrics.unservable({"base": 0, "missing": 4})
    shown = [
        value(metrics, "adapters_unservable", cause=cause)
        for cause in ("base", "missing", "quarantined")
    ]
    assert shown == [0, 4, 3]


def test_every_name_has_the_prefix_and_its_unit() -> None:
    metrics = fresh()
    for family in metrics.registry.collect():
        assert re.fullmatch(r"loraplex_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        if family.type == "histogram" and "batch" not in family.name:
            assert family.name.endswith("_seconds")


def test_two_servers_in_one_process_share_nothing() -> None:
    one, other = fresh(), fresh()
    one.generation_ended([], "OK", 5)
    assert value(other, "generated_tokens_total") == 0
