"""Names as labels of metrics: bounded in number, whatever is registered or asked for."""

from __future__ import annotations

from loraplex_server.series import BASE_LABEL, OTHER_LABEL


class NameLabels:
    """Chooses the names that become labels: the first `limit` registered ones in use."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._registered: set[str] = set()
        self._labels: set[str] = set()

    def __len__(self) -> int:
        return len(self._registered)

    @property
    def registered(self) -> frozenset[str]:
        """The names that may become labels."""
        return frozenset(self._registered)

    def add(self, name: str) -> None:
        """Records that the name is registered. Idempotent."""
        self._registered.add(name)

    def label(self, name: str) -> str:
        """Label for a name; "" is the base model."""
        if not name:
            return BASE_LABEL
        if name in self._labels:
            return name
        if name not in self._registered or len(self._labels) >= self._limit:
            return OTHER_LABEL
        self._labels.add(name)
        return name

    def remove(self, name: str) -> bool:
        """Records that the name is no longer registered; returns whether it was a label."""
        self._registered.discard(name)
        if name not in self._labels:
            return False
        self._labels.remove(name)
        return True
