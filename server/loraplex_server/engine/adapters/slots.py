"""Adapters on the device: the slot, the pins, the bytes and the KV blocks of each.

Every request that computes with an adapter pins it. A pin names the slot and the slot's generation,
which grows with each adapter put there; weights leave a slot only when no pin is left. So a running
request never computes with other weights than those it was granted.

An adapter in a slot takes bytes of the adapter budget and, if it has virtual tokens, KV blocks of
those set aside. Both are freed with the slot, and not before.

    Request --pins--> Resident (slot, generation, refs) --owns--> prefix blocks
                          |
                          +-- the slot's weights and dense copies belong to the runner
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.attempts import LOAD, Announcements
from loraplex_server.engine.adapters.eviction import GreedyDual
from loraplex_server.engine.adapters.host_tier import HostAdapter
from loraplex_server.engine.batching.activation import active_from
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.request import MergeState, Pin, Prefix, Request
from loraplex_server.engine.messages import Failure
from loraplex_server.engine.runner.protocol import LoadedAdapter, ModelRunner

PIN_BUDGET = Failure(
    Reason.PIN_BUDGET, "pinned and merged adapters may take half of the device's adapter memory"
)


@dataclass(slots=True)
class Resident:
    """An adapter on the device.

    Attributes:
        generation: number of adapters that the slot has held, this one included.
        merge_nbytes: bytes that its dense copies would take; 0 if it cannot be merged.
        prefix: its virtual tokens, in `blocks` of those set aside.
        invocation_tokens: as in `LoadedAdapter`.
        published: time at which it was put there, on the engine's clock.
        load_seconds: duration of its load.
        reload_seconds: duration of a load from its files.
        last_used: time on the engine's clock; 0 if never.
        refs: requests that have it pinned.
        draining: it takes no new pins and is removed with the last one.
        pinned, merge_ordered: held on the device by an operator's order.
        merged_bytes: bytes of its dense copies; 0 unless merged.
        copies: whether they are in use, for the requests that have it pinned.
    """

    digest: str
    path: str
    slot: int
    generation: int
    nbytes: int
    merge_nbytes: int
    prefix: Prefix
    invocation_tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    published: float
    load_seconds: float
    reload_seconds: float
    last_used: float = 0.0
    refs: int = 0
    draining: bool = False
    pinned: bool = False
    merge_ordered: bool = False
    merged_bytes: int = 0
    copies: MergeState = field(default_factory=MergeState)

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that it puts before every prompt."""
        return self.prefix.count

    @property
    def held(self) -> bool:
        """Whether an order holds it on the device, so that it is never evicted."""
        return self.pinned or self.merge_ordered


