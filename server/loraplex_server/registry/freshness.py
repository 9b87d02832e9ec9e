"""Whether the store's index answers, and whether another process has changed it.

The index may be a database on another machine. While it does not answer, names that are known are
served from memory, and everything else is refused at once instead of waiting for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from loraplex_model.base.refusal import Reason, Refusal

FRESH_SECONDS: Final = 0.5
"""Seconds for which a change made by another process may stay unnoticed."""

PATIENCE_SECONDS: Final = 1.0
"""Seconds that a call waits for the index to say whether something has changed."""

log = logging.getLogger(__name__)


class IndexFreshness:
    """Reads the store's change count, one reading at a time, when calls need it.

    A reading that is older than half of `FRESH_SECONDS` is repeated while calls go on. Only a call
    that finds a reading older than `FRESH_SECONDS` waits, at most for `PATIENCE_SECONDS`. After
    that the index counts as away: no call waits for the index, which is asked until it answers.
    """

    def __init__(
        self,
        count_changes: Callable[[], Awaitable[int]],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count_changes = count_changes
        self._on_change = on_change
        self._clock = clock
        self._count: int | None = None
        self._checked = float("-inf")
        self._confirmed = clock()
        self._lost_at: float | None = None
        self._check: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def away(self) -> bool:
        """Whether the index did not answer when it was asked last."""
        return self._lost_at is not None

    def away_seconds(self) -> float:
        """Seconds since the index was found to be away; 0 while it answers."""
        lost_at = self._lost_at
        return 0.0 if lost_at is None else self._clock() - lost_at

    def age_seconds(self) -> float:
        """Seconds since a reading of the change count has shown whether names have moved."""
        return self._clock() - self._confirmed

    def known(self, count: int) -> None:
        """Records the change count of a reading that was made elsewhere."""
        self._count = count
        self._confirmed = self._clock()

    async def fresh(self) -> None:
        """Waits until the last reading is recent enough, or until the index counts as away."""
        age = self._clock() - self._checked
        if age <= FRESH_SECONDS / 2:
            return
        check = self._started()
        if age > FRESH_SECONDS and not self.away:
            await self._wait(check)

    async def require(self) -> None:
        """Returns if the index answers. Raises Refusal(STORE_UNAVAILABLE) if it is away."""
        if self.away:
            await self._wait(self._started())
            if self.away:
                raise unanswered()

    def lost(self) -> None:
        """Records that the index did not answer; it is asked from now on until it does."""
        if self.away:
            return
        self._lost_at = self._clock()
        log.warning("the store's index does not answer; known adapters are served from memory")
        if self._asking is None or self._asking.done():
            self._asking = _task(self._ask())

    async def close(self) -> None:
        """Ends the background work. Idempotent."""
        tasks = [task for task in (self._asking, self._check) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _ask(self) -> None:
        while self.away:
            await asyncio.wait({self._started()})
            if self.away:
                await asyncio.sleep(FRESH_SECONDS)

    async def _wait(self, check: asyncio.Task[None]) -> None:
        done, _ = await asyncio.wait({check}, timeout=PATIENCE_SECONDS)
        if not done:
            self.lost()

    def _started(self) -> asyncio.Task[None]:
        if self._check is None or self._check.done():
            self._check = _task(self._read())
        return self._check

    async def _read(self) -> None:
        began = self._clock()
        try:
            count = await self._count_changes()
        except Exception as error:
            if not isinstance(error, Refusal):
                log.error("the store's change count cannot be read", exc_info=error)
            self.lost()
            return
        if count != self._count:
            self._count = count
            self._on_change()
        self._checked = self._confirmed = began
        if self.away:
            log.warning("the store's index answers again after %.0f s", self.away_seconds())
            self._lost_at = None


def unanswered() -> Refusal:
    """The refusal of a call that needs the index while it is away."""
    return Refusal(Reason.STORE_UNAVAILABLE, "the adapter store's index does not answer")


def _task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work)
