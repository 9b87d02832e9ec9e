"""Adapters on their way to the device: reads in flight, and the one adapter that is staged.

At most one adapter is staged at a time: one that the head want needs, in host memory and waiting
for room on the device. Adapters read ahead go to the host tier; if it has no room for them they are
dropped and read again when they are needed. So beyond the host tier's budget, host memory holds one
staged adapter and the reads in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, islice

from loraplex_server.engine.adapters.host_tier import HostAdapter, HostTier
from loraplex_server.engine.adapters.loader import LoaderResult, LoadLanes, Read
from loraplex_server.engine.messages import AdapterRef

MOST_AHEAD = 64
"""Most missing adapters that are looked at in a step for one to read ahead."""


class Fetching:
    """Reads in flight and the staged adapter.

    Attributes:
        staged: the adapter that is published next.
        ahead: reads started before their adapter was needed, since the start.
        hits: adapters read ahead and then used, since the start.
        version: grows whenever adapters on their way, or their copies in host memory, change.
    """

    def __init__(self, host: HostTier, lanes: LoadLanes) -> None:
        self._host = host
        self._lanes = lanes
        self._reading: dict[str, AdapterRef] = {}
        self._unwanted: set[str] = set()
        self._no_room: set[str] = set()
        self.staged: HostAdapter | None = None
        self.ahead = 0
        self.hits = 0
        self.version = 0

    @property
    def is_idle(self) -> bool:
        """Whether no adapter is being read or staged."""
        return not self._reading and self.staged is None

    @property
    def coming(self) -> list[AdapterRef]:
        """Adapters that are being read or staged."""
        refs = [*self._reading.values()]
        return refs if self.staged is None else [*refs, self.staged.ref]

    def is_coming(self, digest: str) -> bool:
        """Whether an adapter is being read or staged."""
        return any(ref.digest == digest for ref in self.coming)

    def start_reads(
        self,
        head_missing: Mapping[str, AdapterRef],
        missing: Iterable[AdapterRef],
        is_missing: Callable[[str], bool],
    ) -> None:
        """Starts as many reads as lanes allow.

        `head_missing` is what the head want lacks: one of these is read in the foreground unless an
        adapter is staged or one of these is being read. The first `MOST_AHEAD` of `missing`, which
        any want lacks, are read ahead in its order while the host tier may have room for them.
        """
        self._no_room = {digest for digest in self._no_room if is_missing(digest)}
        is_served = self.staged is not None or any(d in self._reading for d in head_missing)
        if head_missing and not is_served and self._lanes.is_free(background=False):
            self._start(next(iter(head_missing.values())), ahead=False)
        if not self._host.allowed:
            return
        for ref in islice(chain(head_missing.values(), missing), MOST_AHEAD):
            if not self._lanes.is_free(background=True):
                break
            is_kept = ref.digest in self._host.adapters
            if not (is_kept or ref.digest in self._no_room or self.is_coming(ref.digest)):
                self._start(ref, ahead=True)

    def end_read(self, digest: str) -> bool:
        """Notes the end of a read; False if its adapter was given up meanwhile."""
        del self._reading[digest]
        self.version += 1
        given_up = digest in self._unwanted
        self._unwanted.discard(digest)
        return not given_up

    def keep(self, result: LoaderResult, wanted: Collection[str]) -> None:
        """Puts an adapter just read into the host tier, if that leaves those in `wanted`."""
        held = _held(result)
        held.ahead = held.digest in wanted
        if not self._host.put(held, wanted) and held.ahead:
            self._no_room.add(held.digest)

    def stage(self, result: LoaderResult) -> None:
        """Stages an adapter just read."""
        assert self.staged is None, "an adapter is staged already"
        self.staged = _held(result)

    def stage_from_host(self, refs: Iterable[AdapterRef]) -> None:
        """Stages the first of `refs` that the host tier has, if it has any."""
        assert self.staged is None, "an adapter is staged already"
        for ref in refs:
            held = self._host.get(ref.digest)
            if held is not None:
                self.hits += held.ahead
                held.ahead = False
                held.ref = ref
                self.staged = held
                self.version += 1
                return

    def unstage(self, keep: Collection[str]) -> None:
        """Moves the staged adapter to the host tier, or drops it if there is no room."""
        assert self.staged is not None, "no adapter is staged"
        self._host.put(self.staged, keep)
        self.staged = None
        self.version += 1

    def drop_staged(self) -> None:
        """Drops the staged adapter and the host tier's copy, so that its next load reads files."""
        assert self.staged is not None, "no adapter is staged"
        self._host.drop(self.staged.digest)
        self.staged = None
        self.version += 1

    def end_publication(self, keep: Collection[str]) -> None:
        """Notes that the staged adapter is on the device. The host tier may keep its copy."""
        held, self.staged = self.staged, None
        assert held is not None, "no adapter is staged"
        if held.digest not in self._host.adapters:
            held.on_device = True
            self._host.put(held, keep)
        self._host.enter_device(held.digest)

    def forget(self, digest: str) -> None:
        """Drops an adapter's copy in the host tier, and the result of a read of it in flight."""
        self._host.drop(digest)
        self.version += 1
        if digest in self._reading:
            self._unwanted.add(digest)

    def _start(self, ref: AdapterRef, ahead: bool) -> None:
        self._no_room.discard(ref.digest)
        self._reading[ref.digest] = ref
        self.ahead += ahead
        self._lanes.start(Read(ref), ahead)
        self.version += 1


def _held(result: LoaderResult) -> HostAdapter:
    assert result.adapter is not None, "a failed read brings no adapter"
    return HostAdapter(result.task.ref, result.adapter, result.seconds)
