"""Reports to the front: outputs, statistics, and the table of adapters when it has changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from loraplex_server.engine.adapters.adapters import Adapters
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.scheduler import BatchRow, Scheduler
from loraplex_server.engine.memory import MemoryGauge
from loraplex_server.engine.messages import Output, StepReport, StepStats
from loraplex_server.engine.passes.tally import PassTally
from loraplex_server.engine.statistics import BatchView

TABLE_SECONDS = 0.25
"""Shortest time between two tables that differ in references alone, while requests run.

The table has a row for each adapter, of which there may be a thousand, and under steady traffic
some reference changes in every step.
"""


class Reporter:
    """Builds the message of each step, and remembers which state the front was last sent."""

    def __init__(
        self,
        scheduler: Scheduler,
        adapters: Adapters,
        tally: PassTally,
        clock: Callable[[], float],
        take_mask_seconds: Callable[[], list[float]],
    ) -> None:
        """`take_mask_seconds` returns the durations of the masks since it was last called."""
        self._scheduler = scheduler
        self._tally = tally
        self._adapters = adapters
        self._clock = clock
        self._take_mask_seconds = take_mask_seconds
        self._memory = MemoryGauge(clock)
        self._version = 0
        self._uses = 0
        self._table_at = clock()
        self._held = (0, 0)
        self._prompt_tokens = self._generated = 0

    def report(
        self,
        rows: Sequence[BatchRow],
        outputs: list[Output],
        requests: Collection[Request],
        step: int,
        begun: float,
    ) -> StepReport | None:
        """The message of a step that read the pass of `rows`; None if nothing has changed.

        `requests` are the unfinished ones; the duration of the pass counts from `begun` on the
        engine's clock.
        """
        changed = self._table_is_due()
        held = (len(requests), self._scheduler.pool.used)
        # An abort brings no output, but it frees blocks, which the front's gauges show.
        if not (rows or outputs or changed or held != self._held):
            return None
        self._held = held
        self._generated += sum(len(output.token_ids) for output in outputs)
        table = self._adapters.statuses() if changed else None
        return StepReport(outputs, self._stats(rows, requests, step, begun), table)

    def view(self, op: int, requests: Collection[Request], steps: int) -> BatchView:
        """The batch as it is now. Costs time per request, and nothing unless it is asked for."""
        running = [each for each in requests if each.state is RequestState.RUNNING]
        pool, slots = self._scheduler.pool, self._adapters.slots
        return BatchView(
            op=op,
            prefill=[each.id for each in running if each.remaining > 1],
            decode=[each.id for each in running if each.remaining <= 1],
            waiting=[each.id for each in requests if each.state is not RequestState.RUNNING],
            steps=steps,
            generated_tokens=self._generated,
            prompt_tokens=self._prompt_tokens,
            blocks=pool.num_blocks,
            used_blocks=pool.used,
            cached_blocks=pool.cached,
            adapter_bytes=slots.nbytes,
            adapter_bytes_limit=slots.budget,
            max_rows=self._scheduler.limits.max_running,
        )

    def _table_is_due(self) -> bool:
        """Whether this step's message carries the table. If so, it is noted as sent."""
        version, uses = self._adapters.version, self._adapters.slots.uses
        now = self._clock()
        recent = bool(self._scheduler.running) and now - self._table_at < TABLE_SECONDS
        if version == self._version and (uses == self._uses or recent):
            return False
        self._version, self._uses = version, uses
        self._table_at = now
        return True

    def _stats(
        self, rows: Sequence[BatchRow], requests: Collection[Request], step: int, begun: float
    ) -> StepStats:
        counts = [row.count for row in rows]
        decodes = counts.count(1)
        prefill = sum(counts) - decodes
        self._prompt_tokens += prefill
        mixes = [row.mix for row in rows]
        adapters, fetching = self._adapters, self._adapters.residency.fetching
        prefixes = self._scheduler.prefixes
        merged: set[str] = set()
        if adapters.merging.nbytes:
            merged = {r.digest for r in adapters.slots.residents.values() if r.merged_bytes}
        return StepStats(
            step=step,
            step_seconds=self._clock() - begun,
            decode_rows=decodes,
            prefill_tokens=prefill,
            distinct_adapters=len({slot for mix in {*mixes} for slot, _ in mix}),
            base_rows=mixes.count(()),
            running=len(self._scheduler.running),
            waiting=sum(r.state is not RequestState.RUNNING for r in requests),
            free_blocks=self._scheduler.pool.free,
            used_blocks=self._scheduler.pool.used,
            preemptions=self._scheduler.preemptions,
            adapter_bytes=adapters.slots.nbytes,
            evictions=adapters.slots.evictions,
            host_bytes=adapters.host.nbytes,
            merged_bytes=adapters.merging.nbytes,
            prefix_blocks=adapters.slots.prefix_blocks,
            merged_rows=_rows_of(merged, rows) if merged else 0,
            host_evictions=adapters.host.evictions,
            prefetches=fetching.ahead,
            prefetch_hits=fetching.hits,
            waiting_turns=len(self._scheduler.turns),
            memory_bytes=self._memory.nbytes,
            accounted_bytes=self._memory.at_start + adapters.process_bytes,
            wasted_rows=self._tally.wasted_rows,
            out_of_memory=self._tally.out_of_memory,
            waiting_accounts=self._scheduler.queue.waiting_accounts,
            set_back=self._tally.set_back,
            kept_blocks=self._scheduler.pool.kept,
            prefix_lookups=prefixes.lookups,
            prefix_hits=prefixes.hits,
            prefix_evictions=prefixes.evictions,
            mask_seconds=self._take_mask_seconds(),
        )


def _rows_of(adapters: set[str], rows: Sequence[BatchRow]) -> int:
    """Number of rows that one of these adapters alone computes, at weight 1."""
    return sum(bool(row.mix) and row.request.sole_adapter in adapters for row in rows)
