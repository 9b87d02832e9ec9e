"""Adapters on their way to the device: being read, or in hand and waiting for room.

One adapter is in hand at a time (`staged`): the one whose turn it is. What is read before its turn
goes to the host tier, and if that has no room for it, it is let go and read again in its turn. So
beside the host tier's budget, host memory holds one adapter in hand and what is being read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from loraplex_server.engine.adapters.host_tier import HostAdapter, HostTier
from loraplex_server.engine.adapters.loader import Desk, Read, ReadResult
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.engine.runner.protocol import LoadedAdapter


@dataclass(frozen=True, slots=True)
class Staged:
    """The adapter in hand; `from_host` if no file had to be read for it now."""

    ref: AdapterRef
    adapter: LoadedAdapter
    read_seconds: float
    from_host: bool


@dataclass(slots=True)
class _Reading:
    ref: AdapterRef
    ahead: bool
    unwanted: bool = False


class Fetching:
    """Reads in flight and the adapter in hand.

    Attributes:
        ahead: reads begun before their turn, and hits: how many of these were used, counted since
            the start.
    """

    def __init__(self, host: HostTier, desk: Desk) -> None:
        self._host = host
        self._desk = desk
        self._reading: dict[str, _Reading] = {}
        self._no_room: set[str] = set()
        self.staged: Staged | None = None
        self.ahead = 0
        self.hits = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._reading and self.staged is None

    @property
    def coming(self) -> list[AdapterRef]:
        """Everything that is on its way."""
        refs = [reading.ref for reading in self._reading.values()]
        return refs if self.staged is None else [*refs, self.staged.ref]

    def is_coming(self, digest: str) -> bool:
        """Whether an adapter is on its way."""
        in_hand = self.staged is not None and self.staged.ref.digest == digest
        return in_hand or digest in self._reading

    def take_in_hand(self, refs: Iterable[AdapterRef]) -> bool:
        """Stages the first of `refs` that is in host memory; False if none is."""
        assert self.staged is None, "there is an adapter in hand already"
        for ref in refs:
            held = self._host.get(ref.digest)
            if held is not None:
                self.hits += held.ahead
                held.ahead = False
                self.staged = Staged(ref, held.adapter, held.read_seconds, from_host=True)
                return True
        return False

    def let_go(self, keep: Collection[str]) -> None:
        """Takes the adapter out of hand, into the host tier if there is room."""
        if self.staged is not None:
            staged, self.staged = self.staged, None
            self._host.put(_hosted(staged.ref, staged.adapter, staged.read_seconds), keep)

    def forget(self, digest: str) -> None:
        """Lets go of what is known of an adapter, and of what is still being read unless wanted."""
        self._host.drop(digest)
        if digest in self._reading:
            self._reading[digest].unwanted = True

    def read(self, turn: list[AdapterRef], others: Iterable[AdapterRef]) -> bool:
        """Begins what reads it can; True if it began any.

        `turn` is what is missing to those whose turn it is: one of it is read in the foreground,
        unless one is in hand or being read. The rest and `others`, in this order, are read ahead
        while the host tier may have room for them.
        """
        began = False
        if turn and self.staged is None and not any(r.digest in self._reading for r in turn):
            began = self._begin(turn[0], ahead=False)
        if not self._host.budget:
            return began
        for ref in (*turn, *others):
            if not self._desk.has_lane(background=True):
                break
            if ref.digest not in self._no_room and ref.digest not in self._host.adapters:
                began |= not self.is_coming(ref.digest) and self._begin(ref, ahead=True)
        return began

    def ended(self, result: ReadResult) -> bool:
        """Notes the end of a read; True if its adapter may be kept when nobody waits for it."""
        return not self._reading.pop(result.ref.digest).unwanted

    def keep(self, result: ReadResult, wanted: Collection[str]) -> None:
        """Puts what was read into the host tier, if there is room beside what is `wanted`."""
        assert result.adapter is not None
        held = _hosted(result.ref, result.adapter, result.seconds)
        held.ahead = result.ref.digest in wanted
        if not self._host.put(held, wanted) and held.ahead:
            self._no_room.add(result.ref.digest)

    def stage(self, result: ReadResult) -> None:
        """Takes what was read in hand."""
        assert self.staged is None, "there is an adapter in hand already"
        assert result.adapter is not None
        self.staged = Staged(result.ref, result.adapter, result.seconds, from_host=False)

    def retry(self, wanted: Collection[str]) -> None:
        """Forgets that there was no room for what nobody waits for any more."""
        self._no_room.intersection_update(wanted)

    def published(self, staged: Staged, keep: Collection[str]) -> None:
        """Empties the hand: the adapter is on the device. The host tier may keep its copy."""
        self.staged = None
        held = _hosted(staged.ref, staged.adapter, staged.read_seconds)
        held.on_device = True
        self._host.put(held, keep)
        self._host.enter_device(staged.ref.digest)

    def _begin(self, ref: AdapterRef, ahead: bool) -> bool:
        if not self._desk.has_lane(ahead):
            return False
        self._no_room.discard(ref.digest)
        self._reading[ref.digest] = _Reading(ref, ahead)
        self.ahead += ahead
        self._desk.start(Read(ref), ahead)
        return True


def _hosted(ref: AdapterRef, adapter: LoadedAdapter, read_seconds: float) -> HostAdapter:
    return HostAdapter(ref.digest, ref.path, adapter, read_seconds)
