"""WatchAdapters: the feed of adapter changes as messages of bounded size."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Final

from loraplex.v1 import adapter_pb2
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.registry.feed import AdapterFeed, Event, FeedTable
from loraplex_server.registry.view import View
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.messages import describe

MAX_WATCHERS: Final = 64
_PART: Final = 100
"""Most adapters in one message of a table."""

_Message = adapter_pb2.WatchAdaptersResponse


async def watch(feed: AdapterFeed, gate: CallGate, view: View) -> AsyncGenerator[_Message, None]:
    """Yields the table as `view` shows it, then every change until the server drains.

    Raises Refusal: OVERLOADED if there are too many watchers, DRAINING at the end.
    """
    if len(feed) >= MAX_WATCHERS:
        raise Refusal(Reason.OVERLOADED, f"{len(feed)} calls watch already; try again later")
    with feed.watch(view) as watcher:
        for part in _table(await feed.table(watcher)):
            yield part
        while True:
            taking = watcher.take()
            events = await gate.before_draining(taking, "the server is shutting down")
            if events is not None:
                for event in events:
                    yield _change(event)
                continue
            yield _Message(resync=adapter_pb2.AdapterResync())
            for part in _table(await feed.table(watcher)):
                yield part


def _table(table: FeedTable) -> Iterator[_Message]:
    aliases = [
        adapter_pb2.AdapterAlias(
            alias=alias, name=record.name, version=record.version, digest=record.digest
        )
        for alias, record in sorted(table.aliases.items())
    ]
    for begin in range(0, len(table.rows), _PART):
        part = map(describe.adapter, table.rows[begin : begin + _PART])
        yield _Message(table=adapter_pb2.AdapterTable(adapters=part))
    yield _Message(table=adapter_pb2.AdapterTable(complete=True, aliases=aliases))


def _change(event: Event) -> _Message:
    change = adapter_pb2.AdapterChange(
        type=f"ADAPTER_CHANGE_TYPE_{event.change.name}",
        adapter=describe.adapter(event.row),
        alias=event.alias,
    )
    return _Message(change=change)
