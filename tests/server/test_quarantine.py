"""The keeper of quarantines: what one server writes into the store that others share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from loraplex_server.metrics import Metrics
from loraplex_server.registry.quarantine import MOST_WRITTEN, QuarantineKeeper
from prometheus_client import CollectorRegistry


@pytest.mark.fault("adapter-kills-engines")
async def test_a_server_that_finds_fault_with_many_adapters_refuses_the_rest_alone() -> None:
    stored: dict[str, Any] = {}
    released: list[str] = []

    async def read() -> dict[str, Any]:
        return dict(stored)

    async def write(digest: str, reason: str) -> bool:
        stored[digest] = reason
        return True

    digests = [f"sha256:{number}" for number in range(MOST_WRITTEN + 4)]
    quarantined = dict.fromkeys(digests, "it ended the engine")
    engine: Any = SimpleNamespace(quarantined=quarantined, release=released.append)
    keeper = QuarantineKeeper(read, write, engine, Metrics(CollectorRegistry(), "0"))
    for _ in range(2):
        await keeper._synchronise()
        assert list(stored) == digests[:MOST_WRITTEN]
        assert not released  # what is not in the store was not released by an operator
    del stored[digests[0]]
    await keeper._synchronise()
    assert released == [digests[0]]
