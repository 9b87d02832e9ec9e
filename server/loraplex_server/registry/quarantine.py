"""Writes the quarantines that the supervision of the engine decides to the store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from loraplex_adapters.store import Quarantine
from loraplex_model.base.refusal import Refusal

from loraplex_server.engine.group.face import Engine
from loraplex_server.metrics import Metrics

POLL_SECONDS: Final = 5.0
"""Seconds between two counts of the quarantined adapters in the store."""

RELEASE_SECONDS: Final = 1.0
"""Seconds between two counts while the engine's client refuses adapters, which may be released."""

MOST_WRITTEN: Final = 8
"""Quarantines that one server may have in the store. If it comes to more, the machine is at fault
rather than the adapters, and other servers need not do without them."""

log = logging.getLogger(__name__)


class QuarantineKeeper:
    """Writes the engine's quarantines to the store, and counts those in the store.

    The engine's client refuses an adapter from the moment at which it is quarantined, however long
    the store fails, until an operator has released it in the store. Beyond `MOST_WRITTEN` it is
    refused by this server alone, until that is restarted.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Mapping[str, Quarantine]]],
        write: Callable[[str, str], Awaitable[bool]],
        engine: Engine,
        metrics: Metrics,
    ) -> None:
        """`read` returns the store's quarantines by digest; `write` adds one, with its reason.

        Both raise Refusal if the store fails.
        """
        self._read = read
        self._quarantine = write
        self._engine = engine
        self._metrics = metrics
        self._written: set[str] = set()
        self._own: set[str] = set()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Makes `run` write new quarantines at once."""
        self._woken.set()

    async def run(self) -> None:
        """Writes and counts until it is cancelled; a store that fails is tried again."""
        while True:
            try:
                await self._synchronise()
            except Refusal as error:
                log.warning("quarantines cannot be written or counted: %s", error.message)
            except Exception:
                log.exception("quarantines cannot be written or counted")
            with contextlib.suppress(TimeoutError):
                seconds = RELEASE_SECONDS if self._engine.quarantined else POLL_SECONDS
                async with asyncio.timeout(seconds):
                    await self._woken.wait()
            self._woken.clear()

    async def _synchronise(self) -> None:
        """Writes what is new and releases what was released. Raises Refusal if the store fails."""
        for digest, reason in list(self._engine.quarantined.items()):
            if digest in self._written or digest in self._own:
                continue
            if len(self._written) >= MOST_WRITTEN:
                self._own.add(digest)
                log.critical(
                    "adapter %s is quarantined on this server only: it is the one after %d others, "
                    "so the machine may be at fault",
                    *(digest, MOST_WRITTEN),
                )
                continue
            await self._quarantine(digest, reason)
            self._written.add(digest)
        found = await self._read()
        self._metrics.unservable({"quarantined": len(found)})
        for digest in self._written - found.keys():
            log.info("adapter %s was released from its quarantine", digest)
            self._written.discard(digest)
            self._engine.release(digest)
