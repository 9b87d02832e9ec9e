"""Long lists in replies are made in slices, between which other calls go on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from loraplex.v1 import adapter_pb2
from loraplex_adapters.store import Store
from loraplex_adapters.store.index.records import Page
from loraplex_server.rpc.messages import describe
from loraplex_server.rpc.messages.slices import SLICE
from rpc.harness import Running, running
from rpc.turns import Turns

pytestmark = pytest.mark.fault("event-loop-held")

MANY = 300


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as server:
        yield server


def noted(turns: list[Turns], work: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which notes each call in the current turn."""

    def call(*arguments: Any) -> Any:
        for each in turns:
            each.note()
        return work(*arguments)

    return call


async def test_a_page_of_adapters_is_described_in_slices(
    up: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await up.register("a")
    turns: list[Turns] = []
    read = Store.page

    def many(store: Store, *arguments: Any) -> Page:
        page = read(store, *arguments)
        records = tuple(replace(page.records[0], version=i + 1) for i in range(MANY))
        return replace(page, records=records)

    monkeypatch.setattr(Store, "page", many)
    monkeypatch.setattr(Store, "versions", lambda store, name, *seen: many(store).records)
    monkeypatch.setattr(describe, "adapter", noted(turns, describe.adapter))
    turns.append(Turns())
    for reply in (
        await up.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=1000)),
        await up.adapters.ListAdapterVersions(adapter_pb2.ListAdapterVersionsRequest(name="a")),
    ):
        assert [each.version for each in reply.adapters] == list(range(1, MANY + 1))
    assert turns[0].stop() <= SLICE
    assert turns[0].done.total() == 2 * MANY
