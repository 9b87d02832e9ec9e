"""Dense copies of the matrices that an adapter changes: when they are made, used and dropped.

A merge is computed on a loader thread, into a reserved part of the merge budget, and published
between steps. From then on the rows that use that adapter alone at weight 1 use the copies; all
other rows use the untouched base. Dropping the copies restores every bit. The copies never exceed
the budget: a merge without room is refused before any work.

An adapter merged by order is held on the device until it is unmerged or unloaded, and counts among
the pinned ones. An adapter merged automatically is not held: it loses its copies when it is evicted
or when an order needs their room. Orders for one adapter take effect in their order.

    order --expect--> (its adapter loads) --accept--> queue --begin--> computed --publish--> in use
                              |                         |                  |
                            refuse                     fail               fail
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.auto_merge import AutoMerge, Measurement, Move
from loraplex_server.engine.adapters.host_tier import HostTier
from loraplex_server.engine.adapters.loader import (
    LoadLanes,
    MergeResult,
    MergeWeights,
    failure_of,
)
from loraplex_server.engine.adapters.slots import AdapterSlots, Resident
from loraplex_server.engine.batching.scheduler import BatchRow
from loraplex_server.engine.messages import (
    AdapterRef,
    ControlDone,
    Failure,
    Merge,
    MergeDone,
    Reply,
    Unmerge,
)
from loraplex_server.engine.runner.protocol import MergedWeights, ModelRunner

log = logging.getLogger(__name__)

GONE = Failure(Reason.ADAPTER_UNLOADED, "the adapter was unloaded before it was merged")
NOTHING = Failure(Reason.MERGE_UNSUPPORTED, "the adapter changes no matrix that could be merged")
HOLD = Failure(Reason.PIN_BUDGET, "merged and pinned adapters may take half of the adapter memory")


@dataclass(slots=True, eq=False)
class _Merge:
    """An accepted merge: the order's `op` (None: automatic), its reservation and its result."""

    op: int | None
    resident: Resident
    reserved: int = 0
    copies: MergedWeights | None = None
    seconds: float = 0.0


