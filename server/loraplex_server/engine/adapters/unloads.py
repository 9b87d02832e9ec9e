"""Orders to unload that have not been carried out yet."""

from __future__ import annotations

import msgspec

from loraplex_server.engine.messages import ControlDone, Unload


class Unloads:
    """Unanswered orders to unload, by adapter."""

    def __init__(self) -> None:
        self._orders: dict[str, list[Unload]] = {}

    def __bool__(self) -> bool:
        return bool(self._orders)

    def __contains__(self, digest: str) -> bool:
        return digest in self._orders

    def add(self, order: Unload) -> None:
        """Adds an order."""
        self._orders.setdefault(order.digest, []).append(order)

    def answered(self, digest: str) -> list[ControlDone]:
        """Removes the orders for an adapter that is gone, and returns their answers."""
        return [ControlDone(order.op) for order in self._orders.pop(digest, ())]

    def overdue(self, now: float) -> list[str]:
        """Adapters with an order whose deadline has passed. Each order is returned once."""
        found: list[str] = []
        for digest, orders in self._orders.items():
            for at, order in enumerate(orders):
                if order.deadline is not None and order.deadline <= now:
                    orders[at] = msgspec.structs.replace(order, deadline=None)
                    found.append(digest)
        return found

    @property
    def deadline(self) -> float | None:
        """The earliest deadline; None if no order has one."""
        ends = [order.deadline for orders in self._orders.values() for order in orders]
        return min((end for end in ends if end is not None), default=None)
