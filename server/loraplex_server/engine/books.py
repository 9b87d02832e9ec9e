"""Conservation: what requests and adapters hold and what is free is all there is, at any moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from loraplex_server.engine.adapters.adapters import Adapters
from loraplex_server.engine.batching.fair_queue import FairQueue
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.scheduler import Scheduler


def check_books(requests: Collection[Request], scheduler: Scheduler, adapters: Adapters) -> None:
    """Verifies blocks, places in queues, pins and bytes between two steps, whatever is running.

    `requests` are the unfinished ones. Takes time in proportion to the blocks and the requests.
    Raises `AssertionError`.
    """
    scheduler.pool.check()
    scheduler.prefixes.check()
    for request in requests:
        path = [node.block for node in request.path]
        assert path == request.blocks[: len(path)].tolist(), "a request's kept blocks are others"
    held = Counter(block for request in requests for block in request.blocks)
    owners = {block: scheduler.pool.owners(block) for block in held}
    assert held == owners, "a KV block has other owners than the requests that hold it"
    assert len(held) == scheduler.pool.used, "a KV block belongs to no request"
    states = Counter(request.state for request in requests)
    places: dict[RequestState, Collection[Request] | FairQueue] = {
        RequestState.QUEUED: scheduler.queue,
        RequestState.RUNNING: scheduler.running,
        RequestState.FETCHING: adapters.residency.waiting,
    }
    for state, place in places.items():
        assert len(place) == states[state], f"a place of a {state.value} request was lost"
        assert all(request.state is state for request in place), "a request is in two places"
    waits = len(scheduler.turns) + len(scheduler.turns.held)
    assert waits <= len(scheduler.running), "a request without a place waits to be sampled"
    pins = Counter(pin.digest for request in requests for pin in request.pins)
    for digest, resident in adapters.slots.residents.items():
        assert resident.refs == pins.pop(digest, 0), "a pin was lost"
    assert not pins, "a pinned adapter has left the device"
    adapters.check_bytes()
