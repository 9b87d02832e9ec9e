"""Cache of adapter ids, so that a request needs no look-up in the store's index."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypeVar

FRESH_SECONDS: Final = 0.5
"""Seconds for which a change made by another process may stay unnoticed."""

T = TypeVar("T")


class NameCache(Generic[T]):
    """A bounded LRU cache from adapter ids to what they resolve to.

    Changes made by this process clear it at once (`clear`). For changes made by other processes the
    store's change count is read again once the last reading is older than `FRESH_SECONDS`, at most
    once in that time however many requests there are.
    """

    def __init__(
        self,
        count_changes: Callable[[], Awaitable[int]],
        size: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count_changes = count_changes
        self._size = size
        self._clock = clock
        self._entries: OrderedDict[str, T] = OrderedDict()
        self._count: int | None = None
        self._checked = float("-inf")
        self._generation = 0
        self._checking = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def fill(self, entries: Mapping[str, T], count: int) -> None:
        """Replaces all entries by `entries`, read when the store's change count was `count`.

        If there are too many, the first ones are kept.
        """
        self.clear()
        self._count = count
        self._entries.update(itertools.islice(entries.items(), self._size))

    async def get(self, key: str, look_up: Callable[[], Awaitable[T]]) -> T:
        """Value of `key`, from `look_up` if it is not cached. Raises what `look_up` raises.

        The result of `look_up` is cached only if nothing changed meanwhile.
        """
        if self._clock() - self._checked > FRESH_SECONDS:
            await self._check()
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
            return found
        generation = self._generation
        found = await look_up()
        if generation == self._generation:
            self._entries[key] = found
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return found

    def clear(self) -> None:
        """Removes all entries, because this process has changed the store."""
        self._generation += 1
        self._entries.clear()

    async def _check(self) -> None:
        async with self._checking:
            now = self._clock()
            if now - self._checked <= FRESH_SECONDS:
                return  # another caller checked while this one waited
            count = await self._count_changes()
            if count != self._count:
                self._count = count
                self.clear()
            self._checked = now
