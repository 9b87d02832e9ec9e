"""The one face of this room: everything that the engine core asks of adapters.

EngineCore --handle, want, release, settle--> Adapters
                                                 |
        +--------------+-----------------+-------+---------+
        |              |                 |                 |
    Residency       Merging        AdapterSlots        HostTier
    wants, loads,   dense copies   adapters on the     adapters in
    evictions                      device, pins        host memory
        |              |
        +-- LoadLanes -+           threads that read and merge
"""

from __future__ import annotations

from collections.abc import Callable

from loraplex_server.engine.adapters.attempts import Announcements
from loraplex_server.engine.adapters.host_tier import HostTier
from loraplex_server.engine.adapters.loader import Loader, LoadLanes, Read
from loraplex_server.engine.adapters.merging import Merging
from loraplex_server.engine.adapters.residency import Residency
from loraplex_server.engine.adapters.slots import AdapterSlots
from loraplex_server.engine.adapters.table import statuses
from loraplex_server.engine.adapters.wants import Settled
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.messages import (
    AdapterStatus,
    Control,
    Reply,
    Unload,
    Unmerge,
    Withdraw,
)
from loraplex_server.engine.runner.protocol import ModelRunner


class Adapters:
    """Adapters on the device and in host memory, and the orders about them.

    Attributes:
        slots, host, residency, merging: the parts, for statistics and tests to read.
    """

    def __init__(
        self,
        runner: ModelRunner,
        loader: Loader,
        clock: Callable[[], float],
        attempts: Announcements | None = None,
        settle_slot: Callable[[int], None] = lambda slot: None,
        turn: float = 0.0,
    ) -> None:
        """`settle_slot` returns when no pass reads a slot, whose contents are to change then.

        `turn` is as in `Residency`.
        """
        self._replies: list[Reply] = []
        self._lanes = LoadLanes(loader)
        reply = self._replies.append
        self.slots = AdapterSlots(runner, clock, attempts, settle_slot)
        self.host = HostTier(runner.host_budget_bytes, runner.info.device.startswith("cpu"))
        self.merging = Merging(runner, self.slots, self.host, self._lanes, clock, reply, attempts)
        self.residency = Residency(
            runner, self.slots, self.host, self._lanes, self.merging, reply, clock, turn
        )

    def want(self, request: Request) -> None:
        """Adds a request that needs adapters; a later `settle` grants or refuses it."""
        self.residency.want(request)

    def release(self, request: Request) -> None:
        """Drops whatever a request holds or wants of adapters."""
        self.residency.release(request)

    def handle(self, message: Control) -> None:
        """Accepts an order; its answer is among the `replies` of a later `settle`."""
        match message:
            case Unload():
                self.residency.unload(message)
            case Unmerge():
                self.merging.unmerge(message)
            case Withdraw():
                self.residency.withdraw(message.op)
            case _:
                self.residency.order(message)

    def limit_host(self, nbytes: int | None) -> None:
        """Limits the bytes in host memory, beyond what waiting requests need; None lifts it.

        Without effect where the host memory of adapters was allocated at start.
        """
        if self.host.shared:
            waiting = (request.submit.adapters for request in self.residency.waiting)
            self.host.limit(nbytes, {ref.digest for refs in waiting for ref in refs})
            self.residency.fetching.version += 1

    def settle(self) -> Settled:
        """Accepts what the loader has finished and moves everything on, between two steps.

        At most one adapter or one set of dense copies is put on the device.
        """
        for result in self._lanes.finished():
            if isinstance(result.task, Read):
                self.residency.end_read(result)
            else:
                self.merging.end_merge(result)
        settled = self.residency.settle()
        self.merging.begin()
        if not settled.published:
            self.merging.publish()
        settled.replies.extend(self._replies)
        self._replies.clear()
        settled.more |= self.merging.has_more
        return settled

    def overdue_unloads(self, now: float) -> list[tuple[str, bool]]:
        """Adapters whose requests must end now; see `Residency.overdue_unloads`."""
        return self.residency.overdue_unloads(now)

    @property
    def deadline(self) -> float | None:
        """Time on the engine's clock when an unload becomes overdue; None if none will."""
        return self.residency.deadline

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted, under way, or left to answer."""
        return self.residency.is_idle and self.merging.is_idle and not self._replies

    @property
    def version(self) -> int:
        """Grows whenever `statuses` changes by more than references and times."""
        return self.slots.version + self.residency.fetching.version + self.merging.version

    @property
    def process_bytes(self) -> int:
        """Bytes of this process's memory that adapters take in all tiers, by budget."""
        device = self.slots.nbytes + self.merging.nbytes
        return self.host.nbytes + (device if self.host.shared else 0)

    def statuses(self) -> list[AdapterStatus]:
        """Status of every adapter that is on the device, in host memory, or on its way."""
        return statuses(self.slots, self.host, self.residency.fetching)

    def check(self) -> None:
        """Verifies the books of an idle engine. Raises `AssertionError`."""
        self.check_bytes()
        self.residency.check()

    def check_bytes(self) -> None:
        """Verifies slots, blocks and bytes of all tiers, at any moment. Raises `AssertionError`."""
        self.slots.check()
        self.host.check()
        self.merging.check()
