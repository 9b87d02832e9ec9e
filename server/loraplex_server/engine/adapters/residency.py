"""Which adapters are on the device, and who waits for which.

A request that names adapters *wants* them: it is granted all of them at once, as pins, in the step
in which the last one is there. Holding some while waiting for others is never allowed, so two mixes
cannot block each other. Wants are granted in any order in which their adapters happen to be there,
but room is made for one want at a time, the oldest: its adapters are not evicted before it has them
all. If the room is held by adapters in use, the first of them in the order of eviction are closed
to later wants until they are free. So every want is met as long as running requests end.

An adapter comes from host memory if it is there, else from its files, and is in hand before
anything is evicted for it: a bad one costs nobody but those who wait for it. Meanwhile the files of
later wants are read ahead. At most one adapter is put on the device in a step, so that a burst of
loads costs running requests one publication per step and no more.

Unloading closes the adapter, waits for its pins, frees it; whoever wants it meanwhile waits and has
it loaded again.
"""

from __future__ import annotations

from collections.abc import Callable

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.fetching import Fetching, Staged
from loraplex_server.engine.adapters.host_tier import HostTier
from loraplex_server.engine.adapters.loader import Desk, ReadResult, failure_of
from loraplex_server.engine.adapters.merging import Merging
from loraplex_server.engine.adapters.slots import AdapterSlots, Resident
from loraplex_server.engine.adapters.table import statuses
from loraplex_server.engine.adapters.unloads import Unloads
from loraplex_server.engine.adapters.wants import Order, Settled, Want, Wants
from loraplex_server.engine.batching.admission import prefix_refusal
from loraplex_server.engine.batching.request import NO_PREFIX, Request
from loraplex_server.engine.messages import (
    AdapterRef,
    AdapterStatus,
    ControlDone,
    Failure,
    Load,
    LoadDone,
    Merge,
    Pin,
    Unload,
)
from loraplex_server.engine.runner.protocol import LoadedAdapter, ModelRunner

UNLOADED = Failure(
    Reason.ADAPTER_UNLOADED, "the adapter was unloaded while it was in use or on its way"
)

TOGETHER = Failure(
    Reason.ADAPTER_TOO_LARGE,
    "the adapters of the request do not fit on the device together, beside those held there",
)

PIN_BUDGET = Failure(
    Reason.PIN_BUDGET, "pinned and merged adapters may take half of the device's adapter memory"
)


