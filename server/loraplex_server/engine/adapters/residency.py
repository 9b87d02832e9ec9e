"""Residency: which adapters are on the device, and which requests wait for which of them.

A request that names adapters *wants* them. It is granted all of them at once, as pins, in the step
in which the last one arrives. A request never holds some of its adapters while it waits for others,
so two mixes cannot block each other. Wants are granted in whatever order their adapters become
available, but room is made for the oldest want only (the head), and its adapters are not evicted
before it has them all. If adapters in use hold that room, the first of them in eviction order take
no new pins until they are free, the longest resident first, however many requests for them keep
coming. Once the head has waited for a turn and they have been there for a turn, their requests are
set back: they return their pins and want their adapters again, as the newest. So every want is met:
if A adapters are wanted and S of them fit, within A / S times 1.25 turns, and the time of loads.

An adapter is taken from host memory if it is there, else read from its files, and it is staged
before anything is evicted for it: a bad adapter harms only the requests that want it. Later wants'
files are read ahead meanwhile. At most one adapter is copied and put on the device at a time, so a
burst of loads delays running requests by one publication per step and no more.

    files ---------read----------+--keep--> host tier <----------+
                                 |          |      ^             |
                               stage      stage  unstage       evict
                                 |          v      |             |
                                 +--------> staged --publish--> resident --unload--> draining
                                                                   ^                    | last pin
                                                     want granted: pinned               v
                                                                                       gone

An unloaded adapter drains: it takes no new pins and is removed with the last. Requests that want it
meanwhile wait until it has been removed and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.fetching import Fetching
from loraplex_server.engine.adapters.host_tier import HostAdapter, HostTier
from loraplex_server.engine.adapters.loader import LoaderResult, LoadLanes, failure_of
from loraplex_server.engine.adapters.merging import Merging
from loraplex_server.engine.adapters.slots import PIN_BUDGET, AdapterSlots, Resident
from loraplex_server.engine.adapters.unloads import Unloads
from loraplex_server.engine.adapters.wants import LoadOrder, Settled, Want, Wants
from loraplex_server.engine.batching.admission import PromptAdapter, prompt_refusal
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.messages import (
    ControlDone,
    Failure,
    Load,
    LoadDone,
    Merge,
    Reply,
    SetPinned,
    Unload,
)
from loraplex_server.engine.runner.protocol import LoadedAdapter, ModelRunner

UNLOADED = Failure(
    Reason.ADAPTER_UNLOADED, "the adapter was unloaded while it was in use or on its way"
)

TOGETHER = Failure(
    Reason.ADAPTER_TOO_LARGE,
    "the request's adapters do not fit on the device together with the adapters held there",
)


class Residency:
    """The open wants, and the movement of adapters onto the device and off it."""

    def __init__(
        self,
        runner: ModelRunner,
        slots: AdapterSlots,
        host: HostTier,
        lanes: LoadLanes,
        merging: Merging,
        reply: Callable[[Reply], None],
        clock: Callable[[], float],
        turn: float,
    ) -> None:
        """`reply` receives answers to orders, and a `LoadDone` for every load.

        `turn` is in seconds; with 0, running requests are never set back.
        """
        self._runner = runner
        self._slots = slots
        self._host = host
        self._merging = merging
        self._reply = reply
        self._clock = clock
        self._turn = turn
        self._wants = Wants(slots.residents)
        self._unloads = Unloads()
        self._closed: set[str] = set()
        self._settled = Settled()
        self.fetching = Fetching(host, lanes)

    # requests and orders

    def want(self, request: Request) -> None:
        """Adds a request's want; a later `settle` grants or refuses it."""
        self._wants.add(request, self._clock())

    def release(self, request: Request) -> None:
        """Drops a request's want, or the pins that it was granted."""
        if request.state is RequestState.FETCHING:
            self._wants.remove(self._wants.of(request))
            return
        for pin in request.pins:
            self._slots.unpin(pin)

    def order(self, order: LoadOrder) -> None:
        """Adds an order's want. Answered when its adapter is there or has failed."""
        if isinstance(order, SetPinned) and not order.pinned:
            self._unpin(order.adapter.digest)
            self._reply(ControlDone(order.op))
            return
        if isinstance(order, Merge):
            self._merging.expect(order)
        self._wants.add_order(order, self._clock())

    def withdraw(self, op: int) -> None:
        """Drops an order that nobody waits for any more, and what is wanted for it alone.

        It is not answered, unless it is being carried out already. Unknown numbers are ignored.
        """
        if not self._unloads.withdraw(op):
            self._wants.withdraw(op)
            self._merging.withdraw(op)

    def unload(self, order: Unload) -> None:
        """Drains an adapter. Answered when it is gone.

        With `force` the caller ends the requests that use the adapter or wait for it.
        """
        digest = order.digest
        self._unpin(digest)
        if order.force:
            self._refuse_orders(digest)
        if digest in self._slots.residents:
            self._slots.drain(self._slots.residents[digest])
        elif not self.fetching.is_coming(digest) or order.force:
            self.fetching.forget(digest)
            self._reply(ControlDone(order.op))
            return
        self._unloads.add(order)

    def overdue_unloads(self, now: float) -> list[tuple[str, bool]]:
        """Adapters to unload whose deadline has passed, each returned once.

        With each comes whether requests that wait for it end too. They do while the adapter is not
        on the device; otherwise they wait for its next load.
        """
        overdue = [(d, d not in self._slots.residents) for d in self._unloads.overdue(now)]
        for digest, is_coming in overdue:
            if is_coming:
                self._refuse_orders(digest)
        return overdue

    @property
    def waiting(self) -> Collection[Request]:
        """The requests whose adapters are not all on the device yet."""
        return self._wants.requests

    @property
    def deadline(self) -> float | None:
        """The earliest deadline of an order to unload; None if there is none."""
        return self._unloads.deadline

    @property
    def is_idle(self) -> bool:
        """Whether no adapter is wanted, on its way to the device, or draining by order."""
        return not self._wants and not self._unloads and self.fetching.is_idle

    # progress

    def end_read(self, result: LoaderResult) -> None:
        """Accepts the result of reading an adapter."""
        digest = result.task.ref.digest
        may_keep = self.fetching.end_read(digest)
        if result.failure is not None:
            self._fail(digest, result.failure, result.seconds)
        elif digest in self._wants.head_missing and self.fetching.staged is None:
            self.fetching.stage(result)
        elif digest in self._unloads:
            self._answer_unloads(digest)
        elif may_keep or self._wants.naming(digest):
            self.fetching.keep(result, self._wants.digests)

    def settle(self) -> Settled:
        """Grants, evicts, publishes and starts reads, as far as possible. Called between steps."""
        if self._wants or self._unloads or not self.fetching.is_idle:
            while True:
                self._remove_drained()
                self._grant()
                if not self._advance_head():
                    break
            wants = self._wants
            self.fetching.start_reads(wants.head_missing, wants.missing(), wants.is_missing)
        settled, self._settled = self._settled, Settled()
        return settled

    def check(self) -> None:
        """Verifies that no request of an idle engine holds an adapter. Raises `AssertionError`."""
        assert all(r.refs == 0 for r in self._slots.residents.values()), "a pin was leaked"

    def _remove_drained(self) -> None:
        for resident in [r for r in self._slots.residents.values() if r.draining and not r.refs]:
            self._remove(resident, evicted=False)
            self._answer_unloads(resident.digest)

    def _grant(self) -> None:
        """Grants every want whose adapters are all on the device and take new pins."""
        head = self._wants.head
        for want in self._wants.arrived():
            if not all(self._is_open(digest, want is head) for digest in want.refs):
                continue
            residents = [self._slots.residents[digest] for digest in want.refs]
            failure = self._unfit(want, residents)
            if failure is not None:
                self._refuse(want, failure)
                continue
            self._wants.remove(want)
            if want.request is not None:
                self._slots.grant(want.request)
                self._settled.granted.append(want.request)
            for order in want.orders.values():
                self._fulfil(order, residents[0])

    def _advance_head(self) -> bool:
        """Stages and publishes for the head want; True if more may be possible at once."""
        closed, self._closed = self._closed, set()
        head = self._wants.head
        if head is None:
            self._unstage()
            return bool(closed)
        missing = self._wants.head_missing
        if not missing:
            return True  # its adapters were closed to it for an older want that is gone now
        staged = self.fetching.staged
        if staged is not None and staged.digest not in missing:
            self._unstage()
        if self.fetching.staged is None:
            self.fetching.stage_from_host(missing.values())
        staged = self.fetching.staged
        return (staged is not None and self._make_room(head, staged)) or bool(closed - self._closed)

    def _make_room(self, head: Want, staged: HostAdapter) -> bool:
        """Publishes the staged adapter or refuses it; False if it must wait."""
        adapter = staged.adapter
        if self._refuse_unfit(staged.digest, adapter):
            return True
        if not self._slots.fits_alone(adapter):
            return self._fail_staged(staged, self._slots.too_large(adapter))
        is_late = 0.0 < self._turn <= self._clock() - head.since
        victims = self._slots.victims(adapter, keep=head.refs.keys(), past_drains=is_late)
        if victims is None:
            self._refuse(head, TOGETHER)
            return True
        in_use = any(victim.refs for victim in victims)
        if self._settled.published or in_use:
            # Victims accept no new pins meanwhile, or they would never drain.
            self._closed = {victim.digest for victim in victims}
            self._settled.more = not in_use
            if is_late:
                since = self._clock() - self._turn
                in_turn = [each for each in victims if each.refs and each.published <= since]
                self._settled.blocking += [e.digest for e in in_turn if not e.draining]
            return False
        for victim in victims:
            self._remove(victim, evicted=True)
        return self._publish(staged)

    def _publish(self, staged: HostAdapter) -> bool:
        """Publishes the staged adapter; False while it is being copied to the device."""
        tier = "host" if staged.kept else "disk"
        try:
            self._settled.published = self._slots.prepare(staged)
            if not self._settled.published:
                self._settled.more = True
                return False
            resident = self._slots.publish(staged)
        except Exception as error:
            return self._fail_staged(staged, failure_of(error, f"publishing {staged.digest}"))
        self.fetching.end_publication(self._wants.digests)
        self._reply(LoadDone(staged.digest, resident.load_seconds, tier=tier))
        self._grant()
        if staged.digest in self._unloads:
            self._unpin(staged.digest)
            self._slots.drain(resident)
        return True

    # orders

    def _is_open(self, digest: str, is_head: bool) -> bool:
        """Whether an adapter is on the device and takes new pins, of the head want or another."""
        resident = self._slots.residents.get(digest)
        if resident is None or resident.draining:
            return False
        return is_head or digest not in self._closed

    def _fulfil(self, order: LoadOrder, resident: Resident) -> None:
        """Carries out an order whose adapter is on the device."""
        match order:
            case Merge():
                self._merging.accept(order.op, resident)
            case SetPinned() if not self._slots.may_hold(resident):
                self._reply(ControlDone(order.op, PIN_BUDGET))
            case SetPinned():
                self._slots.set_pinned(resident, True)
                self._reply(ControlDone(order.op))
            case Load():
                self._reply(ControlDone(order.op))

    def _unpin(self, digest: str) -> None:
        """Lifts an operator's pin; orders to pin that still wait become plain loads."""
        for want in self._wants.naming(digest):
            for op, order in want.orders.items():
                if isinstance(order, SetPinned):
                    want.orders[op] = Load(op, order.adapter)
        if digest in self._slots.residents:
            self._slots.set_pinned(self._slots.residents[digest], False)

    def _remove(self, resident: Resident, evicted: bool) -> None:
        """Removes an adapter from the device; an evicted one may stay in host memory."""
        self._slots.remove(resident, evicted)
        self._merging.on_removed(resident)
        if evicted:
            self._host.leave_device(resident.digest, resident.last_used, self._wants.digests)
        else:
            self._host.drop(resident.digest)

    def _unstage(self) -> None:
        """Takes the staged adapter off the way to the device: the head want does not need it."""
        staged = self.fetching.staged
        if staged is None:
            return
        if staged.digest in self._unloads:
            self.fetching.drop_staged()
            self._answer_unloads(staged.digest)
        else:
            self.fetching.unstage(self._wants.digests)

    # refusals

    def _unfit(self, want: Want, adapters: Sequence[PromptAdapter]) -> Failure | None:
        """Why the want's request cannot use these of its adapters; None if it can."""
        if want.request is None:
            return None
        info, size = self._runner.info, self._runner.block_size
        # Virtual tokens are computed once, with the frequencies of short sequences.
        context = min(info.max_context, info.base.config.short_positions or info.max_context)
        cache_tokens = self._runner.num_blocks * size
        return prompt_refusal(want.request, adapters, context, cache_tokens, size)

    def _refuse_unfit(self, digest: str, adapter: LoadedAdapter) -> bool:
        """Refuses, before room is made, requests that cannot use an adapter; True if any."""
        refused = False
        for want in self._wants.naming(digest):
            failure = self._unfit(want, [adapter])
            if failure is not None:
                self._refuse(want, failure)
                refused = True
        return refused

    def _refuse_orders(self, digest: str) -> None:
        """Answers the waiting orders for an adapter that is being unloaded."""
        for want in self._wants.naming(digest):
            if want.request is None:
                self._refuse(want, UNLOADED)

    def _refuse(self, want: Want, failure: Failure) -> None:
        self._wants.remove(want)
        if want.request is not None:
            self._settled.refused.append((want.request, failure))
        for op, order in want.orders.items():
            if isinstance(order, Merge):
                self._merging.answer(op, failure)
            else:
                self._reply(ControlDone(op, failure))

    def _fail_staged(self, staged: HostAdapter, failure: Failure) -> bool:
        self.fetching.drop_staged()
        self._fail(staged.digest, failure, staged.read_seconds)
        return True

    def _fail(self, digest: str, failure: Failure, seconds: float) -> None:
        """Refuses every want of an adapter that cannot be loaded."""
        self._reply(LoadDone(digest, seconds, failure))
        for want in self._wants.naming(digest):
            self._refuse(want, failure)
        self._answer_unloads(digest)

    def _answer_unloads(self, digest: str) -> None:
        for done in self._unloads.answered(digest):
            self._reply(done)
