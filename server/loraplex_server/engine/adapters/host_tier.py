"""Packed adapters in host memory: those that left the device, and those read ahead.

Bringing one of them to the device reads no file and repeats no check. The tier never holds more
bytes than its budget: it makes room by `GreedyDual`, or refuses what is offered.

On the CPU an adapter on the device *is* the packed one in host memory. The tier then keeps it for
free and charges it from the moment it leaves its slot. On an accelerator the copy in host memory is
a second one and always charged.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_server.engine.adapters.eviction import GreedyDual
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.engine.runner.protocol import LoadedAdapter


@dataclass(slots=True)
class HostAdapter:
    """A packed adapter in host memory: kept in the tier, staged for the device, or both.

    Attributes:
        read_seconds: duration of reading its files.
        kept: the tier has kept it, so its next load reads no file.
        ahead: it was read before it was needed, and has not been used since.
        on_device: it is in a slot now.
        last_used: time on the engine's clock when it last left the device; 0 if never.
    """

    ref: AdapterRef
    adapter: LoadedAdapter
    read_seconds: float
    kept: bool = False
    ahead: bool = False
    on_device: bool = False
    last_used: float = 0.0

    @property
    def digest(self) -> str:
        """Digest of the adapter's files."""
        return self.ref.digest


class HostTier:
    """Adapters by digest, within `budget` bytes; 0 keeps none.

    Attributes:
        allowed: bytes that it may take now; less than its budget while `limit` says so.
        shared: device memory is host memory, so adapters on the device are not charged here.
        nbytes: bytes charged.
        evictions: adapters removed to make room for others, since the start.
    """

    def __init__(self, budget: int, shared: bool) -> None:
        self.budget = self.allowed = budget
        self.shared = shared
        self.adapters: dict[str, HostAdapter] = {}
        self.nbytes = 0
        self.evictions = 0
        self._order = GreedyDual()

    def get(self, digest: str) -> HostAdapter | None:
        """The adapter, or None if it is not in the tier. Counts as a use."""
        held = self.adapters.get(digest)
        if held is not None:
            self._touch(held)
        return held

    def put(self, held: HostAdapter, keep: Collection[str]) -> bool:
        """Keeps an adapter; False if that would take the room of adapters in `keep`."""
        if held.digest in self.adapters:
            return True
        charge = self.charge(held)
        if not self._make_room(charge, keep):
            return False
        held.kept = True
        self.adapters[held.digest] = held
        self.nbytes += charge
        self._touch(held)
        return True

    def enter_device(self, digest: str) -> None:
        """Notes that an adapter has been put into a slot. No effect if the tier lacks it."""
        held = self.adapters.get(digest)
        if held is not None:
            self.nbytes -= self.charge(held)
            held.on_device = True
            held.ahead = False
            self.nbytes += self.charge(held)

    def leave_device(self, digest: str, last_used: float, keep: Collection[str]) -> None:
        """Notes that an adapter's slot was freed; it stays in the tier if there is room."""
        held = self.adapters.pop(digest, None)
        if held is None:
            return
        self.nbytes -= self.charge(held)
        held.on_device = False
        held.last_used = last_used
        if not self.put(held, keep):
            self._order.forget(digest)

    def drop(self, digest: str) -> None:
        """Removes an adapter. No effect if the tier lacks it."""
        held = self.adapters.pop(digest, None)
        if held is not None:
            self.nbytes -= self.charge(held)
            self._order.forget(digest)

    def limit(self, nbytes: int | None, keep: Collection[str]) -> None:
        """Evicts down to `nbytes`, adapters in `keep` excepted, and stays below; None: no more."""
        self.allowed = self.budget if nbytes is None else min(nbytes, self.budget)
        for held in self._leaving(keep):
            if self.nbytes <= self.allowed:
                break
            self._evict(held)

    def charge(self, held: HostAdapter) -> int:
        """Bytes of host memory that an adapter takes beyond those of its slot."""
        return 0 if self.shared and held.on_device else held.adapter.nbytes

    def check(self) -> None:
        """Verifies the byte counts. Raises `AssertionError`."""
        assert self.nbytes == sum(map(self.charge, self.adapters.values())), "bytes were lost"
        assert self.nbytes <= self.budget, "the host tier takes more than its budget"

    def _touch(self, held: HostAdapter) -> None:
        self._order.touch(held.digest, held.adapter.nbytes, held.read_seconds)

    def _make_room(self, charge: int, keep: Collection[str]) -> bool:
        over = self.nbytes + charge - self.allowed
        if over <= 0:
            return True
        leaving: list[HostAdapter] = []
        for held in self._leaving(keep):
            leaving.append(held)
            over -= self.charge(held)
            if over <= 0:
                break
        else:
            return False
        for held in leaving:
            self._evict(held)
        return True

    def _leaving(self, keep: Collection[str]) -> list[HostAdapter]:
        """The adapters that may leave and take bytes, in the order in which they should leave."""
        found = [h for h in self.adapters.values() if self.charge(h) and h.digest not in keep]
        return sorted(found, key=lambda held: self._order.worth(held.digest))

    def _evict(self, held: HostAdapter) -> None:
        del self.adapters[held.digest]
        self.nbytes -= self.charge(held)
        self._order.evict(held.digest)
        self.evictions += 1
