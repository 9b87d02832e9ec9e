"""What is waited for: adapters that are needed together, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_server.engine.adapters.slots import Resident
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.messages import AdapterRef, Failure, Load, Merge, Pin

Order = Load | Pin | Merge


@dataclass(slots=True, eq=False)
class Want:
    """Adapters that are needed together: by a request, or by an order for one adapter."""

    refs: dict[str, AdapterRef]
    request: Request | None = None
    order: Order | None = None


@dataclass(slots=True)
class Settled:
    """What a step brought: who has its adapters now, and who never will."""

    granted: list[Request] = field(default_factory=list)
    refused: list[tuple[Request, Failure]] = field(default_factory=list)


class Wants:
    """All wants, the oldest first, by a key that grows.

    `residents` is the (changing) table of adapters on the device. A want's turn comes when it is
    the oldest one that no draining adapter keeps back.
    """

    def __init__(self, residents: Mapping[str, Resident]) -> None:
        self._residents = residents
        self._wants: dict[int, Want] = {}
        self._next = 0
        self._by_request: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._wants)

    def __getitem__(self, key: int) -> Want:
        return self._wants[key]

    @property
    def requests(self) -> int:
        """Requests among them."""
        return len(self._by_request)

    @property
    def digests(self) -> set[str]:
        """Every adapter that somebody waits for."""
        return {digest for want in self._wants.values() for digest in want.refs}

    @property
    def head(self) -> int | None:
        """The want whose turn it is."""
        for key, want in self._wants.items():
            if not any(self._is_draining(digest) for digest in want.refs):
                return key
        return None

    @property
    def turn(self) -> dict[str, AdapterRef]:
        """What it still misses."""
        head = self.head
        refs = {} if head is None else self._wants[head].refs
        return {d: ref for d, ref in refs.items() if d not in self._residents}

    @property
    def missing(self) -> dict[str, AdapterRef]:
        """What anybody waits for and is not on the device, in the order of the wants."""
        return {
            d: ref
            for want in self._wants.values()
            for d, ref in want.refs.items()
            if d not in self._residents
        }

    def add(self, want: Want) -> None:
        """Takes one more, behind all others."""
        self._next += 1
        self._wants[self._next] = want
        if want.request is not None:
            self._by_request[want.request.id] = self._next

    def pop(self, key: int) -> Want:
        """Takes one out."""
        want = self._wants.pop(key)
        if want.request is not None:
            del self._by_request[want.request.id]
        return want

    def forget(self, request: Request) -> None:
        """Takes a request's out."""
        self.pop(self._by_request[request.id])

    def items(self) -> list[tuple[int, Want]]:
        """Keys and wants, the oldest first; may be changed while they are gone through."""
        return list(self._wants.items())

    def of(self, digest: str) -> list[tuple[int, Want]]:
        """Those that wait for an adapter."""
        return [(key, want) for key, want in self._wants.items() if digest in want.refs]

    def _is_draining(self, digest: str) -> bool:
        return digest in self._residents and self._residents[digest].draining
