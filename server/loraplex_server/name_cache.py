"""What adapter ids mean, remembered, so that a request costs no look-up in the database."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypeVar

FRESH_SECONDS: Final = 0.5
"""How long a change made by another process may stay unseen."""

T = TypeVar("T")


class NameCache(Generic[T]):
    """A bounded map from adapter ids to what they resolve to; the least recently used goes first.

    Own changes empty it at once (`clear`). Those of other processes are found by their trace: the
    store counts its changes, and the count is read again when the last reading is older than
    `FRESH_SECONDS`, however many requests there are meanwhile.
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
        """Takes in what ids resolved to when the store had counted `count` changes.

        Of more than there is room for, the first are kept.
        """
        self.clear()
        self._count = count
        self._entries.update(itertools.islice(entries.items(), self._size))

    async def get(self, key: str, look_up: Callable[[], Awaitable[T]]) -> T:
        """What `key` resolves to; `look_up` is asked when that is not known. Raises what it does.

        What it finds is kept only if nothing changed while it looked.
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
        """Forgets everything: something was changed here."""
        self._generation += 1
        self._entries.clear()

    async def _check(self) -> None:
        async with self._checking:
            now = self._clock()
            if now - self._checked <= FRESH_SECONDS:
                return  # somebody else looked while this one waited
            count = await self._count_changes()
            if count != self._count:
                self._count = count
                self.clear()
            self._checked = now
