"""Wants: adapters that a request or an order needs on the device together, and the outcome."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loraplex_server.engine.adapters.slots import Resident
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.messages import AdapterRef, Failure, Load, Merge, Reply, SetPinned

LoadOrder = Load | SetPinned | Merge
"""Orders that are carried out once their adapter is on the device."""


@dataclass(slots=True, eq=False)
class Want:
    """Adapters by digest that a request needs together, or the one adapter of an order."""

    refs: dict[str, AdapterRef]
    request: Request | None = None
    order: LoadOrder | None = None


@dataclass(slots=True)
class Settled:
    """The result of one call of `settle`.

    Attributes:
        granted: requests that have all their adapters pinned now.
        refused: requests that cannot have their adapters, each with the reason.
        replies: answers to orders, and notices of loads and merges that ended.
        published: an adapter was put on the device.
        more: another call would go on at once.
    """

    granted: list[Request] = field(default_factory=list)
    refused: list[tuple[Request, Failure]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    published: bool = False
    more: bool = False


class Wants:
    """All open wants, the oldest first.

    The *head* is the oldest want of which no adapter is draining; room is made for it alone.
    `residents` is the live table of adapters on the device.
    """

    def __init__(self, residents: Mapping[str, Resident]) -> None:
        self._residents = residents
        self._wants: list[Want] = []

    def __bool__(self) -> bool:
        return bool(self._wants)

    def __iter__(self) -> Iterator[Want]:
        """Iterates over a copy, the oldest first."""
        return iter(self._wants.copy())

    @property
    def digests(self) -> set[str]:
        """Adapters that any want names."""
        return {digest for want in self._wants for digest in want.refs}

    @property
    def head(self) -> Want | None:
        """The head want; None if there is none."""
        for want in self._wants:
            if not any(self._is_draining(digest) for digest in want.refs):
                return want
        return None

    @property
    def head_missing(self) -> dict[str, AdapterRef]:
        """Adapters that the head want needs and that are not on the device."""
        head = self.head
        return {} if head is None else self._missing(head)

    @property
    def missing(self) -> dict[str, AdapterRef]:
        """Adapters that any want needs and that are not on the device, oldest want first."""
        return {d: ref for want in self._wants for d, ref in self._missing(want).items()}

    def add(self, want: Want) -> None:
        """Adds a want as the newest."""
        self._wants.append(want)

    def remove(self, want: Want) -> None:
        """Removes a want."""
        self._wants.remove(want)

    def of(self, request: Request) -> Want:
        """The want of a request, which must have one."""
        return next(want for want in self._wants if want.request is request)

    def naming(self, digest: str) -> list[Want]:
        """A copy of the wants that name an adapter, the oldest first."""
        return [want for want in self._wants if digest in want.refs]

    def _missing(self, want: Want) -> dict[str, AdapterRef]:
        return {d: ref for d, ref in want.refs.items() if d not in self._residents}

    def _is_draining(self, digest: str) -> bool:
        return digest in self._residents and self._residents[digest].draining
