"""What the server does when its memory runs short, before the system ends a process.

    level   from      until     what happens
    1        90 %      85 %     no new adapters, uploads, training jobs and merges
    2        95 %      90 %     adapters in host memory that no request needs are evicted
    3       100 %      95 %     no new generations either

The percentages are of the limit. A level includes those below it, and none ends what runs: what is
refused would take memory that is not there. Each level ends below where it began, so that it does
not come and go. Requests for adapters that were evicted read them from disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import IntEnum
from typing import Final, Protocol

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.series import Series

LOOK_SECONDS: Final = 1.0
"""Pause between two measurements."""

RETRY_SECONDS: Final = 2.0
"""Pause that refused clients are told; memory is not free again within a step."""

_SLACK: Final = 5

log = logging.getLogger(__name__)


class Pressure(IntEnum):
    """How short memory is; the table above has the meaning."""

    NONE = 0
    GROWTH_REFUSED = 1
    SHEDDING = 2
    FULL = 3


_BEGINS: Final = {
    Pressure.GROWTH_REFUSED: 90,
    Pressure.SHEDDING: 95,
    Pressure.FULL: 100,
}
"""Percentages of the limit."""

_GROWTH: Final = frozenset(
    {
        "StartUpload",
        "UploadAdapter",
        "UploadData",
        "RegisterAdapter",
        "ValidateAdapter",
        "MergeAdapter",
        "CreateJob",
    }
)
"""Methods that take memory beyond what is set aside for requests."""

_WORK: Final = frozenset(
    {"Generate", "GenerateStream", "Embed", "LoadAdapter", "PinAdapter", "RenderChat"}
)


class HostMemory(Protocol):
    """Memory that can be taken back: that of adapters in host memory."""

    def limit_host_memory(self, fewer: int | None) -> None:
        """Evicts adapters from host memory until they take `fewer` bytes less than now.

        None lifts the limits of earlier calls.
        """


class MemoryPressure:
    """Compares the memory in use with its limit, and refuses calls while it is short.

    Attributes:
        level: how short memory is.
    """

    def __init__(
        self,
        limit: int,
        measure: Callable[[], int],
        host: HostMemory,
        series: Series,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit` is in bytes; with 0 nothing is ever refused. `measure` returns bytes in use.

        `also` is called when level 2 begins, to free what the front process itself can do without.
        """
        self._limit = limit
        self._measure = measure
        self._host = host
        self._series = series
        self._also = also
        self.level = Pressure.NONE
        series.memory_bytes.labels("limit").set(limit)

    def require(self, method: str) -> None:
        """Raises Refusal(OVERLOADED) for a call that must wait for memory; `method` is its name."""
        if self.level is Pressure.NONE:
            return
        if method in _GROWTH:
            what = "new adapters, uploads, merges and training jobs"
        elif method in _WORK and self.level is Pressure.FULL:
            what = "new requests"
        else:
            return
        text = f"the server is short of memory and takes no {what} now; try again later"
        raise Refusal(Reason.OVERLOADED, text, retry_seconds=RETRY_SECONDS)

    async def watch(self) -> None:
        """Looks once a second, until it is cancelled."""
        while True:
            self.look(await asyncio.to_thread(self._measure))
            await asyncio.sleep(LOOK_SECONDS)

    def look(self, used: int) -> None:
        """Takes in that so many bytes are in use, and acts on it."""
        self._series.memory_bytes.labels("used").set(used)
        before, self.level = self.level, self._level(used)
        self._series.memory_pressure.set(self.level)
        if self.level is not before:
            self._report(before, used)
        if self.level >= Pressure.SHEDDING:
            if before < Pressure.SHEDDING:
                self._also()
            excess = used - (_BEGINS[Pressure.SHEDDING] - _SLACK) * self._limit // 100
            self._host.limit_host_memory(excess)
        elif self.level is Pressure.NONE and before is not Pressure.NONE:
            self._host.limit_host_memory(None)

    def _level(self, used: int) -> Pressure:
        level = Pressure.NONE
        for each, begin in _BEGINS.items():
            end = begin - _SLACK if self.level >= each else begin
            if self._limit and 100 * used >= end * self._limit:
                level = each
        return level

    def _report(self, before: Pressure, used: int) -> None:
        text = "%d MiB of memory are in use; memory_limit is %d MiB: %s"
        amounts = used >> 20, self._limit >> 20
        if self.level > before:
            log.warning(text, *amounts, _MEANING[self.level])
        else:
            log.info(text, *amounts, _MEANING[self.level])


_MEANING: Final = {
    Pressure.NONE: "everything is accepted again",
    Pressure.GROWTH_REFUSED: "new adapters, uploads, merges and training jobs are refused",
    Pressure.SHEDDING: "adapters that no request needs are evicted from host memory",
    Pressure.FULL: "new requests are refused",
}
