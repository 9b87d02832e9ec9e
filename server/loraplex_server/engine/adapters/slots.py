"""The adapters on the device: which slot each has, who uses it, what it takes.

An adapter in a slot is pinned by every request that computes with it. A pin names the slot and the
slot's generation, which grows with each adapter put there; weights leave a slot only when no pin is
left. So a running request can never meet other weights than those it was given.

A slot has bytes of the adapter budget and, for an adapter with virtual tokens, KV blocks of those
set aside. Both go when the slot is freed, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from loraplex_model.base.faults import reach

from loraplex_server.engine.adapters.eviction import GreedyDual
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.request import Pin, Prefix
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.engine.runner.protocol import LoadedAdapter, ModelRunner


@dataclass(slots=True)
class Resident:
    """An adapter on the device.

    Attributes:
        prefix: its virtual tokens, in `blocks` of those set aside.
        merge_nbytes, merged_bytes: what its dense copies would take, and what they take.
        load_seconds: how long its load took; reload_seconds: how long one from the store takes.
        last_used: of the engine's clock; 0 if never.
        refs: requests that hold it. draining: lets nobody in.
        pinned, merge_ordered: held on the device by order, until another order.
    """

    digest: str
    path: str
    slot: int
    generation: int
    nbytes: int
    merge_nbytes: int
    prefix: Prefix
    blocks: tuple[int, ...]
    load_seconds: float
    reload_seconds: float
    last_used: float = 0.0
    refs: int = 0
    draining: bool = False
    pinned: bool = False
    merge_ordered: bool = False
    merged_bytes: int = 0

    @property
    def held(self) -> bool:
        """Whether it may not be evicted even when nobody uses it."""
        return self.pinned or self.merge_ordered


class AdapterSlots:
    """The slots of a runner, and the bytes and prefix blocks that they may hold together."""

    def __init__(self, runner: ModelRunner, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._clock = clock
        self._free = list(range(runner.num_slots - 1, -1, -1))
        self._generations = [0] * runner.num_slots
        self._order = GreedyDual()
        self._blocks = BlockPool(runner.prefix_blocks, runner.block_size, first=runner.num_blocks)
        self.num_slots = runner.num_slots
        self.budget = runner.adapter_budget_bytes
        self.nbytes = 0
        self.residents: dict[str, Resident] = {}

    @property
    def prefix_blocks(self) -> int:
        """Blocks in use, of those set aside for virtual tokens."""
        return self._blocks.used

    def publish(
        self, ref: AdapterRef, adapter: LoadedAdapter, read_seconds: float, from_host: bool
    ) -> Resident:
        """Puts an adapter into a free slot. There must be room. Passes the runner's errors on."""
        assert ref.digest not in self.residents, "an adapter is loaded twice"
        assert self.victims(adapter, ()) == [], "an adapter is published without room for it"
        slot = self._free[-1]
        blocks = self._blocks.reserve(self._blocks.blocks_for(adapter.virtual_tokens))
        begun = self._clock()
        try:
            reach("adapter.publish")
            self._runner.publish_adapter(slot, adapter, blocks)
        except BaseException:
            self._blocks.release(blocks)
            raise
        seconds = self._clock() - begun
        self._free.pop()
        self._generations[slot] += 1
        self.nbytes += adapter.nbytes
        resident = Resident(
            digest=ref.digest,
            path=ref.path,
            slot=slot,
            generation=self._generations[slot],
            nbytes=adapter.nbytes,
            merge_nbytes=adapter.merge_nbytes,
            prefix=Prefix.of(adapter.virtual_tokens, tuple(blocks), self._runner.block_size),
            blocks=tuple(blocks),
            load_seconds=seconds if from_host else read_seconds + seconds,
            reload_seconds=read_seconds + seconds,
        )
        self.residents[ref.digest] = resident
        self._touch(resident)
        return resident

    def remove(self, resident: Resident, evicted: bool) -> None:
        """Frees the slot of an adapter that nobody uses; `evicted` if it has to make room."""
        assert resident.refs == 0, "an adapter in use is removed"
        self._runner.remove_adapter(resident.slot)
        del self.residents[resident.digest]
        self._free.append(resident.slot)
        self._blocks.release(resident.blocks)
        self.nbytes -= resident.nbytes
        if evicted:
            self._order.evict(resident.digest)
        else:
            self._order.forget(resident.digest)

    def pin(self, digest: str) -> Pin:
        """Holds a resident adapter in its slot."""
        resident = self.residents[digest]
        resident.refs += 1
        resident.last_used = self._clock()
        self._touch(resident)
        return Pin(digest, resident.slot, resident.generation)

    def unpin(self, pin: Pin) -> None:
        """Gives up a hold."""
        resident = self.residents[pin.digest]
        assert (resident.slot, resident.generation) == (pin.slot, pin.generation), "a stale pin"
        assert resident.refs > 0, "a pin is given back twice"
        resident.refs -= 1
        resident.last_used = self._clock()
        if resident.refs == 0:
            # While in use, the order of eviction stays as it was, so that who was asked to make
            # room stays asked; out of use, its recency counts from now.
            self._touch(resident)

    def fits_alone(self, adapter: LoadedAdapter) -> bool:
        """Whether an adapter could be published if nothing else were on the device."""
        blocks = self._blocks.blocks_for(adapter.virtual_tokens)
        return adapter.nbytes <= self.budget and blocks <= self._blocks.num_blocks

    def may_hold(self, resident: Resident) -> bool:
        """Whether the adapters that are held on the device may be one more.

        Together they take at most half of the bytes, of the slots and of the prefix blocks: the
        other half goes round among all the others, so that nothing up to that size is shut out.
        """
        held = [r for r in self.residents.values() if r.held or r is resident]
        return (
            2 * sum(r.nbytes for r in held) <= self.budget
            and 2 * len(held) <= self.num_slots
            and 2 * sum(len(r.blocks) for r in held) <= self._blocks.num_blocks
        )

    def victims(self, adapter: LoadedAdapter, keep: Collection[str]) -> list[Resident] | None:
        """The adapters whose leaving makes room for one more, none of `keep` among them.

        First those that are leaving anyway, then those out of use, then the others, each by
        `GreedyDual`; whoever has nothing of what is short is passed over, and who is held by order
        stays. None if there is not room enough even without all of them.
        """
        nbytes = self.nbytes + adapter.nbytes - self.budget
        blocks = self._blocks.blocks_for(adapter.virtual_tokens) - self._blocks.free
        slots = 1 - len(self._free)
        chosen: list[Resident] = []
        if max(nbytes, blocks, slots) <= 0:
            return chosen
        candidates = sorted(
            (r for r in self.residents.values() if r.digest not in keep and not self._stays(r)),
            key=lambda r: (not r.draining, r.refs > 0, self._order.worth(r.digest)),
        )
        for resident in candidates:
            if slots > 0 or (nbytes > 0 and resident.nbytes) or (blocks > 0 and resident.blocks):
                chosen.append(resident)
                nbytes -= resident.nbytes
                blocks -= len(resident.blocks)
                slots -= 1
                if max(nbytes, blocks, slots) <= 0:
                    return chosen
        return None

    def check(self) -> None:
        """Verifies slots, bytes and blocks. Raises `AssertionError`."""
        residents = self.residents.values()
        taken = [resident.slot for resident in residents]
        assert sorted(taken + self._free) == list(range(self.num_slots)), "a slot was lost"
        assert self.nbytes == sum(r.nbytes for r in residents), "bytes were lost"
        assert self.nbytes <= self.budget, "adapters take more than their budget"
        self._blocks.check()
        assert self._blocks.used == sum(len(r.blocks) for r in residents), "a block was lost"

    def _touch(self, resident: Resident) -> None:
        self._order.touch(resident.digest, resident.nbytes, resident.reload_seconds)

    def _stays(self, resident: Resident) -> bool:
        return resident.held and not resident.draining
