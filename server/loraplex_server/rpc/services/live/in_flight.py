"""The adapters of the requests that were given to the engine and have not ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loraplex_adapters.store import Record


class InFlight:
    """Records of the requests' adapters, as they were resolved, by the requests' numbers.

    The engine knows adapters by their content only, which several names may share.
    """

    def __init__(self) -> None:
        self._adapters: dict[int, Sequence[Record]] = {}

    def __len__(self) -> int:
        return len(self._adapters)

    @contextmanager
    def request(self, number: int, adapters: Sequence[Record]) -> Iterator[None]:
        """Knows a request within the context; `adapters` are empty for the base model."""
        self._adapters[number] = adapters
        try:
            yield
        finally:
            del self._adapters[number]

    def adapters(self, number: int) -> Sequence[Record] | None:
        """The adapters of a request; None if it has ended."""
        return self._adapters.get(number)
