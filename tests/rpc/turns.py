"""Counts what happens in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter


class Turns:
    """Counts what happens in each turn of the event loop."""

    def __init__(self) -> None:
        self.done: Counter[int] = Counter()
        self._turn = 0
        self._task = asyncio.create_task(self._count())

    async def _count(self) -> None:
        while True:
            self._turn += 1
            await asyncio.sleep(0)

    def note(self) -> None:
        self.done[self._turn] += 1

    def stop(self) -> int:
        """Returns the most that happened in one turn."""
        self._task.cancel()
        return max(self.done.values())
