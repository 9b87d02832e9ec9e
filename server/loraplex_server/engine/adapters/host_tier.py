"""Packed adapters in host memory: those that left the device, and those read ahead for a queue.

Bringing one to the device from here costs no file and no checks. The tier never holds more bytes
than its budget: it makes room by `GreedyDual`, or does not take what is offered.

On the CPU an adapter on the device *is* the packed one in host memory. It is then kept here too, as
it costs nothing, and is charged from when it leaves its slot. On an accelerator the copy here is a
second one and always charged.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_server.engine.adapters.eviction import GreedyDual
from loraplex_server.engine.runner.protocol import LoadedAdapter


@dataclass(slots=True)
class HostAdapter:
    """A packed adapter. `read_seconds` is what reading it from the store took.

    `ahead` until its first use if it was read before its turn; `last_used` in seconds of the
    engine's clock, 0 if never.
    """

    digest: str
    path: str
    adapter: LoadedAdapter
    read_seconds: float
    ahead: bool = False
    on_device: bool = False
    last_used: float = 0.0


class HostTier:
    """Adapters by digest, within `budget` bytes; 0 keeps none.

    Attributes:
        shared: the device's memory is the host's, so what is on the device is not charged here.
        nbytes: bytes charged.
        evictions: adapters that made room for others, counted since the start.
    """

    def __init__(self, budget: int, shared: bool) -> None:
        self.budget = budget
        self.shared = shared
        self.adapters: dict[str, HostAdapter] = {}
        self.nbytes = 0
        self.evictions = 0
        self._order = GreedyDual()

    def get(self, digest: str) -> HostAdapter | None:
        """The adapter, if it is here; counts as a use."""
        held = self.adapters.get(digest)
        if held is not None:
            self._touch(held)
        return held

    def put(self, held: HostAdapter, keep: Collection[str]) -> bool:
        """Takes an adapter in; False if there is no room beside those of `keep`."""
        if held.digest in self.adapters:
            return True
        charge = self.charge(held)
        if not self._make_room(charge, keep):
            return False
        self.adapters[held.digest] = held
        self.nbytes += charge
        self._touch(held)
        return True

    def enter_device(self, digest: str) -> None:
        """Notes that an adapter, if it is here, has been published to a slot."""
        held = self.adapters.get(digest)
        if held is not None:
            self.nbytes -= self.charge(held)
            held.on_device = True
            held.ahead = False
            self.nbytes += self.charge(held)

    def leave_device(self, digest: str, last_used: float, keep: Collection[str]) -> None:
        """Notes that an adapter's slot was freed: it stays here if there is room."""
        held = self.adapters.pop(digest, None)
        if held is None:
            return
        self.nbytes -= self.charge(held)
        held.on_device = False
        held.last_used = last_used
        if not self.put(held, keep):
            self._order.forget(digest)

    def drop(self, digest: str) -> None:
        """Lets go of an adapter, if it is here."""
        held = self.adapters.pop(digest, None)
        if held is not None:
            self.nbytes -= self.charge(held)
            self._order.forget(digest)

    def charge(self, held: HostAdapter) -> int:
        """Bytes of host memory that it takes beyond what its slot takes."""
        return 0 if self.shared and held.on_device else held.adapter.nbytes

    def check(self) -> None:
        """Verifies the bytes. Raises `AssertionError`."""
        assert self.nbytes == sum(map(self.charge, self.adapters.values())), "bytes were lost"
        assert self.nbytes <= self.budget, "the host tier takes more than its budget"

    def _touch(self, held: HostAdapter) -> None:
        self._order.touch(held.digest, held.adapter.nbytes, held.read_seconds)

    def _make_room(self, charge: int, keep: Collection[str]) -> bool:
        over = self.nbytes + charge - self.budget
        if over <= 0:
            return True
        leaving: list[HostAdapter] = []
        candidates = [h for h in self.adapters.values() if self.charge(h) and h.digest not in keep]
        for held in sorted(candidates, key=lambda held: self._order.worth(held.digest)):
            leaving.append(held)
            over -= self.charge(held)
            if over <= 0:
                break
        else:
            return False
        for held in leaving:
            del self.adapters[held.digest]
            self.nbytes -= self.charge(held)
            self._order.evict(held.digest)
            self.evictions += 1
        return True
