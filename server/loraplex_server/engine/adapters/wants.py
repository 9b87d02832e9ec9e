"""Wants: adapters that a request or an order needs on the device together, and the outcome."""

from __future__ import annotations

from collections.abc import Collection, Iterator, KeysView, Mapping
from dataclasses import dataclass, field

from loraplex_server.engine.adapters.slots import Resident
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.messages import AdapterRef, Failure, Load, Merge, Reply, SetPinned

LoadOrder = Load | SetPinned | Merge
"""Orders that are carried out once their adapter is on the device."""


@dataclass(slots=True, eq=False)
class Want:
    """Adapters by digest that a request needs together, or the one adapter of some orders.

    Attributes:
        since: time of its beginning on the engine's clock.
        orders: by their `op`, in the order in which they are carried out; empty for a request.
    """

    refs: dict[str, AdapterRef]
    since: float
    request: Request | None = None
    orders: dict[int, LoadOrder] = field(default_factory=dict)


@dataclass(slots=True)
class Settled:
    """The result of one call of `settle`.

    Attributes:
        granted: requests that have all their adapters pinned now.
        blocking: adapters in use that were there for a turn and whose place is waited for as long.
        refused: requests that cannot have their adapters, each with the reason.
        replies: answers to orders, and notices of loads and merges that ended.
        published: an adapter was put on the device.
        more: another call would go on at once.
    """

    granted: list[Request] = field(default_factory=list)
    blocking: list[str] = field(default_factory=list)
    refused: list[tuple[Request, Failure]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    published: bool = False
    more: bool = False


class Wants:
    """All open wants, the oldest first.

    The *head* is the oldest want of which no adapter is draining; room is made for it alone. All
    orders for one adapter share one want, whose age is that of the first order. Thousands of orders
    may be waiting, so the queries of every step take time in proportion to the adapters on the
    device or to the result, not to the number of open wants.

    `residents` is the live table of adapters on the device.
    """

    def __init__(self, residents: Mapping[str, Resident]) -> None:
        self._residents = residents
        self._number = 0
        self._wants: dict[int, Want] = {}
        self._naming: dict[str, dict[int, Want]] = {}
        self._requests: dict[Request, int] = {}
        self._ordered: dict[str, int] = {}
        self._digests: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self._wants)

    @property
    def requests(self) -> Collection[Request]:
        """Live view of the requests that have a want."""
        return self._requests.keys()

    @property
    def digests(self) -> KeysView[str]:
        """Live view of the adapters that any want names."""
        return self._naming.keys()

    @property
    def head(self) -> Want | None:
        """The head want; None if there is none."""
        for want in self._wants.values():
            if not any(self._is_draining(digest) for digest in want.refs):
                return want
        return None

    @property
    def head_missing(self) -> dict[str, AdapterRef]:
        """Adapters that the head want needs and that are not on the device."""
        head = self.head
        if head is None:
            return {}
        return {d: ref for d, ref in head.refs.items() if d not in self._residents}

    def missing(self) -> Iterator[AdapterRef]:
        """Adapters that any want needs and that are not on the device, oldest want first.

        An adapter that several wants need is repeated.
        """
        for want in self._wants.values():
            yield from (ref for d, ref in want.refs.items() if d not in self._residents)

    def is_missing(self, digest: str) -> bool:
        """Whether any want names an adapter that is not on the device."""
        return digest in self._naming and digest not in self._residents

    def add(self, request: Request, now: float) -> None:
        """Adds the want of a request as the newest."""
        refs = {ref.digest: ref for ref in request.submit.adapters}
        self._requests[request] = self._add(Want(refs, now, request))

    def add_order(self, order: LoadOrder, now: float) -> None:
        """Adds an order to the want of its adapter's orders, or as the newest want."""
        digest = order.adapter.digest
        if digest not in self._ordered:
            self._ordered[digest] = self._add(Want({digest: order.adapter}, now))
        self._wants[self._ordered[digest]].orders[order.op] = order
        self._digests[order.op] = digest

    def remove(self, want: Want) -> None:
        """Removes a want, with its request or all its orders."""
        if want.request is not None:
            number = self._requests.pop(want.request)
        else:
            number = self._ordered.pop(next(iter(want.refs)))
            for op in want.orders:
                del self._digests[op]
        del self._wants[number]
        for digest in want.refs:
            named = self._naming[digest]
            del named[number]
            if not named:
                del self._naming[digest]

    def withdraw(self, op: int) -> bool:
        """Removes one order, and its want with the last one; False if no want has the order."""
        digest = self._digests.get(op)
        if digest is None:
            return False
        want = self._wants[self._ordered[digest]]
        if len(want.orders) == 1:
            self.remove(want)
        else:
            del want.orders[op], self._digests[op]
        return True

    def of(self, request: Request) -> Want:
        """The want of a request, which must have one."""
        return self._wants[self._requests[request]]

    def naming(self, digest: str) -> list[Want]:
        """A copy of the wants that name an adapter, the oldest first."""
        return list(self._naming.get(digest, {}).values())

    def arrived(self) -> list[Want]:
        """A copy of the wants of which every adapter is on the device, the oldest first."""
        fewer, more = sorted((self._naming, self._residents), key=len)
        found: dict[int, Want] = {}
        for digest in fewer:
            if digest in more:
                found.update(self._naming[digest])
        return [
            found[number]
            for number in sorted(found)
            if all(digest in self._residents for digest in found[number].refs)
        ]

    def _add(self, want: Want) -> int:
        self._number += 1
        self._wants[self._number] = want
        for digest in want.refs:
            self._naming.setdefault(digest, {})[self._number] = want
        return self._number

    def _is_draining(self, digest: str) -> bool:
        return digest in self._residents and self._residents[digest].draining
