"""Which adapters are on the device, and who waits for which.

A request that names adapters *wants* them: it is granted all of them at once, as pins, in the step
in which the last one is there. Holding some while waiting for others is never allowed, so two mixes
cannot block each other. Wants are granted in any order in which their adapters happen to be there,
but files are read and room is made for one want at a time, the oldest: its adapters are not evicted
before it has them all. If the room is held by adapters in use, the least recently used of them are
closed to later wants until they are free. So every want is met as long as running requests end.

An adapter is read before anything is evicted for it: a bad one costs nobody but those who wait for
it. Unloading closes the adapter, waits for its pins, frees it; whoever wants it meanwhile waits and
has it loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from loraplex_server.engine.loader import Loader, failure_of
from loraplex_server.engine.messages import (
    AdapterRef,
    AdapterStatus,
    ControlDone,
    Failure,
    Load,
    LoadDone,
    Unload,
)
from loraplex_server.engine.request import Request
from loraplex_server.engine.runner import LoadedAdapter, ModelRunner
from loraplex_server.engine.slots import AdapterSlots, Pin

UNLOADED = Failure("ADAPTER_UNLOADED", "the adapter was unloaded while the request was using it")

MIX_TOO_LARGE = Failure(
    "ADAPTER_TOO_LARGE", "the adapters of the mix do not fit on the device together"
)


@dataclass(slots=True, eq=False)
class Want:
    """Adapters that are needed together, by a request or by a `Load` (its `op`)."""

    refs: dict[str, AdapterRef]
    request: Request | None = None
    op: int = 0


@dataclass(slots=True)
class Settled:
    """What a call of `settle` brought: who has its adapters now, and who never will."""

    granted: list[Request] = field(default_factory=list)
    refused: list[tuple[Request, Failure]] = field(default_factory=list)


class Residency:
    """The slots, the wants, and the one adapter that is being read or waits for room.

    Attributes:
        replies: answers to `Load` and `Unload`, and `LoadDone`s; the owner takes them out.
        evictions: adapters that made room for others, counted since the start.
        version: grows whenever `table` changes.
    """

    def __init__(self, runner: ModelRunner, loader: Loader, clock: Callable[[], float]) -> None:
        self.slots = AdapterSlots(runner)
        self._loader = loader
        self._clock = clock
        self._wants: dict[int, Want] = {}
        self._next_want = 0
        self._by_request: dict[int, int] = {}
        self._reading: AdapterRef | None = None
        self._read_since = 0.0
        self._read: tuple[AdapterRef, LoadedAdapter] | None = None
        self._closed: set[str] = set()
        self._unloads: dict[str, list[int]] = {}
        self.replies: list[ControlDone | LoadDone] = []
        self.evictions = 0
        self.version = 0

    # what is asked for

    def want(self, request: Request) -> None:
        """Queues a request for its adapters; `settle` grants or refuses it."""
        refs = {ref.digest: ref for ref in request.submit.adapters}
        self._by_request[request.id] = self._add(Want(refs, request))

    def forget(self, request: Request) -> None:
        """Drops a request's want."""
        del self._wants[self._by_request.pop(request.id)]

    def release(self, request: Request) -> None:
        """Takes back a request's pins."""
        for pin in request.pins:
            self.slots.unpin(pin)
        if request.pins:
            self.version += 1
        request.pins = ()
        request.mix = ()

    def load(self, message: Load) -> None:
        """Wants an adapter for nobody; answered when it is there or has failed."""
        self._add(Want({message.adapter.digest: message.adapter}, op=message.op))

    def unload(self, message: Unload) -> None:
        """Closes an adapter; answered when it is gone. With `force` the owner ends its requests."""
        digest = message.digest
        if message.force:
            self._refuse_loads(digest, UNLOADED)
        if digest in self.slots.residents:
            self.slots.residents[digest].draining = True
        elif not self._is_coming(digest) or message.force:
            self.replies.append(ControlDone(message.op))
            return
        self._unloads.setdefault(digest, []).append(message.op)
        self.version += 1

    @property
    def waiting(self) -> int:
        """Requests that wait for adapters."""
        return len(self._by_request)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted, read, waiting to leave, or left to be answered."""
        return not (self._wants or self._reading or self._unloads or self.replies)

    @property
    def needs_settling(self) -> bool:
        """Whether `settle` may have something to do before a read ends or a request finishes."""
        return bool(self._wants or self._unloads or self._reading or self._read)

    # what comes of it

    def settle(self) -> Settled:
        """Brings wants and adapters together, as far as it goes now. Called between steps."""
        settled = Settled()
        if not self.needs_settling:
            return settled
        self._take_read(settled)
        while True:
            self._drain()
            self._grant(settled)
            if not self._advance(settled):
                return settled

    def table(self) -> list[AdapterStatus]:
        """Every adapter that is coming, there, or leaving."""
        rows = [
            AdapterStatus(
                r.digest, "draining" if r.draining else "resident", r.nbytes, r.refs, r.path
            )
            for r in self.slots.residents.values()
        ]
        coming = self._reading or (self._read[0] if self._read else None)
        if coming is not None and coming.digest not in self.slots.residents:
            nbytes = self._read[1].nbytes if self._read else 0
            rows.append(AdapterStatus(coming.digest, "loading", nbytes, 0, coming.path))
        return rows

    def check(self) -> None:
        """Verifies, when idle, that nobody holds anything. Raises `AssertionError`."""
        self.slots.check()
        assert not self._by_request, "a request waits for an adapter after its end"
        assert all(r.refs == 0 for r in self.slots.residents.values()), "a pin was leaked"

    # one step of settling

    def _take_read(self, settled: Settled) -> None:
        result = self._loader.poll() if self._reading is not None else None
        if result is None:
            return
        self._reading = None
        self.version += 1
        if result.adapter is None:
            assert result.failure is not None
            self._fail(result.ref, result.failure, settled)
        elif any(True for _ in self._wanting(result.ref.digest)):
            self._read = (result.ref, result.adapter)
        else:
            self._answer_unloads(result.ref.digest)

    def _drain(self) -> None:
        for resident in [r for r in self.slots.residents.values() if r.draining and not r.refs]:
            self.slots.evict(resident.digest)
            self._answer_unloads(resident.digest)
            self.version += 1

    def _grant(self, settled: Settled) -> None:
        """Grants every want whose adapters are all there and open to it."""
        head = self._head()
        for key, want in list(self._wants.items()):
            if not all(self._is_open(digest, key, head) for digest in want.refs):
                continue
            del self._wants[key]
            if want.request is None:
                self.replies.append(ControlDone(want.op))
                continue
            del self._by_request[want.request.id]
            self._pin(want.request)
            settled.granted.append(want.request)
            self.version += 1

    def _advance(self, settled: Settled) -> bool:
        """Moves the oldest open want on; True if there may be more to do at once."""
        closed, self._closed = self._closed, set()
        head = self._head()
        if head is None:
            self._drop_read()
            return bool(closed)
        refs = self._wants[head].refs
        missing = [ref for digest, ref in refs.items() if digest not in self.slots.residents]
        if not missing:
            return True  # it was kept out for an older want that is gone now
        if self._read is not None and self._read[0].digest not in {ref.digest for ref in missing}:
            self._drop_read()
        if self._read is not None and self._publish(head, settled):
            return True
        if self._read is None and self._reading is None:
            self._reading = missing[0]
            self._read_since = self._clock()
            self._loader.start(missing[0])
            self.version += 1
        return bool(closed - self._closed)

    def _publish(self, head: int, settled: Settled) -> bool:
        """Puts what was read on the device, if there is or can be room; False if it has to wait."""
        assert self._read is not None
        ref, adapter = self._read
        wanted = self._wants[head].refs.keys()
        victims = self.slots.victims(adapter.nbytes, keep=wanted)
        if victims is None and adapter.nbytes > self.slots.budget:
            self._read = None
            self._fail(ref, self._too_large(adapter.nbytes), settled)
            return True
        if victims is None:
            self._refuse(head, MIX_TOO_LARGE, settled)
            return True
        if any(victim.refs for victim in victims):
            self._closed = {victim.digest for victim in victims}
            return False
        for victim in victims:
            self.slots.evict(victim.digest)
            self.evictions += 1
        self._read = None
        self.version += 1
        try:
            self.slots.publish(ref.digest, ref.path, adapter)
        except Exception as error:
            failure = failure_of(error, f"publishing adapter {ref.digest}")
            self._fail(ref, failure, settled)
            return True
        self.replies.append(LoadDone(ref.digest, self._clock() - self._read_since))
        self._grant(settled)
        if self._unloads.get(ref.digest):
            self.slots.residents[ref.digest].draining = True
        return True

    # small things

    def _add(self, want: Want) -> int:
        self._next_want += 1
        self._wants[self._next_want] = want
        return self._next_want

    def _head(self) -> int | None:
        """The oldest want that no draining adapter keeps back."""
        residents = self.slots.residents
        for key, want in self._wants.items():
            if not any(digest in residents and residents[digest].draining for digest in want.refs):
                return key
        return None

    def _is_open(self, digest: str, key: int, head: int | None) -> bool:
        resident = self.slots.residents.get(digest)
        if resident is None or resident.draining:
            return False
        return digest not in self._closed or key == head

    def _wanting(self, digest: str) -> Iterator[tuple[int, Want]]:
        return ((key, want) for key, want in self._wants.items() if digest in want.refs)

    def _is_coming(self, digest: str) -> bool:
        coming = self._reading or (self._read[0] if self._read else None)
        return coming is not None and coming.digest == digest

    def _pin(self, request: Request) -> None:
        # In the order of digests, so that neither the order in which a mix is written nor the slots
        # that its adapters happen to have can change the order of summation.
        weights: dict[str, float] = {}
        for ref in sorted(request.submit.adapters, key=lambda ref: ref.digest):
            weights[ref.digest] = weights.get(ref.digest, 0.0) + ref.weight
        pins: list[Pin] = [self.slots.pin(digest) for digest in weights]
        request.pins = tuple(pins)
        request.mix = tuple((pin.slot, weights[pin.digest]) for pin in pins)

    def _fail(self, ref: AdapterRef, failure: Failure, settled: Settled) -> None:
        """Refuses all who wait for an adapter that cannot be had."""
        self.replies.append(LoadDone(ref.digest, self._clock() - self._read_since, failure))
        for key, _ in list(self._wanting(ref.digest)):
            self._refuse(key, failure, settled)
        self._answer_unloads(ref.digest)

    def _refuse(self, key: int, failure: Failure, settled: Settled) -> None:
        want = self._wants.pop(key)
        if want.request is None:
            self.replies.append(ControlDone(want.op, failure))
        else:
            del self._by_request[want.request.id]
            settled.refused.append((want.request, failure))

    def _refuse_loads(self, digest: str, failure: Failure) -> None:
        for key, want in list(self._wanting(digest)):
            if want.request is None:
                del self._wants[key]
                self.replies.append(ControlDone(want.op, failure))

    def _answer_unloads(self, digest: str) -> None:
        for op in self._unloads.pop(digest, ()):
            self.replies.append(ControlDone(op))

    def _drop_read(self) -> None:
        """Forgets what was read for nobody, or for somebody whose turn it no longer is."""
        if self._read is not None:
            self._answer_unloads(self._read[0].digest)
            self._read = None
            self.version += 1

    def _too_large(self, nbytes: int) -> Failure:
        text = f"the adapter takes {nbytes} bytes; the server has {self.slots.budget} for all"
        return Failure("ADAPTER_TOO_LARGE", text)
