"""The batch as callers see it: rows by adapter, from the engine's requests and their names."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf import timestamp_pb2
from loraplex.v1 import engine_pb2
from loraplex_adapters.store import Record
from loraplex_model.base.refusal import Refusal

from loraplex_server.access.principals import Principal
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.statistics import BatchView
from loraplex_server.rpc.services.live.in_flight import InFlight

FRESH_SECONDS: Final = 0.05
"""Age up to which the engine's answer is used for further watchers."""

STAGES: Final = ("prefill", "decode", "waiting")
"""The lists of requests in a `BatchView`, and the fields of the counts that are made of them."""


@dataclass(frozen=True, slots=True)
class TakenView:
    """The state of the engine, and when it was taken, in seconds since 1970."""

    view: BatchView
    time: float


class BatchLooks:
    """Asks the engine for its state, once for all who want it at the same time.

    While nobody calls `newest`, the engine is asked nothing.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._taken: TakenView | None = None
        self._taken_at = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def newest(self) -> TakenView:
        """The state, at most `FRESH_SECONDS` old. An engine that is away has an empty one."""
        if self._taken is None or time.monotonic() - self._taken_at >= FRESH_SECONDS:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(), name="engine state")
            # A watcher that leaves must not take the answer from the others.
            await asyncio.shield(self._asking)
        assert self._taken is not None, "the question has ended without an answer"
        return self._taken

    async def _ask(self) -> None:
        try:
            view = await self._engine.look()
        except Refusal:  # it is being restarted: watchers wait for it to come back
            view = BatchView(op=0)
        self._taken, self._taken_at = TakenView(view, time.time()), time.monotonic()


def batch_of(
    taken: TakenView, in_flight: InFlight, principal: Principal, residents: int
) -> engine_pb2.WatchEngineResponse:
    """The state as a principal sees it; `residents` is the number of its adapters on the device."""
    view = taken.view
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(int(taken.time * 1e9))
    return engine_pb2.WatchEngineResponse(
        time=stamp,
        steps=view.steps,
        generated_tokens=view.generated_tokens,
        prompt_tokens=view.prompt_tokens,
        adapters=_rows(view, in_flight, principal),
        kv_blocks_used=view.used_blocks,
        kv_blocks=view.blocks,
        kv_blocks_cached=view.cached_blocks,
        resident_adapters=residents,
        adapter_bytes=view.adapter_bytes,
        adapter_bytes_limit=view.adapter_bytes_limit,
        max_rows=view.max_rows,
    )


def _rows(
    view: BatchView, in_flight: InFlight, principal: Principal
) -> list[engine_pb2.AdapterRows]:
    """The requests by adapter, those of one with most requests first."""
    entries: dict[tuple[str, bool], engine_pb2.AdapterRows] = defaultdict(engine_pb2.AdapterRows)
    for stage in STAGES:
        for number in getattr(view, stage):
            adapters = in_flight.adapters(number)
            if adapters is None:
                continue  # it has ended since the engine was asked
            is_hidden = not _sees(principal, adapters)
            ids = "+".join(f"{each.name}@{each.version}" for each in adapters)
            named = "" if is_hidden else ids
            entry = entries[named, is_hidden]
            entry.adapter_id, entry.hidden = named, is_hidden
            setattr(entry, stage, getattr(entry, stage) + 1)

    def rank(entry: engine_pb2.AdapterRows) -> tuple[int, bool, str]:
        return -(entry.prefill + entry.decode + entry.waiting), entry.hidden, entry.adapter_id

    return sorted(entries.values(), key=rank)


def _sees(principal: Principal, adapters: Sequence[Record]) -> bool:
    """Whether all adapters of a request exist for a principal; the base if it may be used."""
    if not adapters:
        return principal.base
    return all(principal.sees(record.labels) for record in adapters)
