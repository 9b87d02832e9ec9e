"""Dense copies of the matrices that an adapter changes: when they are made, used and dropped.

A merge is computed on a loader thread and published between steps. From then on the rows that use
that adapter alone at weight 1 use the copies; all other rows use the untouched base. Dropping the
copies restores every bit. The copies never exceed the merge budget: a merge without room is refused
before any work.

A merged adapter is held on the device until it is unmerged or unloaded, and counts among the pinned
ones. Orders for one adapter take effect in their order.

    order --expect--> (its adapter loads) --accept--> queue --begin--> computed --publish--> in use
                              |                         |                  |
                           answer                      fail               fail
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.attempts import MERGE, Announcements
from loraplex_server.engine.adapters.host_tier import HostTier
from loraplex_server.engine.adapters.loader import (
    LoaderResult,
    LoadLanes,
    MergeWeights,
    failure_of,
)
from loraplex_server.engine.adapters.slots import PIN_BUDGET, AdapterSlots, Resident
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

GONE = Failure(Reason.ADAPTER_UNLOADED, "the adapter was unloaded before it was merged")
NOTHING = Failure(Reason.MERGE_UNSUPPORTED, "the adapter changes no matrix that could be merged")


@dataclass(slots=True, eq=False)
class _Merge:
    """The merge that the order `op` asked for; `copies` and `seconds` once it is computed."""

    op: int
    resident: Resident
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
        attempts: Announcements | None = None,
    ) -> None:
        """`reply` receives answers to orders, and a `MergeDone` for every merge and unmerge."""
        self._attempts = attempts or Announcements()
        self._runner = runner
        self._slots = slots
        self._host = host
        self._lanes = lanes
        self._clock = clock
        self._reply = reply
        self._ordered: dict[int, str] = {}
        self._expected: Counter[str] = Counter()
        self._unmerges: dict[str, list[int]] = {}
        self._queue: deque[_Merge] = deque()
        self._current: _Merge | None = None
        self.version = 0

    # orders

    def expect(self, order: Merge) -> None:
        """Notes an order whose adapter is still to be loaded; `accept` or `answer` follows."""
        self._ordered[order.op] = order.adapter.digest
        self._expected[order.adapter.digest] += 1

    def accept(self, op: int, resident: Resident) -> None:
        """Queues an order's merge: its adapter is on the device."""
        if self._slots.may_hold(resident):
            self._queue.append(_Merge(op, resident))
        else:
            self.answer(op, PIN_BUDGET)

    def answer(self, op: int, failure: Failure | None = None) -> None:
        """Answers an order to merge. Without a `failure`, the copies are in use."""
        self._reply(ControlDone(op, failure))
        self._settle(op)

    def withdraw(self, op: int) -> None:
        """Drops an order that nobody waits for any more. A merge that has begun goes on.

        An unmerge is carried out nevertheless, without an answer. Unknown numbers are ignored.
        """
        for ops in self._unmerges.values():
            if op in ops:
                ops.remove(op)
                return
        if op not in self._ordered or (self._current is not None and self._current.op == op):
            return
        self._queue = deque(merge for merge in self._queue if merge.op != op)
        self._settle(op)

    def unmerge(self, order: Unmerge) -> None:
        """Drops an adapter's copies, after the merges of it that were ordered before."""
        self._unmerges.setdefault(order.digest, []).append(order.op)
        self._unmerge_if_due(order.digest)

    # state

    @property
    def is_idle(self) -> bool:
        """Whether every order is answered; so no merge is queued or under way."""
        return not self._ordered and not self._unmerges

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
        merge = self._current
        if merge is None:
            return self.nbytes
        expected = merge.resident.merge_nbytes
        return self.nbytes + (expected if merge.copies is None else merge.copies.nbytes)

    def check(self) -> None:
        """Verifies the budget. Raises `AssertionError`."""
        assert self.reserved_nbytes <= self._runner.merge_budget_bytes, "merges exceed their budget"

    # progress

    def end_merge(self, result: LoaderResult) -> None:
        """Accepts the result of a finished merge."""
        merge = self._current
        assert merge is not None, "a merge ended that was not begun"
        assert merge.resident.digest == result.task.ref.digest, "another adapter was merged"
        merge.seconds = result.seconds
        if result.copies is None:
            assert result.failure is not None
            self._fail(merge, result.failure)
        elif not self._is_resident(merge):
            self._fail(merge, GONE)
        elif (failure := self._lack_of_room(result.copies.nbytes)) is not None:
            self._fail(merge, failure)
        else:
            merge.copies = result.copies

    def begin(self) -> None:
        """Starts the next merge if a lane is free. Called between steps."""
        while self._current is None and self._queue and self._lanes.is_free(background=True):
            merge = self._queue.popleft()
            failure = self._objection(merge)
            if failure is not None:
                self._fail(merge, failure)
            elif merge.resident.merged_bytes:
                self.answer(merge.op)
            else:
                self._start(merge)

    def publish(self) -> None:
        """Lets rows use the copies that are computed, if any. Called between steps."""
        merge = self._current
        if merge is None or merge.copies is None:
            return
        resident, begun = merge.resident, self._clock()
        self._slots.settle_slot(resident.slot)
        try:
            with self._attempts.of(resident.digest, MERGE):
                self._runner.publish_merge(resident.slot, merge.copies)
        except Exception as error:
            self._fail(merge, failure_of(error, f"publishing the merge of {resident.digest}"))
            return
        resident.merged_bytes = merge.copies.nbytes
        self._current = None
        self.version += 1
        resident.copies.change(self.version)
        seconds = merge.seconds + self._clock() - begun
        self._reply(MergeDone(resident.digest, True, seconds))
        self.answer(merge.op)

    def on_removed(self, resident: Resident) -> None:
        """Notes that an adapter has left the device, and its copies with it."""
        if resident.merged_bytes:
            self._on_unmerged(resident, 0.0)
        current = self._current
        if current is not None and current.resident is resident and current.copies is not None:
            self._fail(current, GONE)
        for merge in [merge for merge in self._queue if merge.resident is resident]:
            self._queue.remove(merge)
            self._fail(merge, GONE)

    # one merge

    def _objection(self, merge: _Merge) -> Failure | None:
        """Why a merge cannot start now; None if it can, or if the adapter is merged already."""
        resident = merge.resident
        if not self._is_resident(merge):
            return GONE
        if resident.merged_bytes:
            return None
        if not resident.merge_nbytes:
            return NOTHING
        failure = self._lack_of_room(resident.merge_nbytes)
        if failure is None and not self._slots.may_hold(resident):
            return PIN_BUDGET
        return failure

    def _start(self, merge: _Merge) -> None:
        self._current = merge
        resident = merge.resident
        resident.merge_ordered = True
        ref = AdapterRef(resident.digest, resident.path)
        held = self._host.get(resident.digest)
        self._lanes.start(MergeWeights(ref, held.adapter if held else None), background=True)

    def _fail(self, merge: _Merge, failure: Failure) -> None:
        if self._current is merge:
            self._current = None
            merge.resident.merge_ordered = False
        self._reply(MergeDone(merge.resident.digest, True, merge.seconds, failure))
        self.answer(merge.op, failure)

    def _settle(self, op: int) -> None:
        """Notes that an order to merge is answered or withdrawn."""
        digest = self._ordered.pop(op)
        self._expected[digest] -= 1
        if not self._expected[digest]:
            del self._expected[digest]
        self._unmerge_if_due(digest)

    def _unmerge_if_due(self, digest: str) -> None:
        if digest not in self._unmerges or digest in self._expected:
            return
        resident = self._slots.residents.get(digest)
        if resident is not None and resident.merged_bytes:
            self._slots.settle_slot(resident.slot)
            begun = self._clock()
            self._runner.remove_merge(resident.slot)
            self._on_unmerged(resident, self._clock() - begun)
        for op in self._unmerges.pop(digest):
            self._reply(ControlDone(op))

    def _on_unmerged(self, resident: Resident, seconds: float) -> None:
        """Notes that an adapter's copies are gone; dropping them took `seconds`."""
        resident.merged_bytes = 0
        resident.merge_ordered = False
        self.version += 1
        resident.copies.change(0)
        self._reply(MergeDone(resident.digest, False, seconds))

    def _is_resident(self, merge: _Merge) -> bool:
        """Whether the adapter is still in the slot for which the merge was accepted."""
        there = self._slots.residents.get(merge.resident.digest)
        return there is merge.resident and not there.draining

    def _lack_of_room(self, nbytes: int) -> Failure | None:
        """The failure of copies of `nbytes` that do not fit beside those in use; None if they do.

        At most one merge is computed at a time, so no other reservation counts.
        """
        budget = self._runner.merge_budget_bytes
        if self.nbytes + nbytes <= budget:
            return None
        used = self.nbytes
        text = f"the dense copies take {nbytes} bytes; of the {budget} for all, {used} are in use"
        return Failure(Reason.MERGE_BUDGET, text)