class Merging:
    """The merges that are ordered, the one that is being computed, and the copies in use.

    Attributes:
        version: grows whenever an adapter is merged or unmerged.
    """

    def __init__(
        self,
        runner: ModelRunner,
        slots: AdapterSlots,
        host: HostTier,
        lanes: LoadLanes,
        clock: Callable[[], float],
        reply: Callable[[Reply], None],
        automatic: AutoMerge | None = None,
    ) -> None:
        """`reply` receives answers to orders, and a `MergeDone` for every merge and unmerge."""
        self._runner = runner
        self._slots = slots
        self._host = host
        self._lanes = lanes
        self._clock = clock
        self._reply = reply
        self._automatic = automatic
        self._ordered: dict[int, str] = {}
        self._unmerges: dict[str, list[int]] = {}
        self._queue: deque[_Merge] = deque()
        self._current: _Merge | None = None
        self.version = 0

    # orders

    def expect(self, order: Merge) -> None:
        """Notes an order whose adapter is still to be loaded; `accept` or `refuse` follows."""
        self._ordered[order.op] = order.adapter.digest

    def accept(self, op: int, resident: Resident) -> None:
        """Queues an order's merge: its adapter is on the device."""
        if not self._slots.may_hold(resident):
            self.refuse(op, HOLD)
        else:
            self._queue.append(_Merge(op, resident))

    def refuse(self, op: int, failure: Failure) -> None:
        """Answers an order with a failure."""
        self._answer(op, failure)

    def unmerge(self, order: Unmerge) -> None:
        """Drops an adapter's copies, after the merges of it that were ordered before."""
        self._unmerges.setdefault(order.digest, []).append(order.op)
        self._unmerge_if_due(order.digest)

    # state

    @property
    def is_idle(self) -> bool:
        """Whether no order is unanswered and no merge is queued or under way."""
        return not (self._ordered or self._unmerges or self._queue) and self._current is None

    @property
    def has_more(self) -> bool:
        """Whether `begin` or `publish` would have something to do now."""
        if self._current is None:
            return bool(self._queue) and self._lanes.is_free(background=True)
        return self._current.copies is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies in use."""
        return sum(r.merged_bytes for r in self._slots.residents.values())

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of the copies in use and of those being computed."""
        return self.nbytes + (self._current.reserved if self._current is not None else 0)

    def check(self) -> None:
        """Verifies the budget. Raises `AssertionError`."""
        assert self.reserved_nbytes <= self._runner.merge_budget_bytes, "merges exceed their budget"

    # progress

    def end_merge(self, result: MergeResult) -> None:
        """Accepts the result of a finished merge."""
        merge = self._current
        assert merge is not None, "a merge ended that was not begun"
        assert merge.resident.digest == result.ref.digest, "another adapter was merged"
        merge.seconds = result.seconds
        if result.merged is None:
            assert result.failure is not None
            self._fail(merge, result.failure)
        elif not self._is_resident(merge):
            self._fail(merge, GONE)
        elif result.merged.nbytes > merge.reserved and not self._fits(result.merged.nbytes, merge):
            self._fail(merge, self._no_room(result.merged.nbytes))
        else:
            merge.reserved = result.merged.nbytes
            merge.copies = result.merged

    def begin(self) -> None:
        """Starts the next merge if a lane is free. Called between steps."""
        self._decide()
        while self._current is None and self._queue and self._lanes.is_free(background=True):
            merge = self._queue.popleft()
            failure = self._objection(merge)
            if failure is not None:
                self._fail(merge, failure)
            elif merge.resident.merged_bytes:
                self._complete(merge)
            else:
                self._start(merge)

    def publish(self) -> None:
        """Lets rows use the copies that are computed, if any. Called between steps."""
        merge = self._current
        if merge is None or merge.copies is None:
            return
        resident, begun = merge.resident, self._clock()
        try:
            self._runner.publish_merge(resident.slot, merge.copies)
        except Exception as error:
            self._fail(merge, failure_of(error, f"publishing the merge of {resident.digest}"))
            return
        merge.seconds += self._clock() - begun
        resident.merged_bytes = merge.copies.nbytes
        self._current = None
        self.version += 1
        if merge.op is None:
            assert self._automatic is not None
            self._automatic.merged()
            log.info("trying adapter %s merged", resident.digest)
        else:
            self._reply(MergeDone(resident.digest, True, merge.seconds))
            self._complete(merge)

    def on_removed(self, resident: Resident) -> None:
        """Notes that an adapter has left the device, and its copies with it."""
        if resident.merged_bytes:
            resident.merged_bytes = 0
            self._on_unmerged(resident, 0.0)
        current = self._current
        if current is not None and current.resident is resident and current.copies is not None:
            self._fail(current, GONE)
        for merge in [merge for merge in self._queue if merge.resident is resident]:
            self._queue.remove(merge)
            self._fail(merge, GONE)

    def observe(self, rows: Sequence[BatchRow], seconds: float, is_quiet: bool) -> None:
        """Shows automatic merging a forward pass; see `AutoMerge.observe`."""
        if self._automatic is None:
            return
        alone = Counter(d for row in rows if (d := row.request.sole_adapter) is not None)
        tokens = sum(row.count for row in rows)
        self._automatic.observe(alone, len(rows), tokens, seconds, is_quiet)

    # automatic merges

    def _decide(self) -> None:
        automatic = self._automatic
        decision = automatic.decide(self._clock()) if automatic is not None else None
        if automatic is None or decision is None:
            return
        resident = self._slots.residents.get(decision.digest)
        match decision.kind:
            case Move.TRY if resident is not None and _may_be_tried(resident):
                self._queue.append(_Merge(None, resident))
            case Move.TRY:
                automatic.ended(self._clock())
            case Move.KEEP:
                self._report(decision.digest, True, 0.0, decision.measurement)
            case Move.LEAVE if resident is not None and resident.merged_bytes:
                self._drop(resident)

    def _on_unmerged(self, resident: Resident, seconds: float) -> None:
        """Reports that an adapter's copies are gone; dropping them took `seconds`."""
        self.version += 1
        if self._automatic is not None and self._automatic.subject == resident.digest:
            measurement = self._automatic.measurement
            self._automatic.ended(self._clock())
            self._report(resident.digest, False, seconds, measurement)
        else:
            self._reply(MergeDone(resident.digest, False, seconds))

    def _report(
        self, digest: str, merged: bool, seconds: float, measured: Measurement | None
    ) -> None:
        before, after = (measured.unmerged, measured.merged) if measured else (0.0, 0.0)
        done = MergeDone(digest, merged, seconds, True, before, after)
        log.info("%s", done)
        self._reply(done)

    # one merge

    def _objection(self, merge: _Merge) -> Failure | None:
        """Why a merge cannot start now; None if it can, or if the adapter is merged already.

        An order takes the room of automatically merged adapters.
        """
        resident = merge.resident
        if not self._is_resident(merge):
            return GONE
        if resident.merged_bytes:
            return None
        if not resident.merge_nbytes:
            return NOTHING
        while not self._fits(resident.merge_nbytes, merge):
            given_up = self._merged_automatically()
            if merge.op is None or given_up is None:
                return self._no_room(resident.merge_nbytes)
            self._drop(given_up)
        if merge.op is not None and not self._slots.may_hold(resident):
            return HOLD
        return None

    def _start(self, merge: _Merge) -> None:
        resident = merge.resident
        merge.reserved = resident.merge_nbytes
        resident.merge_ordered |= merge.op is not None
        self._current = merge
        ref = AdapterRef(resident.digest, resident.path)
        held = self._host.get(resident.digest)
        self._lanes.start(MergeWeights(ref, held.adapter if held else None), background=True)

    def _complete(self, merge: _Merge) -> None:
        """Answers the order of a merge whose copies are in use."""
        if merge.op is None:
            return
        merge.resident.merge_ordered = True
        if self._automatic is not None and self._automatic.subject == merge.resident.digest:
            self._automatic.reset()
        self._answer(merge.op)

    def _fail(self, merge: _Merge, failure: Failure) -> None:
        if self._current is merge:
            self._current = None
            merge.resident.merge_ordered = False
        digest = merge.resident.digest
        automatic = merge.op is None
        self._reply(MergeDone(digest, False, merge.seconds, automatic, error=failure))
        if merge.op is not None:
            self.refuse(merge.op, failure)
        elif self._automatic is not None:
            self._automatic.ended(self._clock())

    def _answer(self, op: int, failure: Failure | None = None) -> None:
        digest = self._ordered.pop(op)
        self._reply(ControlDone(op, failure))
        self._unmerge_if_due(digest)

    def _unmerge_if_due(self, digest: str) -> None:
        if digest not in self._unmerges or digest in self._ordered.values():
            return
        resident = self._slots.residents.get(digest)
        if resident is not None and resident.merged_bytes:
            self._drop(resident)
        for op in self._unmerges.pop(digest):
            self._reply(ControlDone(op))

    def _drop(self, resident: Resident) -> None:
        begun = self._clock()
        self._runner.remove_merge(resident.slot)
        resident.merged_bytes = 0
        resident.merge_ordered = False
        self._on_unmerged(resident, self._clock() - begun)

    def _is_resident(self, merge: _Merge) -> bool:
        """Whether the adapter is still in the slot for which the merge was accepted."""
        there = self._slots.residents.get(merge.resident.digest)
        return there is merge.resident and not there.draining

    def _merged_automatically(self) -> Resident | None:
        residents = self._slots.residents.values()
        return next((r for r in residents if r.merged_bytes and not r.merge_ordered), None)

    def _fits(self, nbytes: int, merge: _Merge) -> bool:
        others = self.reserved_nbytes - (merge.reserved if merge is self._current else 0)
        return others + nbytes <= self._runner.merge_budget_bytes

    def _no_room(self, nbytes: int) -> Failure:
        text = (
            f"the dense copies take {nbytes} bytes; of the {self._runner.merge_budget_bytes} for "
            f"all, {self.reserved_nbytes} are in use"
        )
        return Failure(Reason.MERGE_BUDGET, text)


def _may_be_tried(resident: Resident) -> bool:
    return bool(resident.merge_nbytes) and not (resident.merged_bytes or resident.draining)
