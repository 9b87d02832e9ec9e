"""One report and one table of adapters from those of several engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import structs

from loraplex_server.engine.messages import AdapterStatus, Hello, StepStats
from loraplex_server.engine.statistics import BatchView

OF_THE_STEP: Final = (
    "step", "step_seconds", "decode_rows", "prefill_tokens", "distinct_adapters", "base_rows",
    "merged_rows",
)  # fmt: skip
"""Statistics of one step, which stay those of its engine."""

LISTED: Final = ("mask_seconds",)
"""The same, as lists."""

SUMMED: Final = (
    "running", "waiting", "free_blocks", "used_blocks", "adapter_bytes", "host_bytes",
    "merged_bytes", "prefix_blocks", "waiting_turns", "waiting_accounts", "memory_bytes",
    "accounted_bytes", "kept_blocks",
)  # fmt: skip
"""States of an engine; together they are the sums over the engines that are up."""

COUNTED: Final = (
    "preemptions", "evictions", "host_evictions", "prefetches", "prefetch_hits", "wasted_rows",
    "set_back", "out_of_memory", "prefix_lookups", "prefix_hits", "prefix_evictions",
)  # fmt: skip
"""Numbers since an engine started; together they also count those of lost engines."""

_NUMBERS: Final[dict[str, Any]] = dict.fromkeys((*OF_THE_STEP, *SUMMED, *COUNTED), 0)

NOTHING: Final = StepStats(**_NUMBERS)

_STATES: Final = ("host", "loading", "draining", "resident")
"""States of an adapter, the one that decides what callers see last."""


class JoinedStats:
    """Sums of the engines' statistics, kept up to date with each report."""

    def __init__(self, engines: int) -> None:
        self._last = [NOTHING] * engines
        self._sums: Counter[str] = Counter()

    def join(self, engine: int, stats: StepStats) -> StepStats:
        """Records an engine's statistics; returns them with the sums over all engines."""
        last, self._last[engine] = self._last[engine], stats
        sums = self._sums
        for name in (*SUMMED, *COUNTED):
            sums[name] += getattr(stats, name) - getattr(last, name)
        return structs.replace(stats, **sums)

    def on_ready(self, engine: int, hello: Hello) -> None:
        """An engine is up, and counts from 0."""
        free = structs.replace(NOTHING, free_blocks=hello.num_blocks)
        self.join(engine, free)

    def on_lost(self, engine: int) -> None:
        """An engine is away. What it counted stays counted."""
        last, self._last[engine] = self._last[engine], NOTHING
        for name in SUMMED:
            self._sums[name] -= getattr(last, name)

    def restart(self) -> None:
        """All engines are away: counts from 0 again."""
        self._sums.clear()

    def idle(self) -> StepStats:
        """The sums, as the statistics of a step that computed nothing."""
        return structs.replace(NOTHING, **self._sums)


def join_tables(
    tables: Sequence[Mapping[str, AdapterStatus]], devices: Sequence[str]
) -> dict[str, AdapterStatus]:
    """The table of all engines; each adapter with the devices that hold it.

    An adapter is resident if it is on some device. Bytes, blocks and references are summed.
    """
    found: dict[str, list[tuple[str, AdapterStatus]]] = {}
    for device, table in zip(devices, tables, strict=True):
        for digest, status in table.items():
            found.setdefault(digest, []).append((device, status))
    return {digest: _join(places) for digest, places in found.items()}


def _join(places: Sequence[tuple[str, AdapterStatus]]) -> AdapterStatus:
    statuses = [status for _, status in places]
    held = [device for device, each in places if each.state in ("resident", "draining")]
    best = max(statuses, key=lambda each: _STATES.index(each.state))
    if len(statuses) == 1:
        return structs.replace(best, devices=held)
    return structs.replace(
        best,
        devices=held,
        bytes=sum(each.bytes for each in statuses),
        refs=sum(each.refs for each in statuses),
        host_bytes=sum(each.host_bytes for each in statuses),
        merged_bytes=sum(each.merged_bytes for each in statuses),
        prefix_blocks=sum(each.prefix_blocks for each in statuses),
        pinned=any(each.pinned for each in statuses),
        last_used=max(each.last_used for each in statuses),
    )


def join_hellos(hellos: Sequence[Hello]) -> Hello:
    """The first engine's message with the blocks and budgets of all engines together."""

    def total(name: str) -> int:
        return sum(getattr(hello, name) for hello in hellos)

    return structs.replace(
        hellos[0],
        num_blocks=total("num_blocks"),
        adapter_budget_bytes=total("adapter_budget_bytes"),
        host_budget_bytes=total("host_budget_bytes"),
        merge_budget_bytes=total("merge_budget_bytes"),
        prefix_blocks=total("prefix_blocks"),
        num_slots=total("num_slots"),
    )


def join_views(views: Sequence[BatchView]) -> BatchView:
    """The requests of all engines, and the sums of their numbers."""

    def total(name: str) -> int:
        return sum(getattr(view, name) for view in views)

    return BatchView(
        op=0,
        prefill=[number for view in views for number in view.prefill],
        decode=[number for view in views for number in view.decode],
        waiting=[number for view in views for number in view.waiting],
        steps=total("steps"),
        generated_tokens=total("generated_tokens"),
        prompt_tokens=total("prompt_tokens"),
        blocks=total("blocks"),
        used_blocks=total("used_blocks"),
        cached_blocks=total("cached_blocks"),
        adapter_bytes=total("adapter_bytes"),
        adapter_bytes_limit=total("adapter_bytes_limit"),
        max_rows=total("max_rows"),
    )
