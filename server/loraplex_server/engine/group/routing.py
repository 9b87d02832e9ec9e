"""Which engine gets a request: one that has its adapters, unless its load is much higher.

The load of an engine is what the front has given to it and what has not ended: each request counts
one, and `TOKENS_AS_REQUEST` prompt tokens that are not computed yet count one more. Nothing is
estimated from reports, which arrive late.

The rule, for the engines that are up and whose KV cache holds the request, if there are any (on
GPUs the caches may differ in size):

1. Those whose load is at most `SPREAD_FACTOR` times the smallest load plus `SPREAD_REQUESTS` are
   candidates. The engine with the smallest load always is.
2. Of these the one is taken that is nearest to having the request's adapters: the sum over the
   adapters of 0 (on the device), 1 (on its way there), 2 (in host memory) or 3.
3. Of several, the one with the smallest load is taken, and then the one with the lowest number.

So a request of the base goes to the engine with the smallest load. An adapter stays on one engine
until rule 1 excludes that engine for its load; then another one loads the adapter too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from loraplex_server.engine.messages import AdapterStatus, Hello, Submit

TOKENS_AS_REQUEST: Final = 64
SPREAD_FACTOR: Final = 2
SPREAD_REQUESTS: Final = 8

_RESIDENT, _COMING, _HOST, _ABSENT = range(4)


def with_room(tokens: int, up: Sequence[int], sizes: Mapping[int, Hello]) -> Sequence[int]:
    """The engines of `up` that accept requests of so many tokens; all of `up` if none does.

    `tokens` are those of a prompt and its answer.
    """

    def longest(hello: Hello) -> int:  # as in `batching.admission`
        return min(hello.model.max_context, hello.num_blocks * hello.block_size + 1)

    return [engine for engine in up if tokens <= longest(sizes[engine])] or up


@dataclass(slots=True)
class EngineLoad:
    """What one engine has been given and has not ended.

    Attributes:
        requests: number of requests.
        waiting_tokens: prompt tokens of the requests that have not begun.
        expected: adapters of these requests and of unanswered orders to load, with their number.
    """

    requests: int = 0
    waiting_tokens: int = 0
    expected: Counter[str] = field(default_factory=Counter)

    @property
    def weight(self) -> int:
        """The load, in units of one waiting token."""
        return self.requests * TOKENS_AS_REQUEST + self.waiting_tokens

    def distance(self, digests: Iterable[str], table: Mapping[str, AdapterStatus]) -> int:
        """How far the engine, with `table`, is from having the adapters on its device."""
        return sum(self._distance(digest, table.get(digest)) for digest in digests)

    def _distance(self, digest: str, status: AdapterStatus | None) -> int:
        state = "" if status is None else status.state
        if state == "resident":
            return _RESIDENT
        if state == "loading" or digest in self.expected:
            return _COMING
        return _HOST if state == "host" else _ABSENT

    def expect(self, digests: Iterable[str]) -> None:
        """Counts adapters that are being loaded, or will be."""
        self.expected.update(digests)

    def unexpect(self, digests: Iterable[str]) -> None:
        """Undoes an `expect`."""
        for digest in digests:
            self.expected[digest] -= 1
            if self.expected[digest] <= 0:
                del self.expected[digest]


@dataclass(slots=True)
class Route:
    """A request that has not ended: its engine, and what it counts there."""

    load: EngineLoad
    engine: int
    tokens: int
    digests: tuple[str, ...]
    has_begun: bool = False


class Routes:
    """The requests that have not ended, and the loads of the engines."""

    def __init__(self, engines: int) -> None:
        self.loads = [EngineLoad() for _ in range(engines)]
        self._routes: dict[int, Route] = {}

    def __len__(self) -> int:
        return len(self._routes)

    def choose(
        self,
        digests: Collection[str],
        up: Sequence[int],
        tables: Sequence[Mapping[str, AdapterStatus]],
    ) -> int:
        """The engine for a request with these adapters, of the engines that are `up`."""
        weights = [self.loads[engine].weight for engine in up]
        most = SPREAD_FACTOR * min(weights) + SPREAD_REQUESTS * TOKENS_AS_REQUEST

        def rank(engine: int) -> tuple[int, int, int]:
            load = self.loads[engine]
            return load.distance(digests, tables[engine]), load.weight, engine

        return min(
            (engine for engine, weight in zip(up, weights, strict=True) if weight <= most), key=rank
        )

    def add(self, request: Submit, engine: int) -> None:
        """Counts a request that is given to an engine."""
        digests = tuple(dict.fromkeys(ref.digest for ref in request.adapters))
        load = self.loads[engine]
        route = Route(load, engine, len(request.token_ids), digests)
        self._routes[request.id] = route
        load.requests += 1
        load.waiting_tokens += route.tokens
        load.expect(digests)

    def begin(self, request_id: int) -> None:
        """Notes that the prompt of a request is computed."""
        route = self._routes.get(request_id)
        if route is not None:
            self._begin(route)

    def end(self, request_id: int) -> int | None:
        """Forgets a request, and returns its engine; None if the request is not known."""
        route = self._routes.pop(request_id, None)
        if route is None:
            return None
        self._begin(route)
        route.load.requests -= 1
        return route.engine

    def lost(self, engine: int) -> None:
        """Counts nothing more of what a lost engine was given."""
        # What ends later is subtracted from the old object.
        self.loads[engine] = EngineLoad()

    @contextmanager
    def loading(self, engine: int, digest: str) -> Iterator[None]:
        """Counts an adapter as expected while an order to load it is open."""
        load = self.loads[engine]
        load.expect([digest])
        try:
            yield
        finally:
            load.unexpect([digest])

    @staticmethod
    def _begin(route: Route) -> None:
        if not route.has_begun:
            route.has_begun = True
            route.load.waiting_tokens -= route.tokens
            route.load.unexpect(route.digests)
