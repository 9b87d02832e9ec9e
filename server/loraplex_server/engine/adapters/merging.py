"""Dense copies of the matrices that an adapter changes: when they are made, used and dropped.

A merge is computed beside the engine, in its reserved part of the merge budget, and published
between steps; rows of that adapter alone at weight 1 then use the copies, and all other rows the
untouched base. Dropping the copies undoes it to the bit. There is never more than the budget: a
merge for which there is no room is refused before any work.

An adapter merged by order is held on the device until it is unmerged or unloaded (and counts with
the pinned ones); one merged automatically is not, and gives up its copies when it is evicted or
when an order needs their room. Orders for one adapter take effect one after the other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.auto_merge import AutoMerge, Measurement, Move
from loraplex_server.engine.adapters.host_tier import HostTier
from loraplex_server.engine.adapters.loader import Desk, MergeResult, MergeWeights, failure_of
from loraplex_server.engine.adapters.slots import AdapterSlots, Resident
from loraplex_server.engine.messages import (
    AdapterRef,
    ControlDone,
    Failure,
    Merge,
    MergeDone,
    Unmerge,
)
from loraplex_server.engine.runner.protocol import MergedWeights, ModelRunner

log = logging.getLogger(__name__)

GONE = Failure(Reason.ADAPTER_UNLOADED, "the adapter was unloaded before it was merged")
NOTHING = Failure(Reason.MERGE_UNSUPPORTED, "the adapter changes no matrix that could be merged")
HOLD = Failure(Reason.PIN_BUDGET, "merged and pinned adapters may take half of the adapter memory")


@dataclass(slots=True, eq=False)
class _Job:
    """A merge that was accepted: who asked for it (None: the engine), and what it came to."""

    op: int | None
    resident: Resident
    reserved: int = 0
    merged: MergedWeights | None = None
    seconds: float = 0.0


class Merging:
    """The merges asked for, the one that is computed, and the copies in use.

    Attributes:
        replies: answers to orders, and `MergeDone`s; the owner takes them out.
        version: grows whenever an adapter is merged or unmerged.
    """

    def __init__(
        self,
        runner: ModelRunner,
        slots: AdapterSlots,
        host: HostTier,
        desk: Desk,
        clock: Callable[[], float],
        automatic: AutoMerge | None = None,
    ) -> None:
        self._runner = runner
        self._slots = slots
        self._host = host
        self._desk = desk
        self._clock = clock
        self._automatic = automatic
        self._ordered: dict[int, str] = {}
        self._unmerges: dict[str, list[int]] = {}
        self._queue: deque[_Job] = deque()
        self._job: _Job | None = None
        self.replies: list[ControlDone | MergeDone] = []
        self.version = 0

    # what is asked for

    def order(self, message: Merge) -> None:
        """Notes a merge whose adapter is still wanted; `ready` or `refuse` follows."""
        self._ordered[message.op] = message.adapter.digest

    def ready(self, op: int, resident: Resident) -> None:
        """The adapter of an order is on the device."""
        if not self._slots.may_hold(resident):
            self.refuse(op, HOLD)
        else:
            self._queue.append(_Job(op, resident))

    def refuse(self, op: int, failure: Failure | None) -> None:
        """Answers an order."""
        digest = self._ordered.pop(op)
        self.replies.append(ControlDone(op, failure))
        self._unmerge_if_due(digest)

    def unmerge(self, message: Unmerge) -> None:
        """Drops an adapter's copies, after the merges of it that were ordered before."""
        self._unmerges.setdefault(message.digest, []).append(message.op)
        self._unmerge_if_due(message.digest)

    @property
    def is_idle(self) -> bool:
        """Whether no order waits, nothing is computed, and nothing is left to be answered."""
        idle = not (self._ordered or self._unmerges or self._queue or self.replies)
        return idle and self._job is None

    @property
    def is_automatic(self) -> bool:
        """Whether merges may come without an order."""
        return self._automatic is not None

    # what comes of it

    @property
    def nbytes(self) -> int:
        """Bytes of the copies in use."""
        return sum(r.merged_bytes for r in self._slots.residents.values())

    @property
    def has_more(self) -> bool:
        """Whether `publish` would publish, or `begin` begin, if they were called now."""
        waits = self._job is not None and self._job.merged is not None
        can_begin = self._job is None and bool(self._queue) and self._desk.has_lane(True)
        return waits or can_begin

    def take(self, result: MergeResult) -> None:
        """Takes in what came of computing copies."""
        job = self._job
        assert job is not None
        assert job.resident.digest == result.ref.digest, "nobody asked for it"
        job.seconds = result.seconds
        if result.merged is None:
            self._fail(job, result.failure)
        elif not self._is_there(job):
            self._fail(job, GONE)
        elif result.merged.nbytes > job.reserved and not self._has_room(result.merged.nbytes, job):
            self._fail(job, self._no_room(result.merged.nbytes))
        else:
            job.reserved = result.merged.nbytes
            job.merged = result.merged

    def begin(self) -> None:
        """Begins the next merge, if there is one and it may: `automatic`'s if nobody ordered any.

        Called between steps.
        """
        self._decide()
        while self._job is None and self._queue and self._desk.has_lane(background=True):
            job = self._queue.popleft()
            failure = self._objection(job)
            if failure is not None:
                self._fail(job, failure)
            elif job.resident.merged_bytes:
                self._done(job)
            else:
                self._start(job)

    def publish(self) -> bool:
        """Lets rows use the copies that are computed; True if there were any. Between steps."""
        job = self._job
        if job is None or job.merged is None:
            return False
        resident, begun = job.resident, self._clock()
        try:
            self._runner.publish_merge(resident.slot, job.merged)
        except Exception as error:
            self._fail(job, failure_of(error, f"publishing the merge of {resident.digest}"))
            return True
        job.seconds += self._clock() - begun
        resident.merged_bytes = job.merged.nbytes
        self._job = None
        self.version += 1
        if job.op is None:
            assert self._automatic is not None
            self._automatic.merged()
            log.info("trying adapter %s merged", resident.digest)
        else:
            self.replies.append(MergeDone(resident.digest, True, job.seconds))
            self._done(job)
        return True

    def gone(self, resident: Resident) -> None:
        """Notes that an adapter has left the device, and its copies with it."""
        if resident.merged_bytes:
            resident.merged_bytes = 0
            self._left(resident, 0.0)
        job = self._job
        if job is not None and job.resident is resident and job.merged is not None:
            self._fail(job, GONE)
        for job in [job for job in self._queue if job.resident is resident]:
            self._queue.remove(job)
            self._fail(job, GONE)

    def observe(
        self, rows: Mapping[str, int], total: int, tokens: int, seconds: float, quiet: bool
    ) -> None:
        """Shows the automatic mode what a step was like; see `AutoMerge.observe`."""
        assert self._automatic is not None, "there is no automatic mode"
        self._automatic.observe(rows, total, tokens, seconds, quiet)

    def check(self) -> None:
        """Verifies the budget. Raises `AssertionError`."""
        assert self._in_use() <= self._runner.merge_budget_bytes, "merges exceed their budget"

    # automatic merges

    def _decide(self) -> None:
        automatic = self._automatic
        if automatic is None:
            return
        move = automatic.decide(self._clock())
        if move is None:
            return
        resident = self._slots.residents.get(move.digest)
        match move.kind:
            case Move.TRY if resident is not None and _may_be_tried(resident):
                self._queue.append(_Job(None, resident))
            case Move.TRY:
                automatic.failed(self._clock())
            case Move.KEEP:
                self._tell(move.digest, True, 0.0, move.measurement)
            case Move.LEAVE if resident is not None and resident.merged_bytes:
                self._drop(resident, move.measurement)

    def _left(self, resident: Resident, seconds: float) -> None:
        """Tells that an adapter's copies are gone."""
        self.version += 1
        if self._automatic is not None and self._automatic.subject == resident.digest:
            measurement = self._automatic.measurement
            self._automatic.gone(self._clock())
            self._tell(resident.digest, False, seconds, measurement)
        else:
            self.replies.append(MergeDone(resident.digest, False, seconds))

    def _tell(
        self, digest: str, merged: bool, seconds: float, measured: Measurement | None
    ) -> None:
        before, after = (measured.unmerged, measured.merged) if measured else (0.0, 0.0)
        done = MergeDone(digest, merged, seconds, True, before, after)
        log.info("%s", done)
        self.replies.append(done)

    # small things

    def _objection(self, job: _Job) -> Failure | None:
        """Why a merge cannot be begun now; None if it can, or is done already."""
        resident = job.resident
        if not self._is_there(job):
            return GONE
        if resident.merged_bytes:
            return None
        if not resident.merge_nbytes:
            return NOTHING
        while not self._has_room(resident.merge_nbytes, job):
            given_up = self._merged_automatically()
            if job.op is None or given_up is None:
                return self._no_room(resident.merge_nbytes)
            self._drop(given_up, None)
        if job.op is not None and not self._slots.may_hold(resident):
            return HOLD
        return None

    def _start(self, job: _Job) -> None:
        resident = job.resident
        job.reserved = resident.merge_nbytes
        resident.merge_ordered |= job.op is not None
        self._job = job
        ref = AdapterRef(resident.digest, resident.path)
        held = self._host.get(resident.digest)
        self._desk.start(MergeWeights(ref, held.adapter if held else None), background=True)

    def _done(self, job: _Job) -> None:
        """The order has come to its end: the copies are in use."""
        if job.op is None:
            return
        job.resident.merge_ordered = True
        if self._automatic is not None and self._automatic.subject == job.resident.digest:
            self._automatic.reset()
        self.refuse(job.op, None)

    def _fail(self, job: _Job, failure: Failure | None) -> None:
        assert failure is not None
        if self._job is job:
            self._job = None
            job.resident.merge_ordered = False
        digest = job.resident.digest
        automatic = job.op is None
        self.replies.append(MergeDone(digest, False, job.seconds, automatic, error=failure))
        if job.op is not None:
            self.refuse(job.op, failure)
        elif self._automatic is not None:
            self._automatic.failed(self._clock())

    def _unmerge_if_due(self, digest: str) -> None:
        if digest not in self._unmerges or digest in self._ordered.values():
            return
        resident = self._slots.residents.get(digest)
        if resident is not None and resident.merged_bytes:
            self._drop(resident, None)
        for op in self._unmerges.pop(digest):
            self.replies.append(ControlDone(op))

    def _drop(self, resident: Resident, measurement: Measurement | None) -> None:
        begun = self._clock()
        self._runner.remove_merge(resident.slot)
        resident.merged_bytes = 0
        resident.merge_ordered = False
        self._left(resident, self._clock() - begun)

    def _is_there(self, job: _Job) -> bool:
        there = self._slots.residents.get(job.resident.digest)
        return there is job.resident and not there.draining

    def _merged_automatically(self) -> Resident | None:
        residents = self._slots.residents.values()
        return next((r for r in residents if r.merged_bytes and not r.merge_ordered), None)

    def _in_use(self) -> int:
        return self.nbytes + (self._job.reserved if self._job is not None else 0)

    def _has_room(self, nbytes: int, job: _Job) -> bool:
        others = self._in_use() - (job.reserved if job is self._job else 0)
        return others + nbytes <= self._runner.merge_budget_bytes

    def _no_room(self, nbytes: int) -> Failure:
        text = (
            f"the dense copies take {nbytes} bytes; of the {self._runner.merge_budget_bytes} for "
            f"all, {self._in_use()} are in use"
        )
        return Failure(Reason.MERGE_BUDGET, text)


def _may_be_tried(resident: Resident) -> bool:
    return bool(resident.merge_nbytes) and not (resident.merged_bytes or resident.draining)
