"""What a step tells the front: outputs, statistics, and the adapters when they have changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from loraplex_server.engine.adapters.host_tier import HostTier
from loraplex_server.engine.adapters.merging import Merging
from loraplex_server.engine.adapters.residency import Residency
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.scheduler import Row, Scheduler
from loraplex_server.engine.messages import Output, StepDone, StepStats

TABLE_SECONDS = 0.25
"""While rows run, the table of adapters is sent for new references alone only so often: it has a
row for each of maybe a thousand adapters, and with steady traffic some reference changes in every
step."""


class Reporter:
    """Knows what has been told, so that nothing is told twice and no change is kept back."""

    def __init__(
        self,
        scheduler: Scheduler,
        residency: Residency,
        host: HostTier,
        merging: Merging,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._residency = residency
        self._host = host
        self._merging = merging
        self._clock = clock
        self._version = 0
        self._uses = 0
        self._table_at = clock()
        self._held = (0, 0)

    def report(
        self,
        rows: Sequence[Row],
        outputs: list[Output],
        requests: Collection[Request],
        step: int,
        begun: float,
    ) -> StepDone | None:
        """The message of a step that computed `rows`; None if there is nothing to tell."""
        changed = self._table_is_due()
        held = (len(requests), self._scheduler.pool.used)
        # An abort brings no output, but its blocks are free now, and the front's gauges must know.
        if not (rows or outputs or changed or held != self._held):
            return None
        self._held = held
        table = self._residency.table() if changed else None
        return StepDone(outputs, self._stats(rows, requests, step, begun), table)

    def _table_is_due(self) -> bool:
        """Whether the table goes with this step; it is then taken to be sent."""
        version = self._residency.version + self._merging.version
        now = self._clock()
        recent = bool(self._scheduler.running) and now - self._table_at < TABLE_SECONDS
        if version == self._version and (self._residency.uses == self._uses or recent):
            return False
        self._version, self._uses = version, self._residency.uses
        self._table_at = now
        return True

    def _stats(
        self, rows: Sequence[Row], requests: Collection[Request], step: int, begun: float
    ) -> StepStats:
        decodes = sum(row.count == 1 for row in rows)
        mixes = [row.request.mix for row in rows]
        waiting = [r for r in requests if r.state is not RequestState.RUNNING]
        slots = self._residency.slots
        dense = {(r.slot, 1.0) for r in slots.residents.values() if r.merged_bytes}
        return StepStats(
            step=step,
            step_seconds=self._clock() - begun,
            decode_rows=decodes,
            prefill_tokens=sum(row.count for row in rows) - decodes,
            distinct_adapters=len({slot for mix in mixes for slot, _ in mix}),
            base_rows=sum(not mix for mix in mixes),
            running=len(self._scheduler.running),
            waiting=len(waiting),
            waiting_tokens=sum(len(r.tokens) for r in waiting),
            free_blocks=self._scheduler.pool.free,
            used_blocks=self._scheduler.pool.used,
            preemptions=self._scheduler.preemptions,
            adapter_bytes=slots.nbytes,
            evictions=self._residency.evictions,
            host_bytes=self._host.nbytes,
            merged_bytes=self._merging.nbytes,
            prefix_blocks=slots.prefix_blocks,
            merged_rows=sum(len(mix) == 1 and mix[0] in dense for mix in mixes),
            host_evictions=self._host.evictions,
            prefetches=self._residency.fetching.ahead,
            prefetch_hits=self._residency.fetching.hits,
        )
