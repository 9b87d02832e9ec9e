"""The adapters on the device: which slot each has, who uses it, what it takes.

An adapter in a slot is pinned by every request that computes with it. A pin names the slot and the
slot's generation, which grows with each adapter put there; weights leave a slot only when no pin is
left. So a running request can never meet other weights than those it was given.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_server.engine.runner import LoadedAdapter, ModelRunner


@dataclass(frozen=True, slots=True)
class Pin:
    """One request's hold on one adapter."""

    digest: str
    slot: int
    generation: int


@dataclass(slots=True)
class Resident:
    """An adapter on the device. `used` grows with its last use; `draining` lets nobody in."""

    digest: str
    path: str
    slot: int
    generation: int
    nbytes: int
    used: int
    refs: int = 0
    draining: bool = False


class AdapterSlots:
    """The slots of a runner and the bytes they may hold together."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._free = list(range(runner.num_slots - 1, -1, -1))
        self._generations = [0] * runner.num_slots
        self._uses = 0
        self.num_slots = runner.num_slots
        self.budget = runner.adapter_budget_bytes
        self.nbytes = 0
        self.residents: dict[str, Resident] = {}

    def publish(self, digest: str, path: str, adapter: LoadedAdapter) -> None:
        """Puts an adapter into a free slot. There must be room. Passes the runner's errors on."""
        assert digest not in self.residents, "an adapter is loaded twice"
        assert self.has_room(adapter.nbytes), "an adapter is published without room for it"
        slot = self._free[-1]
        self._runner.publish_adapter(slot, adapter)
        self._free.pop()
        self._generations[slot] += 1
        self._uses += 1
        self.nbytes += adapter.nbytes
        self.residents[digest] = Resident(
            digest, path, slot, self._generations[slot], adapter.nbytes, self._uses
        )

    def evict(self, digest: str) -> None:
        """Frees the slot of an adapter that nobody uses."""
        resident = self.residents[digest]
        assert resident.refs == 0, "an adapter in use is evicted"
        self._runner.remove_adapter(resident.slot)
        del self.residents[digest]
        self._free.append(resident.slot)
        self.nbytes -= resident.nbytes

    def pin(self, digest: str) -> Pin:
        """Holds a resident adapter in its slot."""
        resident = self.residents[digest]
        resident.refs += 1
        self._uses += 1
        resident.used = self._uses
        return Pin(digest, resident.slot, resident.generation)

    def unpin(self, pin: Pin) -> None:
        """Gives up a hold."""
        resident = self.residents[pin.digest]
        assert (resident.slot, resident.generation) == (pin.slot, pin.generation), "a stale pin"
        assert resident.refs > 0, "a pin is given back twice"
        resident.refs -= 1
        if resident.refs == 0:
            # While in use, the order of eviction stays as it was, so that who was asked to make
            # room stays asked; out of use, its recency counts from now.
            self._uses += 1
            resident.used = self._uses

    def has_room(self, nbytes: int) -> bool:
        """Whether an adapter of that size could be published now."""
        return bool(self._free) and self.nbytes + nbytes <= self.budget

    def victims(self, nbytes: int, keep: Collection[str]) -> list[Resident] | None:
        """The adapters whose leaving makes room for `nbytes`, none of `keep` among them.

        First those that are leaving anyway, then those out of use, the longest unused first. None
        if there is not room enough even without all of them.
        """
        candidates = sorted(
            (r for r in self.residents.values() if r.digest not in keep),
            key=lambda r: (not r.draining, r.refs > 0, r.used),
        )
        chosen: list[Resident] = []
        left, slots = self.nbytes, len(self._free)
        while left + nbytes > self.budget or slots == 0:
            if len(chosen) == len(candidates):
                return None
            left -= candidates[len(chosen)].nbytes
            slots += 1
            chosen.append(candidates[len(chosen)])
        return chosen

    def check(self) -> None:
        """Verifies slots and bytes. Raises `AssertionError`."""
        taken = [resident.slot for resident in self.residents.values()]
        assert sorted(taken + self._free) == list(range(self.num_slots)), "a slot was lost"
        assert self.nbytes == sum(r.nbytes for r in self.residents.values()), "bytes were lost"
        assert self.nbytes <= self.budget, "adapters take more than their budget"
