"""Counts the registered adapters that this server does not serve, for the log and the metrics."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from loraplex_adapters.store import Surveyed
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Refusal

from loraplex_server.metrics import Metrics
from loraplex_server.registry.servable import base_text

CENSUS_SECONDS: Final = 30.0
"""Seconds between two counts."""

_SHOWN = 5

log = logging.getLogger(__name__)


class Census:
    """Counts once in `CENSUS_SECONDS`, and logs a warning when more adapters are not served."""

    def __init__(
        self,
        survey: Callable[[], Awaitable[Sequence[Surveyed]]],
        base: Callable[[], BaseInfo],
        metrics: Metrics,
    ) -> None:
        self._survey = survey
        self._base = base
        self._metrics = metrics
        self._reported: dict[str, list[str]] = {}

    async def run(self) -> None:
        """Counts until it is cancelled. A store that fails is asked again the next time."""
        while True:
            try:
                await self.count()
            except Refusal as error:
                log.warning("adapters that are not served cannot be counted: %s", error.message)
            except Exception:
                # The server goes on without the count: it is for the log and the metrics only.
                log.exception("adapters that are not served cannot be counted")
            await asyncio.sleep(CENSUS_SECONDS)

    async def count(self) -> None:
        """Counts now. Raises Refusal if the store cannot be read."""
        base, found = self._base(), await self._survey()
        counts = Counter({"base": 0, "missing": 0})
        reported = {}
        for cause, text, ids in troubles(found, base.name, base.fingerprint):
            counts[cause] += len(ids)
            reported[text] = ids
            if self._reported.get(text) != ids:
                shown = ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
                log.warning("%d adapters %s: %s", len(ids), text, shown)
        self._reported = reported
        self._metrics.unservable({cause: counts[cause] for cause in ("base", "missing")})


def troubles(
    found: Sequence[Surveyed], base_name: str, base_fingerprint: str
) -> Iterator[tuple[str, str, list[str]]]:
    """What keeps adapters from being served on a base: a cause, a text, and the adapters' ids.

    A fingerprint of "" stands for a base that is not known, which is compared with nothing.

    The causes are "base", once for each other base, and "missing". The cause "unknown" stands for
    adapters that are served although the base for which they were registered is not known.
    """
    others: dict[tuple[str, str], list[str]] = {}
    for each in found:
        if base_fingerprint and each.base_fingerprint not in ("", base_fingerprint):
            others.setdefault((each.base_name, each.base_fingerprint), []).append(each.id)
    served = base_text(base_name, base_fingerprint)
    for (name, fingerprint), ids in others.items():
        text = f"were registered for {base_text(name, fingerprint)} and are not served on {served}"
        yield "base", text, ids
    if missing := [each.id for each in found if not each.is_stored]:
        yield "missing", "have no files in the store", missing
    if unknown := [each.id for each in found if not each.base_fingerprint]:
        text = "were registered before bases were recorded; `store rebase` checks them"
        yield "unknown", text, unknown
