"""Orders to unload that have not been carried out yet."""

from __future__ import annotations

import math

from loraplex_server.engine.batching.deadlines import Deadlines
from loraplex_server.engine.messages import ControlDone, Unload


class Unloads:
    """Unanswered orders to unload, by adapter.

    A withdrawn order is still carried out, since its adapter is draining already; only its answer
    is dropped. Of the deadlines of withdrawn orders the earliest one is kept for each adapter.
    """

    def __init__(self) -> None:
        self._orders: dict[str, dict[int, bool]] = {}
        """For each adapter, whether its orders are to be answered, by `op`."""
        self._digests: dict[int, str] = {}
        self._deadlines = Deadlines()

    def __bool__(self) -> bool:
        return bool(self._orders)

    def __contains__(self, digest: str) -> bool:
        return digest in self._orders

    def add(self, order: Unload) -> None:
        """Adds an order."""
        self._orders.setdefault(order.digest, {})[order.op] = True
        self._digests[order.op] = order.digest
        if order.deadline is not None:
            self._deadlines.add(order.op, order.deadline)

    def withdraw(self, op: int) -> bool:
        """Drops the answer to an order; False if there is no such order."""
        digest = self._digests.get(op)
        if digest is None:
            return False
        orders = self._orders[digest]
        orders[op] = False
        withdrawn = [one for one, is_open in orders.items() if not is_open]
        kept = min(withdrawn, key=self._end)
        for one in withdrawn:
            if one != kept:
                del orders[one]
                self._forget(one)
        return True

    def answered(self, digest: str) -> list[ControlDone]:
        """Removes the orders for an adapter that is gone, and returns their answers."""
        orders = self._orders.pop(digest, {})
        for op in orders:
            self._forget(op)
        return [ControlDone(op) for op, is_open in orders.items() if is_open]

    def overdue(self, now: float) -> list[str]:
        """Adapters with an order whose deadline has passed. Each order is returned once."""
        return [self._digests[op] for op in self._deadlines.passed(now)]

    @property
    def deadline(self) -> float | None:
        """The earliest deadline; None if no order has one."""
        return self._deadlines.next

    def _end(self, op: int) -> float:
        deadline = self._deadlines.of(op)
        return math.inf if deadline is None else deadline

    def _forget(self, op: int) -> None:
        del self._digests[op]
        self._deadlines.remove(op)