class Residency:
    """The wants, and the way of adapters onto the device and off it.

    Attributes:
        unloads: the orders to unload that wait.
        replies: answers to orders, and `LoadDone`s; the owner takes them out.
        evictions: adapters that made room for others, counted since the start.
        version: grows whenever `table` changes by more than references and uses.
        uses: grows whenever these change.
        published: whether the last `settle` has put an adapter on the device.
        has_more: whether it stopped there, though it could have gone on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        slots: AdapterSlots,
        host: HostTier,
        desk: Desk,
        merging: Merging,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self.slots = slots
        self._host = host
        self._merging = merging
        self._clock = clock
        self.fetching = Fetching(host, desk)
        self._wants = Wants(slots.residents)
        self._closed: set[str] = set()
        self.unloads = Unloads()
        self._settled = Settled()
        self.replies: list[ControlDone | LoadDone] = []
        self.evictions = 0
        self.version = 0
        self.uses = 0
        self.published = False
        self.has_more = False

    # what is asked for

    def want(self, request: Request) -> None:
        """Queues a request for its adapters; `settle` grants or refuses it."""
        refs = {ref.digest: ref for ref in request.submit.adapters}
        self._wants.add(Want(refs, request))

    def forget(self, request: Request) -> None:
        """Drops a request's want."""
        self._wants.forget(request)

    def release(self, request: Request) -> None:
        """Takes back a request's pins."""
        for pin in request.pins:
            self.slots.unpin(pin)
        if request.pins:
            self.uses += 1
        request.pins = ()
        request.mix = ()
        request.prefix = NO_PREFIX

    def order(self, order: Order) -> None:
        """Wants an adapter for nobody; answered when it is there or has failed."""
        if isinstance(order, Pin) and not order.pinned:
            self._unpin(order.adapter.digest)
            self.replies.append(ControlDone(order.op))
            return
        self._wants.add(Want({order.adapter.digest: order.adapter}, order=order))

    def unload(self, message: Unload) -> None:
        """Closes an adapter; answered when it is gone. With `force` the owner ends its requests."""
        digest = message.digest
        self._unpin(digest)
        if message.force:
            self.refuse_orders(digest)
        if digest in self.slots.residents:
            self.slots.residents[digest].draining = True
        elif not self.fetching.is_coming(digest) or message.force:
            self.fetching.forget(digest)
            self.version += 1
            self.replies.append(ControlDone(message.op))
            return
        self.unloads.add(message)
        self.version += 1

    def refuse_orders(self, digest: str) -> None:
        """Answers the orders that wait for an adapter: it was unloaded."""
        for key, want in self._wants.of(digest):
            if want.request is None:
                self._refuse(key, UNLOADED)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted, on its way, waiting to leave, or left to be answered."""
        return not (self._wants or self.unloads or self.replies) and self.fetching.is_idle

    # what comes of it

    def take(self, result: ReadResult) -> None:
        """Takes in what came of reading an adapter."""
        digest = result.ref.digest
        may_keep = self.fetching.ended(result)
        self.version += 1
        if result.adapter is None:
            assert result.failure is not None
            self._fail(result.ref, result.failure, result.seconds)
        elif digest in self._wants.turn and self.fetching.staged is None:
            self.fetching.stage(result)
        elif digest in self.unloads:
            self._answer_unloads(digest)
        elif may_keep or self._wants.of(digest):
            self.fetching.keep(result, self._wants.digests)

    def settle(self) -> Settled:
        """Brings wants and adapters together, as far as it goes now. Called between steps."""
        self.published = self.has_more = False
        if self._wants or self.unloads or not self.fetching.is_idle:
            while True:
                self._drain()
                self._grant()
                if not self._advance():
                    break
            self._read_on()
        settled, self._settled = self._settled, Settled()
        return settled

    def table(self) -> list[AdapterStatus]:
        """Every adapter that is in host memory, coming, there, or leaving."""
        return statuses(self.slots, self._host, self.fetching)

    def check(self) -> None:
        """Verifies, when idle, that nobody holds anything. Raises `AssertionError`."""
        self.slots.check()
        self._host.check()
        assert not self._wants.requests, "a request waits for an adapter after its end"
        assert all(r.refs == 0 for r in self.slots.residents.values()), "a pin was leaked"

    # one step of settling

    def _drain(self) -> None:
        for resident in [r for r in self.slots.residents.values() if r.draining and not r.refs]:
            self._remove(resident, evicted=False)
            self._answer_unloads(resident.digest)

    def _grant(self) -> None:
        """Grants every want whose adapters are all there and open to it."""
        head = self._wants.head
        for key, want in self._wants.items():
            if not all(self._is_open(digest, key, head) for digest in want.refs):
                continue
            residents = [self.slots.residents[digest] for digest in want.refs]
            failure = self._unfit(want, max(resident.prefix.count for resident in residents))
            if failure is not None:
                self._refuse(key, failure)
                continue
            self._wants.pop(key)
            if want.request is not None:
                self._pin(want.request)
                self._settled.granted.append(want.request)
            elif want.order is not None:
                self._fulfil(want.order, residents[0])

    def _advance(self) -> bool:
        """Moves the oldest open want on; True if there may be more to do at once."""
        closed, self._closed = self._closed, set()
        head = self._wants.head
        if head is None:
            self._put_back()
            return bool(closed)
        missing = self._wants.turn
        if not missing:
            return True  # it was kept out for an older want that is gone now
        staged = self.fetching.staged
        if staged is not None and staged.ref.digest not in missing:
            self._put_back()
        if self.fetching.staged is None and self.fetching.take_in_hand(missing.values()):
            self.version += 1
        if self.fetching.staged is not None and self._publish(head, self.fetching.staged):
            return True
        return bool(closed - self._closed)

    def _publish(self, head: int, staged: Staged) -> bool:
        """Puts what is in hand on the device, if there is or can be room; False if it must wait."""
        ref, adapter = staged.ref, staged.adapter
        if self._refuse_unfit(ref.digest, adapter):
            return True
        if not self.slots.fits_alone(adapter):
            self._drop_staged(ref.digest)
            self._fail(ref, self._too_large(adapter), staged.read_seconds)
            return True
        victims = self.slots.victims(adapter, keep=self._wants[head].refs.keys())
        if victims is None:
            self._refuse(head, TOGETHER)
            return True
        if self.published or any(victim.refs for victim in victims):
            # Who has to go lets nobody in until then, or room would never be there.
            self._closed = {victim.digest for victim in victims}
            self.has_more = not any(victim.refs for victim in victims)
            return False
        for victim in victims:
            self._remove(victim, evicted=True)
        self._put_on_device(staged)
        return True

    def _put_on_device(self, staged: Staged) -> None:
        ref = staged.ref
        self.published = True
        self.version += 1
        try:
            resident = self.slots.publish(
                ref, staged.adapter, staged.read_seconds, staged.from_host
            )
        except Exception as error:
            failure = failure_of(error, f"publishing adapter {ref.digest}")
            self._drop_staged(ref.digest)  # so that the next attempt reads it afresh
            self._fail(ref, failure, staged.read_seconds)
            return
        self.fetching.published(staged, self._wants.digests)
        tier = "host" if staged.from_host else "disk"
        self.replies.append(LoadDone(ref.digest, resident.load_seconds, tier=tier))
        self._grant()
        if ref.digest in self.unloads:
            self._unpin(ref.digest)
            resident.draining = True

    def _read_on(self) -> None:
        """Begins to read what will be needed, the oldest want's adapters first."""
        wanted = self._wants.missing
        self.fetching.retry(wanted)
        if wanted and self.fetching.read(list(self._wants.turn.values()), wanted.values()):
            self.version += 1

    # small things

    def _is_open(self, digest: str, key: int, head: int | None) -> bool:
        resident = self.slots.residents.get(digest)
        if resident is None or resident.draining:
            return False
        return digest not in self._closed or key == head

    def _pin(self, request: Request) -> None:
        # In the order of digests, so that neither the order in which a mix is written nor the slots
        # that its adapters happen to have can change the order of summation.
        weights: dict[str, float] = {}
        for ref in sorted(request.submit.adapters, key=lambda ref: ref.digest):
            weights[ref.digest] = weights.get(ref.digest, 0.0) + ref.weight
        pins = [self.slots.pin(digest) for digest in weights]
        request.pins = tuple(pins)
        request.mix = tuple((pin.slot, weights[pin.digest]) for pin in pins)
        if len(pins) == 1:
            request.prefix = self.slots.residents[pins[0].digest].prefix
        self.uses += 1

    def _fulfil(self, order: Order, resident: Resident) -> None:
        """Answers an order whose adapter is there."""
        match order:
            case Merge():
                self._merging.ready(order.op, resident)
            case Pin() if not self.slots.may_hold(resident):
                self.replies.append(ControlDone(order.op, PIN_BUDGET))
            case Pin():
                resident.pinned = True
                self.version += 1
                self.replies.append(ControlDone(order.op))
            case Load():
                self.replies.append(ControlDone(order.op))

    def _unpin(self, digest: str) -> None:
        """Takes back a pin, and those that are still waited for: these become plain loads."""
        for _, want in self._wants.of(digest):
            if isinstance(want.order, Pin):
                want.order = Load(want.order.op, want.order.adapter)
        if digest in self.slots.residents:
            self.slots.residents[digest].pinned = False
            self.version += 1

    def _remove(self, resident: Resident, evicted: bool) -> None:
        """Takes an adapter off the device: to host memory when evicted, else for good."""
        self.slots.remove(resident, evicted)
        self._merging.gone(resident)
        self.version += 1
        if evicted:
            self.evictions += 1
            self._host.leave_device(resident.digest, resident.last_used, self._wants.digests)
        else:
            self._host.drop(resident.digest)

    def _unfit(self, want: Want, virtual_tokens: int) -> Failure | None:
        if want.request is None:
            return None
        context, blocks = self._runner.info.max_context, self._runner.num_blocks
        size = self._runner.block_size
        return prefix_refusal(want.request, want.refs, virtual_tokens, context, blocks, size)

    def _refuse_unfit(self, digest: str, adapter: LoadedAdapter) -> bool:
        """Refuses, before room is made, those who cannot use an adapter; True if there are any."""
        refused = False
        for key, want in self._wants.of(digest):
            failure = self._unfit(want, adapter.virtual_tokens)
            if failure is not None:
                self._refuse(key, failure)
                refused = True
        return refused

    def _fail(self, ref: AdapterRef, failure: Failure, seconds: float) -> None:
        """Refuses all who wait for an adapter that cannot be had."""
        self.replies.append(LoadDone(ref.digest, seconds, failure))
        for key, _ in self._wants.of(ref.digest):
            self._refuse(key, failure)
        self._answer_unloads(ref.digest)

    def _refuse(self, key: int, failure: Failure) -> None:
        want = self._wants.pop(key)
        if want.request is not None:
            self._settled.refused.append((want.request, failure))
        elif isinstance(want.order, Merge):
            self._merging.refuse(want.order.op, failure)
        elif want.order is not None:
            self.replies.append(ControlDone(want.order.op, failure))

    def _answer_unloads(self, digest: str) -> None:
        self.replies.extend(self.unloads.answered(digest))

    def _drop_staged(self, digest: str) -> None:
        self.fetching.staged = None
        self._host.drop(digest)

    def _put_back(self) -> None:
        """Takes what is in hand away from whom it was for: nobody, or not the next in turn."""
        staged = self.fetching.staged
        if staged is None:
            return
        digest = staged.ref.digest
        if digest in self.unloads:
            self._drop_staged(digest)
            self._answer_unloads(digest)
        else:
            self.fetching.let_go(self._wants.digests)
        self.version += 1

    def _too_large(self, adapter: LoadedAdapter) -> Failure:
        text = (
            f"the adapter takes {adapter.nbytes} bytes and {adapter.virtual_tokens} virtual tokens;"
            f" the server has {self.slots.budget} bytes and "
            f"{self._runner.prefix_blocks * self._runner.block_size} tokens for all adapters"
        )
        return Failure(Reason.ADAPTER_TOO_LARGE, text)
