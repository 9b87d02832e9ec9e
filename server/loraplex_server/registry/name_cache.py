"""Cache of adapter ids, so that a request needs no look-up in the store's index."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.registry.freshness import FRESH_SECONDS, IndexFreshness

__all__ = ["FRESH_SECONDS", "NameCache"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_NEVER: Final = -1
"""Generation of a value that no look-up has confirmed."""

_GONE: Final = (Reason.ADAPTER_NOT_FOUND, Reason.FIELD_INVALID)


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    """A value, and the generation of the cache in which it was looked up."""

    value: T
    generation: int


class NameCache(Generic[K, T]):
    """A bounded LRU cache from adapter ids, or keys with an id, to what they resolve to.

    After any change of the store an id is looked up again before its value is used: after changes
    made by this process at once (`clear`), after changes made by others once the store's change
    count shows them (`freshness`). Values from before the change are kept and used only while the
    index is away, except those that this process has removed (`forget`).
    """

    def __init__(
        self,
        count_changes: Callable[[], Awaitable[int]],
        size: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size = size
        self._entries: OrderedDict[K, _Entry[T]] = OrderedDict()
        self._generation = 0
        self._looking: dict[tuple[K, int], asyncio.Task[T]] = {}
        self.freshness = IndexFreshness(count_changes, self.clear, clock)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        """Whether a value of `key` is kept, be it of the present or of an earlier state."""
        return key in self._entries

    def fill(self, entries: Mapping[K, T], count: int) -> None:
        """Replaces all entries by `entries`, read when the store's change count was `count`.

        If there are too many, the first ones are kept.
        """
        self.clear()
        self.freshness.known(count)
        self._entries.clear()
        for key, value in itertools.islice(entries.items(), self._size):
            self._entries[key] = _Entry(value, self._generation)

    async def get(self, key: K, look_up: Callable[[], Awaitable[T]]) -> T:
        """Value of `key`, from `look_up` if it is not cached. Raises what `look_up` raises.

        The result of `look_up` is cached only if nothing changed meanwhile. Calls for the same key
        share one look-up. While the index is away, a kept value is returned at once; without one,
        Refusal(STORE_UNAVAILABLE) is raised.
        """
        await self.freshness.fresh()
        found = self.recall(key)
        if found is not None:
            return found
        await self.freshness.require()
        try:
            return await self._shared(key, look_up)
        except Refusal as refusal:
            if refusal.reason in _GONE:
                self._entries.pop(key, None)
            if refusal.reason is not Reason.STORE_UNAVAILABLE:
                raise
            self.freshness.lost()
            kept = self.recall(key)
            if kept is None:
                raise
            return kept

    def recall(self, key: K) -> T | None:
        """The cached value of `key`, or, while the index is away, the one kept; else None."""
        entry = self._entries.get(key)
        if entry is None or not (entry.generation == self._generation or self.freshness.away):
            return None
        self._entries.move_to_end(key)
        return entry.value

    def snapshot(self) -> list[tuple[K, T]]:
        """The kept keys with their values, the last used first. May be called in any thread."""
        while True:
            try:
                entries = list(self._entries.items())
            except RuntimeError:  # the loop has changed them meanwhile
                continue
            return [(key, entry.value) for key, entry in reversed(entries)]

    def clear(self) -> None:
        """Marks all entries to be looked up again before their next use: the store has changed."""
        self._generation += 1

    def keep(self, key: K, value: T) -> None:
        """Keeps a value for the time when the index is away; until then `key` is looked up."""
        if key not in self._entries:
            self._put(key, _Entry(value, _NEVER))

    def forget(self, concerned: Callable[[K, T], bool]) -> Sequence[K]:
        """Removes the entries for whose key and value `concerned` is true; returns their keys."""
        forgotten = [k for k, entry in self._entries.items() if concerned(k, entry.value)]
        for key in forgotten:
            del self._entries[key]
        return forgotten

    async def _shared(self, key: K, look_up: Callable[[], Awaitable[T]]) -> T:
        # A look-up that began before a change must not answer a call that came after it.
        about = (key, self._generation)
        task = self._looking.get(about)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._look(about, look_up))
            self._looking[about] = task
            task.add_done_callback(lambda done: self._looked(about, done))
        return await asyncio.shield(task)

    async def _look(self, about: tuple[K, int], look_up: Callable[[], Awaitable[T]]) -> T:
        key, generation = about
        found = await look_up()
        if generation == self._generation:
            self._put(key, _Entry(found, generation))
        return found

    def _put(self, key: K, entry: _Entry[T]) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def _looked(self, about: tuple[K, int], task: asyncio.Task[T]) -> None:
        del self._looking[about]
        if not task.cancelled():
            task.exception()  # if every caller was cancelled, nobody else reads it