class AdapterSlots:
    """The slots of a runner, within its adapter bytes and prefix blocks.

    Attributes:
        nbytes: bytes that the adapters on the device take.
        residents: adapters on the device, by digest.
        evictions: adapters removed to make room for others, since the start.
        version: grows whenever an adapter's status changes by more than references and times.
        uses: grows whenever references and times change.
    """

    def __init__(
        self,
        runner: ModelRunner,
        clock: Callable[[], float],
        attempts: Announcements | None = None,
        settle_slot: Callable[[int], None] = lambda slot: None,
    ) -> None:
        """`settle_slot` returns once no pass reads a slot; it is called before a slot changes."""
        self.settle_slot = settle_slot
        self._runner = runner
        self._clock = clock
        self._attempts = attempts or Announcements()
        self._free = list(range(runner.num_slots - 1, -1, -1))
        self._generations = [0] * runner.num_slots
        self._order = GreedyDual()
        self._blocks = BlockPool(runner.prefix_blocks, runner.block_size, first=runner.num_blocks)
        self._preparing: tuple[HostAdapter, float] | None = None
        self.nbytes = 0
        self.residents: dict[str, Resident] = {}
        self.evictions = 0
        self.version = 0
        self.uses = 0

    @property
    def budget(self) -> int:
        """Bytes that the adapters may take together."""
        return self._runner.adapter_budget_bytes

    @property
    def prefix_blocks(self) -> int:
        """Number of blocks in use, of those set aside for virtual tokens."""
        return self._blocks.used

    def prepare(self, held: HostAdapter) -> bool:
        """Begins or continues to copy an adapter to the device; True once it can be published.

        There must be room for it. Raises the runner's errors.
        """
        with self._attempts.of(held.digest, LOAD):
            begun = self._clock()
            is_there = self._runner.prepare_adapter(held.adapter)
            if self._preparing is None or self._preparing[0] is not held:
                self._preparing = held, begun
        return is_there

    def publish(self, held: HostAdapter) -> Resident:
        """Puts an adapter into a free slot. There must be room. Raises the runner's errors."""
        adapter = held.adapter
        assert held.digest not in self.residents, "an adapter is loaded twice"
        assert self.victims(adapter, ()) == [], "an adapter is published without room for it"
        slot = self._free[-1]
        blocks = self._blocks.reserve(self._blocks.blocks_for(adapter.virtual_tokens))
        begun = self._clock()
        if self._preparing is not None and self._preparing[0] is held:
            begun = self._preparing[1]
        self._preparing = None
        try:
            with self._attempts.of(held.digest, LOAD):
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
            digest=held.digest,
            path=held.ref.path,
            slot=slot,
            generation=self._generations[slot],
            nbytes=adapter.nbytes,
            merge_nbytes=adapter.merge_nbytes,
            prefix=Prefix.of(adapter.virtual_tokens, tuple(blocks), self._runner.block_size),
            invocation_tokens=tuple(adapter.invocation_tokens),
            blocks=tuple(blocks),
            published=begun + seconds,
            load_seconds=seconds if held.kept else held.read_seconds + seconds,
            reload_seconds=held.read_seconds + seconds,
        )
        self.residents[held.digest] = resident
        self.version += 1
        self._touch(resident)
        return resident

    def remove(self, resident: Resident, evicted: bool) -> None:
        """Frees the slot of an adapter without pins; `evicted` if it makes room for another."""
        assert resident.refs == 0, "an adapter in use is removed"
        self.settle_slot(resident.slot)
        self._runner.remove_adapter(resident.slot)
        del self.residents[resident.digest]
        self._free.append(resident.slot)
        self._blocks.release(resident.blocks)
        self.nbytes -= resident.nbytes
        self.version += 1
        if evicted:
            self.evictions += 1
            self._order.evict(resident.digest)
        else:
            self._order.forget(resident.digest)

    def set_pinned(self, resident: Resident, pinned: bool) -> None:
        """Holds an adapter on the device by order, or ends that."""
        resident.pinned = pinned
        self.version += 1

    def drain(self, resident: Resident) -> None:
        """Closes an adapter to new pins; it is to be removed when it has none."""
        resident.draining = True
        self.version += 1

    def pin(self, digest: str) -> Pin:
        """Pins a resident adapter in its slot."""
        resident = self.residents[digest]
        resident.refs += 1
        self.uses += 1
        resident.last_used = self._clock()
        self._touch(resident)
        return Pin(digest, resident.slot, resident.generation)

    def grant(self, request: Request) -> None:
        """Pins a request's adapters, which are all resident, and sets how they act in it."""
        # In the order of digests, so that neither the order in which a mix is written nor the slots
        # of its adapters can change the order of summation.
        weights: dict[str, float] = {}
        for ref in sorted(request.submit.adapters, key=lambda ref: ref.digest):
            weights[ref.digest] = weights.get(ref.digest, 0.0) + ref.weight
        request.pins = tuple(self.pin(digest) for digest in weights)
        request.mix = tuple((pin.slot, weights[pin.digest]) for pin in request.pins)
        if len(weights) == 1:
            resident = self.residents[request.pins[0].digest]
            request.prefix = resident.prefix
            request.copies = resident.copies
            request.active_from = active_from(
                request.tokens[: request.prompt_len], resident.invocation_tokens
            )

    def unpin(self, pin: Pin) -> None:
        """Releases a pin."""
        resident = self.residents[pin.digest]
        assert (resident.slot, resident.generation) == (pin.slot, pin.generation), "a stale pin"
        assert resident.refs > 0, "a pin is given back twice"
        resident.refs -= 1
        self.uses += 1
        resident.last_used = self._clock()
        if resident.refs == 0:
            # While adapters are in use their eviction order stays as it is, so that the victims
            # chosen to make room stay the victims; out of use, recency counts from now.
            self._touch(resident)

    def fits_alone(self, adapter: LoadedAdapter) -> bool:
        """Whether an adapter could be published on an empty device."""
        blocks = self._blocks.blocks_for(adapter.virtual_tokens)
        budget = self._runner.adapter_budget_bytes
        return adapter.nbytes <= budget and blocks <= self._blocks.num_blocks

    def may_hold(self, resident: Resident) -> bool:
        """Whether an order may hold `resident` too.

        Held adapters take at most half of the bytes, of the slots and of the prefix blocks, so
        every adapter that fits into the other half can still be loaded.
        """
        held = [r for r in self.residents.values() if r.held or r is resident]
        return (
            2 * sum(r.nbytes for r in held) <= self._runner.adapter_budget_bytes
            and 2 * len(held) <= self._runner.num_slots
            and 2 * sum(len(r.blocks) for r in held) <= self._blocks.num_blocks
        )

    def too_large(self, adapter: LoadedAdapter) -> Failure:
        """The refusal of an adapter that does not fit alone."""
        text = (
            f"the adapter takes {adapter.nbytes} bytes and {adapter.virtual_tokens} virtual tokens;"
            f" the server has {self._runner.adapter_budget_bytes} bytes and "
            f"{self._runner.prefix_blocks * self._runner.block_size} tokens for all adapters"
        )
        return Failure(Reason.ADAPTER_TOO_LARGE, text)

    def victims(
        self, adapter: LoadedAdapter, keep: Collection[str], past_drains: bool = False
    ) -> list[Resident] | None:
        """Adapters whose removal makes room for `adapter`; None if no removal makes enough.

        Draining adapters come first, then those without pins in the order of `GreedyDual`, then the
        others, the longest on the device first. Adapters in `keep`, adapters held by order, and
        adapters that take nothing of what is short are passed over. With `past_drains` so are those
        that drain and are in use, as far as the others make enough room.
        """
        if past_drains:
            drained = {r.digest for r in self.residents.values() if r.draining and r.refs}
            chosen = self.victims(adapter, {*keep, *drained}) if drained else None
            if chosen is not None:
                return chosen
        nbytes = self.nbytes + adapter.nbytes - self.budget
        blocks = self._blocks.blocks_for(adapter.virtual_tokens) - self._blocks.free
        slots = 1 - len(self._free)
        chosen = []
        if max(nbytes, blocks, slots) <= 0:
            return chosen
        candidates = [r for r in self.residents.values() if r.draining or not r.held]
        candidates.sort(key=self._eviction_key)
        for resident in [r for r in candidates if r.digest not in keep]:
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
        assert sorted(taken + self._free) == list(range(self._runner.num_slots)), "a slot was lost"
        assert self.nbytes == sum(r.nbytes for r in residents), "bytes were lost"
        assert self.nbytes <= self._runner.adapter_budget_bytes, (
            "adapters take more than their budget"
        )
        self._blocks.check()
        assert self._blocks.used == sum(len(r.blocks) for r in residents), "a block was lost"

    def _eviction_key(self, resident: Resident) -> tuple[bool, bool, tuple[float, int]]:
        age = (resident.published, resident.slot)
        worth = age if resident.refs else self._order.worth(resident.digest)
        return not resident.draining, resident.refs > 0, worth

    def _touch(self, resident: Resident) -> None:
        self._order.touch(resident.digest, resident.nbytes, resident.reload_seconds)
