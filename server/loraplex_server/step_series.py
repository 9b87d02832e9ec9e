"""The series that every step of the engine updates: only those whose values have changed."""

from __future__ import annotations

from typing import Final, TypeVar

from prometheus_client import Counter, Gauge

from loraplex_server.engine.messages import StepStats
from loraplex_server.series import Series

M = TypeVar("M", Gauge, Counter)

_GAUGES: Final = (
    ("free_blocks", "kv_blocks", ("free",)),
    ("used_blocks", "kv_blocks", ("used",)),
    ("kept_blocks", "prefix_cache_blocks", ()),
    ("adapter_bytes", "adapter_bytes", ("device",)),
    ("host_bytes", "adapter_bytes", ("host",)),
    ("merged_bytes", "adapter_bytes", ("merged",)),
    ("prefix_blocks", "adapter_prefix_blocks", ("used",)),
    ("waiting_turns", "sampling_waiting_requests", ()),
    ("waiting_accounts", "waiting_accounts", ()),
    ("memory_bytes", "engine_memory_bytes", ("used",)),
    ("accounted_bytes", "engine_memory_bytes", ("accounted",)),
)
"""Fields of `StepStats`, and the families and labels that show them."""

_COUNTERS: Final = (
    ("preemptions", "preemptions", ()),
    ("prefix_lookups", "prefix_cache_lookups", ()),
    ("prefix_hits", "prefix_cache_hits", ()),
    ("prefix_evictions", "prefix_cache_evictions", ()),
    ("wasted_rows", "wasted_rows", ()),
    ("set_back", "set_back_requests", ()),
    ("out_of_memory", "out_of_memory", ()),
    ("evictions", "adapter_evictions", ("device",)),
    ("host_evictions", "adapter_evictions", ("host",)),
    ("prefetches", "adapter_prefetches", ()),
    ("prefetch_hits", "adapter_prefetch_hits", ()),
)
"""The same of numbers since the engine's start."""


class StepSeries:
    """Shows the statistics of the latest step, and counts over the restarts of the engine."""

    def __init__(self, series: Series) -> None:
        self._series = series
        rows = series.batch_rows
        self._rows = rows.labels("decode"), rows.labels("base"), rows.labels("merged")
        self._gauges: list[tuple[str, Gauge]] = [
            (field, _child(getattr(series, family), labels)) for field, family, labels in _GAUGES
        ]
        self._counters: list[tuple[str, Counter]] = [
            (field, _child(getattr(series, family), labels)) for field, family, labels in _COUNTERS
        ]
        self._free_prefix_blocks = series.adapter_prefix_blocks.labels("free")
        self._prefix_blocks = 0
        self._usage = 0.0
        self._shown: dict[str, int] = {}
        self._counted: dict[str, int] = {}

    def show(self, stats: StepStats) -> None:
        """Records the statistics of one step."""
        series = self._series
        if stats.decode_rows or stats.prefill_tokens:
            decode, base, merged = self._rows
            decode.observe(stats.decode_rows)
            base.observe(stats.base_rows)
            merged.observe(stats.merged_rows)
            series.batch_distinct_adapters.observe(stats.distinct_adapters)
            series.engine_step_seconds.observe(stats.step_seconds)
            series.prefill_tokens.inc(stats.prefill_tokens)
        for seconds in stats.mask_seconds:
            series.structure_mask_seconds.observe(seconds)
        shown, counted = self._shown, self._counted
        for field, gauge in self._gauges:
            value = getattr(stats, field)
            if shown.get(field) != value:
                shown[field] = value
                gauge.set(value)
                if field == "prefix_blocks":
                    self._free_prefix_blocks.set(self._prefix_blocks - value)
        blocks = stats.used_blocks + stats.free_blocks
        self._show_usage(stats.used_blocks / blocks if blocks else 0.0)
        for field, counter in self._counters:
            value = getattr(stats, field)
            # The engine counts from its own start; a Prometheus counter continues over restarts.
            before = counted.get(field, 0)
            if value != before:
                counted[field] = value
                counter.inc(max(0, value - before))

    def show_ready(self, blocks: int, prefix_blocks: int) -> None:
        """An engine is ready, with so many KV blocks, and so many for virtual tokens."""
        self._prefix_blocks = prefix_blocks
        self._show_nothing()
        self._shown["free_blocks"] = blocks
        self._series.kv_blocks.labels("free").set(blocks)

    def show_lost(self) -> None:
        """The engine was lost; its successor counts from 0."""
        self._counted.clear()
        self._show_nothing()

    def _show_usage(self, ratio: float) -> None:
        if ratio != self._usage:
            self._usage = ratio
            self._series.kv_usage_ratio.set(ratio)

    def _show_nothing(self) -> None:
        """Sets the gauges of an engine without requests and adapters."""
        for field, gauge in self._gauges:
            if field != "free_blocks":
                self._shown[field] = 0
                gauge.set(0)
        self._free_prefix_blocks.set(self._prefix_blocks)
        self._show_usage(0.0)


def _child(family: M, labels: tuple[str, ...]) -> M:
    return family.labels(*labels) if labels else family
