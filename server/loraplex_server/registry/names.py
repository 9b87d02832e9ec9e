"""What adapter ids mean, and for whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from loraplex_adapters.store import LabelSelector

from loraplex_server.registry.freshness import IndexFreshness
from loraplex_server.registry.name_cache import NameCache
from loraplex_server.registry.terms import Registered

LookUp: TypeAlias = Callable[[str, LabelSelector, bool], Awaitable[Registered]]
"""Looks an id up in the index, among the versions that a selector selects. The third argument says
whether it was found before."""

_Key: TypeAlias = tuple[str, str]

_ALL: Final = ""
"""Text of the selector that selects every adapter."""


class Names:
    """Adapter ids and the versions that they mean, in a cache.

    What was found for one selector is never an answer for another one, except a version that both
    select. So an id that means nothing to a caller is looked up by each of its calls, by the same
    statements, whether it means something to others or not: the time of an answer does not tell.
    """

    def __init__(self, count_changes: Callable[[], Awaitable[int]], look_up: LookUp) -> None:
        self._cache: NameCache[_Key, Registered] = NameCache(count_changes)
        self._look_up = look_up

    @property
    def freshness(self) -> IndexFreshness:
        """Whether the index answers, and whether it has changed."""
        return self._cache.freshness

    def fill(self, known: Mapping[str, Registered], count: int) -> None:
        """Replaces all that is known; the store's change count was `count` when it was read."""
        self._cache.fill({(name, _ALL): adapter for name, adapter in known.items()}, count)

    async def resolve(self, adapter_id: str, seen: LabelSelector) -> Registered:
        """The version among those that `seen` selects. Raises Refusal as `Store.resolve` does.

        While the index is away, what is known is returned, with the labels that it had.
        """
        await self.freshness.fresh()
        known = self._current(adapter_id) or self._cache.recall((adapter_id, _ALL))
        if known is not None and seen.matches(known.record.labels):
            return known
        key = adapter_id, str(seen)
        return await self._cache.get(
            key, lambda: self._look_up(adapter_id, seen, key in self._cache)
        )

    def _current(self, adapter_id: str) -> Registered | None:
        """The cached current version of a name, if `adapter_id` pins just that; else None."""
        name, _, pin = adapter_id.partition("@")
        current = self._cache.recall((name, _ALL)) if pin else None
        if current is None:
            return None
        record = current.record
        pinned = pin == record.digest or (pin == str(record.version) and name == record.name)
        return current if pinned else None

    def keep(self, name: str, adapter: Registered) -> None:
        """Notes what a name or an alias means now, for the time when the index is away."""
        self._cache.keep((name, _ALL), adapter)

    def forget(self, moved: str) -> None:
        """Forgets what a name or an alias, and the aliases of the name, meant."""

        def concerned(key: _Key, adapter: Registered) -> bool:
            return moved in (key[0].partition("@")[0], adapter.record.name)

        self._cache.forget(concerned)

    def relabelled(self, adapter: Registered) -> None:
        """Notes that a version has other labels, which decide who may use it, from now on."""

        def concerned(key: _Key, known: Registered) -> bool:
            return known.record.id == adapter.record.id

        for adapter_id, selector in self._cache.forget(concerned):
            if selector == _ALL:
                self._cache.keep((adapter_id, _ALL), adapter)

    def clear(self) -> None:
        """Makes every id be looked up again before its next use: the store has changed."""
        self._cache.clear()

    def known(self) -> list[tuple[str, str]]:
        """The known ids, each with the digest of its version, the last used first.

        An id that means different versions to different callers comes with each. May be called in
        any thread.
        """
        pairs = [(key[0], adapter.record.digest) for key, adapter in self._cache.snapshot()]
        return list(dict.fromkeys(pairs))
